//! A bitmap in a caller's memory, one bit for each page of a range of IOVA (`struct iova_bitmap`).

use crate::abi::iommufd as abi;
use crate::client::Client;
use crate::command::{offset, read, write};
use crate::error::Result;

/// Bytes of the bitmap that are gathered before they go to the caller.
const WINDOW: usize = 4096;

/// A bitmap of a caller, in which bits are set and none is cleared. Bit n of it, bit n % 8 of byte
/// n / 8, stands for page n of the range. It need not be aligned.
pub(super) struct UserBitmap<'a> {
    client: &'a dyn Client,
    /// Address of its first byte.
    at: u64,
    /// First IOVA of the range.
    iova: u64,
    /// A page has 2 to the power of `shift` bytes.
    shift: u32,
    /// The byte of the bitmap that is first in `bytes`.
    start: u64,
    /// Bits that were set and that the caller does not have yet.
    bytes: Box<[u8; WINDOW]>,
    /// Bytes from the first to the last one with such a bit.
    touched: Option<(usize, usize)>,
}

impl<'a> UserBitmap<'a> {
    /// The one that an ioctl names, whose page size is not 0.
    pub(super) fn new(client: &'a dyn Client, argument: &abi::HwptGetDirtyBitmap) -> Self {
        Self {
            client,
            at: argument.data,
            iova: argument.iova,
            shift: argument.page_size.trailing_zeros(),
            start: 0,
            bytes: Box::new([0; WINDOW]),
            touched: None,
        }
    }

    /// Sets the bits of `first..=last`, IOVAs of the range (`iova_bitmap_set`). `EFAULT` when the
    /// caller's memory cannot be read or written.
    pub(super) fn set(&mut self, first: u64, last: u64) -> Result<()> {
        let mut bit = (first - self.iova) >> self.shift;
        let end = (last - self.iova) >> self.shift;
        loop {
            let byte = bit / 8;
            let inside = byte.checked_sub(self.start).and_then(|byte| usize::try_from(byte).ok());
            let Some(index) = inside.filter(|index| *index < WINDOW) else {
                self.flush()?;
                self.start = byte - byte % WINDOW as u64;
                continue;
            };
            let room = (WINDOW - index) as u64 * 8 - bit % 8;
            let stop = end.min(bit.saturating_add(room - 1));
            self.fill(index, bit, stop);
            if stop == end {
                return Ok(());
            }
            bit = stop + 1;
        }
    }

    /// Hands what was set to the caller.
    pub(super) fn flush(&mut self) -> Result<()> {
        let Some((first, last)) = self.touched.take() else {
            return Ok(());
        };
        let Some(bytes) = self.bytes.get_mut(first..=last) else {
            return Ok(());
        };
        let at = offset(self.at, self.start.saturating_add(first as u64))?;
        let mut theirs = [0; WINDOW];
        let theirs = theirs.get_mut(..bytes.len()).unwrap_or_default();
        read(self.client, at, theirs)?;
        for (theirs, ours) in theirs.iter_mut().zip(bytes.iter_mut()) {
            *theirs |= std::mem::take(ours);
        }
        write(self.client, at, theirs)
    }

    /// Sets bits `bit..=stop`, the first of which is in byte `index` of the window, all in it.
    fn fill(&mut self, index: usize, bit: u64, stop: u64) {
        let last = index + usize::try_from(stop / 8 - bit / 8).unwrap_or(0);
        let (low, high) = (0xff_u8 << (bit % 8), 0xff_u8 >> (7 - stop % 8));
        if let Some(bytes) = self.bytes.get_mut(index..=last) {
            match bytes {
                [one] => *one |= low & high,
                [first, middle @ .., end] => {
                    *first |= low;
                    middle.fill(0xff);
                    *end |= high;
                }
                [] => {}
            }
        }
        let (from, to) = self.touched.unwrap_or((index, last));
        self.touched = Some((from.min(index), to.max(last)));
    }
}
