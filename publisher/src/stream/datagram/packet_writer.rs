//! Packets on their way into the socket: many go out with one call, all of one size but for the last.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use penstock_auth::PacketKeys;
use penstock_transport::{Outgoing, Sender, Timestamp, Transmit};
use penstock_wire::crc32c::Joiner;
use penstock_wire::packet::{DATA_LEN, Data, DataPrefix, StreamKey, TAG_LEN, Tag};
use zerocopy::IntoBytes;

use crate::batch::sealed_batch::SealedBatch;
use crate::net::udp::{Datagrams, MAX_BYTES, MAX_SEGMENTS};
use crate::shared::Shared;
use crate::stream::datagram_tx::DatagramTx;

/// The packets of one call, and what is left of the last one.
pub(super) struct PacketWriter {
    key: StreamKey,
    /// If packets are authenticated.
    keys: Option<Arc<PacketKeys>>,
    shared: Arc<Shared>,
    /// Packets of one call, and their headers.
    group: Vec<Transmit>,
    headers: Vec<DataPrefix>,
    /// A packet that did not fit into the last call.
    carried: Option<Transmit>,
    /// For full packets, whose payload was summed before.
    full: Arc<Joiner>,
    /// The kernel had no room for the group: it goes first.
    is_blocked: bool,
}

impl PacketWriter {
    pub(super) fn new(key: StreamKey, keys: Option<Arc<PacketKeys>>, shared: &Arc<Shared>) -> Self {
        Self {
            key,
            keys,
            shared: Arc::clone(shared),
            group: Vec::with_capacity(MAX_SEGMENTS),
            headers: Vec::with_capacity(MAX_SEGMENTS),
            carried: None,
            full: shared.joiner(0),
            is_blocked: false,
        }
    }

    /// Whether the kernel had no room for the last packets.
    pub(super) fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    /// The kernel had no room for the group.
    pub(super) fn on_blocked(&mut self) {
        self.is_blocked = true;
    }

    /// Numbers of the packets of the last call.
    pub(super) fn packets(&self) -> impl DoubleEndedIterator<Item = u64> {
        self.group.iter().map(|transmit| transmit.packet)
    }

    /// Keeps those packets that the kernel had no room for whose batch is not committed yet. Returns whether
    /// there are any.
    pub(super) fn retry(&mut self, committed: u64) -> bool {
        let is_of_use = |transmit: &Transmit| match transmit.what {
            Outgoing::Payload { chunk, .. } => chunk.batch.seq >= committed,
            Outgoing::Ping { .. } => true,
        };
        self.group.retain(is_of_use);
        self.carried = self.carried.take().filter(is_of_use);
        self.is_blocked = false;
        !self.group.is_empty()
    }

    /// Collects at most `limit` packets for one call: all of one size, but for the last. Returns whether there
    /// are any.
    pub(super) fn gather(&mut self, sender: &mut Sender, now: Timestamp, limit: usize) -> bool {
        self.group.clear();
        let tag_len = if self.keys.is_some() { TAG_LEN } else { 0 };
        let (mut segment, mut total) = (0, 0);
        while self.group.len() < limit {
            let next = self.carried.take().or_else(|| sender.poll_transmit(now));
            let Some(transmit) = next else { break };
            let size = size_of_packet(&transmit) + tag_len;
            if !self.group.is_empty() && (size > segment || total + size > MAX_BYTES) {
                self.carried = Some(transmit);
                break;
            }
            if self.group.is_empty() {
                segment = size;
            }
            total += size;
            self.group.push(transmit);
            if size < segment {
                break;
            }
        }
        !self.group.is_empty()
    }

    /// Sends the group with one call; `batches` are those that are not committed.
    pub(super) fn send(
        &mut self,
        sender: &Sender,
        batches: &VecDeque<SealedBatch>,
        tx: &mut DatagramTx,
        datagrams: &mut Datagrams,
    ) -> io::Result<()> {
        static PADDING: [u8; MAX_BYTES] = [0; MAX_BYTES];
        self.update_joiner(sender.segment() as usize);
        let first = sender.committed();
        let batch = |seq: u64| &batches[(seq - first) as usize].payload;
        let payload = |transmit: &Transmit| match transmit.what {
            Outgoing::Payload { chunk, len } => {
                &batch(chunk.batch.seq)[chunk.offset as usize..][..len as usize]
            }
            Outgoing::Ping { padding } => &PADDING[..padding as usize],
        };
        let full = &self.full;
        let part_checksum = |transmit: &Transmit| match transmit.what {
            Outgoing::Payload { chunk, len } if len as usize == full.len() => {
                batch(chunk.batch.seq).part_checksum(chunk.offset as usize, len as usize)
            }
            _ => None,
        };
        self.headers.clear();
        self.headers.extend(self.group.iter().map(|transmit| {
            let payload = payload(transmit);
            match &self.keys {
                None => summed(self.key, transmit, payload, part_checksum(transmit), full),
                Some(keys) => sealed(self.key, keys, transmit, payload),
            }
        }));
        let mut packets = [[IoSlice::new(&[]); 2]; MAX_SEGMENTS];
        let parts = self.headers.iter().zip(&self.group);
        for (packet, (header, transmit)) in packets.iter_mut().zip(parts) {
            let payload = IoSlice::new(payload(transmit));
            *packet = [IoSlice::new(header.on_wire()), payload];
        }
        tx.send(datagrams, &packets[..self.group.len()])
    }

    /// Full packets carry `segment` bytes of payload now: the batch builder sums parts of this size, unless
    /// packets have tags instead of checksums.
    fn update_joiner(&mut self, segment: usize) {
        if self.keys.is_none() && self.full.len() != segment {
            self.full = self.shared.joiner(segment);
            let hint = &self.shared.packet_payload;
            hint.store(segment as u32, Ordering::Relaxed);
        }
    }
}

/// Header of a packet with a checksum; that of its payload may be known, if it is as long as `full` has it.
fn summed(
    key: StreamKey,
    transmit: &Transmit,
    payload: &[u8],
    payload_sum: Option<u32>,
    full: &Joiner,
) -> DataPrefix {
    let (packet, pause) = (transmit.packet, transmit.pause);
    let data = match (&transmit.what, payload_sum) {
        (Outgoing::Payload { chunk, .. }, Some(sum)) => {
            Data::summed_payload(key, packet, chunk, pause, sum, full)
        }
        (Outgoing::Payload { chunk, .. }, None) => {
            Data::payload(key, packet, chunk, pause, payload)
        }
        (Outgoing::Ping { .. }, _) => Data::ping(key, packet, payload),
    };
    let tag = Tag::default();
    DataPrefix { data, tag }
}

/// Header of a packet with a tag behind it.
fn sealed(key: StreamKey, keys: &PacketKeys, transmit: &Transmit, payload: &[u8]) -> DataPrefix {
    let (chunk, pause) = match &transmit.what {
        Outgoing::Payload { chunk, .. } => (Some(chunk), transmit.pause),
        Outgoing::Ping { .. } => (None, None),
    };
    let len = payload.len() as u16;
    let data = Data::to_be_sealed(key, transmit.packet, chunk, pause, len);
    let tag = keys.seal_data(transmit.packet, &[data.as_bytes(), payload]);
    DataPrefix { data, tag }
}

fn size_of_packet(transmit: &Transmit) -> usize {
    DATA_LEN
        + match transmit.what {
            Outgoing::Payload { len, .. } => len as usize,
            Outgoing::Ping { padding } => padding as usize,
        }
}
