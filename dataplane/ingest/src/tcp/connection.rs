//! One stream after its handshake: frames come in, payload goes to its place in the log, acks go
//! out. Owns no loop and never blocks; a worker drives it.

mod batch;
mod close;
mod receive;
mod replies;
mod ring;
mod spilled;
mod timers;

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use penstock_auth::PacketKeys;
use penstock_log::Writer;
use penstock_runtime::profile::Tick;
use penstock_wire::batch::HEADER_LEN;
use penstock_wire::packet::TAG_LEN;

use self::batch::State;
pub(super) use self::close::CloseReason;
pub(super) use self::spilled::SCRATCH;
use super::worker::WorkerConfig;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::admission::Admission;
use crate::session::buffers::EffectiveBuffers;
use crate::session::claims::Claimant;
use crate::session::commit::Committed;
use crate::session::reply_queue::ReplyQueue;
use crate::session::stats::{Shared, WorkerStats};

/// What a worker lends to the connection that it drives.
pub(super) struct Context<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) stats: &'a mut WorkerStats,
    pub(super) first_frame: &'a mut Option<Tick>,
    pub(super) last_commit: &'a mut Option<Tick>,
    pub(super) shared: &'a Shared,
    pub(super) config: &'a WorkerConfig,
    /// [`SCRATCH`] bytes.
    pub(super) scratch: &'a mut [u8],
    /// Of the worker's loop.
    pub(super) round: u64,
    pub(super) now: Instant,
}

/// What a connection needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// More bytes from its socket.
    Readable,
    /// Another turn: its socket holds more.
    Turn,
    /// Room in the ring, or the frontier: ask again soon.
    Space,
    /// To acknowledge, unless more bytes come first.
    Ack,
    /// Nothing: it is over.
    Nothing,
}

/// An open stream.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: TcpStream,
    peer: SocketAddr,
    buffers: EffectiveBuffers,
    pub(super) admission: Admission,
    claimant: Claimant,
    /// Since when its batch must leave the ring but gets no memory.
    evicted: Option<Instant>,
    state: State,
    /// Header of the next frame, with its tag.
    header: [u8; HEADER_LEN + TAG_LEN],
    header_len: usize,
    header_filled: usize,
    /// Keys for the tags of frames, if there are any, and the number of frames so far.
    keys: Option<Arc<PacketKeys>>,
    verified: u64,
    /// Header and tag of the batch that is being received; the next header may arrive with its end.
    begun: [u8; HEADER_LEN + TAG_LEN],
    /// Sequence number of the next batch, which is the number of committed ones.
    next_seq: u64,
    /// Index of the last committed batch, if it was not yet visible when last looked at.
    unseen: Option<u64>,
    /// What the last ack said.
    acked: u64,
    /// Payload bytes committed since.
    unacked_bytes: u64,
    replies: ReplyQueue,
    outbox_empty: bool,
    last_progress: Instant,
    /// When the publisher was last told that the broker waits for room.
    last_heartbeat: Option<Instant>,
    committed: Committed,
    failure: Option<String>,
}

impl Connection {
    pub(super) fn new(opened: AcceptedStream, shared: &Shared, now: Instant) -> Self {
        let AcceptedStream {
            socket,
            peer,
            buffers,
            admission,
            keys,
        } = opened;
        let first_batch = admission.lease.committed();
        Self {
            socket,
            peer,
            buffers,
            claimant: shared.claims.claimant(&admission.log, &admission.tenant),
            evicted: None,
            admission,
            state: State::Header,
            header: [0; HEADER_LEN + TAG_LEN],
            header_len: HEADER_LEN + if keys.is_some() { TAG_LEN } else { 0 },
            header_filled: 0,
            verified: 0,
            begun: [0; HEADER_LEN + TAG_LEN],
            next_seq: first_batch,
            unseen: None,
            acked: first_batch,
            unacked_bytes: 0,
            replies: ReplyQueue::new(keys.clone()),
            keys,
            outbox_empty: true,
            last_progress: now,
            last_heartbeat: None,
            committed: Committed::default(),
            failure: None,
        }
    }

    /// Receives, commits and acknowledges as far as it goes without waiting.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) -> Result<Need, CloseReason> {
        let need = match self.receive(cx) {
            Err(CloseReason::Fault(fault, text)) => {
                self.fail(cx, fault, text);
                Ok(Need::Readable)
            }
            other => other,
        };
        match need {
            Ok(Need::Turn) if self.may_ack_later() => return Ok(Need::Turn),
            Ok(Need::Readable) if self.may_ack_later() => return Ok(Need::Ack),
            _ => {}
        }
        // What was committed before the peer went away is still acked, if it can be.
        let acknowledged = self.acknowledge(cx);
        match (need?, acknowledged?) {
            (need, Need::Readable) => Ok(need),
            (_, other) => Ok(other),
        }
    }

    /// Whether it waits for room in the shared buffer.
    pub(super) fn is_blocked(&self) -> bool {
        matches!(self.state, State::Waiting { .. } | State::Starved { .. })
    }

    pub(super) fn log(&self) -> &Arc<penstock_log::Log> {
        &self.admission.log
    }
}
