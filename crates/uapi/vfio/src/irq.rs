//! Interrupts of an open device: INTx, MSI, MSI-X, errors and requests (`vfio_pci_intrs.c`).
//!
//! Messages are programmed into the function as a host driver would, so they go function, IOMMU,
//! interrupt controller, handler, eventfd.

mod intx;
mod message;
mod watch;

use std::sync::{Arc, Mutex, PoisonError};

use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{Client, EventFd, Refusal};
use lychgate_model::{Msi, PciFunction};
use lychgate_types::Errno;

use self::message::Messages;
use crate::abi::*;
use crate::config::{
    Capability, PCI_CAP_ID_EXP, PCI_CAP_ID_MSI, PCI_CAP_ID_MSIX, VirtualConfig, read16, read32,
};
use crate::user;

pub(crate) use self::intx::IntxLine;
pub(crate) use self::watch::Watch;

/// What runs when an interrupt arrives.
pub type Handler = Arc<dyn Fn() + Send + Sync>;

/// The interrupt controller of the machine, as a driver asks it for vectors.
pub trait Interrupts: Send + Sync {
    /// Takes a vector: gives the message that makes `handler` run. `ENOSPC` when none is free.
    fn request(&self, handler: Handler) -> Result<Msi, Errno>;

    /// Takes a vector for each of `handlers`, a power of two of them, whose messages differ only in
    /// the low bits of their data, ascending from 0: multiple message MSI. Each is freed by itself.
    /// `ENOSPC` where the controller has none such; a driver makes do with one.
    fn request_block(&self, handlers: &[Handler]) -> Result<Msi, Errno> {
        let _ = handlers;
        Err(Errno::ENOSPC)
    }

    /// Gives a vector back. When it returns, its handler does not run and will not.
    fn free(&self, msi: Msi);
}

/// Where an interrupt goes: an eventfd, while there is one.
#[derive(Default)]
pub(crate) struct Trigger(Mutex<Option<Arc<dyn EventFd>>>);

impl Trigger {
    pub(crate) fn set(&self, eventfd: Option<Arc<dyn EventFd>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = eventfd;
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Signals the eventfd, without holding a lock while it does.
    pub(crate) fn signal(&self) {
        let eventfd = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(eventfd) = eventfd {
            eventfd.signal();
        }
    }
}

/// What interrupts need of the device that they belong to.
pub(crate) struct Hardware<'a> {
    /// The function.
    pub(crate) function: &'a dyn PciFunction,
    /// Where vectors come from.
    pub(crate) interrupts: &'a dyn Interrupts,
    /// The device's pin.
    pub(crate) line: &'a Arc<IntxLine>,
    /// Its configuration space.
    pub(crate) config: &'a VirtualConfig,
}

impl Hardware<'_> {
    fn capability(&self, id: u8) -> Option<Capability> {
        self.config.capability(id)
    }

    /// How many interrupts an index has (`vfio_pci_get_irq_count`).
    pub(crate) fn count(&self, index: u32) -> u32 {
        match index {
            VFIO_PCI_INTX_IRQ_INDEX => u32::from(self.config.interrupt_pin() != 0),
            VFIO_PCI_MSI_IRQ_INDEX => self
                .capability(PCI_CAP_ID_MSI)
                .map_or(0, |msi| 1 << (read16(self.function, msi.start + 2) >> 1 & 7)),
            VFIO_PCI_MSIX_IRQ_INDEX => self
                .capability(PCI_CAP_ID_MSIX)
                .map_or(0, |msix| u32::from(read16(self.function, msix.start + 2) & 0x7ff) + 1),
            VFIO_PCI_ERR_IRQ_INDEX => u32::from(self.is_pcie()),
            VFIO_PCI_REQ_IRQ_INDEX => 1,
            _ => 0,
        }
    }

    /// Whether the function is PCI Express: only then errors are reported.
    pub(crate) fn is_pcie(&self) -> bool {
        self.capability(PCI_CAP_ID_EXP).is_some()
    }

    /// Where the MSI-X table is: BAR, offset, length in bytes.
    pub(crate) fn msix_table(&self) -> Option<(u8, u64, u64)> {
        let start = self.capability(PCI_CAP_ID_MSIX)?.start;
        let table = read32(self.function, start + 4);
        let entries = u64::from(self.count(VFIO_PCI_MSIX_IRQ_INDEX));
        let [low, ..] = table.to_le_bytes();
        Some((low & 7, u64::from(table & !7), entries * 16))
    }
}

/// What is set up.
#[derive(Default)]
enum Mode {
    #[default]
    None,
    Intx {
        /// Unmasks when it is signalled.
        unmask: Option<Watch>,
    },
    Messages(Messages),
}

/// The interrupts of one open device.
#[derive(Default)]
pub(crate) struct Irqs {
    mode: Mode,
    error: Trigger,
    request: Trigger,
}

impl Irqs {
    /// The log2 of the MSI vectors that are enabled; `None` unless MSI is in use.
    pub(crate) fn msi(&self) -> Option<u8> {
        match &self.mode {
            Mode::Messages(messages) => messages.msi_log2(),
            _ => None,
        }
    }

    /// `VFIO_DEVICE_SET_IRQS`. Gives 0, or how many MSI vectors there could be when fewer than asked.
    pub(crate) fn set(
        &mut self,
        hardware: &Hardware<'_>,
        client: &dyn Client,
        argument: u64,
    ) -> Result<i32> {
        let header: IrqSet = user::copy_in(client, argument, size_of::<IrqSet>())?;
        let data = Data::of(client, argument, &header, hardware.count(header.index))?;
        let request = Request { client, start: header.start, count: header.count, data: &data };
        let action = header.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
        match (header.index, action) {
            (VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_MASK) => {
                self.mask_intx(hardware, &request)
            }
            (VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_UNMASK) => {
                self.unmask_intx(hardware, &request)
            }
            (VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_TRIGGER) => {
                self.trigger_intx(hardware, &request)
            }
            (VFIO_PCI_MSI_IRQ_INDEX | VFIO_PCI_MSIX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_TRIGGER) => {
                let msix = header.index == VFIO_PCI_MSIX_IRQ_INDEX;
                return self.trigger_messages(hardware, &request, msix);
            }
            (VFIO_PCI_ERR_IRQ_INDEX, VFIO_IRQ_SET_ACTION_TRIGGER) => single(&self.error, &request),
            (VFIO_PCI_REQ_IRQ_INDEX, VFIO_IRQ_SET_ACTION_TRIGGER) => {
                single(&self.request, &request)
            }
            _ => refuse(Errno::ENOTTY, "this interrupt index does not have this action"),
        }?;
        Ok(0)
    }

    /// Programs the messages again, after a reset took them.
    pub(crate) fn restore(&self, hardware: &Hardware<'_>) {
        if let Mode::Messages(messages) = &self.mode {
            messages.program(hardware.function);
        }
    }

    /// Takes everything down: the device closes.
    pub(crate) fn disable(&mut self, hardware: &Hardware<'_>) {
        self.disable_mode(hardware);
        self.error.set(None);
        self.request.set(None);
    }

    fn disable_mode(&mut self, hardware: &Hardware<'_>) {
        match std::mem::take(&mut self.mode) {
            Mode::None => {}
            Mode::Intx { unmask } => {
                drop(unmask);
                hardware.line.disable();
            }
            Mode::Messages(messages) => messages.disable(hardware.function, hardware.interrupts),
        }
    }

    fn mask_intx(&mut self, hardware: &Hardware<'_>, request: &Request<'_>) -> Result<()> {
        self.require_intx(request)?;
        match request.data {
            Data::None => hardware.line.mask(),
            Data::Bool(bools) if bools.first().is_some_and(|mask| *mask != 0) => {
                hardware.line.mask()
            }
            Data::Bool(_) => {}
            Data::EventFd(_) => {
                return refuse(Errno::ENOTTY, "INTx cannot be masked by an eventfd");
            }
        }
        Ok(())
    }

    fn unmask_intx(&mut self, hardware: &Hardware<'_>, request: &Request<'_>) -> Result<()> {
        let unmask = self.require_intx(request)?;
        match request.data {
            Data::None => hardware.line.unmask(),
            Data::Bool(bools) if bools.first().is_some_and(|unmask| *unmask != 0) => {
                hardware.line.unmask();
            }
            Data::Bool(_) => {}
            Data::EventFd(fds) => match request.eventfd(fds.first().copied().unwrap_or(-1))? {
                None => *unmask = None,
                Some(_) if unmask.is_some() => {
                    return refuse(Errno::EBUSY, "INTx has an eventfd that unmasks it");
                }
                Some(eventfd) => {
                    let line = Arc::clone(hardware.line);
                    *unmask = Some(Watch::new(eventfd, move || line.unmask())?);
                }
            },
        }
        Ok(())
    }

    /// The checks that masking and unmasking share: gives the eventfd that unmasks.
    fn require_intx(&mut self, request: &Request<'_>) -> Result<&mut Option<Watch>> {
        match &mut self.mode {
            Mode::Intx { unmask } if request.start == 0 && request.count == 1 => Ok(unmask),
            Mode::Intx { .. } => refuse(Errno::EINVAL, "INTx has one interrupt"),
            _ => refuse(Errno::EINVAL, "INTx is not set up"),
        }
    }

    fn trigger_intx(&mut self, hardware: &Hardware<'_>, request: &Request<'_>) -> Result<()> {
        let set_up = matches!(self.mode, Mode::Intx { .. });
        if set_up && request.disables() {
            self.disable_mode(hardware);
            return Ok(());
        }
        if !set_up && !matches!(self.mode, Mode::None) {
            return refuse(Errno::EINVAL, "another kind of interrupt is set up");
        }
        if request.start != 0 || request.count != 1 {
            return refuse(Errno::EINVAL, "INTx has one interrupt");
        }
        match request.data {
            Data::EventFd(fds) => {
                let eventfd = request.eventfd(fds.first().copied().unwrap_or(-1))?;
                if set_up {
                    hardware.line.set_trigger(eventfd);
                } else {
                    self.mode = Mode::Intx { unmask: None };
                    hardware.line.enable(eventfd);
                }
            }
            _ if !set_up => return refuse(Errno::EINVAL, "INTx is not set up"),
            Data::None => hardware.line.send(),
            Data::Bool(bools) => {
                if bools.first().is_some_and(|trigger| *trigger != 0) {
                    hardware.line.send();
                }
            }
        }
        Ok(())
    }

    fn trigger_messages(
        &mut self,
        hardware: &Hardware<'_>,
        request: &Request<'_>,
        msix: bool,
    ) -> Result<i32> {
        let set_up = matches!(&self.mode, Mode::Messages(messages) if messages.is_msix() == msix);
        if set_up && request.disables() {
            self.disable_mode(hardware);
            return Ok(0);
        }
        if !set_up && !matches!(self.mode, Mode::None) {
            return refuse(Errno::EINVAL, "another kind of interrupt is set up");
        }
        if let (Data::EventFd(fds), false) = (request.data, set_up) {
            let wanted = request.start + request.count;
            let mut messages = match Messages::enable(hardware, msix, wanted)? {
                Ok(messages) => messages,
                Err(possible) => return Ok(i32::try_from(possible).unwrap_or(i32::MAX)),
            };
            let set = messages.set_block(hardware, request.client, request.start, fds);
            match set {
                Ok(()) => self.mode = Mode::Messages(messages),
                Err(_) => messages.disable(hardware.function, hardware.interrupts),
            }
            return set.map(|()| 0);
        }
        let Mode::Messages(messages) = &mut self.mode else {
            return refuse(Errno::EINVAL, "this kind of interrupt is not set up");
        };
        match request.data {
            Data::EventFd(fds) => {
                messages.set_block(hardware, request.client, request.start, fds)?;
            }
            Data::None => messages.signal(request.start, std::iter::repeat_n(true, request.len())),
            Data::Bool(bools) => {
                messages.signal(request.start, bools.iter().map(|bool| *bool != 0))
            }
        }
        Ok(0)
    }
}

/// Errors and requests: one eventfd each (`vfio_pci_set_ctx_trigger_single`).
fn single(trigger: &Trigger, request: &Request<'_>) -> Result<()> {
    if request.start != 0 || request.count > 1 {
        return refuse(Errno::EINVAL, "this index has one interrupt");
    }
    match request.data {
        Data::None if !trigger.is_set() => refuse(Errno::EINVAL, "no eventfd is set"),
        Data::None => {
            if request.count == 0 {
                trigger.set(None);
            } else {
                trigger.signal();
            }
            Ok(())
        }
        Data::Bool(bools) => match bools.first() {
            None => refuse(Errno::EINVAL, "the range is empty"),
            Some(0) => Ok(()),
            Some(_) => {
                trigger.signal();
                Ok(())
            }
        },
        Data::EventFd(fds) => match fds.first() {
            None => refuse(Errno::EINVAL, "the range is empty"),
            Some(&fd) if fd < -1 => Ok(()),
            Some(&fd) => {
                trigger.set(request.eventfd(fd)?);
                Ok(())
            }
        },
    }
}

/// The data of `VFIO_DEVICE_SET_IRQS`.
enum Data {
    None,
    Bool(Vec<u8>),
    EventFd(Vec<i32>),
}

impl Data {
    /// Checks the header against the `max` interrupts of its index, and copies the data in
    /// (`vfio_set_irqs_validate_and_prepare`).
    fn of(client: &dyn Client, argument: u64, header: &IrqSet, max: u32) -> Result<Self> {
        user::check_argsz(header.argsz, size_of::<IrqSet>())?;
        if header.index >= VFIO_PCI_NUM_IRQS {
            return refuse(Errno::EINVAL, "there is no such interrupt index");
        }
        let known = VFIO_IRQ_SET_DATA_TYPE_MASK | VFIO_IRQ_SET_ACTION_TYPE_MASK;
        if header.flags & !known != 0 {
            return refuse(Errno::EINVAL, "unknown flags");
        }
        let last = header.start.checked_add(header.count);
        if header.start >= max || last.is_none_or(|last| last > max) {
            return refuse(
                Errno::EINVAL,
                format!("the range passes the {max} interrupts of the index"),
            );
        }
        let width = match header.flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
            VFIO_IRQ_SET_DATA_NONE => return Ok(Self::None),
            VFIO_IRQ_SET_DATA_BOOL => 1,
            VFIO_IRQ_SET_DATA_EVENTFD => 4,
            _ => return refuse(Errno::EINVAL, "one kind of data is needed"),
        };
        let len = usize::try_from(header.count).unwrap_or(usize::MAX).saturating_mul(width);
        user::check_argsz(header.argsz, len.saturating_add(size_of::<IrqSet>()))?;
        let mut bytes = vec![0; len];
        if !bytes.is_empty() {
            user::read(client, user::at(argument, size_of::<IrqSet>() as u64)?, &mut bytes)?;
        }
        if width == 1 {
            return Ok(Self::Bool(bytes));
        }
        let fds = bytes.as_chunks().0.iter().map(|fd| i32::from_le_bytes(*fd));
        Ok(Self::EventFd(fds.collect()))
    }
}

/// A checked request.
struct Request<'a> {
    client: &'a dyn Client,
    start: u32,
    count: u32,
    data: &'a Data,
}

impl Request<'_> {
    /// No data for no interrupt: turn the index off.
    fn disables(&self) -> bool {
        self.count == 0 && matches!(self.data, Data::None)
    }

    fn len(&self) -> usize {
        usize::try_from(self.count).unwrap_or(usize::MAX)
    }

    fn eventfd(&self, fd: i32) -> Result<Option<Arc<dyn EventFd>>> {
        eventfd(self.client, fd)
    }
}

/// The eventfd behind a descriptor; `None` for a negative one. `EBADF`, `EINVAL`.
fn eventfd(client: &dyn Client, fd: i32) -> Result<Option<Arc<dyn EventFd>>> {
    if fd < 0 {
        return Ok(None);
    }
    match client.eventfd(fd) {
        Ok(eventfd) => Ok(Some(eventfd)),
        Err(errno) => Err(Refusal::new(errno, format!("descriptor {fd} is no eventfd"))),
    }
}
