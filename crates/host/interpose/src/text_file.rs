//! An open text of the machine.
//!
//! Its descriptors are of a memfd that holds the text as it was at the open. Where calls on them are
//! known to be ours, the text is shown as it is then, and one that is written is taken at once. Under
//! numbers that the filter does not know, to which shells redirect, programs read the memfd; and what
//! they wrote to it is taken when they close it.

use std::any::Any;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lychgate_iommufd::error::{Refusal, Result, refuse};
use lychgate_iommufd::{Client, OpenFile, Reply};
use lychgate_machine::Text;
use lychgate_types::Errno;
use rustix::fs::{MemfdFlags, OFlags};

/// Longest text that is taken, in bytes: what programs store are numbers and switches.
const MAX_STORED: usize = 64;

/// A text that a client has opened.
pub(crate) struct TextFile {
    name: String,
    text: Arc<dyn Text>,
    memory: File,
    /// What was put into the memory.
    shown: String,
}

impl TextFile {
    /// For a client that opens `text` by `name` in the way of `access`.
    pub(crate) fn open(name: String, text: Arc<dyn Text>, access: OFlags) -> Result<Self> {
        // Programs that only write mean to replace what is there.
        let shown = if access.contains(OFlags::WRONLY) { String::new() } else { text.show()? };
        let wrong = |_| Refusal::new(Errno::ENOMEM, "no memory for the text");
        let memory = rustix::fs::memfd_create("text", MemfdFlags::CLOEXEC).map_err(wrong)?;
        let memory = File::from(memory);
        memory
            .write_all_at(shown.as_bytes(), 0)
            .map_err(|_| Refusal::new(Errno::ENOMEM, "no memory for the text"))?;
        Ok(Self { name, text, memory, shown })
    }

    /// What was written behind our back; `None` for nothing.
    fn written(&self) -> Option<String> {
        let mut bytes = Vec::new();
        let most = (self.shown.len() + MAX_STORED) as u64;
        (&self.memory).take(most).read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        (text != self.shown).then_some(text)
    }
}

impl OpenFile for TextFile {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        None
    }

    fn ioctl(&self, _: &dyn Client, _: u32, _: u64) -> Result<Reply> {
        refuse(Errno::ENOTTY, "a text has no ioctls")
    }

    /// `simple_read_from_buffer`.
    fn read_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        let text = self.text.show()?;
        let rest = usize::try_from(offset).ok().and_then(|offset| text.as_bytes().get(offset..));
        let rest = rest.unwrap_or_default();
        let count = usize::try_from(count).unwrap_or(usize::MAX).min(rest.len());
        let bytes = rest.get(..count).unwrap_or_default();
        client.write(buffer, bytes).map_err(|errno| Refusal::new(errno, "the buffer"))?;
        Ok(bytes.len() as u64)
    }

    /// Wherever it is written to, the whole text is replaced.
    fn write_at(&self, client: &dyn Client, buffer: u64, count: u64, _: u64) -> Result<u64> {
        let mut bytes = [0; MAX_STORED];
        let length = usize::try_from(count).ok();
        let Some(bytes) = length.and_then(|length| bytes.get_mut(..length)) else {
            return refuse(Errno::EINVAL, format!("more than {MAX_STORED} bytes"));
        };
        client.read(buffer, bytes).map_err(|errno| Refusal::new(errno, "the buffer"))?;
        match std::str::from_utf8(bytes) {
            Ok(text) => self.text.store(text.strip_suffix('\n').unwrap_or(text))?,
            Err(_) => return refuse(Errno::EINVAL, "this is no text"),
        }
        Ok(count)
    }

    fn backing(&self) -> Option<BorrowedFd<'_>> {
        Some(self.memory.as_fd())
    }

    fn release(&self) {
        let Some(text) = self.written() else { return };
        let text = text.lines().next().unwrap_or_default();
        if let Err(refusal) = self.text.store(text) {
            tracing::warn!(file = self.name, text, %refusal, "what was written is not taken");
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
