//! The command buffer: a ring of commands, and COMPLETION_WAITs that store a number to memory
//! (AMD 48882 2.4).
//!
//! Each batch of commands ends with a COMPLETION_WAIT that stores the batch's number, one more than
//! that of the batch before. Commands are executed in order, so a stored number tells that every
//! batch up to it has been executed.

use core::hint::spin_loop;
use core::sync::atomic::{Ordering, fence};

use lychgate_types::{Lock, Locks, Pages, RequesterId};

use super::hardware::{Hardware, Stalled};
use crate::spec::registers::{
    COMMAND_BUFFER_BASE, COMMAND_HEAD, COMMAND_TAIL, RING_ENTRY_BYTES, RING_POINTER,
};
use crate::spec::size::Block;
use crate::spec::{Command, dte};

/// Where the driver is in the ring.
pub(super) struct Queue {
    /// The entry that the next command goes to.
    tail: u64,
    /// An entry that hardware has not passed for all that was seen; it may be further.
    head: u64,
    /// Number of the last batch.
    batch: u64,
    /// Inside a restart, where another halt is the end.
    restarting: bool,
}

/// Commands that are queued as one batch at most.
const BATCH: usize = 64;
/// Looks at the completion word between two looks at the status register.
const LOOKS: u32 = 1024;
/// Times to restart the ring while waiting for one batch.
const RESTARTS: u32 = 3;

impl Queue {
    pub(super) const fn new() -> Self {
        Self { tail: 0, head: 0, batch: 0, restarting: false }
    }
}

impl<P: Pages, L: Locks> Hardware<P, L> {
    /// Executes commands and waits for their completion. An error, too, once the driver is gone.
    pub(super) fn run(&self, commands: &[Command]) -> Result<(), Stalled> {
        if !self.running() {
            return Err(Stalled);
        }
        let mut last = None;
        for batch in commands.chunks(BATCH) {
            let queued = self.queue.with(|queue| self.submit(queue, batch));
            last = Some(queued.inspect_err(|Stalled| self.stall())?);
        }
        match last {
            Some(batch) => self.wait(batch),
            None => Ok(()),
        }
    }

    /// Drops everything that the hardware has cached.
    pub(super) fn invalidate_everything(&self) -> Result<(), Stalled> {
        let batch = self.queue.with(|queue| {
            self.submit_everything(queue)?;
            self.submit(queue, &[])
        });
        self.wait(batch.inspect_err(|Stalled| self.stall())?)
    }

    /// Waits for a batch, and restarts the ring when it has halted.
    fn wait(&self, batch: u64) -> Result<(), Stalled> {
        let mut restarts = 0;
        for look in 1..=self.config.patience.max(1) {
            if self.completed_batch() >= batch {
                return Ok(());
            }
            spin_loop();
            let halted = look % LOOKS == 0 && !self.status().cmd_buf_run();
            if halted && self.completed_batch() < batch {
                restarts += 1;
                let restarted = self.queue.with(|queue| self.restart(queue));
                if restarts > RESTARTS || restarted.is_err() {
                    break;
                }
            }
        }
        self.stall();
        Err(Stalled)
    }

    /// The number that the last COMPLETION_WAIT has stored.
    fn completed_batch(&self) -> u64 {
        let word = self.completed.words().first();
        word.map_or(0, |word| u64::from_le(word.load(Ordering::Acquire)))
    }

    /// Queues commands and their COMPLETION_WAIT; gives the number of the batch.
    fn submit(&self, queue: &mut Queue, commands: &[Command]) -> Result<u64, Stalled> {
        self.make_room(queue, commands.len() as u64 + 1)?;
        for command in commands {
            self.store(queue, *command);
        }
        queue.batch += 1;
        self.store(queue, self.completion_wait(queue.batch));
        self.ring(queue);
        Ok(queue.batch)
    }

    /// Queues what empties every cache, without a COMPLETION_WAIT at the end.
    fn submit_everything(&self, queue: &mut Queue) -> Result<(), Stalled> {
        if self.efr().ia_sup() {
            return self.submit_bare(queue, Command::invalidate_iommu_all());
        }
        let devices = self.device_table.bytes / dte::BYTES;
        for id in (0..=u16::MAX).take_while(|id| u64::from(*id) < devices) {
            let device = RequesterId::new(id);
            self.submit_bare(queue, Command::invalidate_devtab_entry(device))?;
            self.submit_bare(queue, Command::invalidate_interrupt_table(device))?;
        }
        // An entry that is still cached could refill what is dropped next, so nothing of that may
        // start before this is over: F.
        queue.batch += 1;
        self.submit_bare(queue, self.completion_wait(queue.batch).with_wait_f(true))?;
        for id in 0..=u16::MAX {
            let pages = Command::invalidate_iommu_pages(id, Block::ALL, true);
            self.submit_bare(queue, pages)?;
        }
        Ok(())
    }

    fn submit_bare(&self, queue: &mut Queue, command: Command) -> Result<(), Stalled> {
        self.make_room(queue, 1)?;
        self.store(queue, command);
        self.ring(queue);
        Ok(())
    }

    /// Stores a command to the tail, for which there is room.
    fn store(&self, queue: &mut Queue, command: Command) {
        if let Some(entry) = self.command_buffer.entry(queue.tail) {
            for (word, value) in entry.iter().zip(command.0) {
                word.store(value.to_le(), Ordering::Relaxed);
            }
        }
        queue.tail = self.command_buffer.advance(queue.tail, 1);
    }

    /// Tells hardware of the new tail, after everything that was stored before: the commands, and
    /// the tables that they are about.
    fn ring(&self, queue: &Queue) {
        fence(Ordering::SeqCst);
        self.mmio.write64(COMMAND_TAIL, queue.tail * RING_ENTRY_BYTES);
    }

    /// Waits until `wanted` commands fit; the tail must not reach the head.
    fn make_room(&self, queue: &mut Queue, wanted: u64) -> Result<(), Stalled> {
        let ring = &self.command_buffer;
        let room = |queue: &Queue| ring.advance(queue.head, ring.entries() - queue.tail - 1);
        for look in 1..=self.config.patience.max(1) {
            if room(queue) >= wanted {
                return Ok(());
            }
            queue.head = (self.mmio.read64(COMMAND_HEAD) & RING_POINTER) / RING_ENTRY_BYTES;
            if look % LOOKS == 0 && !self.status().cmd_buf_run() {
                if queue.restarting {
                    break;
                }
                self.restart(queue)?;
            }
        }
        Err(Stalled)
    }

    /// Restarts a ring that has halted at a command which hardware could not fetch or would not
    /// execute (AMD 48882 2.4, and 2.5 for the events 5 and 6).
    ///
    /// Every command that was queued and not executed is an invalidation or a wait. One that drops
    /// everything stands for all the invalidations, and the newest number for all the waits.
    fn restart(&self, queue: &mut Queue) -> Result<(), Stalled> {
        if self.status().cmd_buf_run() {
            // Another thread was faster.
            return Ok(());
        }
        self.restarts.fetch_add(1, Ordering::Relaxed);
        self.change_control(|control| control.with_cmd_buf_en(false));
        // Writing the base makes head and tail 0.
        self.mmio.write64(COMMAND_BUFFER_BASE, self.command_buffer.base().0[0]);
        (queue.tail, queue.head) = (0, 0);
        self.change_control(|control| control.with_cmd_buf_en(true));
        queue.restarting = true;
        let result = self.submit_everything(queue).and_then(|()| self.make_room(queue, 1));
        queue.restarting = false;
        result?;
        let wait = self.completion_wait(queue.batch);
        self.store(queue, wait);
        self.ring(queue);
        Ok(())
    }

    fn completion_wait(&self, batch: u64) -> Command {
        Command::completion_wait(self.completed.at, batch, false)
    }
}
