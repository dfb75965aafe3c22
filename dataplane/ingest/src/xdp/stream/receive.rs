//! Receives packets: each payload goes to its offset in the batch.

use penstock_transport::{ArrivalOrder, DropReason, Offer};
use penstock_wire::packet::{Chunk, Content, Data};

use super::placement::Placement;
use super::{Context, Stream};
use crate::session::claims::ClaimPriority;
use crate::session::stats::PathStage;
use crate::xdp::ack_route::Arrival;

impl Stream {
    /// Handles a packet that only requests an ACK.
    pub(in crate::xdp) fn ping(&mut self, cx: &mut Context<'_>, packet: u64) {
        let is_newest = self.receiver.is_newest(packet);
        let order = self.receiver.arrived(cx.now, packet);
        cx.xdp.note_order(order);
        cx.xdp.pings += 1;
        if is_newest {
            self.acks.at_once(cx.now);
        } else {
            self.acks.delayed(cx.now);
        }
    }

    /// Verifies a packet and places its payload in one pass, if it continues the newest batch in the ring
    /// and came from the same sender as the packet before it, as nearly all do. Returns whether its checksum
    /// is right; `None`, with nothing changed, if it takes [`Self::payload`].
    ///
    /// Bytes of a damaged packet may remain in the ring: behind all received bytes of the batch, where the
    /// header claims to belong and the batch's reservation reaches. They do not count as received, so another
    /// packet overwrites them before the batch is committed, and readers see no batch earlier. A stream with
    /// keys places nothing before its tag is verified.
    pub(in crate::xdp) fn payload_if_next(
        &mut self,
        cx: &mut Context<'_>,
        arrival: Arrival<'_>,
        header: &Data,
        fragments: &[&[u8]],
    ) -> Option<bool> {
        let received = header.parse_unverified(header.rest_len()).ok()?;
        let (Content::Payload(chunk), None) = (received.content, &self.keys) else {
            return None;
        };
        let len = header.rest_len() as u32;
        let next = self.receiver.offer_next(received.packet, &chunk, len)?;
        let placement = next.placement();
        let (Some(reservation), None) = (&placement.reservation, &placement.spill) else {
            return None;
        };
        if !self.route.matches_sender(arrival.frame, arrival.datagram) {
            return None;
        }
        let (mut sum, mut at) = (header.sum_before_payload(), chunk.offset);
        for fragment in fragments {
            sum = cx.writer.place_and_sum(reservation, at, fragment, sum);
            at += fragment.len() as u32;
        }
        if sum != header.checksum() {
            return Some(false);
        }
        next.placed(cx.now);
        self.last_packet_at = cx.now;
        self.route.confirm(arrival.socket);
        if let Some(pause) = received.pause {
            cx.xdp.note_pause(pause);
        }
        self.count_placed(cx, ArrivalOrder::InOrder);
        Some(true)
    }

    /// Places a packet's payload of `len` bytes.
    pub(in crate::xdp) fn payload(
        &mut self,
        cx: &mut Context<'_>,
        packet: u64,
        chunk: &Chunk,
        fragments: &[&[u8]],
        len: u32,
    ) {
        let priority = match chunk.batch.seq == self.receiver.committed() {
            true => ClaimPriority::Next,
            false => ClaimPriority::Later,
        };
        let mut offer = self.receiver.offer(packet, chunk, len);
        while matches!(offer, Err(DropReason::NoMemory)) && self.memory.grow(&self.claimant) {
            let charged = self.memory.charged() as usize;
            self.receiver.allow_memory(charged);
            offer = self.receiver.offer(packet, chunk, len);
        }
        let mut packet = match offer {
            Ok(Offer::OpenBatch(packet)) => packet,
            Ok(Offer::NewBatch(batch)) => {
                let start = cx.stats.stages.now();
                let clock = self.readers.clock(cx.now);
                let len = chunk.batch.len;
                let placement = Placement::new(cx, &self.claimant, len, priority, clock);
                self.has_unsettled |= placement.spill.is_some();
                let packet = batch.open(placement);
                cx.stats.stages.lap(PathStage::ReserveLogSpace, start);
                packet
            }
            Err(reason) => return self.drop_packet(cx, reason),
        };
        let placement = packet.placement();
        let (claimant, offset) = (&self.claimant, chunk.offset);
        if !self
            .memory
            .reserve(claimant, placement, offset, len, priority)
        {
            self.has_unsettled = true;
            return self.drop_packet(cx, DropReason::NoMemory);
        }
        placement.write(cx, offset, fragments);
        let order = packet.placed(cx.now);
        self.count_placed(cx, order);
    }

    fn count_placed(&mut self, cx: &mut Context<'_>, order: ArrivalOrder) {
        cx.xdp.note_order(order);
        cx.xdp.placed += 1;
        self.acks.note_placed(order, cx.now);
    }

    fn drop_packet(&mut self, cx: &mut Context<'_>, reason: DropReason) {
        match reason {
            // The ACK may have been lost.
            DropReason::Duplicate => cx.xdp.duplicates += 1,
            // The publisher retransmits the packet. An ACK shows that the broker is alive, although it may
            // drop everything that the publisher sends meanwhile.
            DropReason::NoMemory => {
                cx.xdp.no_memory += 1;
                self.memory.is_short = true;
            }
            _ => {
                cx.xdp.refused += 1;
                return;
            }
        }
        self.acks.delayed(cx.now);
    }
}
