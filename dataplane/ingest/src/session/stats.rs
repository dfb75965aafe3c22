//! What both paths count: per process, per worker, per stream.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use penstock_wire::handshake::Path;
use serde::Serialize;
use tracing::{debug, info};

use super::buffers::EffectiveBuffers;
use crate::session::admission::Admission;
use crate::session::claims::Claims;
use crate::session::commit::Committed;
use crate::session::log_quota::LogQuota;
use penstock_runtime::poison::lock;
use penstock_runtime::profile::{Stage, StageTimer};

/// Number of ended connections that the report lists.
const MAX_ENDED_CONNECTIONS: usize = 4096;

/// Stages of a batch in the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathStage {
    /// Receiving and checking a batch header that did not arrive together with a payload.
    DrainHeader,
    /// Reserving room in the shared buffer.
    ReserveLogSpace,
    /// Receiving payload into its final place.
    DrainPayloadToBuffer,
    /// Verifying, if enabled, and publishing.
    Commit,
    /// Sending acks.
    SendAck,
}

impl Stage for PathStage {
    const ALL: &'static [Self] = &[
        Self::DrainHeader,
        Self::ReserveLogSpace,
        Self::DrainPayloadToBuffer,
        Self::Commit,
        Self::SendAck,
    ];

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        match self {
            Self::DrainHeader => "DrainHeader",
            Self::ReserveLogSpace => "ReserveLogSpace",
            Self::DrainPayloadToBuffer => "DrainPayloadToBuffer",
            Self::Commit => "Commit",
            Self::SendAck => "SendAck",
        }
    }
}

/// Events over the life of the process, counted where they happen and read by the report.
#[derive(Debug, Default, Serialize)]
pub struct Counters {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Streams opened.
    pub streams_opened: AtomicU64,
    /// Remote subscribers admitted.
    pub subscribers_opened: AtomicU64,
    /// Streams and subscribers refused with a reason.
    pub streams_refused: AtomicU64,
    /// Of these, peers without a key that the broker takes.
    pub unauthenticated: AtomicU64,
    /// Of these, peers that may not publish to the topic or read it.
    pub not_permitted: AtomicU64,
    /// Connections dropped because their first bytes were not this protocol's.
    pub garbage: AtomicU64,
    /// Connections that did not complete their hello in time.
    pub handshake_timeouts: AtomicU64,
    /// Pending connections dropped to make room for newer ones.
    pub handshake_evictions: AtomicU64,
    /// Connections that ended before their hello was complete.
    pub handshake_closed: AtomicU64,
    /// Times that accept failed for lack of descriptors or memory.
    pub accept_failures: AtomicU64,
    /// Streams that ended with an end frame and a last ack.
    pub streams_completed: AtomicU64,
    /// Streams whose connection ended inside a batch or without an end frame.
    pub streams_cut: AtomicU64,
    /// Streams ended for breaking the protocol.
    pub protocol_errors: AtomicU64,
    /// Streams ended for a wrong checksum.
    pub checksum_errors: AtomicU64,
    /// Streams ended for a frame with an invalid tag (`--packet-auth`).
    pub forged: AtomicU64,
    /// Streams ended for stalling inside a batch.
    pub stalled: AtomicU64,
    /// Batches moved out of the ring because their publisher was a round of the ring behind.
    pub evacuated_batches: AtomicU64,
    /// Times that a batch had to wait for room in the shared buffer.
    pub waits_for_space: AtomicU64,
    /// Streams ended because they were unused and others needed their places.
    pub stream_evictions: AtomicU64,
    /// Registered readers that died without leaving.
    pub readers_lost: AtomicU64,
    /// Times that a registered reader was alive but read nothing for --reader-timeout and blocked its
    /// log.
    pub readers_stalled: AtomicU64,
    /// Of these, times that the broker evicted the reader.
    pub readers_evicted: AtomicU64,
    /// Logs that were deleted, replaced or truncated while the broker wrote them.
    pub logs_lost: AtomicU64,
    /// Reader registries that were deleted or replaced while their log was not.
    pub registries_lost: AtomicU64,
    /// Batches received outside the ring because the share of their host, of their key or of all
    /// publishers was used up.
    pub claims_denied: AtomicU64,
    /// Bytes now held outside the rings for incomplete batches, over both paths.
    pub evacuated_bytes: AtomicU64,
}

impl Counters {
    /// Adds one.
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// One connection, for the report.
#[derive(Debug, Clone, Serialize)]
pub struct ConnectionReport {
    /// Publisher's address.
    pub peer: SocketAddr,
    /// Path of its payload: tcp or xdp.
    pub path: &'static str,
    /// Topic.
    pub topic: String,
    /// Session key; it names the session in the log.
    pub session: String,
    /// Stream inside the session.
    pub stream: u32,
    /// Socket buffers.
    #[serde(flatten)]
    pub buffers: EffectiveBuffers,
    /// Batches committed.
    pub batches: u64,
    /// Message bytes committed, without framing.
    pub payload_bytes: u64,
    /// How it ended.
    pub ended: String,
}

impl ConnectionReport {
    /// The report about an ended stream.
    pub(crate) fn new(
        peer: SocketAddr,
        path: Path,
        admission: &Admission,
        buffers: EffectiveBuffers,
        committed: &Committed,
        ended: String,
    ) -> Self {
        Self {
            peer,
            path: path.name(),
            topic: admission.topic.clone(),
            session: format!("{:016x}", admission.session),
            stream: admission.stream,
            buffers,
            batches: committed.batches,
            payload_bytes: committed.payload_bytes,
            ended,
        }
    }
}

/// State that all threads of both paths share.
#[derive(Debug, Default)]
pub struct Shared {
    /// Counters.
    pub counters: Counters,
    /// Limits on what publishers take before they have sent it.
    pub(crate) claims: Claims,
    /// Quota of log lines about peers.
    pub(crate) lines: LogQuota,
    connections: Mutex<VecDeque<ConnectionReport>>,
}

impl Shared {
    /// Whether a line about a peer may be logged: peers cause them, so their number is limited.
    #[must_use]
    pub fn allows_line(&self) -> bool {
        self.lines.allows()
    }

    /// Logs the end of a stream and remembers it for the report.
    pub(crate) fn stream_ended(&self, report: ConnectionReport, is_complete: bool) {
        if is_complete {
            debug!(peer = %report.peer, stream = report.stream, "completed");
        } else if self.lines.allows() {
            info!(
                peer = %report.peer,
                stream = report.stream,
                batches = report.batches,
                "stream ended: {}",
                report.ended
            );
        }
        self.remember(report);
    }

    /// Keeps an ended connection for the report; drops the oldest one if there are too many.
    fn remember(&self, connection: ConnectionReport) {
        let mut list = lock(&self.connections);
        if list.len() == MAX_ENDED_CONNECTIONS {
            list.pop_front();
        }
        list.push_back(connection);
    }

    /// Connections that have ended, oldest first.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionReport> {
        lock(&self.connections).iter().cloned().collect()
    }
}

/// Counters of one worker.
#[derive(Debug, Clone, Default)]
pub struct WorkerStats {
    /// Time per stage.
    pub stages: StageTimer<PathStage>,
    /// Nanoseconds from the first frame to the last commit.
    pub active_ns: u64,
    /// Batches committed.
    pub batches: u64,
    /// Successful receive calls.
    pub recv_calls: u64,
    /// Bytes received.
    pub recv_bytes: u64,
    /// Receive calls that found nothing.
    pub eagain: u64,
    /// Times that the worker waited for sockets.
    pub polls: u64,
}

impl WorkerStats {
    /// Adds another worker's figures; active times add up, so percentages are of thread time.
    pub fn merge(&mut self, other: &Self) {
        self.stages.merge(&other.stages);
        self.active_ns += other.active_ns;
        self.batches += other.batches;
        self.recv_calls += other.recv_calls;
        self.recv_bytes += other.recv_bytes;
        self.eagain += other.eagain;
        self.polls += other.polls;
    }
}
