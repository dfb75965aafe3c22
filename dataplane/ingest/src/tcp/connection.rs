//! One stream after its handshake: receives frames, places payload in the log, sends acks. Owns no loop and
//! never blocks; a worker drives it.

mod close;
mod receive;
mod replies;
mod ring;
mod spilled;
mod state;
mod timers;

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use penstock_log::{Log, Writer};
use penstock_runtime::profile::Tick;

pub(super) use self::close::CloseReason;
use self::replies::Replies;
pub(super) use self::spilled::SCRATCH_LEN;
use self::state::State;
use super::worker::WorkerConfig;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::admission::Admission;
use crate::session::buffers::EffectiveBuffers;
use crate::session::claims::Claimant;
use crate::session::commit::Committed;
use crate::session::frame_parser::FrameParser;
use crate::session::stats::{Shared, WorkerStats};

/// What a worker lends to the connection that it drives.
pub(super) struct Context<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) stats: &'a mut WorkerStats,
    pub(super) first_frame: &'a mut Option<Tick>,
    pub(super) last_commit: &'a mut Option<Tick>,
    pub(super) shared: &'a Shared,
    pub(super) config: &'a WorkerConfig,
    /// [`SCRATCH_LEN`] bytes.
    pub(super) scratch: &'a mut [u8],
    /// Round of the worker's loop.
    pub(super) round: u64,
    pub(super) now: Instant,
}

/// What a connection needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// A readable socket.
    Readable,
    /// Another call: the socket has more data, but other connections come first.
    Yield,
    /// Room in the ring or progress of the frontier: the worker tries again soon.
    Space,
    /// To acknowledge, unless more data arrives first.
    Ack,
    /// Nothing: the stream has ended.
    Nothing,
}

/// An open stream.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: TcpStream,
    peer: SocketAddr,
    buffers: EffectiveBuffers,
    admission: Admission,
    claimant: Claimant,
    /// Since when its batch has to leave the ring but gets no memory.
    spill_denied_since: Option<Instant>,
    state: State,
    parser: FrameParser,
    /// Sequence number of the next batch, which is the number of committed ones.
    next_seq: u64,
    /// Index of the last committed batch, if readers could not see it at the last check.
    invisible: Option<u64>,
    replies: Replies,
    last_progress: Instant,
    committed: Committed,
    failure: Option<String>,
}

impl Connection {
    pub(super) fn new(accepted: AcceptedStream, shared: &Shared, now: Instant) -> Self {
        let AcceptedStream {
            socket,
            peer,
            buffers,
            admission,
            keys,
        } = accepted;
        let first_batch = admission.lease.committed();
        Self {
            socket,
            peer,
            buffers,
            claimant: shared.claims.claimant(&admission.log, &admission.tenant),
            spill_denied_since: None,
            admission,
            state: State::Header,
            replies: Replies::new(keys.clone(), first_batch),
            parser: FrameParser::new(keys),
            next_seq: first_batch,
            invisible: None,
            last_progress: now,
            committed: Committed::default(),
            failure: None,
        }
    }

    /// Receives, commits and acknowledges as far as possible without waiting.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) -> Result<Need, CloseReason> {
        let need = match self.receive(cx) {
            Err(CloseReason::Fault(fault, text)) => {
                self.fail(cx, fault, text);
                Ok(Need::Readable)
            }
            other => other,
        };
        match need {
            Ok(Need::Yield) if self.may_ack_later() => return Ok(Need::Yield),
            Ok(Need::Readable) if self.may_ack_later() => return Ok(Need::Ack),
            _ => {}
        }
        // Even if the peer is gone, committed batches are acknowledged if possible.
        let acknowledged = self.acknowledge(cx);
        match (need?, acknowledged?) {
            (need, Need::Readable) => Ok(need),
            (_, other) => Ok(other),
        }
    }

    /// Whether it waits for room in the shared buffer.
    pub(super) fn is_blocked(&self) -> bool {
        self.state.is_blocked()
    }

    pub(super) fn log(&self) -> &Arc<Log> {
        &self.admission.log
    }
}
