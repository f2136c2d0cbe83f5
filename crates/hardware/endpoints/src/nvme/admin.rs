//! Admin commands (5).

use super::controller::Controller;
use super::features::{Answer, Features, TIMESTAMP_LEN};
use super::identify;
use super::initiator::CommandData;
use super::io::ALL_NAMESPACES;
use super::queue::{CompletionQueue, SubmissionQueue};
use super::spec::{CQE_SIZE_LOG2, Completion, SQE_SIZE_LOG2, Sqe, Status, admin, high, low};

/// How an admin command ended.
enum Outcome {
    /// With success and this dword 0.
    Done(u32),
    /// It stays outstanding.
    Pending,
}

impl Controller {
    /// Executes one admin command: its status and dword 0, or `None` if it stays outstanding.
    /// Completions of other commands that must come first are appended to `self.completions`.
    pub(crate) fn execute_admin(&mut self, sqe: &Sqe) -> Option<(Status, u32)> {
        match self.try_admin(sqe) {
            Ok(Outcome::Done(result)) => Some((Status::SUCCESS, result)),
            Ok(Outcome::Pending) => None,
            Err(status) => {
                self.logs.record_error(0, sqe, status);
                Some((status, 0))
            }
        }
    }

    fn try_admin(&mut self, sqe: &Sqe) -> Result<Outcome, Status> {
        if self.events.is_outstanding(sqe.cid()) {
            return Err(Status::CID_CONFLICT);
        }
        // No fused operations, and PRPs only.
        if sqe.fuse() != 0 || sqe.psdt() != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let done = |()| Outcome::Done(0);
        match sqe.opcode() {
            admin::DELETE_SQ => self.delete_sq(low(sqe.dw10())).map(done),
            admin::CREATE_SQ => self.create_sq(sqe).map(done),
            admin::GET_LOG_PAGE => self.get_log_page(sqe).map(done),
            admin::DELETE_CQ => self.delete_cq(low(sqe.dw10())).map(done),
            admin::CREATE_CQ => self.create_cq(sqe).map(done),
            admin::IDENTIFY => self.identify(sqe).map(done),
            admin::ABORT => Ok(Outcome::Done(self.abort(sqe))),
            admin::SET_FEATURES => self.set_features(sqe).map(Outcome::Done),
            admin::GET_FEATURES => self.get_features(sqe).map(Outcome::Done),
            admin::ASYNC_EVENT => self.events.request(sqe.cid()).map(|()| Outcome::Pending),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    /// Create I/O Submission Queue (5.4).
    fn create_sq(&mut self, sqe: &Sqe) -> Result<(), Status> {
        let (qid, cqid) = (low(sqe.dw10()), high(sqe.dw11()));
        if cqid == 0 || self.completion_queue(cqid).is_none() {
            return Err(Status::INVALID_CQ);
        }
        let slot = self.sqs.get(usize::from(qid)).filter(|_| qid != 0);
        if !matches!(slot, Some(None)) {
            return Err(Status::INVALID_QID);
        }
        let entries = self.check_queue(sqe)?;
        if self.configuration.submission_entry_size() != SQE_SIZE_LOG2 {
            return Err(Status::INVALID_FIELD);
        }
        let queue = SubmissionQueue::new(qid, cqid, sqe.prp1(), entries);
        self.add_submission_queue(queue.ok_or(Status::INVALID_PRP_OFFSET)?);
        Ok(())
    }

    /// Create I/O Completion Queue (5.3).
    fn create_cq(&mut self, sqe: &Sqe) -> Result<(), Status> {
        const INTERRUPTS_ENABLED: u32 = 1 << 1;
        let qid = low(sqe.dw10());
        let slot = self.cqs.get(usize::from(qid)).filter(|_| qid != 0);
        if !matches!(slot, Some(None)) {
            return Err(Status::INVALID_QID);
        }
        let entries = self.check_queue(sqe)?;
        if self.configuration.completion_entry_size() != CQE_SIZE_LOG2 {
            return Err(Status::INVALID_FIELD);
        }
        let vector = high(sqe.dw11());
        if usize::from(vector) >= self.msix.vectors() {
            return Err(Status::INVALID_VECTOR);
        }
        let vector = (sqe.dw11() & INTERRUPTS_ENABLED != 0).then_some(vector);
        let queue = CompletionQueue::new(qid, vector, sqe.prp1(), entries);
        self.add_completion_queue(queue.ok_or(Status::INVALID_PRP_OFFSET)?);
        Ok(())
    }

    /// What both kinds of queue have in common: gives the number of entries.
    fn check_queue(&self, sqe: &Sqe) -> Result<u32, Status> {
        const PHYSICALLY_CONTIGUOUS: u32 = 1;
        let entries = u32::from(high(sqe.dw10())) + 1;
        if entries < 2 || entries > self.limits.max_queue_entries {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if sqe.dw11() & PHYSICALLY_CONTIGUOUS == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if !sqe.prp1().is_multiple_of(self.page_size) {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        Ok(entries)
    }

    /// Delete I/O Submission Queue (5.6). Every fetched command has completed; those that were
    /// not fetched never will be.
    fn delete_sq(&mut self, qid: u16) -> Result<(), Status> {
        if qid == 0 || self.submission_queue(qid).is_none() {
            return Err(Status::INVALID_QID);
        }
        self.remove_submission_queue(qid);
        Ok(())
    }

    /// Delete I/O Completion Queue (5.5).
    fn delete_cq(&mut self, qid: u16) -> Result<(), Status> {
        if qid == 0 || self.completion_queue(qid).is_none() {
            return Err(Status::INVALID_QID);
        }
        if self.sqs.iter().flatten().any(|sq| sq.cqid == qid) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.remove_completion_queue(qid);
        Ok(())
    }

    /// Identify (5.15).
    fn identify(&mut self, sqe: &Sqe) -> Result<(), Status> {
        const IO_COMMAND_SET_NAMESPACE: u8 = 0x05;
        const IO_COMMAND_SET_CONTROLLER: u8 = 0x06;
        let nsid = sqe.nsid();
        let command_set = sqe.dw11() >> 24;
        let namespace = || {
            let index = self.namespace_index(nsid).ok_or(Status::INVALID_NAMESPACE)?;
            self.namespaces.get(index).ok_or(Status::INVALID_NAMESPACE)
        };
        let data = match sqe.dw10().to_le_bytes()[0] {
            0x00 => identify::namespace(namespace()?),
            0x01 => identify::controller(&self.names, &self.limits, self.namespaces.len()),
            0x02 => identify::active_list(nsid, self.namespaces.len())?,
            0x03 => identify::descriptors(namespace()?),
            // Linux asks from version 1.2 on; the NVM command set has no such limits to tell.
            IO_COMMAND_SET_NAMESPACE if command_set == 0 => {
                namespace()?;
                vec![0; identify::IDENTIFY_LEN]
            }
            IO_COMMAND_SET_CONTROLLER if command_set == 0 => vec![0; identify::IDENTIFY_LEN],
            _ => return Err(Status::INVALID_FIELD),
        };
        self.send(sqe, &data)
    }

    /// Get Log Page (5.14).
    fn get_log_page(&mut self, sqe: &Sqe) -> Result<(), Status> {
        const RETAIN_EVENT: u32 = 1 << 15;
        let log = sqe.dw10().to_le_bytes()[0];
        let dwords = u64::from(high(sqe.dw10())) | u64::from(low(sqe.dw11())) << 16;
        let len = (dwords + 1) * 4;
        let offset = u64::from(sqe.dw12()) | u64::from(sqe.dw13()) << 32;
        let page = self.logs.page(log, sqe.nsid())?;
        if len > self.limits.max_transfer || offset > page.len() as u64 || offset & 3 != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let from = usize::try_from(offset).ok().and_then(|offset| page.get(offset..));
        let mut data = from.unwrap_or(&[]).to_vec();
        data.resize(usize::try_from(len).map_err(|_| Status::INVALID_FIELD)?, 0);
        self.send(sqe, &data)?;
        if sqe.dw10() & RETAIN_EVENT == 0 {
            self.events.log_read(log);
        }
        Ok(())
    }

    /// Abort (5.1). Commands execute as they are fetched, so only an asynchronous event request
    /// can be found; bit 0 of the result says "not aborted".
    fn abort(&mut self, sqe: &Sqe) -> u32 {
        const NOT_ABORTED: u32 = 1;
        let (queue, cid) = (low(sqe.dw10()), high(sqe.dw10()));
        // Two completions must fit: the victim's comes first.
        let room = self.completion_queue(0).is_some_and(|cq| cq.room() >= 2);
        if queue != 0 || !room || !self.events.abort(cid) {
            return NOT_ABORTED;
        }
        let sq_head = self.submission_queue(0).map_or(0, SubmissionQueue::head);
        let status = Status::ABORT_REQUESTED;
        self.completions.push(Completion { result: 0, sq_head, sqid: 0, cid, status });
        0
    }

    /// Set Features (5.21).
    fn set_features(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        let mut data = [0; TIMESTAMP_LEN];
        if Features::takes_data(sqe) {
            let command = CommandData { queue: 0, sqe };
            self.mover.prepare(&self.bus, command, self.page_size, data.len() as u64)?;
            self.mover.get(&self.bus, command, &mut data)?;
        }
        let queues = self.sqs.iter().skip(1).flatten().count();
        let queues_exist = queues != 0 || self.cqs.iter().skip(1).flatten().next().is_some();
        self.features.set(sqe, data, queues_exist)
    }

    /// Get Features (5.13).
    fn get_features(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        match self.features.get(sqe)? {
            Answer::Dword(value) => Ok(value),
            Answer::Timestamp(data) => self.send(sqe, &data).map(|()| 0),
        }
    }

    /// Writes `data` to the buffer of an admin command.
    fn send(&mut self, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        let command = CommandData { queue: 0, sqe };
        self.mover.prepare(&self.bus, command, self.page_size, data.len() as u64)?;
        self.mover.put(&self.bus, command, data)
    }

    /// The place of namespace `nsid`, 1 to the number of namespaces.
    pub(crate) fn namespace_index(&self, nsid: u32) -> Option<usize> {
        let index = usize::try_from(nsid.checked_sub(1)?).ok()?;
        (nsid != ALL_NAMESPACES && index < self.namespaces.len()).then_some(index)
    }
}
