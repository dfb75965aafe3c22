//! Packets that the receiver accepts: each step of placing one is a value that only the step before returns.

use penstock_wire::packet::Chunk;

use super::{ArrivalOrder, Assembly, Receiver, span};
use crate::ranges::Ranges;
use crate::time::Timestamp;

/// A packet that may be placed. Dropping it leaves the packet unplaced and unacknowledged.
#[derive(Debug)]
#[must_use = "a packet that is not placed is not acknowledged"]
pub enum Offer<'a, P> {
    /// Earlier packets have opened its batch.
    OpenBatch(OfferedPacket<'a, P>),
    /// It is the first packet of its batch, which needs a placement.
    NewBatch(NewBatch<'a, P>),
}

/// The first packet of a batch.
#[derive(Debug)]
#[must_use = "a packet that is not placed is not acknowledged"]
pub struct NewBatch<'a, P> {
    packet: OfferedPacket<'a, P>,
}

/// A packet whose batch is open.
#[derive(Debug)]
#[must_use = "a packet that is not placed is not acknowledged"]
pub struct OfferedPacket<'a, P> {
    receiver: &'a mut Receiver<P>,
    /// Position of its batch in `receiver.open`.
    index: usize,
    number: u64,
    chunk: Chunk,
    len: u32,
}

/// The next packet in order, which continues the newest batch: the usual case. Dropping it leaves the packet
/// unplaced and unacknowledged.
#[derive(Debug)]
#[must_use = "a packet that is not placed is not acknowledged"]
pub struct NextPacket<'a, P> {
    pub(super) batch: &'a mut Assembly<P>,
    pub(super) packets: &'a mut Ranges,
    pub(super) largest_at: &'a mut Timestamp,
    pub(super) placed: &'a mut u64,
    pub(super) owes_ack: &'a mut bool,
    pub(super) number: u64,
    pub(super) len: u32,
}

impl<'a, P> Offer<'a, P> {
    pub(super) fn new(
        receiver: &'a mut Receiver<P>,
        index: usize,
        number: u64,
        chunk: &Chunk,
        len: u32,
    ) -> Self {
        let is_open = matches!(receiver.open.get(index), Some(Some(_)));
        let packet = OfferedPacket {
            receiver,
            index,
            number,
            chunk: *chunk,
            len,
        };
        match is_open {
            true => Self::OpenBatch(packet),
            false => Self::NewBatch(NewBatch { packet }),
        }
    }

    /// The packet; a new batch gets the placement that `place` returns.
    pub fn or_open(self, place: impl FnOnce() -> P) -> OfferedPacket<'a, P> {
        match self {
            Self::OpenBatch(packet) => packet,
            Self::NewBatch(batch) => batch.open(place()),
        }
    }
}

impl<'a, P> NewBatch<'a, P> {
    /// Opens the batch.
    pub fn open(self, placement: P) -> OfferedPacket<'a, P> {
        let packet = self.packet;
        let batch = &packet.chunk.batch;
        packet.receiver.open_batch(packet.index, batch, placement);
        packet
    }
}

impl<P> OfferedPacket<'_, P> {
    /// The placement of its batch.
    pub fn placement(&mut self) -> &mut P {
        let batch = self.receiver.open[self.index].as_mut();
        &mut batch.expect("the batch is open").placement
    }

    /// Records that its payload is in its place.
    pub fn placed(self, now: Timestamp) -> ArrivalOrder {
        let Self {
            receiver,
            index,
            number,
            chunk,
            len,
        } = self;
        let batch = receiver.open[index].as_mut().expect("the batch is open");
        let (low, high) = span(&chunk, len);
        let missing = batch.parts.missing(low, high);
        let before = batch.parts.memory();
        batch.parts.insert(low, high);
        receiver.parts_memory += batch.parts.memory() - before;
        batch.received += missing;
        receiver.placed += missing;
        receiver.arrived(now, number)
    }
}

impl<P> NextPacket<'_, P> {
    /// The placement of its batch. No received byte lies where the payload goes, so the payload may be
    /// placed before it is verified.
    #[inline]
    pub fn placement(&self) -> &P {
        &self.batch.placement
    }

    /// Records that its payload is in its place, and verified.
    #[inline]
    pub fn placed(self, now: Timestamp) {
        let len = u64::from(self.len);
        self.batch.received += len;
        self.batch.parts.extend_last(self.batch.received - 1);
        *self.placed += len;
        self.packets.extend_last(self.number);
        *self.largest_at = now;
        *self.owes_ack = true;
    }
}
