//! The event log (AMD 48882 2.5).

use lychgate_types::Memory;

use super::registers::Registers;
use crate::spec::Event;

impl Registers {
    /// Appends `event`. The one that would make the log full is lost, and every later one until
    /// software has restarted the log.
    pub(super) fn log(&mut self, memory: &dyn Memory, event: Event) {
        if !self.events.running {
            return;
        }
        let next = self.events.next(self.events.tail);
        if next == self.events.offset(self.events.head) {
            self.recorded = self.recorded.with_event_overflow(true);
            self.events.running = false;
            self.record_event();
            return;
        }
        let at = self.events.entry(self.events.tail);
        // The code last: software that polls for a code finds the whole entry behind it.
        let written = memory
            .store_u64(at.wrapping_add(8), event.0[1])
            .and_then(|()| memory.store_u64(at, event.0[0]));
        // No event reports that the event log itself cannot be written.
        if written.is_ok() {
            self.events.tail = next;
            self.record_event();
        }
    }
}
