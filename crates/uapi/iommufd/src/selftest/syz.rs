//! IOVAs by the number of an area, for fuzzers that cannot know where areas are
//! (`iommufd_test_syz_conv_iova`).

use super::abi;
use crate::abi::iommufd::IoasCopy;
use crate::access::Access;
use crate::context::Context;
use crate::io_pagetable::IoPageTable;

impl Context {
    /// Takes the flag of such an IOVA from a copy, and puts the IOVA that is meant in its place; on a
    /// machine without a mock IOMMU nothing.
    pub(crate) fn convert_copy(&self, copy: &mut IoasCopy) {
        if self.selftest.is_none() || copy.flags & abi::ACCESS_SYZ == 0 {
            return;
        }
        copy.flags &= !abi::ACCESS_SYZ;
        if let Ok(ioas) = self.lock().objects.ioas(copy.src_ioas_id) {
            copy.src_iova = convert(&ioas.table, copy.src_iova);
        }
    }
}

/// The IOVA that is meant by one in the IOAS of an access.
pub(super) fn convert_for(access: &Access, iova: u64) -> u64 {
    let state = access.context().lock();
    let ioas = state.objects.access(access.id()).and_then(|access| access.ioas());
    match ioas.and_then(|ioas| state.objects.ioas(ioas)) {
        Ok(ioas) => convert(&ioas.table, iova),
        Err(_) => 0,
    }
}

/// Bits 31:0 are the number of an area, bits 63:32 an offset into it; 0 for an area that is not there.
fn convert(table: &IoPageTable, iova: u64) -> u64 {
    let (number, offset) = (iova & 0xffff_ffff, iova >> 32);
    let area = usize::try_from(number).ok().and_then(|number| table.area_by_number(number));
    area.map_or(0, |first| first.wrapping_add(offset))
}
