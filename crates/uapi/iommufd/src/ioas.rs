//! IO address spaces: the ioctls on them (`drivers/iommu/iommufd/ioas.c`).

use std::ops::RangeInclusive;
use std::sync::Arc;

use lychgate_types::{Errno, PhysRun, Prot};
use zerocopy::IntoBytes;

use crate::abi::iommufd as abi;
use crate::client::{Cap, Client};
use crate::command::{Command, offset, read_value};
use crate::context::Context;
use crate::dma_buf::Import;
use crate::error::{Result, refuse};
use crate::fault_injection::allocation;
use crate::io_pagetable::{Slice, last_of};
use crate::mm::{Accounting, Mm, PAGE_SIZE, PinSource};
use crate::objects::Object;
use crate::observer::Event;
use crate::pages::{Account, Origin, Pages};
use crate::state::State;

const MAP_FLAGS: u32 = abi::MAP_FIXED_IOVA | abi::MAP_WRITEABLE | abi::MAP_READABLE;

/// Bytes of an element of the arrays of ranges.
const RANGE_BYTES: u64 = size_of::<abi::IovaRange>() as u64;

impl Context {
    /// `IOMMU_DESTROY`.
    pub(crate) fn destroy(&self, command: &mut Command<'_, abi::Destroy>) -> Result<()> {
        let mut state = self.lock();
        state.objects.check_unused(command.argument.id)?;
        if let Object::Viommu(viommu) = state.objects.get(command.argument.id)?
            && viommu.is_mapped(command.client)
        {
            return refuse(Errno::EBUSY, "a process maps memory of the vIOMMU");
        }
        self.destroy_object(&mut state, command.argument.id);
        Ok(())
    }

    /// `IOMMU_IOAS_ALLOC`.
    pub(crate) fn ioas_alloc(&self, command: &mut Command<'_, abi::IoasAlloc>) -> Result<()> {
        if command.argument.flags != 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set");
        }
        let id = self.lock().add_ioas()?;
        command.argument.out_ioas_id = id;
        self.finish(command, id)
    }

    /// `IOMMU_IOAS_IOVA_RANGES`.
    pub(crate) fn ioas_iova_ranges(
        &self,
        command: &mut Command<'_, abi::IoasIovaRanges>,
    ) -> Result<()> {
        reserved_is_zero(command.argument.reserved)?;
        let (ranges, alignment) = {
            let state = self.lock();
            let table = &state.objects.ioas(command.argument.ioas_id)?.table;
            (table.usable(), table.alignment())
        };
        let room = command.argument.num_iovas;
        let mut at = command.argument.allowed_iovas;
        for range in ranges.iter().take(usize::try_from(room).unwrap_or(usize::MAX)) {
            let range = abi::IovaRange { start: *range.start(), last: *range.end() };
            command.write(at, range.as_bytes())?;
            at = offset(at, RANGE_BYTES)?;
        }
        let count = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
        command.argument.num_iovas = count;
        command.argument.out_iova_alignment = alignment;
        command.respond()?;
        if count > room {
            return refuse(
                Errno::EMSGSIZE,
                format!("there are {count} ranges, the array has room for {room}"),
            );
        }
        Ok(())
    }

    /// `IOMMU_IOAS_ALLOW_IOVAS`.
    pub(crate) fn ioas_allow_iovas(
        &self,
        command: &mut Command<'_, abi::IoasAllowIovas>,
    ) -> Result<()> {
        let argument = command.argument;
        reserved_is_zero(argument.reserved)?;
        self.lock().objects.ioas(argument.ioas_id)?;
        let ranges = read_ranges(command.client, argument.allowed_iovas, argument.num_iovas)?;
        self.lock().objects.ioas_mut(argument.ioas_id)?.table.allow(ranges)
    }

    /// `IOMMU_IOAS_MAP`.
    pub(crate) fn ioas_map(&self, command: &mut Command<'_, abi::IoasMap>) -> Result<()> {
        let argument = command.argument;
        let prot = map_prot(argument.flags, argument.reserved)?;
        in_reach([argument.iova, argument.length])?;
        let fixed = argument.flags & abi::MAP_FIXED_IOVA != 0;
        let iova = self.map_user(
            command.client,
            |_| Ok(argument.ioas_id),
            User { va: argument.user_va, len: argument.length, prot },
            fixed.then_some(argument.iova),
        )?;
        command.argument.iova = iova;
        command.respond()
    }

    /// `IOMMU_IOAS_MAP_FILE`.
    pub(crate) fn ioas_map_file(&self, command: &mut Command<'_, abi::IoasMapFile>) -> Result<()> {
        let argument = command.argument;
        let prot = map_prot(argument.flags, 0)?;
        in_reach([argument.iova, argument.length])?;
        self.lock().objects.ioas(argument.ioas_id)?;
        let origin = self.origin(command)?;
        let mut state = self.lock();
        let base = argument.start - argument.start % PAGE_SIZE;
        let account = account(&state, command.client, command.client.mm());
        allocation()?;
        let pages = Pages::new(origin, base, prot.contains(Prot::WRITE), account);
        let slice = Slice { pages, start: argument.start % PAGE_SIZE, len: argument.length };
        let fixed = argument.flags & abi::MAP_FIXED_IOVA != 0;
        let fixed = fixed.then_some(argument.iova);
        command.argument.iova = self.map(&mut state, argument.ioas_id, &[slice], fixed, prot)?;
        drop(state);
        command.respond()
    }

    /// The file to map: a dma-buf, else one in memory (`iopt_map_file_pages`). Called without the
    /// lock: the exporter of a dma-buf has its own.
    fn origin(&self, command: &Command<'_, abi::IoasMapFile>) -> Result<Origin> {
        let argument = &command.argument;
        let Some(more) = argument.length.checked_sub(1) else {
            return refuse(Errno::EINVAL, "the length is 0");
        };
        let Some(last) = argument.start.checked_add(more) else {
            return refuse(Errno::EOVERFLOW, "the memory passes the end of the address space");
        };
        let ours = command.client.file(argument.fd);
        if let Some(buffer) = ours.as_ref().and_then(|file| file.dma_buf()) {
            if last >= buffer.size() {
                return refuse(
                    Errno::EINVAL,
                    format!("the dma-buf has only {:#x} bytes", buffer.size()),
                );
            }
            return match Import::new(self.weak(), buffer) {
                Ok(import) => Ok(Origin::DmaBuf(import)),
                Err(errno) => refuse(errno, "the exporter of the dma-buf does not give it"),
            };
        }
        match command.client.mem_file(argument.fd) {
            Ok(file) => Ok(Origin::File(file)),
            Err(Errno::EBADF) => {
                refuse(Errno::EBADF, format!("descriptor {} is not open", argument.fd))
            }
            // As in Linux, this shows when the pages are needed.
            Err(_) => Ok(Origin::File(Arc::new(NotInMemory))),
        }
    }

    /// `IOMMU_IOAS_COPY`.
    pub(crate) fn ioas_copy(&self, command: &mut Command<'_, abi::IoasCopy>) -> Result<()> {
        self.convert_copy(&mut command.argument);
        let argument = command.argument;
        if argument.flags & !MAP_FLAGS != 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set");
        }
        in_reach([argument.length, argument.src_iova, argument.dst_iova])?;
        let prot = map_prot(argument.flags, 0)?;
        let mut state = self.lock();
        let source = &state.objects.ioas(argument.src_ioas_id)?.table;
        let slices = source.slices(argument.src_iova, argument.length)?;
        let fixed = argument.flags & abi::MAP_FIXED_IOVA != 0;
        let fixed = fixed.then_some(argument.dst_iova);
        command.argument.dst_iova =
            self.map(&mut state, argument.dst_ioas_id, &slices, fixed, prot)?;
        drop(state);
        command.respond()
    }

    /// `IOMMU_IOAS_UNMAP`.
    pub(crate) fn ioas_unmap(&self, command: &mut Command<'_, abi::IoasUnmap>) -> Result<()> {
        let argument = command.argument;
        let state = self.lock();
        state.objects.ioas(argument.ioas_id)?;
        let all = (argument.iova, argument.length) == (0, u64::MAX);
        let last = if all {
            u64::MAX
        } else {
            in_reach([argument.iova, argument.length])?;
            last_of(argument.iova, argument.length)?
        };
        let (bytes, result) = self.unmap_areas(state, argument.ioas_id, argument.iova, last);
        result?;
        if bytes == 0 && !all {
            return refuse(
                Errno::ENOENT,
                format!("nothing is mapped in {:#x}..={last:#x}", argument.iova),
            );
        }
        command.argument.length = bytes;
        command.respond()
    }

    /// `IOMMU_IOAS_CHANGE_PROCESS`: what is pinned counts against the caller from now on, or, on an
    /// error, nothing of it.
    pub(crate) fn ioas_change_process(
        &self,
        command: &mut Command<'_, abi::IoasChangeProcess>,
    ) -> Result<()> {
        reserved_is_zero(command.argument.reserved)?;
        let state = self.lock();
        let mut memory: Vec<&Arc<Pages>> = Vec::new();
        for (id, _) in state.objects.iter() {
            if let Ok(ioas) = state.objects.ioas(id) {
                memory.extend(ioas.table.memory());
            }
        }
        if memory.iter().any(|pages| !pages.is_file()) {
            return refuse(Errno::EINVAL, "memory that is no file's is mapped");
        }
        memory.sort_by_key(|pages| Arc::as_ptr(pages));
        memory.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let (mm, limit) = (command.client.mm(), command.client.memlock_limit());
        memory.retain(|pages| !pages.stays_with(&mm));
        let mut charged = Vec::with_capacity(memory.len());
        for pages in &memory {
            match pages.charge_to(&mm, limit) {
                Ok(account) => charged.push(account),
                Err(refusal) => {
                    for (pages, account) in memory.iter().zip(&charged) {
                        pages.uncharge_from(account);
                    }
                    return Err(refusal);
                }
            }
        }
        for (pages, account) in memory.iter().zip(charged) {
            pages.change_account(account);
        }
        Ok(())
    }

    /// Maps memory of the caller into the IOAS that `ioas` picks (`iopt_map_user_pages`).
    pub(crate) fn map_user(
        &self,
        client: &dyn Client,
        ioas: impl FnOnce(&State) -> Result<u32>,
        user: User,
        iova: Option<u64>,
    ) -> Result<u64> {
        let mut state = self.lock();
        let ioas = ioas(&state)?;
        state.objects.ioas(ioas)?;
        check_source(user.va, user.len)?;
        if user.len == 0 || user.len > u64::MAX - PAGE_SIZE {
            return refuse(Errno::EINVAL, "the length is 0 or too large to be counted in pages");
        }
        let mm = client.mm();
        let origin = Origin::User(Arc::clone(&mm));
        let base = user.va - user.va % PAGE_SIZE;
        allocation()?;
        let account = account(&state, client, mm);
        let pages = Pages::new(origin, base, user.prot.contains(Prot::WRITE), account);
        let slice = Slice { pages, start: user.va % PAGE_SIZE, len: user.len };
        self.map(&mut state, ioas, &[slice], iova, user.prot)
    }

    fn map(
        &self,
        state: &mut State,
        ioas: u32,
        slices: &[Slice],
        iova: Option<u64>,
        prot: Prot,
    ) -> Result<u64> {
        let ioas = state.objects.ioas_mut(ioas)?;
        let first = ioas.table.map(slices, iova, prot)?;
        let mut iova = first;
        for slice in slices {
            let len = slice.len;
            self.observer.event(&Event::Mapped { ioas: ioas.serial, iova, len, prot });
            iova = iova.wrapping_add(len);
        }
        Ok(first)
    }
}

/// Memory of a caller that is to be mapped.
#[derive(Clone, Copy)]
pub(crate) struct User {
    /// First virtual address.
    pub(crate) va: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// What devices may do.
    pub(crate) prot: Prot,
}

/// A file without pages that could be pinned.
struct NotInMemory;

impl PinSource for NotInMemory {
    fn pin(&self, _: u64, _: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        Err(Errno::EINVAL)
    }

    fn unpin(&self, _: &[PhysRun]) {}
}

/// Whom pins of the caller's mapping count against.
fn account(state: &State, client: &dyn Client, mm: Arc<dyn Mm>) -> Account {
    let mode = match client.capable(Cap::IpcLock) {
        true => Accounting::None,
        false => state.accounting,
    };
    Account { mm, mode, limit: client.memlock_limit() }
}

fn reserved_is_zero(reserved: u32) -> Result<()> {
    match reserved {
        0 => Ok(()),
        _ => refuse(Errno::EOPNOTSUPP, "a reserved member is set"),
    }
}

/// What devices may do with a mapping; DMA is always coherent.
fn map_prot(flags: u32, reserved: u32) -> Result<Prot> {
    if flags & !MAP_FLAGS != 0 || reserved != 0 {
        return refuse(Errno::EOPNOTSUPP, "an unknown flag or a reserved member is set");
    }
    let mut prot = Prot::CACHE;
    if flags & abi::MAP_READABLE != 0 {
        prot |= Prot::READ;
    }
    if flags & abi::MAP_WRITEABLE != 0 {
        prot |= Prot::WRITE;
    }
    if prot == Prot::CACHE {
        return refuse(Errno::EINVAL, "neither READABLE nor WRITEABLE is set");
    }
    Ok(prot)
}

/// Addresses and lengths must be below the last address.
fn in_reach<const N: usize>(values: [u64; N]) -> Result<()> {
    match values.iter().find(|value| **value == u64::MAX) {
        Some(value) => refuse(Errno::EOVERFLOW, format!("{value:#x} is out of reach")),
        None => Ok(()),
    }
}

/// The memory to map must not pass the end of its space.
fn check_source(start: u64, len: u64) -> Result<()> {
    match start.checked_add(len) {
        Some(_) => Ok(()),
        None => refuse(Errno::EOVERFLOW, "the memory passes the end of the address space"),
    }
}

/// `count` ranges of the caller, none of them overlapping another (`iommufd_ioas_load_iovas`).
fn read_ranges(client: &dyn Client, at: u64, count: u32) -> Result<Vec<RangeInclusive<u64>>> {
    let mut ranges: std::collections::BTreeMap<u64, u64> = std::collections::BTreeMap::new();
    let mut at = at;
    for _ in 0..count {
        let abi::IovaRange { start, last } = read_value(client, at)?;
        if start >= last {
            return refuse(
                Errno::EINVAL,
                format!("the range {start:#x}..={last:#x} does not end behind its start"),
            );
        }
        if ranges.range(..=last).next_back().is_some_and(|(_, end)| *end >= start) {
            return refuse(
                Errno::EINVAL,
                format!("the range {start:#x}..={last:#x} overlaps another of the list"),
            );
        }
        ranges.insert(start, last);
        at = offset(at, RANGE_BYTES)?;
    }
    Ok(ranges.into_iter().map(|(start, last)| start..=last).collect())
}
