//! Commands (AMD 48882 2.4): 16 bytes, the opcode in bits 63:60 of word 0.

use super::fields::{fields, mask};
use super::size::Block;
use lychgate_types::{Pasid, PhysAddr, RequesterId};

/// COMPLETION_WAIT (2.4.1).
pub const COMPLETION_WAIT: u64 = 0x1;
/// INVALIDATE_DEVTAB_ENTRY (2.4.2).
pub const INVALIDATE_DEVTAB_ENTRY: u64 = 0x2;
/// INVALIDATE_IOMMU_PAGES (2.4.3).
pub const INVALIDATE_IOMMU_PAGES: u64 = 0x3;
/// INVALIDATE_IOTLB_PAGES (2.4.4).
pub const INVALIDATE_IOTLB_PAGES: u64 = 0x4;
/// INVALIDATE_INTERRUPT_TABLE (2.4.5).
pub const INVALIDATE_INTERRUPT_TABLE: u64 = 0x5;
/// PREFETCH_IOMMU_PAGES (2.4.6), PreFSup.
pub const PREFETCH_IOMMU_PAGES: u64 = 0x6;
/// COMPLETE_PPR_REQUEST (2.4.7), PPRSup.
pub const COMPLETE_PPR_REQUEST: u64 = 0x7;
/// INVALIDATE_IOMMU_ALL (2.4.8), IASup.
pub const INVALIDATE_IOMMU_ALL: u64 = 0x8;
/// INSERT_GUEST_EVENT (2.4.9), vIommuSup.
pub const INSERT_GUEST_EVENT: u64 = 0x9;
/// RESET_VMMIO (2.4.10), vIommuSup.
pub const RESET_VMMIO: u64 = 0xa;

/// PRG response code of COMPLETE_PPR_REQUEST: success.
pub const PRG_SUCCESS: u64 = 0x0;
/// PRG response code: invalid request.
pub const PRG_INVALID: u64 = 0x1;
/// PRG response code: failure. 2 to Eh are reserved.
pub const PRG_FAILURE: u64 = 0xf;

/// One command: two words.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Command(pub [u64; 2]);

const STORE_ADDRESS: u64 = mask(51, 3);
const PAGE_ADDRESS: u64 = mask(63, 12);

fields! { Command {
    /// Opcode.
    opcode, with_opcode: 0[63:60];
    /// COMPLETION_WAIT S: store [`Self::store_data`] to [`Self::store_address`].
    wait_s, with_wait_s: 0[0];
    /// COMPLETION_WAIT I: set Status.ComWaitInt.
    wait_i, with_wait_i: 0[1];
    /// COMPLETION_WAIT F: younger commands start only after this one has finished.
    wait_f, with_wait_f: 0[2];
    /// COMPLETION_WAIT store data.
    store_data, with_store_data: 1[63:0];
    /// DeviceID, in the commands that have one.
    device_id, with_device_id: 0[15:0];
    /// PASID of INVALIDATE_IOMMU_PAGES.
    pages_pasid, with_pages_pasid: 0[19:0];
    /// PASID of COMPLETE_PPR_REQUEST and PREFETCH_IOMMU_PAGES.
    ppr_pasid, with_ppr_pasid: 0[51:32];
    /// DomainID of INVALIDATE_IOMMU_PAGES.
    domain_id, with_domain_id: 0[47:32];
    /// MaxPend of INVALIDATE_IOTLB_PAGES; page count of PREFETCH_IOMMU_PAGES.
    count, with_count: 0[31:24];
    /// QueueID of INVALIDATE_IOTLB_PAGES.
    queue_id, with_queue_id: 0[47:32];
    /// S: the address encodes a size ([`super::size`]).
    s, with_s: 1[0];
    /// PDE of INVALIDATE_IOMMU_PAGES: directory entries go too.
    pde, with_pde: 1[1];
    /// GN: guest addresses, tagged with the PASID.
    gn, with_gn: 1[2];
    /// Inval of PREFETCH_IOMMU_PAGES: invalidate first.
    inval, with_inval: 1[4];
    /// Type of INVALIDATE_IOTLB_PAGES (InvIotlbTypeSup).
    iotlb_type, with_iotlb_type: 1[5:4];
    /// PRG index of COMPLETE_PPR_REQUEST, 9 bits.
    prg_index, with_prg_index: 1[40:32];
    /// PRG response code of COMPLETE_PPR_REQUEST.
    prg_code, with_prg_code: 1[47:44];
} }

impl Command {
    /// COMPLETION_WAIT that stores `data` to the SPA `at`, a multiple of 8; `interrupt` also sets
    /// ComWaitInt.
    pub const fn completion_wait(at: PhysAddr, data: u64, interrupt: bool) -> Self {
        Self([at.get() & STORE_ADDRESS, data])
            .with_opcode(COMPLETION_WAIT)
            .with_wait_s(true)
            .with_wait_i(interrupt)
    }

    /// INVALIDATE_DEVTAB_ENTRY.
    pub const fn invalidate_devtab_entry(device: RequesterId) -> Self {
        Self::for_device(INVALIDATE_DEVTAB_ENTRY, device)
    }

    /// INVALIDATE_IOMMU_PAGES of host translations (GN = 0); `pde`: directory entries too.
    pub const fn invalidate_iommu_pages(domain_id: u16, block: Block, pde: bool) -> Self {
        Self([0, 0])
            .with_opcode(INVALIDATE_IOMMU_PAGES)
            .with_domain_id(domain_id as u64)
            .with_block(block)
            .with_pde(pde)
    }

    /// INVALIDATE_IOMMU_PAGES of guest translations (GN = 1) of one PASID.
    pub const fn invalidate_iommu_guest_pages(
        domain_id: u16,
        pasid: Pasid,
        block: Block,
        pde: bool,
    ) -> Self {
        Self::invalidate_iommu_pages(domain_id, block, pde)
            .with_pages_pasid(pasid.get() as u64)
            .with_gn(true)
    }

    /// INVALIDATE_IOTLB_PAGES without PASID; at most `max_pending` are outstanding on the queue
    /// that `queue_id` names.
    pub const fn invalidate_iotlb_pages(
        device: RequesterId,
        queue_id: u16,
        max_pending: u8,
        block: Block,
    ) -> Self {
        Self::for_device(INVALIDATE_IOTLB_PAGES, device)
            .with_queue_id(queue_id as u64)
            .with_count(max_pending as u64)
            .with_block(block)
    }

    /// INVALIDATE_INTERRUPT_TABLE.
    pub const fn invalidate_interrupt_table(device: RequesterId) -> Self {
        Self::for_device(INVALIDATE_INTERRUPT_TABLE, device)
    }

    /// INVALIDATE_IOMMU_ALL.
    pub const fn invalidate_iommu_all() -> Self {
        Self([0, 0]).with_opcode(INVALIDATE_IOMMU_ALL)
    }

    /// Store address of COMPLETION_WAIT: SPA, bits 51:3.
    pub const fn store_address(self) -> PhysAddr {
        PhysAddr::new(self.0[0] & STORE_ADDRESS)
    }

    /// The addresses that the address field and S name.
    pub const fn block(self) -> Block {
        Block::decode(self.address(), self.s())
    }

    /// `self` with the address field and S of `block`.
    #[must_use]
    pub const fn with_block(mut self, block: Block) -> Self {
        let (address, s) = block.encode();
        self.0[1] = self.0[1] & !PAGE_ADDRESS | address;
        self.with_s(s)
    }

    /// Address field, bits 63:12 in place.
    pub const fn address(self) -> u64 {
        self.0[1] & PAGE_ADDRESS
    }

    /// PASID of INVALIDATE_IOTLB_PAGES: 15:8 in bits 23:16, 7:0 in 55:48, 19:16 in 59:56.
    pub const fn iotlb_pasid(self) -> u64 {
        let word = self.0[0];
        (word >> 56 & 0xf) << 16 | (word >> 16 & 0xff) << 8 | word >> 48 & 0xff
    }

    /// `self` with the PASID of INVALIDATE_IOTLB_PAGES, and GN.
    #[must_use]
    pub const fn with_iotlb_pasid(mut self, pasid: Pasid) -> Self {
        let pasid = pasid.get() as u64;
        self.0[0] = self.0[0] & !(0xff << 16 | 0xfff << 48)
            | (pasid >> 8 & 0xff) << 16
            | (pasid & 0xff) << 48
            | (pasid >> 16 & 0xf) << 56;
        self.with_gn(true)
    }

    /// Bits that must be 0 in a command with this opcode, by word; `None` for an opcode that no
    /// revision defines.
    pub const fn reserved(opcode: u64) -> Option<[u64; 2]> {
        let used = match opcode {
            COMPLETION_WAIT => [mask(51, 0), u64::MAX],
            INVALIDATE_DEVTAB_ENTRY | INVALIDATE_INTERRUPT_TABLE => [mask(15, 0), 0],
            INVALIDATE_IOMMU_PAGES => [mask(19, 0) | mask(47, 32), PAGE_ADDRESS | mask(2, 0)],
            INVALIDATE_IOTLB_PAGES => [mask(59, 0), PAGE_ADDRESS | mask(2, 2) | mask(0, 0)],
            PREFETCH_IOMMU_PAGES => [
                mask(15, 0) | mask(31, 24) | mask(51, 32),
                PAGE_ADDRESS | mask(4, 4) | mask(2, 2) | mask(0, 0),
            ],
            COMPLETE_PPR_REQUEST => {
                [mask(15, 0) | mask(51, 32), mask(47, 44) | mask(40, 32) | mask(2, 2)]
            }
            INVALIDATE_IOMMU_ALL => [0, 0],
            INSERT_GUEST_EVENT => [mask(59, 0), u64::MAX],
            RESET_VMMIO => [mask(15, 0) | mask(27, 27) | mask(31, 31), 0],
            _ => return None,
        };
        Some([!(used[0] | mask(63, 60)), !used[1]])
    }

    const fn for_device(opcode: u64, device: RequesterId) -> Self {
        Self([0, 0]).with_opcode(opcode).with_device_id(device.get() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_lie_where_the_figures_say() {
        let wait = Command::completion_wait(PhysAddr::new(0x1_2345_6788), 7, true);
        assert_eq!(wait.0, [0x1000_0001_2345_678b, 7]);
        let pages = Command::invalidate_iommu_pages(0xbeef, Block::ALL, true);
        assert_eq!(pages.0, [0x3000_beef_0000_0000, 0x7fff_ffff_ffff_f003]);
        let iotlb = Command::invalidate_iotlb_pages(
            RequesterId::new(0x0108),
            0x0108,
            32,
            Block { start: 0x5000, order: 12 },
        );
        assert_eq!(iotlb.0, [0x4000_0108_2000_0108, 0x5000]);
    }

    #[test]
    fn the_iotlb_pasid_is_split_in_three() {
        let pasid = Pasid::new(0xa_bcde).unwrap();
        let command = Command::default().with_iotlb_pasid(pasid);
        assert_eq!(command.0[0], 0x0ade_0000_00bc_0000);
        assert_eq!(command.iotlb_pasid(), 0xa_bcde);
        assert!(command.gn());
    }

    #[test]
    fn no_constructor_sets_a_reserved_bit() {
        let device = RequesterId::new(0xffff);
        for command in [
            Command::completion_wait(PhysAddr::new(u64::MAX), u64::MAX, true),
            Command::invalidate_devtab_entry(device),
            Command::invalidate_iommu_pages(0xffff, Block::ALL, true),
            Command::invalidate_iommu_guest_pages(
                0xffff,
                Pasid::new(0xf_ffff).unwrap(),
                Block::ALL,
                true,
            ),
            Command::invalidate_iotlb_pages(device, 0xffff, 0xff, Block::ALL)
                .with_iotlb_pasid(Pasid::new(0xf_ffff).unwrap()),
            Command::invalidate_interrupt_table(device),
            Command::invalidate_iommu_all(),
        ] {
            let reserved = Command::reserved(command.opcode()).unwrap();
            assert_eq!(command.0[0] & reserved[0], 0, "{command:x?}");
            assert_eq!(command.0[1] & reserved[1], 0, "{command:x?}");
        }
        assert_eq!(Command::reserved(0), None);
        assert_eq!(Command::reserved(0xb), None);
    }
}
