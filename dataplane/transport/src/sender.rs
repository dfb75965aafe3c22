//! The publisher's end of a stream: what to send next, when, and what has arrived.

use std::collections::VecDeque;

use penstock_wire::packet::{BatchInfo, Chunk, DATA_LEN, Feedback, Pause};
use thiserror::Error;

use super::MAX_OPEN_BATCHES;
use super::congestion::Congestion;
use super::in_flight::InFlightLimit;
use super::mtu::{BASE_PLPMTU, PathMtu};
use super::rtt::Rtt;

/// A packet is lost once so many later ones arrived (RFC 9002 section 6.1.1); more where the
/// network is seen to reorder.
const PACKET_THRESHOLD: u64 = 3;
const MAX_PACKET_THRESHOLD: u64 = 512;
/// Longest time that the broker waits before it acks, nanoseconds.
const MAX_ACK_DELAY: u64 = 1_000_000;
/// Longest time between probes of a path from which nothing comes.
const MAX_PTO: u64 = 1_000_000_000;
/// A stream that has nothing to send shows in this time that it lives.
const KEEP_ALIVE_INTERVAL: u64 = 1_000_000_000;
/// Bytes that may go out back to back.
const MAX_BURST: u64 = 64 << 10;
/// Shortest probe timeout: a machine that is busy elsewhere may be silent for so long.
const MIN_PTO: u64 = 5_000_000;
/// Probe timeouts in a row after which the window begins anew (RFC 9002 section 7.6).
const PERSISTENT_CONGESTION_PTOS: u32 = 3;
/// Probe timeouts in a row that mean that nothing so large gets through.
const REDUCE_MTU_PTOS: u32 = 5;
/// Large packets lost in a row, none of them arriving for so many probe timeouts, that mean that the
/// path takes only smaller ones (RFC 8899 section 4.3): a full queue can lose as many at a time.
const BLACK_HOLE_LOSSES: u32 = 8;
const BLACK_HOLE_PTOS: u64 = 2;
/// Packets that are remembered after they count as lost, in case they come late.
const MAX_LOST_KEPT: u64 = 1024;

/// What a stream starts with.
#[derive(Debug, Clone, Copy)]
pub struct SenderConfig {
    /// Sequence number of the first batch: those before are committed.
    pub first_batch: u64,
    /// Bytes that may be sent before the first ACK.
    pub credit: u64,
    /// Largest UDP payload that both ends' interfaces take, bytes.
    pub max_datagram: u32,
    /// Bytes of batches that may be unacknowledged, however little the path needs.
    pub min_in_flight: u64,
    /// Time between a moment that is the same for all streams of a publisher and 0, nanoseconds.
    pub phase: u64,
}

/// A packet to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit {
    /// Its number.
    pub packet: u64,
    /// What it carries.
    pub what: Outgoing,
    /// Why nothing was sent before it, if nothing was.
    pub pause: Option<Pause>,
}

/// What a packet is to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outgoing {
    /// So many bytes of a batch.
    Payload {
        /// Batch, and offset in it.
        chunk: Chunk,
        /// Bytes.
        len: u32,
    },
    /// A ping with so many bytes of padding.
    Ping {
        /// Bytes.
        padding: u32,
    },
}

/// Feedback that no honest broker gives.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum AckFault {
    /// It acknowledges a packet that was never sent.
    #[error("acknowledges packet {claimed}, but only {sent} were sent")]
    Packet {
        /// The packet.
        claimed: u64,
        /// Packets sent.
        sent: u64,
    },
    /// It commits a batch that was never sent.
    #[error("commits batches up to {claimed}, but only {sent} were sent")]
    Batch {
        /// Batches committed, as it says.
        claimed: u64,
        /// Batches that were sent, at least in part.
        sent: u64,
    },
}

/// What a stream did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SenderStats {
    /// Packets sent.
    pub packets: u64,
    /// Packets that carried again what was declared lost, or probed a silent path.
    pub retransmits: u64,
    /// Packets declared lost.
    pub lost: u64,
    /// Of these, packets that came after all.
    pub spurious: u64,
    /// Times that nothing came for a whole probe timeout.
    pub probe_timeouts: u64,
    /// Times that the broker's credit was all that held the stream back.
    pub credit_stalls: u64,
    /// Times that full packets had to become smaller.
    pub black_holes: u64,
    /// Payload bytes that arrived, each as often as it did.
    pub delivered: u64,
}

/// A batch that is not committed.
#[derive(Debug, Clone, Copy)]
struct Pending {
    info: BatchInfo,
    /// Position in the stream where it starts.
    position: u64,
}

/// A part of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    seq: u64,
    offset: u32,
    len: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PacketContent {
    Payload(Span),
    Ping,
    /// A ping that finds out whether so large a datagram gets through.
    MtuProbe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PacketState {
    InFlight,
    Acked,
    Lost,
}

/// A packet that was sent.
#[derive(Debug, Clone, Copy)]
struct Sent {
    content: PacketContent,
    at: u64,
    size: u32,
    state: PacketState,
}

/// One stream's sending end. The caller keeps the payload of batches until they are committed.
#[derive(Debug)]
pub struct Sender {
    pending: VecDeque<Pending>,
    committed: u64,
    /// What has never been sent: batch, and offset in it.
    next: (u64, u32),
    /// Position in the stream behind the last batch.
    end: u64,
    credit: u64,
    sent: VecDeque<Sent>,
    /// Number of the first entry of `sent`.
    first_sent: u64,
    largest_acked: Option<u64>,
    lost: VecDeque<Span>,
    in_flight: u64,
    /// Packets on their way.
    packets_in_flight: u64,
    congestion: Congestion,
    in_flight_limit: InFlightLimit,
    /// When a batch may be wanted again that is not now, whatever is heard until then.
    wants_batch_at: Option<u64>,
    /// The window was full since the last ACK.
    window_used: bool,
    stalled: bool,
    /// Why the last poll brought nothing; reported with the next payload.
    pause: Option<Pause>,
    rtt: Rtt,
    mtu: PathMtu,
    packet_threshold: u64,
    /// Eighths of a round trip that reordering may take beyond a whole one.
    time_threshold: u64,
    loss_at: Option<u64>,
    /// Probe timeouts in a row.
    pto_count: u32,
    /// Pings in a row while nothing was on its way and nothing changed.
    idle_probes: u32,
    /// Packets larger than surely get through that were lost in a row, and when the first of them
    /// was declared so.
    large_lost: u32,
    large_lost_since: u64,
    /// Packets that go out whatever the window says.
    probes: u8,
    last_sent: u64,
    last_feedback_at: u64,
    /// When payload last arrived, or went on its way after all before had arrived.
    undelivered_since: Option<u64>,
    /// Pacing: the moment at which the next packet is due.
    next_send_time: u64,
    blocked: bool,
    stats: SenderStats,
}

impl Sender {
    /// A stream that has sent nothing.
    #[must_use]
    pub fn new(config: &SenderConfig, now: u64) -> Self {
        let mtu = PathMtu::new(config.max_datagram);
        Self {
            pending: VecDeque::with_capacity(64),
            committed: config.first_batch,
            next: (config.first_batch, 0),
            end: 0,
            credit: config.credit,
            // Entries are used round and round: many would fall out of the CPU's cache before their next use.
            sent: VecDeque::with_capacity(256),
            first_sent: 0,
            largest_acked: None,
            lost: VecDeque::with_capacity(64),
            in_flight: 0,
            packets_in_flight: 0,
            congestion: Congestion::new(u64::from(mtu.current())),
            in_flight_limit: InFlightLimit::new(config.min_in_flight, config.phase, now),
            wants_batch_at: None,
            window_used: false,
            stalled: false,
            pause: None,
            rtt: Rtt::default(),
            mtu,
            packet_threshold: PACKET_THRESHOLD,
            time_threshold: 1,
            loss_at: None,
            pto_count: 0,
            idle_probes: 0,
            large_lost: 0,
            large_lost_since: now,
            probes: 0,
            last_sent: now,
            last_feedback_at: now,
            undelivered_since: None,
            next_send_time: now,
            blocked: false,
            stats: SenderStats::default(),
        }
    }

    /// Whether one more batch may be pushed.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.pending.len() < MAX_OPEN_BATCHES
    }

    /// Whether one more batch keeps the path busy. If not, it would only wait in a queue; the caller
    /// that has one says so with [`Self::on_in_flight_limited`].
    #[must_use]
    pub fn wants_batch(&self, now: u64) -> bool {
        self.unacked_bytes() < self.in_flight_limit(now)
    }

    /// Bytes of batches that may be unacknowledged: what the path needs to stay busy.
    fn in_flight_limit(&self, now: u64) -> u64 {
        self.in_flight_limit.bytes(now)
    }

    /// Bytes of batches that the path needs, as far as that is known: the limit without its floor.
    #[must_use]
    pub fn needed_bytes(&self) -> u64 {
        self.in_flight_limit.needed()
    }

    /// A batch waits until [`Self::wants_batch`].
    pub fn on_in_flight_limited(&mut self, now: u64) {
        self.in_flight_limit.on_limited(now, self.stats.delivered);
        self.wants_batch_at = self.in_flight_limit.probe_end(now);
    }

    /// Bytes of batches that are pushed and not committed.
    fn unacked_bytes(&self) -> u64 {
        let first = self.pending.front();
        first.map_or(0, |first| self.end - first.position)
    }

    /// Adds a batch of `len` bytes with so many messages and this checksum; returns its number.
    ///
    /// # Panics
    /// If there is no room for it, or it is empty.
    pub fn push(&mut self, len: u32, messages: u32, checksum: u32) -> u64 {
        assert!(self.has_room() && len > 0);
        let seq = self.committed + self.pending.len() as u64;
        let info = BatchInfo {
            seq,
            len,
            messages,
            checksum,
        };
        self.pending.push_back(Pending {
            info,
            position: self.end,
        });
        self.end += u64::from(len);
        seq
    }

    /// The next packet, if one may go out now.
    pub fn poll_transmit(&mut self, now: u64) -> Option<Transmit> {
        if self.probes > 0 {
            self.probes -= 1;
            let content = self.probe_content();
            return Some(self.send(now, content));
        }
        if let Some(size) = self.mtu.next_probe(now).filter(|_| self.rtt.is_known()) {
            self.mtu.on_sent(size);
            return Some(self.send_sized(now, PacketContent::MtuProbe, size));
        }
        let full = u64::from(self.mtu.current());
        if self.in_flight + full > self.congestion.window() {
            self.window_used |= self.wants_to_send();
            self.pause = Some(match self.wants_to_send() {
                true => Pause::Congestion,
                false => Pause::Idle,
            });
            return None;
        }
        if self.next_send_time > now {
            self.window_used |= self.has_unsent();
            if !self.wants_to_send() {
                self.pause = Some(Pause::Idle);
            }
            return None;
        }
        if let Some(span) = self.next_lost() {
            self.stats.retransmits += 1;
            return Some(self.send(now, PacketContent::Payload(span)));
        }
        let span = self.next_unsent()?;
        Some(self.send(now, PacketContent::Payload(span)))
    }

    /// Takes the broker's feedback of this stream.
    ///
    /// # Errors
    /// [`AckFault`] when it tells of what never was; nothing is changed then.
    pub fn on_feedback(&mut self, now: u64, feedback: &Feedback) -> Result<(), AckFault> {
        let (claimed, sent) = (feedback.committed, self.next.0 + u64::from(self.next.1 > 0));
        if claimed > sent {
            return Err(AckFault::Batch { claimed, sent });
        }
        let (largest, sent) = (feedback.received.first(), self.next_packet());
        if let Some(&(_, claimed)) = largest.filter(|&&(_, high)| high >= sent) {
            return Err(AckFault::Packet { claimed, sent });
        }
        self.last_feedback_at = now;
        if feedback.credit > self.credit || feedback.committed > self.committed {
            self.idle_probes = 0;
        }
        self.credit = self.credit.max(feedback.credit);
        if (feedback.blocked || self.blocked)
            && let Some(since) = &mut self.undelivered_since
        {
            // Payload for which the broker had no room says nothing about the path.
            *since = now;
        }
        self.blocked = feedback.blocked;
        while self.committed < feedback.committed {
            self.pending.pop_front();
            self.committed += 1;
        }
        let mut newly_acked = false;
        for &(low, high) in &feedback.received {
            if high < self.first_sent {
                break;
            }
            newly_acked |= self.on_acked(now, low.max(self.first_sent), high, feedback);
        }
        if newly_acked {
            self.in_flight_limit.on_delivered(now, self.stats.delivered);
            self.pto_count = 0;
            self.detect_lost(now);
            if self.in_flight + u64::from(self.mtu.current()) <= self.congestion.window() {
                self.window_used = false;
            }
        }
        if self.packets_in_flight == 0 && self.lost.is_empty() {
            self.undelivered_since = None;
        }
        self.prune_sent(now);
        Ok(())
    }

    /// When [`Self::on_timeout`] is to be called, at the latest.
    #[must_use]
    pub fn next_timeout(&self) -> u64 {
        let mut next = self.pto_at();
        if let Some(at) = self.loss_at {
            next = next.min(at);
        }
        if let Some(at) = self.mtu.next_at().filter(|_| self.rtt.is_known()) {
            next = next.min(at);
        }
        if let Some(at) = self.wants_batch_at {
            next = next.min(at);
        }
        if self.has_something() && self.window_is_open() {
            next = next.min(self.next_send_time);
        }
        next
    }

    /// Time has passed; [`Self::poll_transmit`] may have something afterwards.
    pub fn on_timeout(&mut self, now: u64) {
        self.wants_batch_at = self.wants_batch_at.filter(|&at| at > now);
        if self.loss_at.is_some_and(|at| at <= now) {
            self.detect_lost(now);
            return;
        }
        if self.pto_at() > now {
            return;
        }
        if self.packets_in_flight == 0 {
            // Nothing is on its way: ask whether anything has changed, or just show life.
            self.idle_probes = (self.idle_probes + 1).min(32);
            self.probes = 1;
            return;
        }
        self.stats.probe_timeouts += 1;
        self.pto_count = (self.pto_count + 1).min(32);
        self.probes = 2;
        if self.pto_count == PERSISTENT_CONGESTION_PTOS {
            self.congestion.on_persistent_congestion(now);
        }
        if self.pto_count == REDUCE_MTU_PTOS {
            self.reduce_mtu(now);
        }
    }

    /// The kernel says that a datagram of this packet's size cannot be sent. Returns whether smaller
    /// ones are left to be tried.
    pub fn on_too_large(&mut self, now: u64, packet: u64) -> bool {
        let Some(sent) = self.entry(packet).copied() else {
            return true;
        };
        match sent.content {
            PacketContent::MtuProbe => {
                self.mtu.on_lost(now, sent.size, true);
            }
            PacketContent::Payload(_) | PacketContent::Ping => self.reduce_mtu(now),
        }
        if sent.state == PacketState::InFlight {
            self.mark_lost(packet);
        }
        sent.size > self.mtu.current()
    }

    /// Sends a packet in any case, to hear whether the broker is there.
    pub fn probe(&mut self) {
        self.probes = 1;
    }

    /// Number that the next packet will have.
    #[must_use]
    pub fn next_packet(&self) -> u64 {
        self.first_sent + self.sent.len() as u64
    }

    /// Batches committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Batches that are pushed and not committed.
    #[must_use]
    pub fn uncommitted(&self) -> usize {
        self.pending.len()
    }

    /// When the broker was last heard, or the stream began.
    #[must_use]
    pub fn last_feedback_at(&self) -> u64 {
        self.last_feedback_at
    }

    /// Since when payload is on its way without any arriving; none while there is nothing to wait
    /// for. A path may answer pings and yet take no payload.
    #[must_use]
    pub fn undelivered_since(&self) -> Option<u64> {
        self.undelivered_since
    }

    /// Whether the broker said last that it waits for room in the shared buffer.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Payload bytes of a full packet.
    #[must_use]
    pub fn segment(&self) -> u32 {
        self.mtu.current() - DATA_LEN as u32
    }

    /// Round-trip time.
    #[must_use]
    pub fn rtt(&self) -> &Rtt {
        &self.rtt
    }

    /// What the stream did.
    #[must_use]
    pub fn stats(&self) -> SenderStats {
        self.stats
    }

    /// Entries that are kept of all kinds.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.sent.len() + self.lost.len() + self.pending.len()
    }

    fn entry(&mut self, packet: u64) -> Option<&mut Sent> {
        let index = packet.checked_sub(self.first_sent)?;
        self.sent.get_mut(usize::try_from(index).ok()?)
    }

    fn pending(&self, seq: u64) -> Option<&Pending> {
        let index = seq.checked_sub(self.committed)?;
        self.pending.get(usize::try_from(index).ok()?)
    }

    fn has_unsent(&self) -> bool {
        self.pending(self.next.0).is_some()
    }

    fn wants_to_send(&self) -> bool {
        !self.lost.is_empty() || self.has_unsent()
    }

    fn has_something(&self) -> bool {
        !self.lost.is_empty() || (self.has_unsent() && !self.stalled)
    }

    fn window_is_open(&self) -> bool {
        self.in_flight + u64::from(self.mtu.current()) <= self.congestion.window()
    }

    fn probe_timeout(&self) -> u64 {
        self.rtt.probe_timeout(MAX_ACK_DELAY).max(MIN_PTO)
    }

    /// When a silent path is probed, or an idle stream shows life.
    fn pto_at(&self) -> u64 {
        let timeout = self.probe_timeout();
        let backed_off = |times: u32| (timeout << times.min(20)).min(MAX_PTO);
        let timeout = if self.packets_in_flight > 0 {
            backed_off(self.pto_count)
        } else if self.pending.is_empty() {
            KEEP_ALIVE_INTERVAL
        } else {
            backed_off(self.idle_probes)
        };
        self.last_sent.max(self.last_feedback_at) + timeout
    }

    /// The next span to be sent again; what is committed meanwhile is not.
    fn next_lost(&mut self) -> Option<Span> {
        let segment = self.segment();
        loop {
            let span = self.lost.front_mut()?;
            if span.seq < self.committed {
                self.lost.pop_front();
                continue;
            }
            // Packets may have become smaller since.
            let first = Span {
                len: span.len.min(segment),
                ..*span
            };
            span.offset += first.len;
            span.len -= first.len;
            if span.len == 0 {
                self.lost.pop_front();
            }
            return Some(first);
        }
    }

    fn next_unsent(&mut self) -> Option<Span> {
        let (seq, offset) = self.next;
        let Some(&Pending { info, position }) = self.pending(seq) else {
            self.stalled = false;
            self.pause = Some(Pause::Idle);
            return None;
        };
        let len = (info.len - offset).min(self.segment());
        if position + u64::from(offset + len) > self.credit {
            self.stats.credit_stalls += u64::from(!self.stalled);
            self.stalled = true;
            self.pause = Some(Pause::Credit);
            return None;
        }
        self.stalled = false;
        self.next = if offset + len == info.len {
            (seq + 1, 0)
        } else {
            (seq, offset + len)
        };
        Some(Span { seq, offset, len })
    }

    /// What wakes a silent broker best: the oldest packet that is not acked, new data, or a ping.
    fn probe_content(&mut self) -> PacketContent {
        if let Some(span) = self.next_lost() {
            self.stats.retransmits += 1;
            return PacketContent::Payload(span);
        }
        let segment = self.segment();
        let committed = self.committed;
        // The first probe carries the oldest, the second the newest: either end of a gap.
        let oldest = self.probes == 1;
        let wanted = |sent: &&Sent| {
            sent.state == PacketState::InFlight
                && matches!(sent.content, PacketContent::Payload(span) if span.seq >= committed)
        };
        let found = if oldest {
            self.sent.iter().find(wanted)
        } else {
            self.sent.iter().rev().find(wanted)
        };
        match found.map(|sent| sent.content) {
            Some(PacketContent::Payload(span)) => {
                self.stats.retransmits += 1;
                PacketContent::Payload(Span {
                    len: span.len.min(segment),
                    ..span
                })
            }
            _ => self
                .next_unsent()
                .map_or(PacketContent::Ping, PacketContent::Payload),
        }
    }

    fn send(&mut self, now: u64, content: PacketContent) -> Transmit {
        let payload = match content {
            PacketContent::Payload(span) => span.len,
            PacketContent::Ping | PacketContent::MtuProbe => 0,
        };
        self.send_sized(now, content, payload + DATA_LEN as u32)
    }

    fn send_sized(&mut self, now: u64, content: PacketContent, size: u32) -> Transmit {
        let packet = self.next_packet();
        self.sent.push_back(Sent {
            content,
            at: now,
            size,
            state: PacketState::InFlight,
        });
        if let PacketContent::Payload(_) = content {
            self.undelivered_since.get_or_insert(now);
        }
        self.in_flight += u64::from(size);
        self.packets_in_flight += 1;
        self.stats.packets += 1;
        self.last_sent = now;
        let allowed_late = self.congestion.pace(MAX_BURST, &self.rtt);
        let time = self.congestion.pace(u64::from(size), &self.rtt);
        self.next_send_time = self.next_send_time.max(now.saturating_sub(allowed_late)) + time;
        let what = match content {
            PacketContent::Payload(Span { seq, offset, len }) => {
                let batch = self
                    .pending(seq)
                    .expect("only what is uncommitted is sent")
                    .info;
                Outgoing::Payload {
                    chunk: Chunk { batch, offset },
                    len,
                }
            }
            PacketContent::Ping | PacketContent::MtuProbe => Outgoing::Ping {
                padding: size - DATA_LEN as u32,
            },
        };
        let pause = match what {
            Outgoing::Payload { .. } => self.pause.take(),
            Outgoing::Ping { .. } => None,
        };
        Transmit {
            packet,
            what,
            pause,
        }
    }

    /// Packets `low` to `high` arrived. Returns whether that was not known of any of them.
    fn on_acked(&mut self, now: u64, low: u64, high: u64, feedback: &Feedback) -> bool {
        let mut newly_acked = false;
        for packet in low..=high {
            let Some(entry) = self.entry(packet) else {
                break;
            };
            let sent = *entry;
            if sent.state == PacketState::Acked {
                continue;
            }
            entry.state = PacketState::Acked;
            newly_acked = true;
            match sent.state {
                PacketState::Lost => self.on_spurious_loss(packet),
                _ => {
                    self.in_flight -= u64::from(sent.size);
                    self.packets_in_flight -= 1;
                }
            }
            let newest = self.largest_acked.is_none_or(|largest| packet > largest);
            // The broker reports its delay for the largest packet only.
            if newest && packet == feedback.received[0].1 {
                let delay = u64::from(feedback.delay_us) * 1000;
                self.rtt.sample(now - sent.at, delay);
                self.in_flight_limit.on_round_trip(now, now - sent.at);
            }
            if newest {
                self.largest_acked = Some(packet);
            }
            if sent.size > BASE_PLPMTU {
                self.large_lost = 0;
            }
            if let PacketContent::Payload(span) = sent.content {
                self.undelivered_since = Some(now);
                self.stats.delivered += u64::from(span.len);
            }
            if sent.content == PacketContent::MtuProbe {
                self.mtu.on_acked(now, sent.size);
                self.congestion.set_segment(u64::from(self.mtu.current()));
            }
            let size = u64::from(sent.size);
            self.congestion
                .on_ack(now, sent.at, size, &self.rtt, self.window_used);
        }
        newly_acked
    }

    /// A packet that was declared lost came late: be more patient with the next.
    fn on_spurious_loss(&mut self, packet: u64) {
        self.stats.spurious += 1;
        let largest = self.largest_acked.unwrap_or(packet);
        let behind = largest.saturating_sub(packet) + 1;
        self.packet_threshold = self.packet_threshold.max(behind).min(MAX_PACKET_THRESHOLD);
        self.time_threshold = (self.time_threshold + 1).min(16);
    }

    /// Declares packets lost that later ones have overtaken by too much.
    fn detect_lost(&mut self, now: u64) {
        self.loss_at = None;
        let Some(largest) = self.largest_acked else {
            return;
        };
        let delay = self.rtt.loss_delay() / 9 * (8 + self.time_threshold);
        for packet in self.first_sent..largest {
            let sent = self.sent[(packet - self.first_sent) as usize];
            if sent.state != PacketState::InFlight {
                continue;
            }
            let overtaken = largest - packet >= self.packet_threshold;
            if overtaken || sent.at + delay <= now {
                self.mark_lost(packet);
                self.stats.lost += 1;
                match sent.content {
                    PacketContent::MtuProbe => self.mtu.on_lost(now, sent.size, false),
                    _ => {
                        self.congestion.on_loss(now, sent.at, &self.rtt);
                        if sent.size > BASE_PLPMTU {
                            if self.large_lost == 0 {
                                self.large_lost_since = now;
                            }
                            self.large_lost += 1;
                        }
                    }
                }
            } else {
                let at = sent.at + delay;
                self.loss_at = Some(self.loss_at.map_or(at, |earlier| earlier.min(at)));
            }
        }
        let shortest = BLACK_HOLE_PTOS * self.probe_timeout();
        if self.large_lost >= BLACK_HOLE_LOSSES && now - self.large_lost_since >= shortest {
            self.reduce_mtu(now);
        }
    }

    /// Full packets do not get through: goes back to a size that surely does.
    fn reduce_mtu(&mut self, now: u64) {
        self.large_lost = 0;
        if self.mtu.on_black_hole(now) {
            self.stats.black_holes += 1;
            self.congestion.set_segment(u64::from(self.mtu.current()));
        }
    }

    /// A packet does not count as being on its way any more; what it carried goes out again.
    fn mark_lost(&mut self, packet: u64) {
        let committed = self.committed;
        let Some(entry) = self.entry(packet) else {
            return;
        };
        entry.state = PacketState::Lost;
        let sent = *entry;
        self.in_flight -= u64::from(sent.size);
        self.packets_in_flight -= 1;
        if let PacketContent::Payload(span) = sent.content
            && span.seq >= committed
        {
            self.lost.push_back(span);
        }
    }

    /// Forgets packets whose state matters no more.
    fn prune_sent(&mut self, now: u64) {
        let late = 3 * self.rtt.smoothed();
        while let Some(front) = self.sent.front() {
            let done = match front.state {
                PacketState::InFlight => false,
                PacketState::Acked => true,
                PacketState::Lost => {
                    now - front.at > late || self.sent.len() as u64 > MAX_LOST_KEPT
                }
            };
            if !done {
                return;
            }
            self.sent.pop_front();
            self.first_sent += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::packet::StreamKey;

    const MS: u64 = 1_000_000;

    fn sender() -> Sender {
        let config = SenderConfig {
            first_batch: 5,
            credit: 10_000,
            max_datagram: 1452,
            min_in_flight: 1 << 20,
            phase: 0,
        };
        Sender::new(&config, 0)
    }

    fn feedback(received: &[(u64, u64)], committed: u64) -> Feedback {
        Feedback {
            received: received.to_vec(),
            committed,
            credit: 10_000,
            ..Feedback::new(StreamKey { key: 0, stream: 0 })
        }
    }

    fn transmit_all(sender: &mut Sender, now: u64) -> Vec<Transmit> {
        std::iter::from_fn(|| sender.poll_transmit(now)).collect()
    }

    #[test]
    fn lies_change_nothing() {
        let mut s = sender();
        s.push(500, 1, 0);
        assert_eq!(s.push(500, 1, 0), 6);
        s.poll_transmit(0).unwrap();
        let packet = AckFault::Packet {
            claimed: 1,
            sent: 1,
        };
        assert_eq!(s.on_feedback(MS, &feedback(&[(0, 1)], 5)), Err(packet));
        let batch = AckFault::Batch {
            claimed: 7,
            sent: 6,
        };
        assert_eq!(s.on_feedback(MS, &feedback(&[(0, 0)], 7)), Err(batch));
        assert_eq!((s.committed(), s.last_feedback_at()), (5, 0));
        s.on_feedback(MS, &feedback(&[(0, 0)], 6)).unwrap();
        assert_eq!((s.committed(), s.uncommitted()), (6, 1));
    }

    #[test]
    fn no_more_than_the_credit_is_sent() {
        let mut s = sender();
        for _ in 0..20 {
            s.push(1000, 1, 0);
        }
        let mut now = 0;
        let mut sent = 0;
        for _ in 0..100 {
            now += MS;
            let last = transmit_all(&mut s, now).last().map(|t| t.packet);
            sent = last.unwrap_or(sent);
            // Arrives, but is not committed: the credit stays.
            s.on_feedback(now, &feedback(&[(0, sent)], 5)).unwrap();
        }
        assert_eq!(s.next, (15, 0));
        assert_eq!(s.stats().credit_stalls, 1);
        let more = Feedback {
            credit: 12_500,
            ..feedback(&[(0, sent)], 5)
        };
        s.on_feedback(now, &more).unwrap();
        let last = transmit_all(&mut s, now + MS);
        assert_eq!(s.next, (17, 0), "half a batch is not worth a packet");
        let pauses: Vec<_> = last.iter().map(|t| t.pause).collect();
        assert_eq!(pauses, [Some(Pause::Credit), None], "reported once");
    }

    #[test]
    fn the_first_packet_after_a_pause_tells_why_it_was() {
        let pauses =
            |sent: &[Transmit]| -> Vec<_> { sent.iter().filter_map(|t| t.pause).collect() };
        let mut s = sender();
        s.push(1000, 1, 0);
        assert_eq!(pauses(&transmit_all(&mut s, 0)), []);
        s.on_feedback(MS, &feedback(&[(0, 0)], 5)).unwrap();
        s.push(1000, 1, 0);
        assert_eq!(pauses(&transmit_all(&mut s, 10 * MS)), [Pause::Idle]);
        // The congestion window at first is smaller than this credit.
        let config = SenderConfig {
            first_batch: 0,
            credit: 1 << 20,
            max_datagram: 1452,
            min_in_flight: 1 << 20,
            phase: 0,
        };
        let mut s = Sender::new(&config, 0);
        for _ in 0..100 {
            s.push(1000, 1, 0);
        }
        let sent = transmit_all(&mut s, 5000 * MS);
        let last = sent.last().unwrap().packet;
        assert!(last < 99);
        let acked = feedback(&[(0, last)], 0);
        s.on_feedback(5001 * MS, &acked).unwrap();
        let more = transmit_all(&mut s, 5002 * MS);
        assert_eq!(pauses(&more), [Pause::Congestion]);
    }

    #[test]
    fn a_lost_packet_goes_out_again_with_a_new_number() {
        let mut s = sender();
        for _ in 0..6 {
            s.push(1000, 1, 0);
        }
        let sent = transmit_all(&mut s, 100 * MS);
        assert!(sent.len() >= 5);
        s.on_feedback(101 * MS, &feedback(&[(1, 4)], 5)).unwrap();
        let again = transmit_all(&mut s, 101 * MS);
        assert!(again.iter().any(|t| t.what == sent[0].what && t.packet > 4));
        assert_eq!((s.stats().lost, s.stats().retransmits), (1, 1));
        // It comes late: the next one is waited for longer.
        s.on_feedback(102 * MS, &feedback(&[(0, 4)], 5)).unwrap();
        assert_eq!(s.stats().spurious, 1);
        assert!(s.packet_threshold > PACKET_THRESHOLD);
    }

    #[test]
    fn a_silent_broker_is_probed_less_and_less_often() {
        let mut s = sender();
        s.push(1000, 1, 0);
        let mut now = 0;
        transmit_all(&mut s, now);
        let mut waits = Vec::new();
        for _ in 0..12 {
            let at = s.next_timeout();
            waits.push(at - now);
            now = at;
            s.on_timeout(now);
            assert!(!transmit_all(&mut s, now).is_empty(), "a probe");
        }
        assert!(waits.is_sorted());
        assert_eq!(*waits.last().unwrap(), MAX_PTO);
        assert!(waits[1] >= 2 * waits[0]);
    }

    #[test]
    fn a_path_is_not_blamed_for_what_a_blocked_broker_does_not_take() {
        const SECOND: u64 = 1000 * MS;
        let mut s = sender();
        s.push(1000, 1, 0);
        transmit_all(&mut s, 0);
        let mut blocked = feedback(&[], 0);
        blocked.blocked = true;
        s.on_feedback(10 * SECOND, &blocked).unwrap();
        // It has room again: the time counts from now.
        s.on_feedback(20 * SECOND, &feedback(&[], 0)).unwrap();
        assert_eq!(s.undelivered_since(), Some(20 * SECOND));
        s.on_feedback(24 * SECOND, &feedback(&[], 0)).unwrap();
        assert_eq!(s.undelivered_since(), Some(20 * SECOND));
    }

    #[test]
    fn an_idle_stream_shows_that_it_lives() {
        let mut s = sender();
        assert_eq!(s.next_timeout(), KEEP_ALIVE_INTERVAL);
        s.on_timeout(KEEP_ALIVE_INTERVAL);
        let sent = transmit_all(&mut s, KEEP_ALIVE_INTERVAL);
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].what, Outgoing::Ping { padding: 0 });
    }

    #[test]
    fn what_the_kernel_cannot_send_is_sent_in_smaller_packets() {
        let config = SenderConfig {
            first_batch: 0,
            credit: 100_000,
            max_datagram: 8972,
            min_in_flight: 1 << 20,
            phase: 0,
        };
        let mut s = Sender::new(&config, 0);
        s.push(50_000, 1, 0);
        s.poll_transmit(0).unwrap();
        s.on_feedback(MS, &feedback(&[(0, 0)], 0)).unwrap();
        let probe = s.poll_transmit(MS).unwrap();
        assert_eq!(
            probe.what,
            Outgoing::Ping {
                padding: 8972 - DATA_LEN as u32
            }
        );
        assert!(s.on_too_large(MS, probe.packet));
        assert!(s.mtu.next_probe(MS).is_some_and(|size| size < 8972));
        let largest = transmit_all(&mut s, 2 * MS)
            .iter()
            .filter_map(|t| match t.what {
                Outgoing::Payload { len, .. } => Some(len),
                Outgoing::Ping { .. } => None,
            })
            .max();
        assert_eq!(largest, Some(BASE_PLPMTU - DATA_LEN as u32));
        let last = s.next_packet() - 1;
        assert!(!s.on_too_large(2 * MS, last), "none is smaller");
    }
}
