//! Packets that were sent, as long as anything needs to know about them.

use std::collections::VecDeque;

use super::send_queue::Span;
use super::time::{Nanos, Timestamp};

/// Lost packets that are kept, in case they arrive late.
const MAX_LOST_KEPT: u64 = 1024;

/// What a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PacketContent {
    Payload(Span),
    Ping,
    /// A ping that tests whether a datagram of this size gets through.
    MtuProbe,
}

/// What is known of a packet's delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PacketState {
    InFlight,
    Acked,
    Lost,
}

/// A packet that was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct SentPacket {
    pub(super) content: PacketContent,
    pub(super) sent_at: Timestamp,
    pub(super) size: u32,
    pub(super) state: PacketState,
}

/// What an acknowledgement of a packet says.
#[derive(Debug)]
pub(super) enum Ack {
    /// Nothing: no such packet is kept.
    Unknown,
    /// Nothing new.
    Repeated,
    /// The packet arrived.
    New {
        /// The packet as it was before.
        sent: SentPacket,
        /// No packet with a larger number was acknowledged before.
        is_largest: bool,
    },
}

/// The sent packets of one stream, by number.
#[derive(Debug)]
pub(super) struct SentPackets {
    packets: VecDeque<SentPacket>,
    /// Number of the first entry of `packets`.
    first: u64,
    largest_acked: Option<u64>,
    bytes_in_flight: u64,
    packets_in_flight: u64,
}

impl SentPackets {
    pub(super) fn new() -> Self {
        Self {
            // Entries are used round and round: many would fall out of the CPU's cache before their next use.
            packets: VecDeque::with_capacity(256),
            first: 0,
            largest_acked: None,
            bytes_in_flight: 0,
            packets_in_flight: 0,
        }
    }

    /// Adds a packet and returns its number.
    pub(super) fn push(&mut self, content: PacketContent, sent_at: Timestamp, size: u32) -> u64 {
        let packet = self.next_number();
        self.packets.push_back(SentPacket {
            content,
            sent_at,
            size,
            state: PacketState::InFlight,
        });
        self.bytes_in_flight += u64::from(size);
        self.packets_in_flight += 1;
        packet
    }

    /// Number of the next packet.
    pub(super) fn next_number(&self) -> u64 {
        self.first + self.packets.len() as u64
    }

    /// Number of the oldest packet that is kept.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// Largest number that was acknowledged.
    pub(super) fn largest_acked(&self) -> Option<u64> {
        self.largest_acked
    }

    /// Bytes of packets that are neither acknowledged nor lost.
    pub(super) fn bytes_in_flight(&self) -> u64 {
        self.bytes_in_flight
    }

    /// Whether a packet is neither acknowledged nor lost.
    pub(super) fn is_any_in_flight(&self) -> bool {
        self.packets_in_flight > 0
    }

    /// A packet, if it is kept.
    pub(super) fn get(&self, packet: u64) -> Option<&SentPacket> {
        let index = packet.checked_sub(self.first)?;
        self.packets.get(usize::try_from(index).ok()?)
    }

    fn get_mut(&mut self, packet: u64) -> Option<&mut SentPacket> {
        let index = packet.checked_sub(self.first)?;
        self.packets.get_mut(usize::try_from(index).ok()?)
    }

    /// Payload of the oldest packet in flight, or of the newest, if its batch is `committed` or later.
    pub(super) fn payload_in_flight(&self, oldest: bool, committed: u64) -> Option<Span> {
        let payload = |sent: &SentPacket| match sent.content {
            PacketContent::Payload(span)
                if sent.state == PacketState::InFlight && span.seq >= committed =>
            {
                Some(span)
            }
            _ => None,
        };
        if oldest {
            self.packets.iter().find_map(payload)
        } else {
            self.packets.iter().rev().find_map(payload)
        }
    }

    /// The broker acknowledged a packet.
    pub(super) fn ack(&mut self, packet: u64) -> Ack {
        let Some(entry) = self.get_mut(packet) else {
            return Ack::Unknown;
        };
        let sent = *entry;
        if sent.state == PacketState::Acked {
            return Ack::Repeated;
        }
        entry.state = PacketState::Acked;
        if sent.state == PacketState::InFlight {
            self.leave_flight(&sent);
        }
        let is_largest = self.largest_acked.is_none_or(|largest| packet > largest);
        if is_largest {
            self.largest_acked = Some(packet);
        }
        Ack::New { sent, is_largest }
    }

    /// A packet in flight counts as lost from now on. Returns what it was.
    pub(super) fn mark_lost(&mut self, packet: u64) -> Option<SentPacket> {
        let entry = self.get_mut(packet)?;
        debug_assert_eq!(entry.state, PacketState::InFlight);
        entry.state = PacketState::Lost;
        let sent = *entry;
        self.leave_flight(&sent);
        Some(sent)
    }

    fn leave_flight(&mut self, sent: &SentPacket) {
        self.bytes_in_flight -= u64::from(sent.size);
        self.packets_in_flight -= 1;
    }

    /// Forgets packets at the front whose delivery is known: lost ones after `keep_lost`, in case they
    /// arrive late.
    pub(super) fn prune(&mut self, now: Timestamp, keep_lost: Nanos) {
        while let Some(front) = self.packets.front() {
            let is_done = match front.state {
                PacketState::InFlight => false,
                PacketState::Acked => true,
                PacketState::Lost => {
                    now - front.sent_at > keep_lost || self.packets.len() as u64 > MAX_LOST_KEPT
                }
            };
            if !is_done {
                return;
            }
            self.packets.pop_front();
            self.first += 1;
        }
    }

    /// Packets that are kept.
    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.packets.len()
    }
}
