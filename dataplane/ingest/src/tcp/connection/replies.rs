//! Acks: when one is due, and replies that wait for room in the socket.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use penstock_auth::PacketKeys;
use penstock_wire::handshake::AckLevel;
use penstock_wire::reply::Fault;

use super::close::CloseReason;
use super::state::State;
use super::{Connection, Context, Need};
use crate::session::reply_queue::ReplyQueue;
use crate::session::stats::PathStage;

/// Payload bytes after which an ack is sent although more data is arriving. An ack passes both network
/// stacks, which costs as much as receiving some 50 kB.
const ACK_EVERY_BYTES: u64 = 512 << 10;

/// The replies of a connection.
#[derive(Debug)]
pub(super) struct Replies {
    queue: ReplyQueue,
    is_flushed: bool,
    /// Number of batches in the last ack.
    acked: u64,
    /// Payload bytes committed since.
    unacked_bytes: u64,
    /// When the publisher last learned that the broker waits for room.
    last_heartbeat: Option<Instant>,
}

impl Replies {
    pub(super) fn new(keys: Option<Arc<PacketKeys>>, first_batch: u64) -> Self {
        Self {
            queue: ReplyQueue::new(keys),
            is_flushed: true,
            acked: first_batch,
            unacked_bytes: 0,
            last_heartbeat: None,
        }
    }

    pub(super) fn acked(&self) -> u64 {
        self.acked
    }

    pub(super) fn note_commit(&mut self, bytes: u32) {
        self.unacked_bytes += u64::from(bytes);
    }

    /// Queues the last reply.
    pub(super) fn error(&mut self, fault: Fault, committed: u64, text: &str) {
        self.queue.error(fault, committed, text);
        self.is_flushed = false;
    }

    /// Queues a heartbeat if the last one is older than `interval`.
    pub(super) fn heartbeat(&mut self, now: Instant, interval: Duration) -> bool {
        let is_due = self.last_heartbeat.is_none_or(|at| now - at >= interval);
        if is_due {
            self.last_heartbeat = Some(now);
            self.queue.ack(self.acked, true);
        }
        is_due
    }

    fn ack(&mut self, committed: u64) {
        (self.acked, self.unacked_bytes) = (committed, 0);
        self.queue.ack(committed, false);
    }

    fn flush(&mut self, socket: &TcpStream) -> Result<(), CloseReason> {
        self.is_flushed = self.queue.flush(socket).map_err(CloseReason::Io)?;
        Ok(())
    }
}

impl Connection {
    /// Whether an ack for few bytes is pending, and nothing else has to be sent.
    pub(super) fn may_ack_later(&self) -> bool {
        self.replies.acked < self.next_seq
            && self.admission.ack == AckLevel::Committed
            && self.replies.unacked_bytes < ACK_EVERY_BYTES
            && self.replies.is_flushed
            && !self.state.is_failed()
    }

    /// Acknowledges visible batches; says what the connection needs besides more data.
    pub(in crate::tcp) fn acknowledge(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Result<Need, CloseReason> {
        self.send_replies(cx)?;
        match self.state {
            State::Ended if self.replies.is_flushed && self.replies.acked == self.next_seq => {
                Err(CloseReason::Completed)
            }
            State::Ended if self.invisible.is_none() => Ok(Need::Nothing),
            State::AwaitingGrant { .. } | State::AwaitingShare { .. } => Ok(Need::Space),
            _ if self.invisible.is_some() => Ok(Need::Space),
            _ => Ok(Need::Readable),
        }
    }

    /// Acknowledges visible batches, and sends queued replies.
    pub(super) fn send_replies(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        let frontier = |index| cx.writer.frontier() > index;
        if self.invisible.is_some_and(frontier) {
            self.invisible = None;
        }
        // The end of a stream is confirmed at every ack level, even if the stream was empty.
        let has_ended = matches!(self.state, State::Ended);
        let is_due = has_ended
            || (self.admission.ack == AckLevel::Committed && self.replies.acked < self.next_seq);
        if is_due && self.invisible.is_none() && !self.state.is_failed() {
            let start = cx.stats.stages.now();
            self.replies.ack(self.next_seq);
            self.flush()?;
            cx.stats.stages.lap(PathStage::SendAck, start);
            return Ok(());
        }
        if self.replies.is_flushed {
            Ok(())
        } else {
            self.flush()
        }
    }

    pub(super) fn flush(&mut self) -> Result<(), CloseReason> {
        self.replies.flush(&self.socket)?;
        if self.replies.is_flushed && self.state.is_failed() {
            let shut = self.socket.shutdown(Shutdown::Write);
            shut.map_err(CloseReason::Io)?;
        }
        Ok(())
    }

    /// Whether replies wait for room in the socket.
    pub(in crate::tcp) fn wants_to_write(&self) -> bool {
        !self.replies.is_flushed
    }
}
