//! Groups and `/dev/vfio/N` (`group.c`).

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lychgate_iommu::GroupId;
use lychgate_iommufd::context::SharedIommu;
use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{Client, Context, ContextRef, NewFile, OpenFile, PAGE_SIZE, Reply};
use lychgate_types::Errno;

use crate::abi::*;
use crate::device::Device;
use crate::device_file::DeviceFile;
use crate::user;
use crate::vfio::Registry;

/// A group of devices that are open together or not at all.
pub(crate) struct Group {
    /// The number in `/dev/vfio` and `/sys/kernel/iommu_groups`.
    pub(crate) id: GroupId,
    /// Minor number of the node.
    pub(crate) minor: u32,
    /// The IOMMU core.
    pub(crate) iommu: SharedIommu,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The group's file, while it is open, and the files of devices that were opened through it.
    files: u32,
    /// Devices' files among them.
    device_files: u32,
    /// Devices that are bound by their own nodes.
    cdevs: u32,
    container: Option<ContextRef>,
}

impl Group {
    pub(crate) fn new(id: GroupId, minor: u32, iommu: SharedIommu) -> Self {
        Self { id, minor, iommu, state: Mutex::default() }
    }

    /// Opens the group's file. `EBUSY` while it is open, or a device is bound by its own node.
    pub(crate) fn open(
        self: &Arc<Self>,
        registry: Weak<Registry>,
        device_number: (u32, u32),
    ) -> Result<Arc<GroupFile>> {
        let mut state = self.lock();
        if state.cdevs != 0 {
            return refuse(Errno::EBUSY, "a device of the group is bound by its own node");
        }
        if state.files != 0 {
            return refuse(Errno::EBUSY, "the group is open");
        }
        state.files = 1;
        Ok(Arc::new(GroupFile { group: Arc::clone(self), registry, device_number }))
    }

    /// A device of the group is about to be bound by its own node (`vfio_device_block_group`). `EBUSY`
    /// while the group is open.
    pub(crate) fn block(&self) -> Result<()> {
        let mut state = self.lock();
        if state.files != 0 {
            return refuse(Errno::EBUSY, "the group is open");
        }
        state.cdevs += 1;
        Ok(())
    }

    /// Undoes [`Group::block`].
    pub(crate) fn unblock(&self) {
        let mut state = self.lock();
        state.cdevs = state.cdevs.saturating_sub(1);
    }

    /// A file of a device that was opened through the group is gone.
    pub(crate) fn device_file_closed(&self, device: &Device) {
        let mut state = self.lock();
        device.close();
        state.device_files = state.device_files.saturating_sub(1);
        put(state, self.id);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One file less; with the last one the group leaves its container.
fn put(mut state: MutexGuard<'_, State>, group: GroupId) {
    state.files = state.files.saturating_sub(1);
    if state.files == 0 {
        leave_container(&mut state, group);
    }
}

fn leave_container(state: &mut State, group: GroupId) {
    if let Some(container) = state.container.take() {
        container.remove_group(group);
    }
}

/// An open of `/dev/vfio/N`.
pub(crate) struct GroupFile {
    pub(crate) group: Arc<Group>,
    registry: Weak<Registry>,
    device_number: (u32, u32),
}

impl GroupFile {
    fn get_status(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const LEN: usize = size_of::<GroupStatus>();
        let mut status: GroupStatus = user::copy_in(client, argument, LEN)?;
        user::check_argsz(status.argsz, LEN)?;
        status.flags = if self.group.lock().container.is_some() {
            VFIO_GROUP_FLAGS_CONTAINER_SET | VFIO_GROUP_FLAGS_VIABLE
        } else if self.group.owned() {
            0
        } else {
            VFIO_GROUP_FLAGS_VIABLE
        };
        user::copy_out(client, argument, &status, LEN)
    }

    fn set_container(&self, client: &dyn Client, argument: u64) -> Result<()> {
        let mut fd = [0; 4];
        user::read(client, argument, &mut fd)?;
        let fd = i32::from_le_bytes(fd);
        let Some(file) = client.file(fd) else {
            let refusal = user::foreign_descriptor(client, fd, Errno::EBADFD);
            if refusal.errno != Errno::EBADF && self.group.lock().container.is_some() {
                return refuse(Errno::EINVAL, "the group is in a container");
            }
            return Err(refusal);
        };
        let context = Context::from_file(&*file);
        let mut state = self.group.lock();
        if state.container.is_some() {
            return refuse(Errno::EINVAL, "the group is in a container");
        }
        let Some(context) = context else {
            return refuse(Errno::EBADFD, "the descriptor is neither a container nor an iommufd");
        };
        context.add_group(self.group.id)?;
        state.container = Some(context);
        Ok(())
    }

    fn unset_container(&self) -> Result<()> {
        let mut state = self.group.lock();
        if state.container.is_none() {
            return refuse(Errno::EINVAL, "the group is in no container");
        }
        if state.device_files != 0 {
            return refuse(Errno::EBUSY, "a device of the group is open");
        }
        leave_container(&mut state, self.group.id);
        Ok(())
    }

    fn get_device_fd(&self, client: &dyn Client, argument: u64) -> Result<NewFile> {
        let name = copy_string(client, argument)?;
        let registry = self.registry.upgrade();
        let devices = registry.map(|registry| registry.devices()).unwrap_or_default();
        let mut found = None;
        for device in devices {
            if Arc::ptr_eq(&device.group, &self.group) && matches(&device, &name)? {
                found = Some(device);
                break;
            }
        }
        let Some(device) = found else {
            return refuse(Errno::ENODEV, "the group has no such device");
        };
        let mut state = self.group.lock();
        let Some(container) = &state.container else {
            return refuse(Errno::EINVAL, "the group is in no container");
        };
        device.open_by_group(container)?;
        state.files += 1;
        state.device_files += 1;
        drop(state);
        let file = DeviceFile::by_group(device, self.registry.clone());
        Ok(NewFile { file: Arc::new(file), cloexec: true })
    }
}

impl Group {
    /// Whether somebody does DMA with the group already.
    fn owned(&self) -> bool {
        self.iommu.lock().unwrap_or_else(PoisonError::into_inner).group_owned(self.id)
    }
}

impl OpenFile for GroupFile {
    fn name(&self) -> String {
        format!("/dev/vfio/{}", self.group.id.get())
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        Some(self.device_number)
    }

    fn ioctl(&self, client: &dyn Client, command: u32, argument: u64) -> Result<Reply> {
        match command {
            VFIO_GROUP_GET_DEVICE_FD => {
                return self.get_device_fd(client, argument).map(Reply::File);
            }
            VFIO_GROUP_GET_STATUS => self.get_status(client, argument),
            VFIO_GROUP_SET_CONTAINER => self.set_container(client, argument),
            VFIO_GROUP_UNSET_CONTAINER => self.unset_container(),
            _ => refuse(Errno::ENOTTY, "a VFIO group does not have this ioctl"),
        }?;
        Ok(Reply::Value(0))
    }

    fn describe(&self, client: &dyn Client, command: u32, argument: u64) -> Option<String> {
        crate::trace::describe(command, argument, client)
    }

    fn release(&self) {
        put(self.group.lock(), self.group.id);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A string of a client, with no more than a page before its end (`strndup_user`). `EFAULT`, `EINVAL`.
fn copy_string(client: &dyn Client, from: u64) -> Result<Vec<u8>> {
    let mut string = Vec::new();
    let mut at = from;
    let end = user::at(from, PAGE_SIZE).unwrap_or(u64::MAX);
    while at < end {
        // Up to the end of a page at once: what is behind the string may not be there.
        let len = (PAGE_SIZE - at % PAGE_SIZE).min(64).min(end - at);
        let mut piece = vec![0; usize::try_from(len).unwrap_or(1)];
        user::read(client, at, &mut piece)?;
        match piece.iter().position(|byte| *byte == 0) {
            Some(len) => {
                string.extend(piece.into_iter().take(len));
                return Ok(string);
            }
            None => string.extend(piece),
        }
        at += len;
    }
    refuse(Errno::EINVAL, "the name is longer than a page")
}

/// Whether a name means a device: its PCI address, and maybe options behind a space
/// (`vfio_pci_core_match`). `EINVAL` for options that are malformed.
fn matches(device: &Device, name: &[u8]) -> Result<bool> {
    const TOKEN: &[u8] = b"vf_token=";
    const UUID: usize = 36;
    let address = device.pci.bdf().to_string();
    let Some(mut options) = name.strip_prefix(address.as_bytes()) else { return Ok(false) };
    if options.first().is_some_and(|byte| *byte != b' ') {
        return Ok(false);
    }
    let mut token = false;
    loop {
        while let Some(rest) = options.strip_prefix(b" ") {
            options = rest;
        }
        if options.is_empty() {
            // A function without SR-IOV takes any token: it has nothing to compare it with.
            return Ok(true);
        }
        let uuid = options.strip_prefix(TOKEN).and_then(|rest| rest.split_at_checked(UUID));
        match uuid {
            Some((uuid, rest)) if !token && is_uuid(uuid) => {
                token = true;
                options = rest;
            }
            _ => return refuse(Errno::EINVAL, "an option behind the name is unknown or malformed"),
        }
    }
}

fn is_uuid(text: &[u8]) -> bool {
    text.iter().enumerate().all(|(index, byte)| match index {
        8 | 13 | 18 | 23 => *byte == b'-',
        _ => byte.is_ascii_hexdigit(),
    })
}
