//! A ring of 16-byte entries in memory: where it is, its two pointers, and whether it runs.

use lychgate_types::PhysAddr;

use crate::spec::registers::{RING_ENTRY_BYTES, RING_LEN_MIN, RING_POINTER, RingBase};

/// Command buffer, event log or PPR log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    base: RingBase,
    /// Byte offset as written; [`Ring::offset`] gives it inside the ring.
    pub(super) head: u64,
    /// See [`Ring::head`].
    pub(super) tail: u64,
    /// Hardware uses the ring.
    pub(super) running: bool,
    enabled: bool,
}

impl Ring {
    pub(super) fn new() -> Self {
        Self {
            base: RingBase::default().with_ring_len(RING_LEN_MIN),
            head: 0,
            tail: 0,
            running: false,
            enabled: false,
        }
    }

    pub(super) fn base(&self) -> RingBase {
        self.base
    }

    /// Its size in bytes; 0 for a reserved length, with which it never runs.
    pub(super) fn bytes(&self) -> u64 {
        self.base.bytes().unwrap_or(0)
    }

    /// A write of the base register: ignored while the ring runs, else it zeroes both pointers.
    pub(super) fn write_base(&mut self, value: u64) {
        if !self.running {
            self.base = RingBase([value & RingBase::MASK]);
            self.head = 0;
            self.tail = 0;
        }
    }

    pub(super) fn write_head(&mut self, value: u64) {
        self.head = value & RING_POINTER;
    }

    pub(super) fn write_tail(&mut self, value: u64) {
        self.tail = value & RING_POINTER;
    }

    /// Follows the enable bits: a ring starts when they become set and `may_start`, and stops when
    /// one clears. One that stopped by itself stays so until then. A reserved length never starts.
    pub(super) fn follow(&mut self, enabled: bool, may_start: bool) {
        if !enabled {
            self.running = false;
        } else if !self.enabled {
            self.running = may_start && self.base.bytes().is_some();
        }
        self.enabled = enabled;
    }

    /// The entry at `pointer` in memory. Pointers beyond the end, which the specification leaves
    /// undefined, wrap.
    pub(super) fn entry(&self, pointer: u64) -> PhysAddr {
        self.base.base().wrapping_add(self.offset(pointer))
    }

    /// The pointer after `pointer`.
    pub(super) fn next(&self, pointer: u64) -> u64 {
        self.offset(pointer + RING_ENTRY_BYTES)
    }

    /// `pointer` inside the ring.
    pub(super) fn offset(&self, pointer: u64) -> u64 {
        // The size is a power of two.
        self.base.bytes().map_or(0, |bytes| pointer & (bytes - 1))
    }
}
