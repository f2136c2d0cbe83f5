//! I/O commands: the NVM command set (6).

use super::controller::Controller;
use super::initiator::CommandData;
use super::namespace::Namespace;
use super::spec::{Sqe, Status, nvm};
use crate::storage::Storage;

/// NSID that means every namespace.
pub(crate) const ALL_NAMESPACES: u32 = !0;

/// A range of logical blocks that lies inside its namespace, in bytes.
struct Extent {
    offset: u64,
    len: u64,
}

impl Controller {
    /// Executes one I/O command. Gives its status, and how many bytes moved.
    pub(crate) fn execute_io(&mut self, queue: u16, sqe: &Sqe) -> (Status, u64) {
        match self.try_io(queue, sqe) {
            Ok(moved) => (Status::SUCCESS, moved),
            Err(status) => {
                self.logs.record_error(queue, sqe, status);
                (status, 0)
            }
        }
    }

    fn try_io(&mut self, queue: u16, sqe: &Sqe) -> Result<u64, Status> {
        let opcode = sqe.opcode();
        if !nvm::ALL.iter().any(|(known, _)| *known == opcode) {
            return Err(Status::INVALID_OPCODE);
        }
        // Fused operations and SGLs are not claimed in Identify.
        if sqe.fuse() != 0 || sqe.psdt() != 0 {
            return Err(Status::INVALID_FIELD);
        }
        if opcode == nvm::FLUSH {
            return self.flush(sqe.nsid());
        }
        let index = self.namespace_index(sqe.nsid()).ok_or(Status::INVALID_NAMESPACE)?;
        let namespace = self.namespaces.get(index).ok_or(Status::INVALID_NAMESPACE)?.clone();
        if nvm::writes(opcode) && namespace.storage.read_only() {
            return Err(Status::READ_ONLY);
        }
        let command = CommandData { queue, sqe };
        if opcode == nvm::DSM {
            return self.manage_dataset(command, &namespace);
        }
        let extent = namespace.extent(sqe.slba(), u64::from(sqe.blocks()))?;
        if opcode == nvm::WRITE_ZEROES {
            return self.write_zeroes(sqe, &namespace, &extent);
        }
        self.transfer(command, &namespace, &extent)
    }

    /// Read, Write and Compare.
    fn transfer(
        &mut self,
        command: CommandData<'_>,
        namespace: &Namespace,
        extent: &Extent,
    ) -> Result<u64, Status> {
        let sqe = command.sqe;
        if extent.len > self.limits.max_transfer {
            return Err(Status::INVALID_FIELD);
        }
        self.mover.prepare(&self.bus, command, self.page_size, extent.len)?;
        let storage = &*namespace.storage;
        let (bus, offset, len) = (&self.bus, extent.offset, extent.len);
        match sqe.opcode() {
            nvm::WRITE => {
                self.mover.write(bus, command, storage, offset, len)?;
                self.logs.health.written(len);
                if sqe.fua() || !self.features.write_cache() {
                    make_durable(storage)?;
                }
            }
            nvm::READ => {
                // Force Unit Access on a read: what is read must be on the medium.
                if sqe.fua() {
                    make_durable(storage)?;
                }
                self.mover.read(bus, command, storage, offset, len)?;
                self.logs.health.read(len);
            }
            _ => {
                self.mover.compare(bus, command, storage, offset, len)?;
                self.logs.health.read(len);
            }
        }
        Ok(len)
    }

    fn flush(&self, nsid: u32) -> Result<u64, Status> {
        if nsid == ALL_NAMESPACES {
            self.flush_all()?;
        } else {
            let index = self.namespace_index(nsid).ok_or(Status::INVALID_NAMESPACE)?;
            let namespace = self.namespaces.get(index).ok_or(Status::INVALID_NAMESPACE)?;
            make_durable(&*namespace.storage)?;
        }
        Ok(0)
    }

    /// Flushes every namespace; the first failure is reported after all were tried.
    pub(crate) fn flush_all(&self) -> Result<(), Status> {
        let mut result = Ok(());
        for namespace in &self.namespaces {
            result = result.and(make_durable(&*namespace.storage));
        }
        result
    }

    fn write_zeroes(
        &self,
        sqe: &Sqe,
        namespace: &Namespace,
        extent: &Extent,
    ) -> Result<u64, Status> {
        const DEALLOCATE: u32 = 1 << 25;
        const ZEROS: &[u8] = &[0; 1 << 16];
        let storage = &*namespace.storage;
        if sqe.dw12() & DEALLOCATE != 0 {
            storage.discard(extent.offset, extent.len).map_err(|_| Status::WRITE_FAULT)?;
        } else {
            let end = extent.offset + extent.len;
            for at in (extent.offset..end).step_by(ZEROS.len()) {
                let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
                storage.write_at(at, &ZEROS[..len]).map_err(|_| Status::WRITE_FAULT)?;
            }
        }
        if sqe.fua() || !self.features.write_cache() {
            make_durable(storage)?;
        }
        Ok(0)
    }

    /// Dataset Management (6.7). Only Deallocate has an effect; the other attributes are hints.
    fn manage_dataset(
        &mut self,
        command: CommandData<'_>,
        namespace: &Namespace,
    ) -> Result<u64, Status> {
        const DEALLOCATE: u32 = 1 << 2;
        const RANGE_SIZE: usize = 16;
        let count = usize::from(command.sqe.dw10().to_le_bytes()[0]) + 1;
        let mut ranges = vec![0; count * RANGE_SIZE];
        self.mover.prepare(&self.bus, command, self.page_size, ranges.len() as u64)?;
        self.mover.get(&self.bus, command, &mut ranges)?;
        if command.sqe.dw11() & DEALLOCATE == 0 {
            return Ok(0);
        }
        let ranges = ranges.as_chunks::<RANGE_SIZE>().0.iter().map(|range| {
            // Context attributes, number of blocks, starting LBA.
            let [first, slba] = [0, 8].map(|at| {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&range[at..at + 8]);
                u64::from_le_bytes(bytes)
            });
            namespace.extent(slba, first >> 32)
        });
        // No range is deallocated unless all are inside the namespace.
        let extents = ranges.collect::<Result<Vec<_>, _>>()?;
        for extent in extents {
            let discarded = namespace.storage.discard(extent.offset, extent.len);
            discarded.map_err(|_| Status::WRITE_FAULT)?;
        }
        if !self.features.write_cache() {
            make_durable(&*namespace.storage)?;
        }
        Ok(0)
    }
}

impl Namespace {
    fn extent(&self, slba: u64, blocks: u64) -> Result<Extent, Status> {
        match slba.checked_add(blocks) {
            Some(end) if end <= self.blocks() => {
                Ok(Extent { offset: slba << self.lba_shift, len: blocks << self.lba_shift })
            }
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }
}

fn make_durable(storage: &dyn Storage) -> Result<(), Status> {
    storage.flush().map_err(|_| Status::WRITE_FAULT)
}
