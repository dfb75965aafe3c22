//! One stream in its worker: places packets in the log, commits complete batches, sends ACKs, answers the end
//! of the stream. Owns no loop and never blocks.

mod acks;
mod close;
mod commit;
mod memory;
mod placement;
mod readers;
mod receive;
mod spilled;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use penstock_auth::PacketKeys;
use penstock_log::Writer;
use penstock_transport::{Limits, Nanos, Receiver, Timestamp};
use penstock_wire::packet::{BatchInfo, StreamKey};
use penstock_wire::reply::Fault;

use self::acks::AckSchedule;
use self::commit::CommitQueue;
use self::memory::StreamMemory;
use self::placement::Placement;
use self::readers::ReaderWait;
use self::spilled::SpillScope;
use super::ack_route::{AckRoute, Arrival};
use super::close_reason::CloseReason;
use super::control_connection::ControlConnection;
use super::stats::XdpStats;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::admission::{Admission, REVOKED};
use crate::session::buffers::EffectiveBuffers;
use crate::session::claims::{self, Claimant, Claims};
use crate::session::stats::WorkerStats;
use crate::session::stream_filter::FilterEntry;

/// Interval of the checks for overdue batches and for an idle stream.
const OVERDUE_CHECK_INTERVAL: Nanos = Nanos::from_millis(250);

/// What a worker lends to the stream that it drives.
pub(super) struct Context<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) stats: &'a mut WorkerStats,
    pub(super) xdp: &'a mut XdpStats,
    pub(super) verify: bool,
    pub(super) idle_timeout: Nanos,
    pub(super) now: Timestamp,
}

/// An open stream.
#[derive(Debug)]
pub(super) struct Stream {
    filter_entry: FilterEntry,
    pub(super) control: ControlConnection,
    peer: SocketAddr,
    buffers: EffectiveBuffers,
    admission: Admission,
    /// Keys of its packets, if they are authenticated.
    pub(super) keys: Option<Arc<PacketKeys>>,
    claimant: Claimant,
    receiver: Receiver<Placement>,
    memory: StreamMemory,
    /// Whether open batches outside the ring have room in it, or wait for room.
    has_unsettled: bool,
    /// Since when a batch has to leave the ring but gets no memory.
    spill_denied_since: Option<Timestamp>,
    readers: ReaderWait,
    commits: CommitQueue,
    acks: AckSchedule,
    pub(super) route: AckRoute,
    last_packet_at: Timestamp,
    overdue_checked_at: Timestamp,
    /// Number of batches committed over this connection at that check.
    batches_at_check: u64,
    /// Number of batches of the whole stream, once the publisher has ended it.
    end: Option<u64>,
}

impl Stream {
    pub(super) fn new(
        accepted: AcceptedStream,
        filter_entry: FilterEntry,
        claims: &Claims,
        rx_socket: usize,
        window: u64,
        now: Timestamp,
    ) -> Self {
        let AcceptedStream {
            socket,
            peer,
            buffers,
            admission,
            keys,
        } = accepted;
        let first = admission.lease.committed();
        let limits = Limits {
            max_payload: admission.max_payload,
            window,
        };
        let key = filter_entry.stream();
        Self {
            filter_entry,
            control: ControlConnection::new(socket, keys.clone()),
            peer,
            buffers,
            keys,
            claimant: claims.claimant(&admission.log, &admission.tenant),
            admission,
            receiver: Receiver::new(key, first, limits, now),
            memory: StreamMemory::default(),
            has_unsettled: false,
            spill_denied_since: None,
            readers: ReaderWait::new(now),
            commits: CommitQueue::new(first),
            acks: AckSchedule::new(first),
            route: AckRoute::new(peer.ip(), rx_socket),
            last_packet_at: now,
            overdue_checked_at: now,
            batches_at_check: 0,
            end: None,
        }
    }

    pub(super) fn key(&self) -> StreamKey {
        self.filter_entry.stream()
    }

    pub(super) fn set_window(&mut self, window: u64) {
        self.receiver.set_window(window);
    }

    /// Whether a packet is the newest: a repeated one neither moves the stream nor keeps it alive.
    pub(super) fn is_newest(&self, packet: u64) -> bool {
        self.receiver.is_newest(packet)
    }

    /// Records the source of the newest packet; see [`AckRoute::update_source`].
    pub(super) fn update_source(&mut self, arrival: Arrival<'_>) -> bool {
        self.last_packet_at = arrival.now;
        self.route.update_source(arrival)
    }

    /// Whether it waits for room in the shared buffer.
    pub(super) fn is_blocked(&self) -> bool {
        !self.commits.is_empty() || self.readers.is_waiting()
    }

    /// Settles batches, and handles timeouts and the control connection; called about once a millisecond.
    pub(super) fn tick(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        self.check_end_conditions(cx)?;
        self.check_readers(cx);
        self.memory.reset_denials();
        if self.has_unsettled {
            self.settle_open(cx);
        }
        if cx.now - self.overdue_checked_at >= OVERDUE_CHECK_INTERVAL {
            self.overdue_checked_at = cx.now;
            self.check_overdue(cx)?;
            self.shrink_if_idle();
        }
        let half = cx.writer.log().geometry().ring_bytes() / 2;
        // While readers block the ring, batches that leave it are of no use to others.
        if cx.writer.oldest_open_age() > half && !cx.writer.waits_for_readers(cx.now.as_nanos()) {
            self.spill_slow(cx, SpillScope::HalfRoundOld)?;
        }
        self.commit(cx)?;
        self.read_control(cx)?;
        self.answer_end()
    }

    /// Ends the stream if its publisher is gone, another connection has it, or the broker cannot serve it.
    fn check_end_conditions(&mut self, cx: &Context<'_>) -> Result<(), CloseReason> {
        if self.admission.lease.is_superseded() {
            return Err(CloseReason::Superseded);
        }
        if self.admission.lease.is_revoked() {
            return Err(CloseReason::Fault(Fault::Stalled, REVOKED.to_owned()));
        }
        if let Some(lost) = cx.writer.log().lost() {
            // A committed batch that was not acknowledged counts as never received.
            self.commits.roll_back(self.acks.reported());
            self.admission.lease.set_committed(self.acks.reported());
            return Err(CloseReason::Fault(lost.fault(), lost.reason.clone()));
        }
        // A live publisher sends something every second; one whose host has failed closes no connection.
        if cx.now - self.last_packet_at > cx.idle_timeout {
            let text = format!("no packet came for {} s", cx.idle_timeout.as_secs());
            return Err(CloseReason::Fault(Fault::Stalled, text));
        }
        Ok(())
    }

    /// Checks whether the stream waits for readers. Its publisher learns of each change at once, because
    /// it gets no credit meanwhile.
    fn check_readers(&mut self, cx: &mut Context<'_>) {
        let lacks_room = !self.commits.is_empty() || self.memory.is_short;
        let is_waiting = lacks_room && cx.writer.waits_for_readers(cx.now.as_nanos());
        if is_waiting {
            self.spill_denied_since = None;
        }
        if self.readers.update(is_waiting, cx.now) {
            self.acks.at_once(cx.now);
        }
    }

    /// Frees the memory that a burst needed once no batch has arrived for a while.
    fn shrink_if_idle(&mut self) {
        let batches = self.commits.here().batches;
        if batches == self.batches_at_check && self.commits.is_empty() {
            self.commits.shrink();
            self.receiver.shrink();
        }
        self.batches_at_check = batches;
    }

    /// Ends the stream if a batch is overdue: neither pings nor packets of other batches extend its
    /// time. While the stream waits for room, its publisher may be unable to send more.
    fn check_overdue(&mut self, cx: &Context<'_>) -> Result<(), CloseReason> {
        if self.is_blocked() {
            return Ok(());
        }
        let clock = self.readers.clock(cx.now);
        let stall_timeout = Duration::from(cx.idle_timeout);
        for batch in self.receiver.open_batches() {
            let elapsed = batch.placement.age(clock);
            if claims::is_overdue(elapsed, batch.received, stall_timeout) {
                let BatchInfo { seq, len, .. } = *batch.info;
                let text = claims::overdue_text(seq, batch.received, len, elapsed);
                return Err(CloseReason::Fault(Fault::Stalled, text));
            }
        }
        Ok(())
    }
}
