//! No-IOMMU mode, which is not there (`CONFIG_VFIO_NOIOMMU`).

use lychgate_types::Errno;

use crate::abi::iommufd as abi;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Result, refuse};

impl Context {
    /// `IOMMU_IOAS_NOIOMMU_GET_PA`: every machine here has an IOMMU.
    pub(crate) fn ioas_noiommu_get_pa(
        &self,
        _: &mut Command<'_, abi::IoasNoiommuGetPa>,
    ) -> Result<()> {
        refuse(Errno::EOPNOTSUPP, "there is no no-IOMMU mode")
    }
}
