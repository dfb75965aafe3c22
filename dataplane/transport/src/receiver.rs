//! The broker's end of a stream: which bytes are there, what to commit next, what to tell.

use std::collections::VecDeque;

use penstock_wire::packet::{BatchInfo, Chunk, Feedback, MAX_GAPS, StreamKey};
use thiserror::Error;

use super::MAX_OPEN_BATCHES;
use super::ranges::Ranges;
use super::time::Timestamp;

/// Maximum number of separate parts of one batch.
const MAX_PARTS: usize = 64;
/// Initial memory for the parts of a batch, bytes: the first allocation of a `Vec`.
const FIRST_PARTS: usize = 4 * size_of::<(u64, u64)>();

/// Maximum memory for the parts of a batch, bytes.
const NEXT_PARTS: usize = MAX_PARTS * size_of::<(u64, u64)>();

/// Memory that every stream may use for the state of its open batches, bytes: enough for 64 consecutive
/// batches that arrive out of order. [`Receiver::allow_memory`] grants more.
pub const FREE_MEMORY: usize = 16 << 10;
/// Initial number of slots for open batches.
const FIRST_BATCHES: usize = 16;
/// Number of part lists of ended batches that are kept for reuse.
const SPARE: usize = 64;

/// What a stream may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest batch, bytes.
    pub max_payload: u32,
    /// Bytes that may arrive ahead of the first that is missing.
    pub window: u64,
}

/// Why a packet is not placed.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// All of it arrived before; the next ACK says so again.
    #[error("it came before")]
    Duplicate,
    /// It belongs to a batch further ahead than is allowed.
    #[error("too many batches ahead")]
    TooFar,
    /// The batch is larger than was offered.
    #[error("a batch larger than was offered")]
    TooLarge,
    /// More bytes than the credit allows.
    #[error("beyond the credit")]
    OverCredit,
    /// It says another thing of its batch than an earlier packet.
    #[error("contradicts an earlier packet")]
    Contradiction,
    /// The batch is in more pieces than are kept account of; a retransmission fills the gaps.
    #[error("in too many pieces")]
    Scattered,
    /// Its state would take more memory than the stream may use.
    #[error("too many open batches and pieces")]
    NoMemory,
}

/// How a packet's number follows on those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalOrder {
    /// It is the next, or came before.
    InOrder,
    /// So many packets before it have not come (yet).
    Ahead(u64),
    /// It is one that others overtook.
    Reordered,
}

/// A batch of which something arrived. `R` is its place, in whatever form the caller needs.
#[derive(Debug)]
struct Assembly<R> {
    info: BatchInfo,
    parts: Ranges,
    /// Bytes received.
    received: u64,
    room: R,
}

/// A batch that is not committed yet.
#[derive(Debug)]
pub struct OpenBatch<'a, R> {
    /// What its packets say about it.
    pub info: &'a BatchInfo,
    /// First and last byte of each received part, in ascending order.
    pub parts: &'a [(u64, u64)],
    /// Bytes received.
    pub received: u64,
    /// Its place.
    pub room: &'a mut R,
}

/// One stream's receiving end.
#[derive(Debug)]
pub struct Receiver<R> {
    stream: StreamKey,
    limits: Limits,
    /// Packet numbers that came.
    packets: Ranges,
    largest_at: Timestamp,
    /// Sequence number of the first entry of `open`: all before are committed.
    committed: u64,
    open: VecDeque<Option<Assembly<R>>>,
    /// Position in the stream where the first open batch starts.
    position: u64,
    /// Bytes there of open batches.
    placed: u64,
    /// Bytes that open batches will have.
    opened: u64,
    credit: u64,
    spare: Vec<Ranges>,
    /// Bytes of memory of all part lists, including those of ended batches.
    parts_memory: usize,
    /// Bytes that it may use beyond [`FREE_MEMORY`].
    allowed: usize,
    owes_ack: bool,
}

impl<R> Receiver<R> {
    /// A stream whose next batch is `first_batch`.
    #[must_use]
    pub fn new(stream: StreamKey, first_batch: u64, limits: Limits, now: Timestamp) -> Self {
        Self {
            stream,
            limits,
            packets: Ranges::new(MAX_GAPS + 1),
            largest_at: now,
            committed: first_batch,
            open: VecDeque::with_capacity(FIRST_BATCHES),
            position: 0,
            placed: 0,
            opened: 0,
            credit: limits.window,
            spare: Vec::new(),
            parts_memory: 0,
            allowed: 0,
            owes_ack: false,
        }
    }

    /// Whether the packet is to be placed: `Some(None)` if its batch has no room yet. Nothing is
    /// changed but what [`Self::feedback`] tells.
    ///
    /// # Errors
    /// [`DropReason`] when the packet is to be dropped.
    pub fn offer(
        &mut self,
        packet: u64,
        chunk: &Chunk,
        len: u32,
    ) -> Result<Option<&mut R>, DropReason> {
        self.owes_ack = true;
        let BatchInfo { seq, .. } = chunk.batch;
        if seq < self.committed || self.packets.contains(packet) {
            self.packets.insert(packet, packet);
            return Err(DropReason::Duplicate);
        }
        let index = seq - self.committed;
        if index >= MAX_OPEN_BATCHES as u64 {
            return Err(DropReason::TooFar);
        }
        if chunk.batch.len > self.limits.max_payload {
            return Err(DropReason::TooLarge);
        }
        let (low, high) = span(chunk, len);
        let (used, credit) = (self.position + self.placed, self.credit);
        let (memory, may_have) = (self.memory(), self.may_have(index));
        let memory_with_it = self.memory_with(index as usize + 1) + FIRST_PARTS;
        let Some(Some(batch)) = self.open.get_mut(index as usize) else {
            let opened = self.opened + u64::from(chunk.batch.len);
            let most = self.limits.window + 2 * u64::from(self.limits.max_payload);
            if used + u64::from(len) > credit || opened > most {
                return Err(DropReason::OverCredit);
            }
            if memory_with_it > may_have {
                return Err(DropReason::NoMemory);
            }
            return Ok(None);
        };
        if batch.info != chunk.batch {
            return Err(DropReason::Contradiction);
        }
        let missing = batch.parts.missing(low, high);
        if missing == 0 {
            self.packets.insert(packet, packet);
            return Err(DropReason::Duplicate);
        }
        if batch.parts.is_full() && batch.parts.adds_range(low, high) {
            return Err(DropReason::Scattered);
        }
        if used + missing > credit {
            return Err(DropReason::OverCredit);
        }
        if batch.parts.is_out_of_memory() && batch.parts.adds_range(low, high) {
            // A vector doubles its capacity.
            let more = batch.parts.memory().max(FIRST_PARTS);
            if memory + more > may_have {
                return Err(DropReason::NoMemory);
            }
        }
        Ok(Some(&mut batch.room))
    }

    /// The room of the newest batch, if a packet continues it: the packet has the next number, and its
    /// payload follows on all that came of the batch so far. Nearly every packet does. Place it and call
    /// [`Self::placed_next`], or leave it: nothing is changed here.
    ///
    /// Nothing that came lies where its payload goes, so the payload may be placed before it is verified.
    #[inline]
    pub fn room_for_next(&mut self, packet: u64, chunk: &Chunk, len: u32) -> Option<&mut R> {
        let used = self.position + self.placed;
        let batch = self.open.back_mut()?.as_mut()?;
        let is_next = batch.info == chunk.batch
            && batch.parts.is_prefix(chunk.offset.into())
            && self.packets.last()? + 1 == packet
            && used + u64::from(len) <= self.credit;
        is_next.then_some(&mut batch.room)
    }

    /// The payload of a packet lies in the room from [`Self::room_for_next`], verified.
    ///
    /// # Panics
    /// If there is no such room.
    #[inline]
    pub fn placed_next(&mut self, now: Timestamp, packet: u64, len: u32) {
        let batch = self.open.back_mut().and_then(Option::as_mut);
        let batch = batch.expect("the batch has room");
        batch.received += u64::from(len);
        batch.parts.extend_last(batch.received - 1);
        self.placed += u64::from(len);
        self.packets.extend_last(packet);
        self.largest_at = now;
        self.owes_ack = true;
    }

    /// Bytes of memory for the state of the open batches.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.memory_with(0)
    }

    /// Memory that it may use for a batch this far after the next one. Later batches leave enough for
    /// the next one, because none of them can commit before it.
    fn may_have(&self, index: u64) -> usize {
        FREE_MEMORY + self.allowed + if index == 0 { NEXT_PARTS } else { 0 }
    }

    /// With slots for this many open batches.
    fn memory_with(&self, batches: usize) -> usize {
        let mut places = self.open.capacity();
        if batches > places {
            places = batches.next_power_of_two();
        }
        places * size_of::<Option<Assembly<R>>>() + self.parts_memory
    }

    /// Allows this many bytes of memory beyond [`FREE_MEMORY`]. The receiver frees what it can when it
    /// has no open batch.
    pub fn allow_memory(&mut self, bytes: usize) {
        self.allowed = bytes;
        if self.memory() > FREE_MEMORY + bytes {
            self.shrink();
        }
    }

    /// Frees what open batches needed, if none is open: for a stream that is idle.
    pub fn shrink(&mut self) {
        if self.open.is_empty() {
            if self.open.capacity() > FIRST_BATCHES {
                self.open = VecDeque::with_capacity(FIRST_BATCHES);
            }
            self.spare = Vec::new();
            self.parts_memory = 0;
        }
    }

    /// Whether no batch is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Gives the batch of an offered packet its room.
    ///
    /// # Panics
    /// If the batch is not one that was just offered without room.
    pub fn give_room(&mut self, batch: &BatchInfo, room: R) {
        let index = (batch.seq - self.committed) as usize;
        if index >= self.open.capacity() {
            let places = (index + 1).next_power_of_two();
            self.open.reserve_exact(places - self.open.len());
        }
        while self.open.len() <= index {
            self.open.push_back(None);
        }
        self.opened += u64::from(batch.len);
        let spare = self.spare.pop();
        let parts = spare.unwrap_or_else(|| Ranges::growing(MAX_PARTS));
        let before = self.open[index].replace(Assembly {
            info: *batch,
            parts,
            received: 0,
            room,
        });
        assert!(before.is_none(), "the batch had room");
    }

    /// The room of a batch that has been given one.
    ///
    /// # Panics
    /// If the batch has no room.
    pub fn room(&mut self, batch: &BatchInfo) -> &mut R {
        let index = (batch.seq - self.committed) as usize;
        &mut self.open[index].as_mut().expect("the batch has room").room
    }

    /// The payload of an offered packet lies in its place. If the packet came out of turn, the
    /// publisher is to hear of that soon.
    ///
    /// # Panics
    /// If the batch has no room.
    pub fn placed(&mut self, now: Timestamp, packet: u64, chunk: &Chunk, len: u32) -> ArrivalOrder {
        let index = (chunk.batch.seq - self.committed) as usize;
        let batch = self.open[index].as_mut().expect("the batch has room");
        let (low, high) = span(chunk, len);
        let missing = batch.parts.missing(low, high);
        let before = batch.parts.memory();
        batch.parts.insert(low, high);
        self.parts_memory += batch.parts.memory() - before;
        batch.received += missing;
        self.placed += missing;
        self.arrived(now, packet)
    }

    /// Whether no packet so late in the stream has arrived: one that is repeated, by whomever, never
    /// is the newest.
    #[must_use]
    pub fn is_newest(&self, packet: u64) -> bool {
        let largest = self.packets.ranges().last();
        largest.is_none_or(|&(_, largest)| largest < packet)
    }

    /// A packet without payload arrived.
    pub fn arrived(&mut self, now: Timestamp, packet: u64) -> ArrivalOrder {
        let largest = self.packets.ranges().last().map(|&(_, high)| high);
        let order = match largest {
            None => ArrivalOrder::InOrder,
            Some(largest) if packet > largest + 1 => ArrivalOrder::Ahead(packet - largest - 1),
            Some(largest) if packet < largest && !self.packets.contains(packet) => {
                ArrivalOrder::Reordered
            }
            Some(_) => ArrivalOrder::InOrder,
        };
        if largest.is_none_or(|largest| largest < packet) {
            self.largest_at = now;
        }
        self.packets.insert(packet, packet);
        self.owes_ack = true;
        order
    }

    /// The next batch in the stream, if it is complete: to be committed.
    pub fn next_complete(&mut self) -> Option<(BatchInfo, R)> {
        let front = self.open.front()?.as_ref()?;
        if front.parts.prefix() < u64::from(front.info.len) {
            return None;
        }
        let Assembly {
            info,
            mut parts,
            room,
            ..
        } = self.open.pop_front().flatten().expect("looked at above");
        if parts.memory() <= FIRST_PARTS && self.spare.len() < SPARE {
            parts.clear();
            self.spare.push(parts);
        } else {
            self.parts_memory -= parts.memory();
        }
        self.committed += 1;
        self.position += u64::from(info.len);
        self.placed -= u64::from(info.len);
        self.opened -= u64::from(info.len);
        self.owes_ack = true;
        Some((info, room))
    }

    /// Ends the stream; returns the room of every batch that is not complete.
    pub fn into_rooms(self) -> impl Iterator<Item = R> {
        self.open.into_iter().flatten().map(|batch| batch.room)
    }

    /// Batches that are not committed yet, for inspection.
    pub fn open_batches(&mut self) -> impl Iterator<Item = OpenBatch<'_, R>> {
        self.open.iter_mut().flatten().map(|batch| OpenBatch {
            info: &batch.info,
            parts: batch.parts.ranges(),
            received: batch.received,
            room: &mut batch.room,
        })
    }

    /// How many bytes may arrive ahead of the first that is missing, from now on. Credit that was
    /// given stays.
    pub fn set_window(&mut self, window: u64) {
        self.limits.window = window;
    }

    /// Batches committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Whether something came, or was committed, since [`Self::feedback`].
    #[must_use]
    pub fn owes_ack(&self) -> bool {
        self.owes_ack
    }

    /// What the publisher is to be told now. While the broker is `blocked` it gives no more credit.
    pub fn feedback(&mut self, now: Timestamp, blocked: bool, feedback: &mut Feedback) {
        if !blocked {
            let reach = self.position + self.prefix_of_open() + self.limits.window;
            self.credit = self.credit.max(reach);
        }
        feedback.stream = self.stream;
        feedback.received.clear();
        feedback.received.extend(self.packets.ranges().iter().rev());
        let delay = (now - self.largest_at).as_micros();
        feedback.delay_us = u32::try_from(delay).unwrap_or(u32::MAX);
        feedback.committed = self.committed;
        feedback.credit = self.credit;
        feedback.blocked = blocked;
        self.owes_ack = false;
    }

    /// Bytes of open batches before the first that is missing.
    fn prefix_of_open(&self) -> u64 {
        let mut prefix = 0;
        for batch in &self.open {
            let Some(batch) = batch else { break };
            let there = batch.parts.prefix();
            prefix += there;
            if there < u64::from(batch.info.len) {
                break;
            }
        }
        prefix
    }
}

/// First and last byte of the batch that a packet fills.
fn span(chunk: &Chunk, len: u32) -> (u64, u64) {
    let low = u64::from(chunk.offset);
    (low, low + u64::from(len) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Nanos;

    const STREAM: StreamKey = StreamKey { key: 1, stream: 2 };
    const START: Timestamp = Timestamp::ZERO;
    const US: Nanos = Nanos::from_micros(1);

    fn receiver() -> Receiver<()> {
        let limits = Limits {
            max_payload: 1000,
            window: 1500,
        };
        Receiver::new(STREAM, 10, limits, START)
    }

    fn chunk(seq: u64, len: u32, offset: u32) -> Chunk {
        let batch = BatchInfo {
            seq,
            len,
            messages: 1,
            checksum: 0,
        };
        Chunk { batch, offset }
    }

    /// Takes a packet as a worker does.
    fn take(
        receiver: &mut Receiver<()>,
        packet: u64,
        chunk: Chunk,
        len: u32,
    ) -> Result<(), DropReason> {
        if receiver.offer(packet, &chunk, len)?.is_none() {
            receiver.give_room(&chunk.batch, ());
        }
        receiver.placed(START + 5 * US, packet, &chunk, len);
        Ok(())
    }

    #[test]
    fn packets_that_others_overtook_are_told_from_those_in_turn() {
        let mut r = receiver();
        let turns = [0, 1, 5, 3, 6, 6].map(|packet| r.arrived(START, packet));
        let wanted = [
            ArrivalOrder::InOrder,
            ArrivalOrder::InOrder,
            ArrivalOrder::Ahead(3),
            ArrivalOrder::Reordered,
            ArrivalOrder::InOrder,
            ArrivalOrder::InOrder,
        ];
        assert_eq!(turns, wanted);
    }

    #[test]
    fn parts_in_any_order_make_batches_in_stream_order() {
        let mut r = receiver();
        take(&mut r, 3, chunk(11, 100, 50), 50).unwrap();
        take(&mut r, 1, chunk(10, 100, 0), 60).unwrap();
        take(&mut r, 2, chunk(11, 100, 0), 50).unwrap();
        assert!(r.next_complete().is_none());
        take(&mut r, 9, chunk(10, 100, 50), 50).unwrap();
        let complete: Vec<_> = std::iter::from_fn(|| r.next_complete())
            .map(|(b, ())| b.seq)
            .collect();
        assert_eq!(complete, [10, 11]);
        let mut told = Feedback::new(STREAM);
        r.feedback(START + 9 * US, false, &mut told);
        assert_eq!(told.received, [(9, 9), (1, 3)]);
        assert_eq!((told.committed, told.credit, told.delay_us), (12, 1700, 4));
        assert!(!r.owes_ack());
        take(&mut r, 10, chunk(12, 100, 0), 100).unwrap();
        r.feedback(START + 9 * US, true, &mut told);
        assert_eq!((told.credit, told.blocked), (1700, true));
    }

    #[test]
    fn what_came_before_is_told_again_and_not_placed() {
        let mut r = receiver();
        take(&mut r, 0, chunk(10, 100, 0), 50).unwrap();
        assert_eq!(
            take(&mut r, 0, chunk(10, 100, 0), 50),
            Err(DropReason::Duplicate)
        );
        assert_eq!(
            take(&mut r, 1, chunk(10, 100, 10), 40),
            Err(DropReason::Duplicate)
        );
        assert_eq!(
            take(&mut r, 2, chunk(9, 100, 10), 40),
            Err(DropReason::Duplicate)
        );
        let mut told = Feedback::new(STREAM);
        r.feedback(START + 9 * US, false, &mut told);
        assert_eq!(told.received, [(0, 2)]);
    }

    #[test]
    fn a_publisher_that_ignores_the_limits_is_not_served() {
        let mut r = receiver();
        let far = 10 + MAX_OPEN_BATCHES as u64;
        assert_eq!(
            take(&mut r, 0, chunk(far, 10, 0), 10),
            Err(DropReason::TooFar)
        );
        assert_eq!(
            take(&mut r, 1, chunk(10, 1001, 0), 10),
            Err(DropReason::TooLarge)
        );
        take(&mut r, 2, chunk(10, 1000, 0), 900).unwrap();
        assert_eq!(
            take(&mut r, 3, chunk(10, 999, 900), 90),
            Err(DropReason::Contradiction)
        );
        assert_eq!(
            take(&mut r, 4, chunk(11, 1000, 0), 601),
            Err(DropReason::OverCredit)
        );
        take(&mut r, 5, chunk(11, 1000, 0), 600).unwrap();
        assert_eq!(
            take(&mut r, 6, chunk(11, 1000, 600), 1),
            Err(DropReason::OverCredit)
        );
        // Room for batches is limited, too, whatever of them arrives.
        let mut r = receiver();
        for seq in 10..13 {
            take(&mut r, seq, chunk(seq, 1000, 0), 1).unwrap();
        }
        assert_eq!(
            take(&mut r, 13, chunk(13, 1000, 0), 1),
            Err(DropReason::OverCredit)
        );
        assert_eq!(r.into_rooms().count(), 3);
    }

    #[test]
    fn a_batch_in_too_many_pieces_waits_for_its_gaps() {
        let mut r = receiver();
        for part in 0..MAX_PARTS as u32 {
            take(&mut r, part.into(), chunk(10, 1000, 2 * part), 1).unwrap();
        }
        let more = chunk(10, 1000, 999);
        assert_eq!(take(&mut r, 500, more, 1), Err(DropReason::Scattered));
        assert!(!r.packets.contains(500), "it is not acked");
    }

    #[test]
    fn memory_for_accounts_is_bounded_and_given_back() {
        let mut r: Receiver<[u64; 12]> = Receiver::new(
            STREAM,
            0,
            Limits {
                max_payload: 1000,
                window: 1 << 30,
            },
            START,
        );
        let most = |r: &Receiver<_>, allowed| {
            assert!(r.memory() <= FREE_MEMORY + allowed + NEXT_PARTS);
        };
        // As many batches as possible, each in as many parts as possible.
        let mut packet = 0;
        let mut fill = |r: &mut Receiver<_>, allowed| {
            let mut refused = 0;
            for seq in 0..MAX_OPEN_BATCHES as u64 {
                for part in 0..MAX_PARTS as u32 {
                    packet += 2;
                    let chunk = chunk(seq, 1000, 2 * part);
                    match r.offer(packet, &chunk, 1) {
                        Ok(None) => r.give_room(&chunk.batch, [0; 12]),
                        Ok(Some(_)) => {}
                        Err(DropReason::Duplicate) => continue,
                        Err(refusal) => {
                            assert_eq!(refusal, DropReason::NoMemory);
                            refused += 1;
                            continue;
                        }
                    }
                    r.placed(START, packet, &chunk, 1);
                    most(r, allowed);
                }
            }
            refused
        };
        assert!(fill(&mut r, 0) > 0);
        r.allow_memory(64 << 10);
        assert!(fill(&mut r, 64 << 10) > 0);
        r.allow_memory(4 << 20);
        assert_eq!(fill(&mut r, 4 << 20), 0);
        assert_eq!(r.open_batches().count(), MAX_OPEN_BATCHES);
        for seq in 0..MAX_OPEN_BATCHES as u64 {
            for part in 0..MAX_PARTS as u32 {
                packet += 2;
                let len = if part + 1 == MAX_PARTS as u32 {
                    1000 - 2 * part
                } else {
                    2
                };
                let chunk = chunk(seq, 1000, 2 * part);
                assert!(
                    r.offer(packet, &chunk, len).unwrap().is_some(),
                    "a gap is filled"
                );
                r.placed(START, packet, &chunk, len);
            }
            assert!(r.next_complete().is_some(), "batch {seq}");
        }
        assert!(r.is_empty());
        r.allow_memory(0);
        most(&r, 0);
        assert!(r.spare.len() <= SPARE);
    }

    #[test]
    fn batches_in_turn_need_no_more_than_every_stream_may_take() {
        let mut r = Receiver::new(
            STREAM,
            0,
            Limits {
                max_payload: 1000,
                window: 1 << 30,
            },
            START,
        );
        // Twice as many batches as a publisher has in flight by default, with gaps.
        for seq in 0..64 {
            for (part, at) in [0, 200, 400, 600].into_iter().enumerate() {
                let (packet, chunk) = (4 * seq + part as u64, chunk(seq, 1000, at));
                if r.offer(packet, &chunk, 100).unwrap().is_none() {
                    r.give_room(&chunk.batch, [0u64; 10]);
                }
                r.placed(START, packet, &chunk, 100);
            }
        }
    }

    #[test]
    fn credit_that_was_given_stays() {
        let mut r = receiver();
        let mut told = Feedback::new(STREAM);
        r.feedback(START + 9 * US, false, &mut told);
        assert_eq!(told.credit, 1500);
        r.set_window(100);
        r.feedback(START + 9 * US, false, &mut told);
        assert_eq!(told.credit, 1500);
        take(&mut r, 0, chunk(10, 1000, 0), 1000).unwrap();
        take(&mut r, 1, chunk(11, 450, 0), 450).unwrap();
        r.feedback(START + 9 * US, false, &mut told);
        assert_eq!(told.credit, 1550);
    }
}
