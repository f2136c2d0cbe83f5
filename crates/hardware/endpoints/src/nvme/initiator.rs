//! What the controller was doing, for those who must explain a fault.

use std::fmt;

use super::spec::{Sqe, admin, nvm};

/// The data of a command.
#[derive(Clone, Copy)]
pub(crate) struct CommandData<'a> {
    pub(crate) queue: u16,
    pub(crate) sqe: &'a Sqe,
}

impl fmt::Display for CommandData<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let opcode = self.sqe.opcode();
        let names: &[(u8, &str)] = if self.queue == 0 { &admin::ALL } else { &nvm::ALL };
        write!(f, "queue {}, command {:#x} ", self.queue, self.sqe.cid())?;
        match names.iter().find(|(code, _)| *code == opcode) {
            Some((_, name)) => f.write_str(name)?,
            None => write!(f, "opcode {opcode:#x}")?,
        }
        if self.queue != 0 && nvm::has_range(opcode) {
            write!(f, " lba {}+{}", self.sqe.slba(), self.sqe.blocks())?;
        }
        Ok(())
    }
}

/// The PRP list of a command.
#[derive(Clone, Copy)]
pub(crate) struct PrpList<'a>(pub(crate) CommandData<'a>);

impl fmt::Display for PrpList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, PRP list", self.0)
    }
}

/// Entries of a queue.
#[derive(Clone, Copy)]
pub(crate) enum Entries {
    /// Commands that are fetched.
    Fetch { queue: u16, from: u16, count: u32 },
    /// Completions that are posted.
    Post { queue: u16, from: u16, count: u32 },
}

impl fmt::Display for Entries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fetch { queue, from, count } => {
                write!(f, "submission queue {queue}, fetch of {count} from entry {from}")
            }
            Self::Post { queue, from, count } => {
                write!(f, "completion queue {queue}, post of {count} from entry {from}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initiator_names_queue_command_and_blocks() {
        let mut bytes = [0; 64];
        bytes[0] = nvm::READ;
        bytes[2] = 0x17;
        bytes[40..44].copy_from_slice(&2048_u32.to_le_bytes());
        bytes[48] = 7;
        let sqe = Sqe::new(&bytes);
        let data = CommandData { queue: 3, sqe: &sqe };
        assert_eq!(data.to_string(), "queue 3, command 0x17 READ lba 2048+8");
        assert_eq!(PrpList(data).to_string(), "queue 3, command 0x17 READ lba 2048+8, PRP list");
        let admin = CommandData { queue: 0, sqe: &sqe };
        assert_eq!(admin.to_string(), "queue 0, command 0x17 GET LOG PAGE");
    }
}
