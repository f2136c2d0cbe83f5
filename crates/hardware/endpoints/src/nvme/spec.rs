//! Where a bit lies: registers, submission and completion queue entries, opcodes and status codes
//! of NVM Express 1.4.

/// Registers as 32-bit words of BAR 0 (3.1).
pub(crate) mod register {
    pub(crate) const CAP_LOW: usize = 0;
    pub(crate) const CAP_HIGH: usize = 1;
    pub(crate) const VS: usize = 2;
    pub(crate) const CC: usize = 0x14 / 4;
    pub(crate) const CSTS: usize = 0x1c / 4;
    pub(crate) const AQA: usize = 0x24 / 4;
    pub(crate) const ASQ: usize = 0x28 / 4;
    pub(crate) const ACQ: usize = 0x30 / 4;
    /// End of the words that are looked after one by one; beyond, up to the doorbells, all are 0.
    pub(crate) const END: usize = 0x80 / 4;
    /// Submission queue 0 tail doorbell; completion queue 0 head doorbell is the next word, then
    /// queue 1's pair (3.1.24, 3.1.25, with CAP.DSTRD = 0).
    pub(crate) const DOORBELLS: usize = 0x1000 / 4;
    /// End of the page of doorbells.
    pub(crate) const DOORBELLS_END: usize = 0x2000 / 4;

    /// The registers that software owns; the rest is read-only or reads as 0.
    pub(crate) const fn is_writable(word: usize) -> bool {
        matches!(word, CC | AQA) || word >= ASQ && word < ACQ + 2
    }
}

/// Version 1.4.0 (3.1.2).
pub(crate) const VERSION: u32 = 0x0001_0400;

/// Largest CC.MPS: memory pages of 64 KiB (CAP.MPSMAX).
pub(crate) const MAX_MPS: u32 = 4;

/// CAP (3.1.1): MQES, contiguous queues required, 10 s time-out, NVM command set, pages of 4 KiB
/// to 64 KiB.
pub(crate) const fn capabilities(max_queue_entries: u32) -> u64 {
    const CQR: u64 = 1 << 16;
    const TIMEOUT_500_MS: u64 = 20 << 24;
    const CSS_NVM: u64 = 1 << 37;
    const MPSMAX: u64 = (MAX_MPS as u64) << 52;
    (max_queue_entries as u64 - 1) | CQR | TIMEOUT_500_MS | CSS_NVM | MPSMAX
}

/// Controller Configuration (3.1.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Configuration(pub(crate) u32);

impl Configuration {
    pub(crate) const fn enabled(self) -> bool {
        self.0 & 1 != 0
    }
    pub(crate) const fn command_set(self) -> u32 {
        self.0 >> 4 & 7
    }
    pub(crate) const fn memory_page_size(self) -> u32 {
        self.0 >> 7 & 0xf
    }
    pub(crate) const fn arbitration(self) -> u32 {
        self.0 >> 11 & 7
    }
    pub(crate) const fn shutdown(self) -> u32 {
        self.0 >> 14 & 3
    }
    pub(crate) const fn submission_entry_size(self) -> u32 {
        self.0 >> 16 & 0xf
    }
    pub(crate) const fn completion_entry_size(self) -> u32 {
        self.0 >> 20 & 0xf
    }
}

/// Controller Status (3.1.6).
pub(crate) mod status_register {
    pub(crate) const READY: u32 = 1;
    pub(crate) const FATAL: u32 = 1 << 1;
    pub(crate) const SHUTDOWN_COMPLETE: u32 = 2 << 2;
}

/// Bytes of a submission queue entry.
pub(crate) const SQE_SIZE: usize = 64;
/// Bytes of a completion queue entry.
pub(crate) const CQE_SIZE: usize = 16;
/// Log2 of [`SQE_SIZE`], as CC.IOSQES and Identify spell it.
pub(crate) const SQE_SIZE_LOG2: u32 = 6;
/// Log2 of [`CQE_SIZE`].
pub(crate) const CQE_SIZE_LOG2: u32 = 4;

/// A submission queue entry (4.2), copied out of the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Sqe([u32; SQE_SIZE / 4]);

impl Sqe {
    pub(crate) fn new(bytes: &[u8; SQE_SIZE]) -> Self {
        let mut dwords = [0; SQE_SIZE / 4];
        for (dword, bytes) in dwords.iter_mut().zip(bytes.as_chunks().0) {
            *dword = u32::from_le_bytes(*bytes);
        }
        Self(dwords)
    }
    pub(crate) const fn opcode(&self) -> u8 {
        self.0[0].to_le_bytes()[0]
    }
    pub(crate) const fn fuse(&self) -> u32 {
        self.0[0] >> 8 & 3
    }
    /// PRP or SGL for Data Transfer: 0 is PRP.
    pub(crate) const fn psdt(&self) -> u32 {
        self.0[0] >> 14 & 3
    }
    pub(crate) const fn cid(&self) -> u16 {
        high(self.0[0])
    }
    pub(crate) const fn nsid(&self) -> u32 {
        self.0[1]
    }
    pub(crate) const fn prp1(&self) -> u64 {
        self.0[6] as u64 | (self.0[7] as u64) << 32
    }
    pub(crate) const fn prp2(&self) -> u64 {
        self.0[8] as u64 | (self.0[9] as u64) << 32
    }
    pub(crate) const fn dw10(&self) -> u32 {
        self.0[10]
    }
    pub(crate) const fn dw11(&self) -> u32 {
        self.0[11]
    }
    pub(crate) const fn dw12(&self) -> u32 {
        self.0[12]
    }
    pub(crate) const fn dw13(&self) -> u32 {
        self.0[13]
    }
    /// Starting LBA of an I/O command.
    pub(crate) const fn slba(&self) -> u64 {
        self.0[10] as u64 | (self.0[11] as u64) << 32
    }
    /// Number of logical blocks of an I/O command, 1 to 65536.
    pub(crate) const fn blocks(&self) -> u32 {
        (self.0[12] & 0xffff) + 1
    }
    /// Force Unit Access.
    pub(crate) const fn fua(&self) -> bool {
        self.0[12] & 1 << 30 != 0
    }
}

/// Bits 15:0.
pub(crate) const fn low(dword: u32) -> u16 {
    (dword & 0xffff) as u16
}

/// Bits 31:16.
pub(crate) const fn high(dword: u32) -> u16 {
    (dword >> 16) as u16
}

/// A completion queue entry (4.6), without its phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Completion {
    /// Dword 0, specific to the command.
    pub(crate) result: u32,
    /// Where the controller stands in the submission queue.
    pub(crate) sq_head: u16,
    pub(crate) sqid: u16,
    pub(crate) cid: u16,
    pub(crate) status: Status,
}

impl Completion {
    pub(crate) fn encode(&self, phase: bool) -> [u8; CQE_SIZE] {
        let dwords = [
            self.result,
            0,
            u32::from(self.sq_head) | u32::from(self.sqid) << 16,
            u32::from(self.cid) | u32::from(phase) << 16 | u32::from(self.status.0) << 17,
        ];
        let mut bytes = [0; CQE_SIZE];
        for (to, dword) in bytes.as_chunks_mut().0.iter_mut().zip(dwords) {
            *to = dword.to_le_bytes();
        }
        bytes
    }
}

/// Admin opcodes (5).
pub(crate) mod admin {
    pub(crate) const DELETE_SQ: u8 = 0x00;
    pub(crate) const CREATE_SQ: u8 = 0x01;
    pub(crate) const GET_LOG_PAGE: u8 = 0x02;
    pub(crate) const DELETE_CQ: u8 = 0x04;
    pub(crate) const CREATE_CQ: u8 = 0x05;
    pub(crate) const IDENTIFY: u8 = 0x06;
    pub(crate) const ABORT: u8 = 0x08;
    pub(crate) const SET_FEATURES: u8 = 0x09;
    pub(crate) const GET_FEATURES: u8 = 0x0a;
    pub(crate) const ASYNC_EVENT: u8 = 0x0c;

    pub(crate) const ALL: [(u8, &str); 10] = [
        (DELETE_SQ, "DELETE SQ"),
        (CREATE_SQ, "CREATE SQ"),
        (GET_LOG_PAGE, "GET LOG PAGE"),
        (DELETE_CQ, "DELETE CQ"),
        (CREATE_CQ, "CREATE CQ"),
        (IDENTIFY, "IDENTIFY"),
        (ABORT, "ABORT"),
        (SET_FEATURES, "SET FEATURES"),
        (GET_FEATURES, "GET FEATURES"),
        (ASYNC_EVENT, "ASYNC EVENT REQUEST"),
    ];
}

/// Opcodes of the NVM command set (6).
pub(crate) mod nvm {
    pub(crate) const FLUSH: u8 = 0x00;
    pub(crate) const WRITE: u8 = 0x01;
    pub(crate) const READ: u8 = 0x02;
    pub(crate) const COMPARE: u8 = 0x05;
    pub(crate) const WRITE_ZEROES: u8 = 0x08;
    pub(crate) const DSM: u8 = 0x09;

    pub(crate) const ALL: [(u8, &str); 6] = [
        (FLUSH, "FLUSH"),
        (WRITE, "WRITE"),
        (READ, "READ"),
        (COMPARE, "COMPARE"),
        (WRITE_ZEROES, "WRITE ZEROES"),
        (DSM, "DSM"),
    ];

    /// The commands that change logical blocks.
    pub(crate) const fn writes(opcode: u8) -> bool {
        matches!(opcode, WRITE | WRITE_ZEROES | DSM)
    }

    /// The commands that name a range of logical blocks in dwords 10 to 12.
    pub(crate) const fn has_range(opcode: u8) -> bool {
        matches!(opcode, WRITE | READ | COMPARE | WRITE_ZEROES)
    }
}

/// The status field of a completion (4.6.1): status code 7:0, type 10:8, More 13, Do Not Retry 14.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Status(u16);

const DO_NOT_RETRY: u16 = 1 << 14;

impl Status {
    pub(crate) const SUCCESS: Self = Self(0);
    pub(crate) const INVALID_OPCODE: Self = Self::permanent(0x01);
    pub(crate) const INVALID_FIELD: Self = Self::permanent(0x02);
    pub(crate) const CID_CONFLICT: Self = Self::permanent(0x03);
    /// A transfer was aborted: what an IOMMU fault looks like to the driver.
    pub(crate) const DATA_TRANSFER_ERROR: Self = Self(0x04);
    pub(crate) const ABORT_REQUESTED: Self = Self(0x07);
    pub(crate) const INVALID_NAMESPACE: Self = Self::permanent(0x0b);
    pub(crate) const SEQUENCE_ERROR: Self = Self::permanent(0x0c);
    pub(crate) const INVALID_PRP_OFFSET: Self = Self::permanent(0x13);
    pub(crate) const LBA_OUT_OF_RANGE: Self = Self::permanent(0x80);
    pub(crate) const INVALID_CQ: Self = Self::permanent(0x100);
    pub(crate) const INVALID_QID: Self = Self::permanent(0x101);
    pub(crate) const INVALID_QUEUE_SIZE: Self = Self::permanent(0x102);
    pub(crate) const ASYNC_EVENT_LIMIT: Self = Self::permanent(0x105);
    pub(crate) const INVALID_VECTOR: Self = Self::permanent(0x108);
    pub(crate) const INVALID_LOG_PAGE: Self = Self::permanent(0x109);
    pub(crate) const INVALID_QUEUE_DELETION: Self = Self::permanent(0x10c);
    pub(crate) const FEATURE_NOT_SAVEABLE: Self = Self::permanent(0x10d);
    pub(crate) const READ_ONLY: Self = Self::permanent(0x182);
    pub(crate) const WRITE_FAULT: Self = Self(0x280);
    pub(crate) const UNRECOVERED_READ: Self = Self(0x281);
    pub(crate) const COMPARE_FAILURE: Self = Self::permanent(0x285);

    const fn permanent(code: u16) -> Self {
        Self(code | DO_NOT_RETRY)
    }

    /// Whether the medium, and not the command, is at fault: status code type 2 without Compare.
    pub(crate) const fn is_media_error(self) -> bool {
        matches!(self.0 & 0x7ff, 0x280 | 0x281)
    }

    /// Bits 14:0 of the status field.
    pub(crate) const fn bits(self) -> u16 {
        self.0
    }
}
