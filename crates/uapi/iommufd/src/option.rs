//! `IOMMU_OPTION` (`drivers/iommu/iommufd/main.c` and `ioas.c`).

use lychgate_types::Errno;

use crate::abi::iommufd as abi;
use crate::client::Cap;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::mm::Accounting;

impl Context {
    /// `IOMMU_OPTION`.
    pub(crate) fn option(&self, command: &mut Command<'_, abi::Option>) -> Result<()> {
        if command.argument.reserved != 0 {
            return refuse(Errno::EOPNOTSUPP, "a reserved member is set");
        }
        match command.argument.option_id {
            abi::OPTION_RLIMIT_MODE => self.rlimit_mode(command)?,
            abi::OPTION_HUGE_PAGES => self.huge_pages(command)?,
            unknown => return refuse(Errno::EOPNOTSUPP, format!("there is no option {unknown}")),
        }
        command.respond()
    }

    fn rlimit_mode(&self, command: &mut Command<'_, abi::Option>) -> Result<()> {
        if command.argument.object_id != 0 {
            return refuse(Errno::EOPNOTSUPP, "the option is not one of an object");
        }
        let mut state = self.lock();
        match command.argument.op {
            abi::OPTION_OP_GET => {
                command.argument.val64 = u64::from(state.accounting == Accounting::Mm);
                Ok(())
            }
            abi::OPTION_OP_SET => {
                if !command.client.capable(Cap::SysResource) {
                    return refuse(Errno::EPERM, "the caller lacks CAP_SYS_RESOURCE");
                }
                if !state.objects.is_empty() {
                    return refuse(Errno::EBUSY, "there are objects already");
                }
                state.accounting = match command.argument.val64 {
                    0 => Accounting::User,
                    1 => Accounting::Mm,
                    value => return refuse(Errno::EINVAL, format!("{value} is neither 0 nor 1")),
                };
                Ok(())
            }
            op => unknown_op(op),
        }
    }

    fn huge_pages(&self, command: &mut Command<'_, abi::Option>) -> Result<()> {
        let mut state = self.lock();
        let table = &mut state.objects.ioas_mut(command.argument.object_id)?.table;
        match (command.argument.op, command.argument.val64) {
            (abi::OPTION_OP_GET, _) => {
                command.argument.val64 = u64::from(table.large_pages());
                Ok(())
            }
            (abi::OPTION_OP_SET, value @ (0 | 1)) => table.set_large_pages(value == 1),
            (abi::OPTION_OP_SET, value) => {
                refuse(Errno::EINVAL, format!("{value} is neither 0 nor 1"))
            }
            (op, _) => unknown_op(op),
        }
    }
}

fn unknown_op(op: u16) -> Result<()> {
    refuse(Errno::EOPNOTSUPP, format!("there is no operation {op}"))
}
