//! Files that calls give to the client, as `interpose` hands them out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use lychgate_iommufd::{Client, OpenFile, Readiness, Refusal, Reply};
use lychgate_types::Errno;

use super::FakeClient;

#[derive(Default)]
pub(crate) struct Files(Mutex<State>);

#[derive(Default)]
struct State {
    open: BTreeMap<u32, (Arc<dyn OpenFile>, Arc<Ready>)>,
    /// The client can have no more.
    full: bool,
}

/// Whether `poll` says `POLLIN`.
#[derive(Default)]
pub(crate) struct Ready(Mutex<bool>);

impl Readiness for Ready {
    fn set_readable(&self, readable: bool) {
        *self.0.lock().unwrap() = readable;
    }
}

impl Files {
    /// Gives the client what it is to have.
    pub(crate) fn take(&self, reply: Reply, client: &FakeClient) -> Result<i32, Refusal> {
        let (new, at) = match reply {
            Reply::Value(value) => return Ok(value),
            Reply::File(_) => panic!("no ioctl of a context gives back a file"),
            Reply::FileAt { file, at } => (file, at),
        };
        assert!(new.cloexec);
        let mut state = self.0.lock().unwrap();
        let number = 100 + u32::try_from(state.open.len()).unwrap();
        let stored = match state.full {
            true => Err(Errno::EMFILE),
            false => client.write(at, &number.to_le_bytes()),
        };
        if let Err(errno) = stored {
            new.file.release();
            return Err(Refusal::new(errno, "no descriptor"));
        }
        let ready = Arc::new(Ready::default());
        assert!(new.file.wait_with(Arc::<Ready>::clone(&ready)));
        assert!(new.file.backing().is_none() && new.file.is_queue());
        new.file.given();
        state.open.insert(number, (new.file, ready));
        Ok(0)
    }

    pub(crate) fn get(&self, fd: u32) -> Arc<dyn OpenFile> {
        Arc::clone(&self.0.lock().unwrap().open[&fd].0)
    }

    pub(crate) fn is_readable(&self, fd: u32) -> bool {
        *self.0.lock().unwrap().open[&fd].1.0.lock().unwrap()
    }

    pub(crate) fn close(&self, fd: u32) {
        let (file, _) = self.0.lock().unwrap().open.remove(&fd).unwrap();
        file.release();
    }

    pub(crate) fn let_none_be_opened(&self) {
        self.0.lock().unwrap().full = true;
    }
}

impl Drop for Files {
    /// What a client has open is closed when it ends.
    fn drop(&mut self) {
        for (file, _) in std::mem::take(&mut self.0.get_mut().unwrap().open).into_values() {
            file.release();
        }
    }
}
