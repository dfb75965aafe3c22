//! One stream in its worker: packets go to their place in the log, complete batches are committed,
//! acks and the end of the stream are told. Owns no loop and never blocks.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use penstock_auth::PacketKeys;
use penstock_log::{Reservation, Writer};
use penstock_transport::{ArrivalOrder, DropReason, Limits, Nanos, OpenBatch, Receiver, Timestamp};
use penstock_wire::handshake::Path;
use penstock_wire::packet::{BatchInfo, Chunk, Content, Data, Feedback, MAX_ACK_LEN, StreamKey};
use penstock_wire::reply::Fault;

use super::ack_route::{AckRoute, Arrival};
use super::close_reason::CloseReason;
use super::control_connection::ControlConnection;
use super::stats::XdpStats;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::admission::{Admission, REVOKED};
use crate::session::buffers::EffectiveBuffers;
use crate::session::claims::{
    self, ClaimPriority, Claimant, Claims, MemoryCharge, RingClaim, Spill, WaitingBatch,
};
use crate::session::commit::Committed;
use crate::session::stats::{ConnectionReport, PathStage, WorkerStats};
use crate::session::stream_filter::FilterEntry;

/// An ack is sent after so many packets, if nothing else asks for one earlier.
const ACK_EVERY: u32 = 32;
/// An ack waits no longer than this.
const ACK_DELAY: Nanos = Nanos::from_micros(100);

/// Maximum number of complete batches that wait for room in the ring; others stay where they are.
const MAX_COMPLETE: usize = 64;
/// Initial number of places for them.
const FIRST_COMPLETE: usize = 8;
/// Open batches to process per millisecond while the ring has no room: the next ones in order.
const LOOKED_AFTER: usize = 64;
/// Interval of the check for overdue batches.
const OVERDUE_EVERY: Nanos = Nanos::from_millis(250);
/// Memory for the state of open batches is charged in steps of this size, bytes.
const MEMORY_STEP: usize = 16 << 10;
/// Time limit for a batch that must leave the ring to get memory outside it.
const EVICTION_WAIT: Nanos = Nanos::from_millis(200);

/// Where a batch lies.
#[derive(Debug)]
struct Room {
    /// Its room in the ring, if any, and its claim to that room while it is incomplete.
    reservation: Option<Reservation>,
    claim: Option<RingClaim>,
    /// Its bytes, while they are outside the ring.
    spill: Option<Box<Spill>>,
    /// Whether it has a share of neither ring nor memory.
    waiting: Option<WaitingBatch>,
    /// When its first packet arrived, on the stream's own clock.
    since: Timestamp,
}

impl Room {
    /// How long the batch has been arriving. The whole time since the last tick counts as blocked, so a
    /// batch that began within it may seem to begin later than now.
    fn age(&self, clock: Timestamp) -> Duration {
        (clock - self.since).into()
    }
}

/// What a worker lends to the stream that it drives.
pub(super) struct Context<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) stats: &'a mut WorkerStats,
    pub(super) xdp: &'a mut XdpStats,
    pub(super) verify: bool,
    pub(super) idle_timeout: Nanos,
    pub(super) now: Timestamp,
}

/// Which slow batches must leave the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaves {
    /// Those that are half a round old.
    Old,
    /// All of them.
    Slow,
}

/// What a stream holds that others need.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Reclaimable {
    /// Bytes of the ring that its slow batches occupy.
    pub(super) ring: u64,
    /// Bytes of memory of batches that hardly make progress.
    pub(super) memory: u64,
}

/// An open stream.
#[derive(Debug)]
pub(super) struct Stream {
    filter_entry: FilterEntry,
    pub(super) control: ControlConnection,
    peer: SocketAddr,
    buffers: EffectiveBuffers,
    pub(super) admission: Admission,
    claimant: Claimant,
    receiver: Receiver<Room>,
    /// Memory for the state of open batches, beyond the free allowance of every stream.
    charged: Vec<MemoryCharge>,
    /// Whether a packet of the next batch, or of a later one, was dropped for lack of memory. Similar
    /// packets are dropped as well, until the next tick.
    starved: bool,
    starved_later: bool,
    /// Whether the last request for memory was refused.
    refused: bool,
    /// Whether batches outside the ring have room in it, or wait for it.
    unsettled: bool,
    /// Whether the stream has something to place for which registered readers leave no room.
    waits_for_readers: bool,
    /// How long it has waited for readers, which does not count against its publisher.
    blocked_for: Nanos,
    ticked_at: Timestamp,
    overdue_at: Timestamp,
    /// Since when a batch must leave the ring but gets no memory.
    evicted: Option<Timestamp>,
    /// Keys of its packets, if they are authenticated; and how many ACKs were.
    pub(super) keys: Option<Arc<PacketKeys>>,
    acks: u64,
    /// Complete batches that wait for room in the ring.
    complete: VecDeque<(BatchInfo, Room)>,
    /// Batches committed.
    committed: u64,
    /// Batches that readers see; with index in the log and number of those that they do not yet.
    visible: u64,
    unseen: Option<(u64, u64)>,
    /// Where ACKs go.
    pub(super) route: AckRoute,
    /// When its last packet came.
    heard_at: Timestamp,
    unacked: u32,
    /// When an ack is due at the latest.
    ack_due: Option<Timestamp>,
    told: u64,
    /// Batches that the publisher says the stream has.
    end: Option<u64>,
    /// Committed over this connection.
    committed_here: Committed,
    /// How many batches that were at the last check for overdue ones.
    batches_before: u64,
}

impl Stream {
    pub(super) fn new(
        opened: AcceptedStream,
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
        } = opened;
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
            acks: 0,
            claimant: claims.claimant(&admission.log, &admission.tenant),
            receiver: Receiver::new(key, first, limits, now),
            charged: Vec::new(),
            starved: false,
            starved_later: false,
            refused: false,
            unsettled: false,
            waits_for_readers: false,
            blocked_for: Nanos::ZERO,
            ticked_at: now,
            overdue_at: now,
            evicted: None,
            complete: VecDeque::with_capacity(FIRST_COMPLETE),
            committed: first,
            visible: first,
            unseen: None,
            route: AckRoute::new(peer.ip(), rx_socket),
            heard_at: now,
            unacked: 0,
            ack_due: None,
            told: first,
            end: None,
            committed_here: Committed::default(),
            batches_before: 0,
            admission,
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
        self.heard_at = arrival.now;
        self.route.update_source(arrival)
    }

    /// A packet that only asks for an ack.
    pub(super) fn ping(&mut self, cx: &mut Context<'_>, packet: u64) {
        let newest = self.receiver.is_newest(packet);
        let order = self.receiver.arrived(cx.now, packet);
        cx.xdp.note_order(order);
        cx.xdp.pings += 1;
        if newest {
            self.ack_due = Some(cx.now);
        } else {
            self.ack_later(cx.now);
        }
    }

    /// Within the delay that an ack may have: however many packets are repeated, that many answers.
    fn ack_later(&mut self, now: Timestamp) {
        self.ack_due.get_or_insert(now + ACK_DELAY);
    }

    /// Verifies a packet and places its payload in one pass, if it continues the newest batch in the ring
    /// and came the way of the packet before it, as nearly all do. Returns whether its checksum is right;
    /// `None`, with nothing changed, if it takes [`Self::payload`].
    ///
    /// Bytes of a damaged packet may remain in the ring: behind all that the batch has, where the header
    /// claims to belong and the batch's reservation reaches. They do not count as received, so another
    /// packet overwrites them before the batch is committed, and nobody reads a batch before that. A
    /// stream with keys places nothing before its tag is verified.
    pub(super) fn payload_if_next(
        &mut self,
        cx: &mut Context<'_>,
        arrival: Arrival<'_>,
        header: &Data,
        parts: &[&[u8]],
    ) -> Option<bool> {
        let received = header.parse_unverified(header.rest_len()).ok()?;
        let (Content::Payload(chunk), None) = (received.content, &self.keys) else {
            return None;
        };
        let (packet, len) = (received.packet, header.rest_len() as u32);
        let room = self.receiver.room_for_next(packet, &chunk, len)?;
        let (Some(reservation), None) = (&room.reservation, &room.spill) else {
            return None;
        };
        if !self.route.matches_sender(arrival.frame, arrival.datagram) {
            return None;
        }
        let (mut sum, mut at) = (header.sum_before_payload(), chunk.offset);
        for part in parts {
            sum = cx.writer.place_and_sum(reservation, at, part, sum);
            at += part.len() as u32;
        }
        if sum != header.checksum() {
            return Some(false);
        }
        self.receiver.placed_next(cx.now, packet, len);
        self.heard_at = cx.now;
        self.route.confirm(arrival.socket);
        if let Some(pause) = received.pause {
            cx.xdp.note_pause(pause);
        }
        self.count_placed(cx, ArrivalOrder::InOrder);
        Some(true)
    }

    /// Places a packet's payload; `parts` has `len` bytes.
    pub(super) fn payload(
        &mut self,
        cx: &mut Context<'_>,
        packet: u64,
        chunk: &Chunk,
        parts: &[&[u8]],
        len: u32,
    ) {
        match self.offer(packet, chunk, len) {
            Ok(true) => {}
            Ok(false) => {
                let start = cx.stats.stages.now();
                let room = self.new_room(cx, chunk);
                self.receiver.give_room(&chunk.batch, room);
                cx.stats.stages.lap(PathStage::ReserveLogSpace, start);
            }
            Err(DropReason::Duplicate) => {
                cx.xdp.duplicates += 1;
                // Perhaps the ack was lost.
                self.ack_later(cx.now);
                return;
            }
            Err(DropReason::NoMemory) => return self.refuse(cx),
            Err(_) => {
                cx.xdp.refused += 1;
                return;
            }
        }
        if self.receiver.room(&chunk.batch).spill.is_some() && !self.find_room(chunk, len) {
            return self.refuse(cx);
        }
        let room = self.receiver.room(&chunk.batch);
        let mut at = chunk.offset;
        for part in parts {
            match (&mut room.spill, &room.reservation) {
                (Some(spill), _) => spill.write(at, part),
                (None, Some(reservation)) => cx.writer.place(reservation, at, part),
                (None, None) => unreachable!("a batch is in the ring or outside it"),
            }
            at += part.len() as u32;
        }
        let order = self.receiver.placed(cx.now, packet, chunk, len);
        self.count_placed(cx, order);
    }

    fn count_placed(&mut self, cx: &mut Context<'_>, order: ArrivalOrder) {
        cx.xdp.note_order(order);
        cx.xdp.placed += 1;
        self.unacked += 1;
        if order != ArrivalOrder::InOrder || self.unacked >= ACK_EVERY {
            self.ack_due = Some(cx.now);
        } else {
            self.ack_later(cx.now);
        }
    }

    /// Drops a packet for lack of memory; the publisher retransmits it. An ACK shows that the broker
    /// lives, for all that the publisher sends meanwhile may be dropped.
    fn refuse(&mut self, cx: &mut Context<'_>) {
        cx.xdp.no_memory += 1;
        self.refused = true;
        self.ack_later(cx.now);
    }

    /// Whether to place a packet in a batch that has room, or in one that needs it.
    fn offer(&mut self, packet: u64, chunk: &Chunk, len: u32) -> Result<bool, DropReason> {
        loop {
            match self.receiver.offer(packet, chunk, len) {
                Ok(room) => return Ok(room.is_some()),
                Err(DropReason::NoMemory) if !self.starved => {
                    let step = self.charged.len().max(1) * MEMORY_STEP;
                    let Some(more) = self.claimant.charge(step as u64) else {
                        self.starved = true;
                        return Err(DropReason::NoMemory);
                    };
                    self.charged.push(more);
                    self.allow_memory();
                    self.refused = false;
                }
                Err(refusal) => return Err(refusal),
            }
        }
    }

    fn allow_memory(&mut self) {
        let allowed: u64 = self.charged.iter().map(MemoryCharge::bytes).sum();
        self.receiver.allow_memory(allowed as usize);
    }

    /// Takes room for a batch: in the ring if its share allows, else outside. If others need its room
    /// in the ring, its bytes go outside as well.
    fn new_room(&mut self, cx: &mut Context<'_>, chunk: &Chunk) -> Room {
        let priority = self.claim_priority(chunk);
        let claim = self.claimant.claim(chunk.batch.len, priority);
        let reservation = claim.as_ref().map(|_| cx.writer.reserve(chunk.batch.len));
        let is_granted = reservation
            .as_ref()
            .is_some_and(|reservation| cx.writer.is_granted(reservation));
        let spill = (!is_granted).then(|| {
            cx.xdp.aside += 1;
            self.unsettled = true;
            Box::new(self.claimant.spill())
        });
        Room {
            reservation,
            claim,
            spill,
            waiting: None,
            since: self.clock(cx.now),
        }
    }

    fn claim_priority(&self, chunk: &Chunk) -> ClaimPriority {
        match chunk.batch.seq == self.receiver.committed() {
            true => ClaimPriority::Next,
            false => ClaimPriority::Later,
        }
    }

    /// Ensures that a batch outside the ring has room for a packet: memory, or a place in the ring.
    /// Returns false if there is none.
    fn find_room(&mut self, chunk: &Chunk, len: u32) -> bool {
        let priority = self.claim_priority(chunk);
        let starved = match priority {
            ClaimPriority::Later => &mut self.starved_later,
            ClaimPriority::Next | ClaimPriority::Waiting => &mut self.starved,
        };
        let room = self.receiver.room(&chunk.batch);
        let Some(spill) = &mut room.spill else {
            return true;
        };
        if spill.has(chunk.offset, len) {
            return true;
        }
        if !*starved && spill.reserve(chunk.offset, len, priority).is_ok() {
            self.refused = false;
            return true;
        }
        *starved = true;
        self.unsettled = true;
        if room.reservation.is_none() && priority == ClaimPriority::Next {
            room.waiting.get_or_insert_with(|| self.claimant.wait());
        }
        false
    }

    /// Moves open batches into the ring if they have room there now, and claims room for those that
    /// have no memory.
    fn settle_open(&mut self, cx: &mut Context<'_>) {
        self.unsettled = false;
        for batch in self.receiver.open_batches().take(LOOKED_AFTER) {
            let OpenBatch { info, room, .. } = batch;
            if room.waiting.is_some()
                && let Some(claim) = self.claimant.claim(info.len, ClaimPriority::Waiting)
            {
                room.waiting = None;
                room.claim = Some(claim.with_received_before(batch.received));
                room.reservation = Some(cx.writer.reserve(info.len));
            }
            let is_in_the_ring = settle(cx, info.len, room);
            self.unsettled |= !is_in_the_ring;
        }
        self.refused &= self.unsettled;
    }

    /// Checks whether the stream waits for readers. Its publisher learns of each change at once, because
    /// it gets no credit meanwhile.
    fn look_at_readers(&mut self, cx: &mut Context<'_>) {
        let has_no_room = !self.complete.is_empty() || self.refused;
        let waits = has_no_room && cx.writer.waits_for_readers(cx.now.as_nanos());
        if waits {
            self.blocked_for += cx.now - self.ticked_at;
            self.evicted = None;
        }
        if waits != self.waits_for_readers {
            self.ack_due = Some(cx.now);
        }
        self.waits_for_readers = waits;
        self.ticked_at = cx.now;
    }

    /// The stream's own clock, which stops while it waits for readers.
    fn clock(&self, now: Timestamp) -> Timestamp {
        now - self.blocked_for
    }

    /// Commits what is complete and has room.
    pub(super) fn commit(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        while self.complete.len() < MAX_COMPLETE
            && let Some((info, mut room)) = self.receiver.next_complete()
        {
            // The batch is complete, so it blocks no other.
            room.waiting = None;
            if let Some(claim) = room.claim.take() {
                claim.complete();
            }
            room.reservation
                .get_or_insert_with(|| cx.writer.reserve(info.len));
            self.complete.push_back((info, room));
        }
        while let Some((info, room)) = self.complete.front_mut() {
            if !settle(cx, info.len, room) {
                break;
            }
            let start = cx.stats.stages.now();
            let (info, room) = self.complete.pop_front().expect("looked at above");
            let reservation = room.reservation.expect("the batch is in the ring");
            self.commit_one(cx, &info, reservation)?;
            cx.stats.stages.lap(PathStage::Commit, start);
        }
        if !self.charged.is_empty() && self.receiver.is_empty() {
            self.refused = false;
            self.charged.clear();
            self.allow_memory();
        }
        self.look_at_frontier(cx);
        Ok(())
    }

    fn commit_one(
        &mut self,
        cx: &mut Context<'_>,
        info: &BatchInfo,
        reservation: Reservation,
    ) -> Result<(), CloseReason> {
        let here = &mut self.committed_here;
        let index = here
            .commit(cx.writer, reservation, &self.admission, info, cx.verify)
            .map_err(|text| CloseReason::Fault(Fault::Checksum, text))?;
        self.committed += 1;
        self.refused = false;
        self.unseen = Some((index, self.committed));
        cx.stats.batches += 1;
        Ok(())
    }

    fn look_at_frontier(&mut self, cx: &Context<'_>) {
        if let Some((index, committed)) = self.unseen
            && cx.writer.frontier() > index
        {
            self.unseen = None;
            self.visible = committed;
            self.ack_due = Some(cx.now);
        }
    }

    /// Writes an ACK packet to `frame`, headers and all, if one is due; returns its length.
    pub(super) fn ack(
        &mut self,
        now: Timestamp,
        feedback: &mut Feedback,
        frame: &mut [u8],
    ) -> Option<usize> {
        if self.ack_due.is_none_or(|due| due > now) {
            return None;
        }
        self.ack_due = None;
        self.unacked = 0;
        let template = self.route.template()?;
        self.receiver.feedback(now, self.is_blocked(), feedback);
        feedback.committed = self.visible;
        self.told = self.visible;
        let headers = template.len();
        let (head, rest) = frame.split_at_mut(headers);
        let mut len = feedback.write(&mut rest[..MAX_ACK_LEN]);
        if let Some(keys) = &self.keys {
            self.acks += 1;
            len = keys.seal_ack(self.acks, rest, len);
        }
        template.write(head, &[&rest[..len]]);
        Some(headers + len)
    }

    /// Whether an ack is owed that is not due yet.
    pub(super) fn ack_due(&self) -> Option<Timestamp> {
        self.ack_due
    }

    /// Whether it waits for room in the shared buffer.
    pub(super) fn is_blocked(&self) -> bool {
        !self.complete.is_empty() || self.waits_for_readers
    }

    /// Looks after rooms, time and the control connection; called about once a millisecond.
    pub(super) fn tick(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        if self.admission.lease.is_superseded() {
            return Err(CloseReason::Superseded);
        }
        if self.admission.lease.is_revoked() {
            return Err(CloseReason::Fault(Fault::Stalled, REVOKED.to_owned()));
        }
        if let Some(lost) = cx.writer.log().lost() {
            // A committed batch that was not acknowledged counts as never received.
            self.visible = self.told;
            self.admission.lease.set_committed(self.told);
            return Err(CloseReason::Fault(lost.fault(), lost.reason.clone()));
        }
        // A publisher that lives sends something every second; one whose host went away closes nothing.
        if cx.now - self.heard_at > cx.idle_timeout {
            let text = format!("no packet came for {} s", cx.idle_timeout.as_secs());
            return Err(CloseReason::Fault(Fault::Stalled, text));
        }
        self.look_at_readers(cx);
        (self.starved, self.starved_later) = (false, false);
        if self.unsettled {
            self.settle_open(cx);
        }
        if cx.now - self.overdue_at >= OVERDUE_EVERY {
            self.overdue_at = cx.now;
            self.find_overdue(cx)?;
            self.shrink_if_idle();
        }
        let half = cx.writer.log().geometry().ring_bytes() / 2;
        // While readers hold up the ring, batches that leave it are of no use to others.
        if cx.writer.oldest_open_age() > half && !cx.writer.waits_for_readers(cx.now.as_nanos()) {
            self.leave_ring(cx, Leaves::Old)?;
        }
        self.commit(cx)?;
        self.read_control(cx)?;
        self.answer_end()
    }

    /// Frees the memory that a burst needed once no batch has come for a while.
    fn shrink_if_idle(&mut self) {
        if self.committed_here.batches == self.batches_before && self.complete.is_empty() {
            self.complete.shrink_to(FIRST_COMPLETE);
            self.receiver.shrink();
        }
        self.batches_before = self.committed_here.batches;
    }

    /// Ends the stream if a batch is overdue: neither pings nor packets of other batches extend its
    /// time. While the stream waits for room, its publisher may be unable to send more.
    fn find_overdue(&mut self, cx: &Context<'_>) -> Result<(), CloseReason> {
        if self.is_blocked() {
            return Ok(());
        }
        let clock = self.clock(cx.now);
        let may_stall = Duration::from(cx.idle_timeout);
        for batch in self.receiver.open_batches() {
            let elapsed = batch.room.age(clock);
            if claims::is_overdue(elapsed, batch.received, may_stall) {
                let BatchInfo { seq, len, .. } = *batch.info;
                let text = claims::overdue_text(seq, batch.received, len, elapsed);
                return Err(CloseReason::Fault(Fault::Stalled, text));
            }
        }
        Ok(())
    }

    /// Moves slow batches out of the ring: those that are half a round old, because they block all
    /// others, or all of them, because others wait for a share. Only the bytes received so far take
    /// memory, and none if the batch lies outside the ring already. If no memory is available for a
    /// while, the stream ends in the first case, and in the second if the batch hardly makes progress.
    fn leave_ring(&mut self, cx: &mut Context<'_>, leaves: Leaves) -> Result<(), CloseReason> {
        let clock = self.clock(cx.now);
        let half = cx.writer.log().geometry().ring_bytes() / 2;
        let mut denied = false;
        for batch in self.receiver.open_batches() {
            let Some(reservation) = &batch.room.reservation else {
                continue;
            };
            let elapsed = batch.room.age(clock);
            let goes = leaves == Leaves::Slow || cx.writer.age(reservation) > half;
            if !goes || !claims::is_slow(elapsed, batch.received) {
                continue;
            }
            if batch.room.spill.is_none() {
                let mut spill = Box::new(self.claimant.spill());
                if !spill_parts(cx, reservation, batch.parts, &mut spill) {
                    denied |= leaves == Leaves::Old || claims::is_stalling(elapsed, batch.received);
                    continue;
                }
                cx.xdp.aside += 1;
                batch.room.spill = Some(spill);
            }
            self.unsettled = true;
            if let Some(claim) = batch.room.claim.take() {
                claim.release(batch.received);
            }
            if let Some(reservation) = batch.room.reservation.take() {
                cx.writer.abort(reservation);
            }
        }
        if !denied {
            self.evicted = None;
            return Ok(());
        }
        // Streams with more memory than this one needs may give way.
        if cx.now - *self.evicted.get_or_insert(cx.now) < EVICTION_WAIT {
            return Ok(());
        }
        let text = "batches arrive so slowly that they block others, and the memory for such batches is used up; send smaller batches (--batch-size)";
        Err(CloseReason::Fault(Fault::Stalled, text.to_owned()))
    }

    /// What this stream holds that others wait for, in batches that arrive below a fair rate: no memory
    /// while it waits for room itself, and nothing of a ring that readers hold up.
    pub(super) fn reclaimable(&mut self, writer: &mut Writer, now: Timestamp) -> Reclaimable {
        let mut sum = Reclaimable::default();
        let mut pressure = self.claimant.pressure();
        pressure.memory &= !self.is_blocked();
        if !pressure.ring && !pressure.memory {
            return sum;
        }
        let clock = self.clock(now);
        let mut stalls = false;
        for batch in self.receiver.open_batches() {
            let elapsed = batch.room.age(clock);
            stalls |= claims::is_stalling(elapsed, batch.received);
            if let Some(spill) = &batch.room.spill {
                sum.memory += spill.held();
            }
            if batch.room.reservation.is_some() && claims::is_slow(elapsed, batch.received) {
                sum.ring += u64::from(batch.info.len);
            }
        }
        sum.memory += self.charged.iter().map(MemoryCharge::bytes).sum::<u64>();
        let has_ring = pressure.ring && sum.ring > 0;
        Reclaimable {
            ring: match has_ring && !writer.waits_for_readers(now.as_nanos()) {
                true => sum.ring,
                false => 0,
            },
            memory: if pressure.memory && stalls {
                sum.memory
            } else {
                0
            },
        }
    }

    /// Releases room in the ring: slow batches continue outside it.
    pub(super) fn give_way(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        self.leave_ring(cx, Leaves::Slow)
    }

    /// Releases memory by ending the stream.
    pub(super) fn give_up(&mut self, _: &mut Context<'_>) -> Result<(), CloseReason> {
        let text = "a batch hardly makes progress, and others need its memory; send smaller batches (--batch-size)";
        Err(CloseReason::Fault(Fault::Stalled, text.to_owned()))
    }

    /// Takes what the publisher says over the control connection.
    fn read_control(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        while self.control.is_ready() {
            match self.control.read_end(&mut cx.xdp.control_reads)? {
                Some(batches) if batches < self.committed => return Err(CloseReason::not_the_end()),
                Some(batches) => self.end = Some(batches),
                None => {}
            }
        }
        Ok(())
    }

    /// Answers the end of the stream once all of it is visible.
    fn answer_end(&mut self) -> Result<(), CloseReason> {
        if self.end != Some(self.visible) {
            return Ok(());
        }
        self.end = None;
        let answered = self.control.complete(self.visible);
        answered.map_err(CloseReason::Io)?;
        Err(CloseReason::Completed)
    }

    /// Gives back what the stream holds, tells the publisher what it does not know, and sums up.
    pub(super) fn finish(mut self, writer: &mut Writer, ending: &CloseReason) -> ConnectionReport {
        if let CloseReason::Fault(fault, text) = ending {
            self.control.fail(*fault, self.visible, text);
        }
        for OpenBatch { received, room, .. } in self.receiver.open_batches() {
            if let Some(claim) = room.claim.take() {
                claim.release(received);
            }
        }
        let open = self.receiver.into_rooms();
        for room in open.chain(self.complete.into_iter().map(|(_, room)| room)) {
            if let Some(reservation) = room.reservation {
                writer.abort(reservation);
            }
        }
        // The stream's next connection tells the publisher that these are committed.
        if let Some((index, _)) = self.unseen {
            writer.wait_until_visible(index);
        }
        let (admission, ended) = (&self.admission, ending.to_string());
        let committed = &self.committed_here;
        ConnectionReport::new(
            self.peer,
            Path::Xdp,
            admission,
            self.buffers,
            committed,
            ended,
        )
    }
}

/// Moves a batch into the ring once there is room; returns whether it lies there.
fn settle(cx: &mut Context<'_>, len: u32, room: &mut Room) -> bool {
    let Some(reservation) = &room.reservation else {
        return false;
    };
    if room.spill.is_some() && !cx.writer.is_granted(reservation) {
        return false;
    }
    if let Some(spill) = room.spill.take() {
        for (offset, part) in spill.written_pieces(len) {
            cx.writer.place(reservation, offset, part);
        }
    }
    true
}

/// Copies the received parts of a batch out of the ring, if there is memory for them.
fn spill_parts(
    cx: &Context<'_>,
    reservation: &Reservation,
    parts: &[(u64, u64)],
    spill: &mut Spill,
) -> bool {
    for &(low, high) in parts {
        let (low, len) = (low as u32, (high - low + 1) as u32);
        if spill.reserve(low, len, ClaimPriority::Next).is_err() {
            return false;
        }
        let placed = cx.writer.placed(reservation, reservation.len());
        spill.write(low, &placed[low as usize..][..len as usize]);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_began_while_the_stream_was_blocked_is_not_old() {
        let room = Room {
            reservation: None,
            claim: None,
            spill: None,
            waiting: None,
            since: Timestamp::from_nanos(1_000),
        };
        assert_eq!(room.age(Timestamp::from_nanos(999)), Duration::ZERO);
        assert_eq!(
            room.age(Timestamp::from_nanos(1_500)),
            Duration::from_nanos(500)
        );
    }
}
