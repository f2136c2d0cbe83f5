//! The interrupt controller: where message-signalled interrupts end.
//!
//! Messages are as on x86: writes to 0xfee0_0000 and up, the target in bits 19:12, the vector in the
//! low byte of the data (Intel SDM 3A 11.11). Every target has the vectors 0x20 to 0xff.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use lychgate_model::Msi;
use lychgate_types::Errno;
use lychgate_vfio::{Handler, Interrupts};

/// First address of the window to which messages are written.
const MSI_WINDOW: u64 = 0xfee0_0000;

const TARGETS: u64 = 256;
const FIRST_VECTOR: u32 = 0x20;
const VECTORS: u32 = 0x100 - FIRST_VECTOR;

/// The interrupt controller of the machine.
#[derive(Default)]
pub(crate) struct InterruptController {
    lines: RwLock<HashMap<Msi, Arc<Line>>>,
    /// Where the search for a free vector goes on.
    next: Mutex<u32>,
}

struct Line {
    handler: Handler,
    /// Held while the handler runs: [`Interrupts::free`] waits for it. `false` once it is freed.
    live: Mutex<bool>,
}

impl InterruptController {
    /// No vector is in use.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A message arrives: runs its handler on this thread. One that nobody asked for is spurious and
    /// gives `false`.
    pub(crate) fn deliver(&self, msi: Msi) -> bool {
        let line = {
            let lines = self.lines.read().unwrap_or_else(PoisonError::into_inner);
            lines.get(&msi).cloned()
        };
        let Some(line) = line else {
            tracing::debug!(address = msi.address, data = msi.data, "spurious interrupt");
            return false;
        };
        let live = line.live.lock().unwrap_or_else(PoisonError::into_inner);
        if *live {
            (line.handler)();
        }
        *live
    }

    /// Takes `handlers.len()` vectors in a row whose first is a multiple of that number.
    fn take(&self, handlers: &[Handler]) -> Option<Msi> {
        let count = u32::try_from(handlers.len()).ok().filter(|count| count.is_power_of_two())?;
        let slots = u32::try_from(TARGETS).ok()? * VECTORS;
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines = self.lines.write().unwrap_or_else(PoisonError::into_inner);
        let start = next.next_multiple_of(count);
        let free = (0..slots / count).map(|step| (start + step * count) % slots).find(|slot| {
            let first = message(*slot);
            let fits =
                first.data + count <= FIRST_VECTOR + VECTORS && first.data.is_multiple_of(count);
            fits && (0..count).all(|i| !lines.contains_key(&behind(first, i)))
        })?;
        *next = (free + count) % slots;
        let first = message(free);
        for (i, handler) in (0..count).zip(handlers) {
            let line = Line { handler: Arc::clone(handler), live: Mutex::new(true) };
            lines.insert(behind(first, i), Arc::new(line));
        }
        Some(first)
    }
}

/// The message of a vector, counted through all targets.
fn message(slot: u32) -> Msi {
    let address = MSI_WINDOW | u64::from(slot / VECTORS) << 12;
    Msi { address, data: FIRST_VECTOR + slot % VECTORS }
}

fn behind(first: Msi, i: u32) -> Msi {
    Msi { data: first.data + i, ..first }
}

impl Interrupts for InterruptController {
    fn request(&self, handler: Handler) -> Result<Msi, Errno> {
        self.take(&[handler]).ok_or(Errno::ENOSPC)
    }

    fn request_block(&self, handlers: &[Handler]) -> Result<Msi, Errno> {
        self.take(handlers).ok_or(Errno::ENOSPC)
    }

    /// Must not be called from the handler itself.
    fn free(&self, msi: Msi) {
        let line = self.lines.write().unwrap_or_else(PoisonError::into_inner).remove(&msi);
        if let Some(line) = line {
            *line.live.lock().unwrap_or_else(PoisonError::into_inner) = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn counter() -> (Arc<AtomicU32>, Handler) {
        let count = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&count);
        (
            count,
            Arc::new(move || {
                counted.fetch_add(1, Ordering::Relaxed);
            }),
        )
    }

    #[test]
    fn a_message_runs_its_handler_until_the_vector_is_freed() {
        let controller = InterruptController::new();
        let (count, handler) = counter();
        let msi = controller.request(handler).unwrap();
        assert!(controller.deliver(msi));
        assert!(!controller.deliver(Msi { data: msi.data + 1, ..msi }));
        controller.free(msi);
        assert!(!controller.deliver(msi));
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_block_differs_in_the_low_bits_and_is_freed_one_by_one() {
        let controller = InterruptController::new();
        controller.request(counter().1).unwrap();
        let handlers: Vec<_> = (0..8).map(|_| counter()).collect();
        let block: Vec<Handler> = handlers.iter().map(|(_, handler)| Arc::clone(handler)).collect();
        let first = controller.request_block(&block).unwrap();
        assert_eq!(first.data % 8, 0);
        controller.free(behind(first, 3));
        for i in 0..8 {
            assert_eq!(controller.deliver(behind(first, i)), i != 3);
        }
        assert!(handlers.iter().all(|(count, _)| count.load(Ordering::Relaxed) <= 1));
        assert_eq!(controller.request_block(&block[..3]), Err(Errno::ENOSPC));
    }

    #[test]
    fn vectors_end_and_come_back() {
        let controller = InterruptController::new();
        let (_, handler) = counter();
        let mut seen = HashSet::new();
        while let Ok(msi) = controller.request(Arc::clone(&handler)) {
            assert!((0xfee0_0000..0xfef0_0000).contains(&msi.address) && msi.data <= 0xff);
            assert!(seen.insert(msi));
        }
        assert_eq!(seen.len(), 256 * 224);
        let one = *seen.iter().next().unwrap();
        controller.free(one);
        assert_eq!(controller.request(handler), Ok(one));
    }
}
