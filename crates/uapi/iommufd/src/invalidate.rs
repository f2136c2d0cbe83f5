//! `IOMMU_HWPT_INVALIDATE`: a guest tells what hardware is to forget.

use std::sync::Arc;

use lychgate_iommu::{Handled, NestedDomain, UserArray, VirtualIommu};
use lychgate_types::Errno;

use crate::abi::iommufd as abi;
use crate::client::Client;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Refusal, Result, refuse};
use crate::mm::PAGE_SIZE;
use crate::objects::Object;

/// Requests in one call.
const MAX_REQUESTS: u32 = 1 << 19;

impl Context {
    /// `IOMMU_HWPT_INVALIDATE`. How many requests were handled is told even on an error.
    pub(crate) fn hwpt_invalidate(
        &self,
        command: &mut Command<'_, abi::HwptInvalidate>,
    ) -> Result<()> {
        let result = self.invalidate(command);
        let (count, result) = match result {
            Ok(Handled { count, result }) => (count, result.map_err(refused)),
            Err(refusal) => (0, Err(refusal)),
        };
        command.argument.entry_num = count;
        command.respond()?;
        result
    }

    fn invalidate(&self, command: &Command<'_, abi::HwptInvalidate>) -> Result<Handled> {
        let argument = &command.argument;
        if argument.reserved != 0 {
            return refuse(Errno::EOPNOTSUPP, "a reserved member is set");
        }
        let empty = argument.data_uptr == 0 || argument.entry_len == 0;
        let long = u64::from(argument.entry_len) > PAGE_SIZE;
        if argument.entry_num > MAX_REQUESTS || argument.entry_num != 0 && (empty || long) {
            return refuse(Errno::EINVAL, "the array of requests has no valid size or address");
        }
        // Without the lock, for the driver reads the caller's memory, and waits for hardware.
        let target = self.target(argument.hwpt_id)?;
        let mut requests = Requests { client: command.client, argument };
        let handled = match target {
            Target::Nested(domain) => domain.invalidate(&mut requests),
            Target::Viommu(viommu) => viommu.invalidate(&mut requests),
        };
        match handled {
            Some(handled) => Ok(handled),
            None => refuse(
                Errno::EOPNOTSUPP,
                format!("object {} takes no invalidation requests", argument.hwpt_id),
            ),
        }
    }

    fn target(&self, id: u32) -> Result<Target> {
        match self.lock().objects.get(id)? {
            Object::Nested(nested) => Ok(Target::Nested(Arc::clone(&nested.domain))),
            Object::Viommu(viommu) => Ok(Target::Viommu(Arc::clone(&viommu.driver))),
            other => refuse(
                Errno::EINVAL,
                format!("object {id} is {}, no nested page table or vIOMMU", other.kind()),
            ),
        }
    }
}

enum Target {
    Nested(Arc<dyn NestedDomain>),
    Viommu(Arc<dyn VirtualIommu>),
}

fn refused(errno: Errno) -> Refusal {
    Refusal::new(errno, "the driver does not take a request")
}

/// The caller's array.
struct Requests<'a> {
    client: &'a dyn Client,
    argument: &'a abi::HwptInvalidate,
}

impl UserArray for Requests<'_> {
    fn kind(&self) -> u32 {
        self.argument.data_type
    }

    fn entry_len(&self) -> u32 {
        self.argument.entry_len
    }

    fn len(&self) -> u32 {
        self.argument.entry_num
    }

    fn read(&mut self, index: u32, least: usize, to: &mut [u8]) -> Result<(), Errno> {
        let len = usize::try_from(self.entry_len()).map_err(|_| Errno::EINVAL)?;
        if index >= self.len() || len < least {
            return Err(Errno::EINVAL);
        }
        let offset = u64::from(index) * u64::from(self.entry_len());
        let at = self.argument.data_uptr.checked_add(offset).ok_or(Errno::EFAULT)?;
        let mut entry = vec![0; len];
        self.client.read(at, &mut entry)?;
        let (known, tail) = entry.split_at(len.min(to.len()));
        if tail.iter().any(|byte| *byte != 0) {
            return Err(Errno::E2BIG);
        }
        to.fill(0);
        if let Some(to) = to.get_mut(..known.len()) {
            to.copy_from_slice(known);
        }
        Ok(())
    }
}
