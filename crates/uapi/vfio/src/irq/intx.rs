//! The INTx pin of a function: a level, which masks itself when it is signalled.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_iommufd::EventFd;

/// The pin, where it enters the interrupt controller. Masking happens here and not in the function,
/// so that a function may drive the pin with whatever it holds.
#[derive(Default)]
pub(crate) struct IntxLine(Mutex<Line>);

#[derive(Default)]
struct Line {
    /// The level, as the function drives it.
    asserted: bool,
    /// Set up by `VFIO_DEVICE_SET_IRQS`.
    enabled: bool,
    /// Masked: by the user, or by the signal that was sent last.
    masked: bool,
    /// The user has INTx disabled in the command register.
    disabled: bool,
    trigger: Option<Arc<dyn EventFd>>,
}

impl IntxLine {
    /// The function drives the pin.
    pub(crate) fn drive(&self, asserted: bool) {
        let mut line = self.lock();
        line.asserted = asserted;
        deliver(line);
    }

    /// Sets the pin up, masked if the command register says so.
    pub(crate) fn enable(&self, trigger: Option<Arc<dyn EventFd>>) {
        let mut line = self.lock();
        line.enabled = true;
        line.masked = line.disabled;
        line.trigger = trigger;
        deliver(line);
    }

    /// Tears it down.
    pub(crate) fn disable(&self) {
        let mut line = self.lock();
        line.enabled = false;
        line.masked = false;
        line.trigger = None;
    }

    /// Signals another eventfd, or none, from now on.
    pub(crate) fn set_trigger(&self, trigger: Option<Arc<dyn EventFd>>) {
        self.lock().trigger = trigger;
    }

    /// Masks the pin.
    pub(crate) fn mask(&self) {
        let mut line = self.lock();
        line.masked = line.masked || line.enabled;
    }

    /// Unmasks the pin; if it is asserted still, signals at once and masks again.
    pub(crate) fn unmask(&self) {
        let mut line = self.lock();
        if !line.disabled {
            line.masked = false;
            deliver(line);
        }
    }

    /// The user sets or clears INTx disable in the command register.
    pub(crate) fn set_disabled(&self, disabled: bool) {
        let changed = {
            let mut line = self.lock();
            let changed = line.disabled != disabled;
            line.disabled = disabled;
            changed
        };
        match (changed, disabled) {
            (true, true) => self.mask(),
            (true, false) => self.unmask(),
            (false, _) => {}
        }
    }

    /// Signals as if the pin had been asserted: loopback.
    pub(crate) fn send(&self) {
        send(self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Signals and masks, if an interrupt is due.
fn deliver(mut line: MutexGuard<'_, Line>) {
    if line.enabled && line.asserted && !line.masked {
        line.masked = true;
        send(line);
    }
}

/// Signals the eventfd, with the lock released.
fn send(line: MutexGuard<'_, Line>) {
    let trigger = line.trigger.clone().filter(|_| line.enabled && !line.disabled);
    drop(line);
    if let Some(trigger) = trigger {
        trigger.signal();
    }
}
