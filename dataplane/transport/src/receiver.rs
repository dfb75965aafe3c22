//! The broker's end of a stream: received bytes, the next batch to commit, and feedback to the publisher.

mod offer;

use std::collections::VecDeque;

use penstock_wire::packet::{BatchInfo, Chunk, Feedback, MAX_GAPS, StreamKey};
use thiserror::Error;

pub use self::offer::{NewBatch, NextPacket, Offer, OfferedPacket};
use super::MAX_OPEN_BATCHES;
use super::ranges::Ranges;
use super::time::Timestamp;

/// Maximum number of separate parts of one batch.
const MAX_PARTS: usize = 64;
/// Initial memory for the parts of a batch, bytes: the first allocation of a `Vec`.
const MIN_PARTS_MEMORY: usize = 4 * size_of::<(u64, u64)>();

/// Maximum memory for the parts of a batch, bytes.
const MAX_PARTS_MEMORY: usize = MAX_PARTS * size_of::<(u64, u64)>();

/// Memory that every stream may use for the state of its open batches, bytes: enough for 64 consecutive
/// batches that arrive out of order. [`Receiver::allow_memory`] grants more.
pub const FREE_MEMORY: usize = 16 << 10;
/// Initial number of slots for open batches.
const MIN_SLOTS: usize = 16;
/// Maximum number of part lists of ended batches that are kept for reuse.
const MAX_SPARE_LISTS: usize = 64;

/// Limits of a stream.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest batch, bytes.
    pub max_payload: u32,
    /// Bytes that may arrive ahead of the first missing one.
    pub window: u64,
}

/// Why the receiver drops a packet.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// All of it arrived before; the next ACK acknowledges it again.
    #[error("it came before")]
    Duplicate,
    /// Its batch is further ahead than allowed.
    #[error("too many batches ahead")]
    TooFar,
    /// Its batch is larger than the broker offered.
    #[error("a batch larger than was offered")]
    TooLarge,
    /// It exceeds the credit.
    #[error("beyond the credit")]
    OverCredit,
    /// It describes its batch differently from an earlier packet.
    #[error("contradicts an earlier packet")]
    Contradiction,
    /// Its batch has arrived in too many separate parts; a retransmission fills the gaps.
    #[error("in too many pieces")]
    Scattered,
    /// Its state would exceed the memory that the stream may use.
    #[error("too many open batches and pieces")]
    NoMemory,
}

/// Order of a packet's number relative to earlier packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalOrder {
    /// It is the next one, or a duplicate.
    InOrder,
    /// This number of packets before it have not arrived yet.
    Ahead(u64),
    /// Later packets have overtaken it.
    Reordered,
}

/// A partly received batch. `P` is its placement, of whatever type the caller needs.
#[derive(Debug)]
struct Assembly<P> {
    info: BatchInfo,
    parts: Ranges,
    /// Bytes received.
    received: u64,
    placement: P,
}

/// A batch that is not committed yet.
#[derive(Debug)]
pub struct OpenBatch<'a, P> {
    /// Its description in its packets.
    pub info: &'a BatchInfo,
    /// First and last byte of each received part, in ascending order.
    pub parts: &'a [(u64, u64)],
    /// Bytes received.
    pub received: u64,
    /// Its placement.
    pub placement: &'a mut P,
}

/// One stream's receiving end.
#[derive(Debug)]
pub struct Receiver<P> {
    stream: StreamKey,
    limits: Limits,
    /// Numbers of received packets.
    packets: Ranges,
    largest_at: Timestamp,
    /// Sequence number of the first entry of `open`: all before are committed.
    committed: u64,
    open: VecDeque<Option<Assembly<P>>>,
    /// Position of the first open batch in the stream, bytes.
    position: u64,
    /// Received bytes of open batches.
    placed: u64,
    /// Total length of open batches, bytes.
    opened: u64,
    credit: u64,
    /// Empty part lists for reuse.
    spare: Vec<Ranges>,
    /// Bytes of memory of all part lists, including those of ended batches.
    parts_memory: usize,
    /// Bytes that it may use beyond [`FREE_MEMORY`].
    allowed: usize,
    owes_ack: bool,
}

impl<P> Receiver<P> {
    /// A stream whose next batch is `first_batch`.
    #[must_use]
    pub fn new(stream: StreamKey, first_batch: u64, limits: Limits, now: Timestamp) -> Self {
        Self {
            stream,
            limits,
            packets: Ranges::new(MAX_GAPS + 1),
            largest_at: now,
            committed: first_batch,
            open: VecDeque::with_capacity(MIN_SLOTS),
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

    /// Accepts or drops a packet with `len` bytes of payload. This changes nothing but the next
    /// [`Self::feedback`]; the [`Offer`] opens a new batch and places the packet.
    ///
    /// # Errors
    /// Why the packet is dropped.
    pub fn offer(
        &mut self,
        packet: u64,
        chunk: &Chunk,
        len: u32,
    ) -> Result<Offer<'_, P>, DropReason> {
        let index = self.check(packet, chunk, len)?;
        Ok(Offer::new(self, index, packet, chunk, len))
    }

    /// The position of the packet's batch in `open`, if the packet may be placed.
    fn check(&mut self, packet: u64, chunk: &Chunk, len: u32) -> Result<usize, DropReason> {
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
        let (memory, memory_limit) = (self.memory(), self.memory_limit(index));
        let index = index as usize;
        let memory_with_it = self.memory_with(index + 1) + MIN_PARTS_MEMORY;
        let Some(Some(batch)) = self.open.get(index) else {
            let opened = self.opened + u64::from(chunk.batch.len);
            let most = self.limits.window + 2 * u64::from(self.limits.max_payload);
            if used + u64::from(len) > credit || opened > most {
                return Err(DropReason::OverCredit);
            }
            if memory_with_it > memory_limit {
                return Err(DropReason::NoMemory);
            }
            return Ok(index);
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
            let more = batch.parts.memory().max(MIN_PARTS_MEMORY);
            if memory + more > memory_limit {
                return Err(DropReason::NoMemory);
            }
        }
        Ok(index)
    }

    /// Accepts a packet that continues the newest batch, as nearly all do: it has the next number, and its
    /// payload follows all received bytes of the batch. `None` leaves everything unchanged; such a packet
    /// takes [`Self::offer`].
    #[inline]
    pub fn offer_next(
        &mut self,
        packet: u64,
        chunk: &Chunk,
        len: u32,
    ) -> Option<NextPacket<'_, P>> {
        let used = self.position + self.placed;
        let batch = self.open.back_mut()?.as_mut()?;
        let is_next = batch.info == chunk.batch
            && batch.parts.is_prefix(chunk.offset.into())
            && self.packets.last()? + 1 == packet
            && used + u64::from(len) <= self.credit;
        is_next.then_some(NextPacket {
            batch,
            packets: &mut self.packets,
            largest_at: &mut self.largest_at,
            placed: &mut self.placed,
            owes_ack: &mut self.owes_ack,
            number: packet,
            len,
        })
    }

    /// Bytes of memory for the state of the open batches.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.memory_with(0)
    }

    /// Memory limit for a batch at this distance from the next one. Later batches leave enough for the next
    /// one, because none of them can commit before it.
    fn memory_limit(&self, index: u64) -> usize {
        FREE_MEMORY + self.allowed + if index == 0 { MAX_PARTS_MEMORY } else { 0 }
    }

    /// The same with slots for this many open batches.
    fn memory_with(&self, batches: usize) -> usize {
        let mut slots = self.open.capacity();
        if batches > slots {
            slots = batches.next_power_of_two();
        }
        slots * size_of::<Option<Assembly<P>>>() + self.parts_memory
    }

    /// Allows this many bytes of memory beyond [`FREE_MEMORY`]. Without open batches the receiver frees
    /// memory beyond that.
    pub fn allow_memory(&mut self, bytes: usize) {
        self.allowed = bytes;
        if self.memory() > FREE_MEMORY + bytes {
            self.shrink();
        }
    }

    /// Frees unused memory, if no batch is open: for an idle stream.
    pub fn shrink(&mut self) {
        if self.open.is_empty() {
            if self.open.capacity() > MIN_SLOTS {
                self.open = VecDeque::with_capacity(MIN_SLOTS);
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

    /// Opens a batch at a vacant position.
    fn open_batch(&mut self, index: usize, batch: &BatchInfo, placement: P) {
        if index >= self.open.capacity() {
            let slots = (index + 1).next_power_of_two();
            self.open.reserve_exact(slots - self.open.len());
        }
        while self.open.len() <= index {
            self.open.push_back(None);
        }
        self.opened += u64::from(batch.len);
        let spare = self.spare.pop();
        let parts = spare.unwrap_or_else(|| Ranges::growing(MAX_PARTS));
        self.open[index] = Some(Assembly {
            info: *batch,
            parts,
            received: 0,
            placement,
        });
    }

    /// Whether a packet is newer than all received ones. A repeated packet never is.
    #[must_use]
    pub fn is_newest(&self, packet: u64) -> bool {
        let largest = self.packets.ranges().last();
        largest.is_none_or(|&(_, largest)| largest < packet)
    }

    /// Records a packet without payload.
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

    /// Takes the next batch of the stream, if it is complete, so that it can be committed.
    pub fn next_complete(&mut self) -> Option<(BatchInfo, P)> {
        let front = self.open.front()?.as_ref()?;
        if front.parts.prefix() < u64::from(front.info.len) {
            return None;
        }
        let Assembly {
            info,
            mut parts,
            placement,
            ..
        } = self.open.pop_front().flatten().expect("checked above");
        if parts.memory() <= MIN_PARTS_MEMORY && self.spare.len() < MAX_SPARE_LISTS {
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
        Some((info, placement))
    }

    /// Ends the stream; returns the placements of all open batches.
    pub fn into_placements(self) -> impl Iterator<Item = P> {
        let open = self.open.into_iter().flatten();
        open.map(|batch| batch.placement)
    }

    /// Open batches in order.
    pub fn open_batches(&mut self) -> impl Iterator<Item = OpenBatch<'_, P>> {
        self.open.iter_mut().flatten().map(|batch| OpenBatch {
            info: &batch.info,
            parts: batch.parts.ranges(),
            received: batch.received,
            placement: &mut batch.placement,
        })
    }

    /// Sets how many bytes may arrive ahead of the first missing one. It does not reduce granted credit.
    pub fn set_window(&mut self, window: u64) {
        self.limits.window = window;
    }

    /// Batches committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Whether a packet arrived or a batch was committed since [`Self::feedback`].
    #[must_use]
    pub fn owes_ack(&self) -> bool {
        self.owes_ack
    }

    /// Writes the current feedback for the publisher. While the broker is `blocked` it grants no more credit.
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

    /// Bytes of open batches before the first missing one.
    fn prefix_of_open(&self) -> u64 {
        let mut prefix = 0;
        for batch in &self.open {
            let Some(batch) = batch else { break };
            let received = batch.parts.prefix();
            prefix += received;
            if received < u64::from(batch.info.len) {
                break;
            }
        }
        prefix
    }
}

/// First and last byte of a packet's payload in its batch.
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

    /// Places a packet as a worker does.
    fn take(
        receiver: &mut Receiver<()>,
        packet: u64,
        chunk: Chunk,
        len: u32,
    ) -> Result<(), DropReason> {
        let packet = receiver.offer(packet, &chunk, len)?.or_open(|| ());
        packet.placed(START + 5 * US);
        Ok(())
    }

    #[test]
    fn overtaken_packets_are_distinguished_from_packets_in_order() {
        let mut r = receiver();
        let orders = [0, 1, 5, 3, 6, 6].map(|packet| r.arrived(START, packet));
        let expected = [
            ArrivalOrder::InOrder,
            ArrivalOrder::InOrder,
            ArrivalOrder::Ahead(3),
            ArrivalOrder::Reordered,
            ArrivalOrder::InOrder,
            ArrivalOrder::InOrder,
        ];
        assert_eq!(orders, expected);
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
        let mut feedback = Feedback::new(STREAM);
        r.feedback(START + 9 * US, false, &mut feedback);
        assert_eq!(feedback.received, [(9, 9), (1, 3)]);
        assert_eq!(
            (feedback.committed, feedback.credit, feedback.delay_us),
            (12, 1700, 4)
        );
        assert!(!r.owes_ack());
        take(&mut r, 10, chunk(12, 100, 0), 100).unwrap();
        r.feedback(START + 9 * US, true, &mut feedback);
        assert_eq!((feedback.credit, feedback.blocked), (1700, true));
    }

    #[test]
    fn duplicates_are_acknowledged_again_and_not_placed() {
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
        let mut feedback = Feedback::new(STREAM);
        r.feedback(START + 9 * US, false, &mut feedback);
        assert_eq!(feedback.received, [(0, 2)]);
    }

    #[test]
    fn packets_beyond_the_limits_are_dropped() {
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
        // The total length of open batches is limited, too, however little of them arrives.
        let mut r = receiver();
        for seq in 10..13 {
            take(&mut r, seq, chunk(seq, 1000, 0), 1).unwrap();
        }
        assert_eq!(
            take(&mut r, 13, chunk(13, 1000, 0), 1),
            Err(DropReason::OverCredit)
        );
        assert_eq!(r.into_placements().count(), 3);
    }

    #[test]
    fn a_batch_in_too_many_parts_accepts_only_bytes_that_fill_gaps() {
        let mut r = receiver();
        for part in 0..MAX_PARTS as u32 {
            take(&mut r, part.into(), chunk(10, 1000, 2 * part), 1).unwrap();
        }
        let more = chunk(10, 1000, 999);
        assert_eq!(take(&mut r, 500, more, 1), Err(DropReason::Scattered));
        assert!(!r.packets.contains(500), "it is not acked");
    }

    #[test]
    fn memory_for_open_batches_is_bounded_and_returned() {
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
            assert!(r.memory() <= FREE_MEMORY + allowed + MAX_PARTS_MEMORY);
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
                        Ok(offer) => _ = offer.or_open(|| [0; 12]).placed(START),
                        Err(DropReason::Duplicate) => continue,
                        Err(reason) => {
                            assert_eq!(reason, DropReason::NoMemory);
                            refused += 1;
                            continue;
                        }
                    }
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
                let Ok(Offer::OpenBatch(packet)) = r.offer(packet, &chunk, len) else {
                    panic!("a gap is filled");
                };
                packet.placed(START);
            }
            assert!(r.next_complete().is_some(), "batch {seq}");
        }
        assert!(r.is_empty());
        r.allow_memory(0);
        most(&r, 0);
        assert!(r.spare.len() <= MAX_SPARE_LISTS);
    }

    #[test]
    fn the_free_memory_suffices_for_many_batches_with_gaps() {
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
                let offer = r.offer(packet, &chunk, 100).unwrap();
                offer.or_open(|| [0u64; 10]).placed(START);
            }
        }
    }

    #[test]
    fn granted_credit_stays() {
        let mut r = receiver();
        let mut feedback = Feedback::new(STREAM);
        r.feedback(START + 9 * US, false, &mut feedback);
        assert_eq!(feedback.credit, 1500);
        r.set_window(100);
        r.feedback(START + 9 * US, false, &mut feedback);
        assert_eq!(feedback.credit, 1500);
        take(&mut r, 0, chunk(10, 1000, 0), 1000).unwrap();
        take(&mut r, 1, chunk(11, 450, 0), 450).unwrap();
        r.feedback(START + 9 * US, false, &mut feedback);
        assert_eq!(feedback.credit, 1550);
    }
}
