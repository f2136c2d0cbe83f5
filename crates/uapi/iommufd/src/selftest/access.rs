//! Accesses that user space drives: a file each, closing which destroys it.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use lychgate_types::{Errno, PhysAddr, PhysRun};

use super::check::frame_of;
use super::{TestCommand, abi, syz};
use crate::access::{Access, AccessOps};
use crate::client::Client;
use crate::context::Context;
use crate::error::{Refusal, Result, refuse};
use crate::fault_injection;
use crate::file::{NewFile, OpenFile, Reply};
use crate::mm::{Mm, PAGE_SIZE};

/// Bytes that one operation pins or copies at most.
const MOST: u64 = 16 << 20;

/// What an access has pinned (`struct selftest_access`).
#[derive(Default)]
struct Pinned {
    access: OnceLock<Weak<Access>>,
    items: Mutex<Items>,
}

#[derive(Default)]
struct Items {
    all: Vec<Item>,
    next: u32,
}

/// What one operation has pinned (`struct selftest_access_item`).
struct Item {
    id: u32,
    iova: u64,
    len: u64,
}

impl Pinned {
    /// Held from before pages are pinned until they are in the list, so that an unmap finds them.
    fn items(&self) -> MutexGuard<'_, Items> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AccessOps for Pinned {
    fn unmap(&self, iova: u64, len: u64) {
        let Some(access) = self.access.get().and_then(Weak::upgrade) else {
            return;
        };
        let last = iova.saturating_add(len.saturating_sub(1));
        self.items().all.retain(|item| {
            let stays = iova > item.last() || last < item.iova;
            if !stays {
                access.unpin_pages(item.iova, item.len);
            }
            stays
        });
    }
}

impl Item {
    fn last(&self) -> u64 {
        self.iova.saturating_add(self.len.saturating_sub(1))
    }
}

/// The file of an access: `[iommufd_test_staccess]`.
struct AccessFile {
    access: Mutex<Option<Arc<Access>>>,
    pinned: Arc<Pinned>,
    pins: bool,
}

impl AccessFile {
    fn access(&self) -> Result<Arc<Access>> {
        let access = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        match &*access {
            Some(access) => Ok(Arc::clone(access)),
            None => refuse(Errno::EBADFD, "the file is closed"),
        }
    }
}

impl OpenFile for AccessFile {
    fn name(&self) -> String {
        "[iommufd_test_staccess]".to_owned()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        None
    }

    fn ioctl(&self, _client: &dyn Client, _command: u32, _argument: u64) -> Result<Reply> {
        refuse(Errno::ENOTTY, "an access has no ioctl of its own")
    }

    fn release(&self) {
        let access = self.access.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Unpinning needs the access: it goes afterwards.
        self.pinned.unmap(0, u64::MAX);
        drop(access);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for AccessFile {
    fn drop(&mut self) {
        self.release();
    }
}

impl Context {
    /// `IOMMU_TEST_OP_CREATE_ACCESS`.
    pub(super) fn test_create_access(&self, command: &TestCommand<'_>) -> Result<Reply> {
        let flags = command.argument.member::<abi::CreateAccess>().flags;
        if flags & !abi::ACCESS_CREATE_NEEDS_PIN_PAGES != 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set");
        }
        let pins = flags & abi::ACCESS_CREATE_NEEDS_PIN_PAGES != 0;
        fault_injection::allocation()?;
        let Some(context) = Self::from_file(self) else {
            return refuse(Errno::ENODEV, "the context is gone");
        };
        let pinned = Arc::new(Pinned::default());
        let access = Arc::new(context.create_access(Arc::clone(&pinned) as _, pins)?);
        // The only call: nobody else has it yet.
        let _ = pinned.access.set(Arc::downgrade(&access));
        access.attach(command.argument.id)?;
        let file = AccessFile { access: Mutex::new(Some(access)), pinned, pins };
        let at = command.member_at(abi::TestCmd::UNION_OFFSET);
        Ok(Reply::FileAt { file: NewFile { file: Arc::new(file), cloexec: true }, at })
    }
}

/// `IOMMU_TEST_OP_ACCESS_REPLACE_IOAS`.
pub(super) fn replace_ioas(command: &TestCommand<'_>) -> Result<()> {
    let ioas = command.argument.member::<abi::AccessReplaceIoas>().ioas_id;
    with_access(command, |file| file.access()?.replace(ioas))
}

/// `IOMMU_TEST_OP_ACCESS_PAGES`.
pub(super) fn pages(command: &mut TestCommand<'_>) -> Result<()> {
    let mut member = command.argument.member::<abi::AccessPages>();
    check_length(member.length)?;
    if member.flags & !(abi::ACCESS_WRITE | abi::ACCESS_SYZ) != 0 {
        return refuse(Errno::EOPNOTSUPP, "an unknown flag is set");
    }
    let client = command.client;
    let file = access_file(client, command.argument.id)?;
    let file = downcast(&*file)?;
    if !file.pins {
        return refuse(Errno::EOPNOTSUPP, "the access does not pin pages");
    }
    let access = file.access()?;
    let syz = member.flags & abi::ACCESS_SYZ != 0;
    let iova = if syz { syz::convert_for(&access, member.iova) } else { member.iova };
    fault_injection::allocation()?;
    let mut items = file.pinned.items();
    let runs = access.pin_pages(iova, member.length, member.flags & abi::ACCESS_WRITE != 0)?;
    let id = items.next;
    member.out_access_pages_id = id;
    command.argument.set_member(&member);
    let kept = compare(client.mm().as_ref(), member.uptr, iova, &runs)
        .and_then(|()| fault_injection::allocation())
        .and_then(|()| command.respond());
    match kept {
        Ok(()) => {
            items.next = items.next.wrapping_add(1);
            items.all.push(Item { id, iova, len: member.length });
        }
        Err(_) => access.unpin_pages(iova, member.length),
    }
    kept
}

/// `IOMMU_TEST_OP_DESTROY_ACCESS_PAGES`.
pub(super) fn destroy_pages(command: &TestCommand<'_>) -> Result<()> {
    let id = command.argument.member::<abi::DestroyAccessPages>().access_pages_id;
    with_access(command, |file| {
        let access = file.access()?;
        let mut items = file.pinned.items();
        let Some(index) = items.all.iter().position(|item| item.id == id) else {
            return refuse(Errno::ENOENT, format!("nothing pinned has the number {id}"));
        };
        let item = items.all.remove(index);
        access.unpin_pages(item.iova, item.len);
        Ok(())
    })
}

/// `IOMMU_TEST_OP_ACCESS_RW`.
pub(super) fn copy(command: &TestCommand<'_>) -> Result<()> {
    let member = command.argument.member::<abi::AccessRw>();
    check_length(member.length)?;
    if member.flags & !(abi::ACCESS_RW_WRITE | abi::ACCESS_RW_SLOW_PATH) != 0 {
        return refuse(Errno::EOPNOTSUPP, "an unknown flag is set");
    }
    let client = command.client;
    with_access(command, |file| {
        let access = file.access()?;
        fault_injection::allocation()?;
        let mut bytes = vec![0_u8; usize::try_from(member.length).unwrap_or(0)];
        let caller = (member.flags & abi::ACCESS_RW_SLOW_PATH == 0).then_some(client);
        if member.flags & abi::ACCESS_RW_WRITE != 0 {
            command.read(member.uptr, &mut bytes)?;
            access.write(member.iova, &bytes, caller)
        } else {
            access.read(member.iova, &mut bytes, caller)?;
            command.write(member.uptr, &bytes)
        }
    })
}

/// Compares the frames that were pinned at `iova` with those of the caller's memory at `at`, if that
/// is not 0: `EBADE`.
fn compare(mm: &dyn Mm, at: u64, iova: u64, runs: &[PhysRun]) -> Result<()> {
    if at == 0 {
        return Ok(());
    }
    let mut page = at.wrapping_sub(iova % PAGE_SIZE);
    for run in runs {
        let mut done = 0;
        while done < run.len {
            let frame: PhysAddr = run.start.wrapping_add(done);
            if frame_of(mm, page)? != frame {
                return refuse(Errno::EBADE, format!("the page at {page:#x} is not at {frame}"));
            }
            page = page.wrapping_add(PAGE_SIZE);
            done += PAGE_SIZE;
        }
    }
    Ok(())
}

/// `ENOMEM` for more than a test may ask for.
fn check_length(len: u64) -> Result<()> {
    if len > MOST {
        return refuse(Errno::ENOMEM, format!("{len:#x} bytes are more than {MOST:#x}"));
    }
    Ok(())
}

/// Runs `f` with the access whose file the command names: `EBADFD`.
fn with_access(command: &TestCommand<'_>, f: impl FnOnce(&AccessFile) -> Result<()>) -> Result<()> {
    let file = access_file(command.client, command.argument.id)?;
    f(downcast(&*file)?)
}

fn access_file(client: &dyn Client, fd: u32) -> Result<Arc<dyn OpenFile>> {
    let file = i32::try_from(fd).ok().and_then(|fd| client.file(fd));
    file.ok_or_else(|| Refusal::new(Errno::EBADFD, format!("descriptor {fd} is no access")))
}

fn downcast(file: &dyn OpenFile) -> Result<&AccessFile> {
    match file.as_any().downcast_ref() {
        Some(access) => Ok(access),
        None => refuse(Errno::EBADFD, format!("{} is no access", file.name())),
    }
}
