//! Where what lies in the machine's physical address space, and in which order frames lie.

use lychgate_types::PhysAddr;

/// First address of the machine's own RAM, which holds what hardware reads: tables and queues.
pub(crate) const RAM_BASE: u64 = 1 << 32;

/// First address of the frames of client pages.
pub(crate) const FRAMES_BASE: u64 = 1 << 40;

/// First address behind all frames: where AMD's and x86's page tables end.
const FRAMES_END: u64 = 1 << 52;

/// Bytes of a chunk: frames of one backing that lie together, aligned.
pub(crate) const CHUNK: u64 = 1 << 30;

/// How many chunks there can be.
pub(crate) const MAX_CHUNKS: usize = ((FRAMES_END - FRAMES_BASE) / CHUNK) as usize;

/// Bytes of a page and of its frame.
pub(crate) const PAGE: u64 = lychgate_iommufd::PAGE_SIZE;

const PAGE_BITS: u32 = 18;
const PAGE_MASK: u32 = (1 << PAGE_BITS) - 1;
const _: () = assert!(CHUNK / PAGE == 1 << PAGE_BITS);

/// How the frames of consecutive pages lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FrameOrder {
    /// In a row, aligned as the pages are, within each GiB: a machine that was just started. Large
    /// pages happen as often as they can.
    #[default]
    Contiguous,
    /// Scattered page by page, as `seed` decides: a machine that has run for long. No large page
    /// ever happens.
    Fragmented {
        /// Decides where each page lies.
        seed: u64,
    },
}

impl FrameOrder {
    /// The frame, counted in its chunk, of a page of the chunk's backing.
    fn frame_of(self, chunk: u32, page: u32) -> u32 {
        match self {
            Self::Contiguous => page,
            Self::Fragmented { seed } => Shuffle::new(seed, chunk).apply(page),
        }
    }

    /// The inverse of [`FrameOrder::frame_of`].
    fn page_of(self, chunk: u32, frame: u32) -> u32 {
        match self {
            Self::Contiguous => frame,
            Self::Fragmented { seed } => Shuffle::new(seed, chunk).undo(frame),
        }
    }

    /// How many bytes from `offset` of a chunk's backing have frames in a row.
    pub(crate) fn run_len(self, offset: u64) -> u64 {
        match self {
            Self::Contiguous => CHUNK - offset % CHUNK,
            Self::Fragmented { .. } => PAGE - offset % PAGE,
        }
    }

    /// The physical address of byte `offset`, below [`CHUNK`], of a chunk's backing.
    pub(crate) fn address(self, chunk: u32, offset: u64) -> PhysAddr {
        let frame = self.frame_of(chunk, page_number(offset));
        let base = FRAMES_BASE + u64::from(chunk) * CHUNK;
        PhysAddr::new(base + u64::from(frame) * PAGE + offset % PAGE)
    }

    /// The chunk at a physical address, and the byte of its backing; `None` outside the frames.
    pub(crate) fn locate(self, at: PhysAddr) -> Option<(u32, u64)> {
        let offset = at.get().checked_sub(FRAMES_BASE).filter(|_| at.get() < FRAMES_END)?;
        let chunk = u32::try_from(offset / CHUNK).ok()?;
        let page = self.page_of(chunk, page_number(offset));
        Some((chunk, u64::from(page) * PAGE + offset % PAGE))
    }
}

/// The page in its chunk.
pub(crate) fn page_number(offset: u64) -> u32 {
    u32::try_from(offset % CHUNK / PAGE).unwrap_or(0)
}

/// A permutation of the pages of a chunk: two affine maps with a fold of the upper half onto the
/// lower one between them, each its own kind of invertible.
struct Shuffle {
    factors: [u32; 2],
    offsets: [u32; 2],
}

impl Shuffle {
    fn new(seed: u64, chunk: u32) -> Self {
        let mut state = seed ^ u64::from(chunk).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            u32::try_from((z ^ (z >> 31)) & u64::from(PAGE_MASK)).unwrap_or(0)
        };
        // Bits 0 and 2: odd, so invertible, and neither 1 nor -1, which would keep pages together.
        Self { factors: [next() & !2 | 5, next() & !2 | 5], offsets: [next(), next()] }
    }

    fn apply(&self, page: u32) -> u32 {
        let x = page.wrapping_mul(self.factors[0]).wrapping_add(self.offsets[0]) & PAGE_MASK;
        let x = x ^ (x >> (PAGE_BITS / 2));
        x.wrapping_mul(self.factors[1]).wrapping_add(self.offsets[1]) & PAGE_MASK
    }

    fn undo(&self, frame: u32) -> u32 {
        let x =
            frame.wrapping_sub(self.offsets[1]).wrapping_mul(inverse(self.factors[1])) & PAGE_MASK;
        let x = x ^ (x >> (PAGE_BITS / 2));
        x.wrapping_sub(self.offsets[0]).wrapping_mul(inverse(self.factors[0])) & PAGE_MASK
    }
}

/// The inverse of an odd number modulo 2^32, by Newton's iteration.
fn inverse(odd: u32) -> u32 {
    let mut x = odd;
    for _ in 0..4 {
        x = x.wrapping_mul(2_u32.wrapping_sub(odd.wrapping_mul(x)));
    }
    x
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_scattered_chunk_uses_each_frame_once_and_keeps_no_two_pages_together_often() {
        let order = FrameOrder::Fragmented { seed: 42 };
        let mut seen = vec![false; 1 << PAGE_BITS];
        let mut together = 0;
        let mut before = None;
        for page in 0..1 << PAGE_BITS {
            let frame = order.frame_of(3, page);
            assert!(!std::mem::replace(&mut seen[frame as usize], true));
            together += u32::from(before == frame.checked_sub(1));
            before = Some(frame);
        }
        assert!(together < (1 << PAGE_BITS) / 1000, "{together}");
    }

    proptest! {
        #[test]
        fn an_address_leads_back_to_its_position(
            seed in prop::option::of(any::<u64>()),
            chunk in 0..u32::try_from(MAX_CHUNKS).unwrap(),
            offset in 0..CHUNK,
        ) {
            let order = seed.map_or(FrameOrder::Contiguous, |seed| FrameOrder::Fragmented { seed });
            let at = order.address(chunk, offset);
            prop_assert_eq!(order.locate(at), Some((chunk, offset)));
            prop_assert_eq!(at.get() % PAGE, offset % PAGE);
        }
    }

    #[test]
    fn nothing_lies_outside_the_frames() {
        for at in [0, RAM_BASE, FRAMES_BASE - 1, FRAMES_END, u64::MAX] {
            assert_eq!(FrameOrder::Contiguous.locate(PhysAddr::new(at)), None);
        }
    }
}
