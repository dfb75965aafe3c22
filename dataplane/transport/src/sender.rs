//! The publisher's end of a stream: what to send next, when, and what has arrived.

use penstock_wire::packet::{Chunk, DATA_LEN, Feedback, Pause};
use thiserror::Error;

use super::congestion::Congestion;
use super::in_flight::InFlightLimit;
use super::loss::LossDetection;
use super::mtu::PathMtu;
use super::pacer::Pacer;
use super::probe_timer::{ProbeTimer, WaitsFor};
use super::rtt::Rtt;
use super::send_queue::{SendQueue, Span};
use super::sent_packets::{Ack, PacketContent, PacketState, SentPacket, SentPackets};
use super::time::{Nanos, Timestamp};

/// Probe timeouts in a row after which the window begins anew (RFC 9002 section 7.6).
const PERSISTENT_CONGESTION_PTOS: u32 = 3;
/// Probe timeouts in a row that mean that nothing so large gets through.
const REDUCE_MTU_PTOS: u32 = 5;

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
    /// Time between a moment that is the same for all streams of a publisher and [`Timestamp::ZERO`].
    pub phase: Nanos,
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
    /// A part of a batch.
    Payload {
        /// Batch, and offset in it.
        chunk: Chunk,
        /// Bytes.
        len: u32,
    },
    /// A ping with this many bytes of padding.
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

/// One stream's sending end. The caller keeps the payload of batches until they are committed.
#[derive(Debug)]
pub struct Sender {
    queue: SendQueue,
    sent: SentPackets,
    loss: LossDetection,
    probe_timer: ProbeTimer,
    pacer: Pacer,
    congestion: Congestion,
    rtt: Rtt,
    mtu: PathMtu,
    in_flight_limit: InFlightLimit,
    /// When a batch may be wanted again that is not now, whatever arrives until then.
    wants_batch_at: Option<Timestamp>,
    /// The congestion window was full since the last ACK.
    is_window_limited: bool,
    /// Why the last poll brought nothing; reported with the next payload.
    pause: Option<Pause>,
    /// When payload last arrived, or went on its way after all before had arrived.
    undelivered_since: Option<Timestamp>,
    is_blocked: bool,
    stats: SenderStats,
}

impl Sender {
    /// A stream that has sent nothing.
    #[must_use]
    pub fn new(config: &SenderConfig, now: Timestamp) -> Self {
        let mtu = PathMtu::new(config.max_datagram);
        Self {
            queue: SendQueue::new(config.first_batch, config.credit),
            sent: SentPackets::new(),
            loss: LossDetection::new(),
            probe_timer: ProbeTimer::new(now),
            pacer: Pacer::new(now),
            congestion: Congestion::new(u64::from(mtu.current())),
            rtt: Rtt::default(),
            mtu,
            in_flight_limit: InFlightLimit::new(config.min_in_flight, config.phase, now),
            wants_batch_at: None,
            is_window_limited: false,
            pause: None,
            undelivered_since: None,
            is_blocked: false,
            stats: SenderStats::default(),
        }
    }

    /// Whether one more batch may be pushed.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    /// Whether one more batch keeps the path busy. If not, it would only wait in a queue; the caller
    /// that has one says so with [`Self::on_in_flight_limited`].
    #[must_use]
    pub fn wants_batch(&self, now: Timestamp) -> bool {
        self.queue.uncommitted_bytes() < self.in_flight_limit.bytes(now)
    }

    /// Bytes of batches that the path needs, as far as that is known: the limit without its floor.
    #[must_use]
    pub fn needed_bytes(&self) -> u64 {
        self.in_flight_limit.needed()
    }

    /// A batch waits until [`Self::wants_batch`].
    pub fn on_in_flight_limited(&mut self, now: Timestamp) {
        self.in_flight_limit.on_limited(now, self.stats.delivered);
        self.wants_batch_at = self.in_flight_limit.probe_end(now);
    }

    /// Adds a batch of `len` bytes with this number of messages and this checksum; returns its number.
    ///
    /// # Panics
    /// If there is no room for it, or it is empty.
    pub fn push(&mut self, len: u32, messages: u32, checksum: u32) -> u64 {
        self.queue.push(len, messages, checksum)
    }

    /// The next packet, if one may go out now.
    pub fn poll_transmit(&mut self, now: Timestamp) -> Option<Transmit> {
        if let Some(left) = self.probe_timer.take_probe() {
            // The first probe carries the newest payload, the last the oldest: either end of a gap.
            let content = self.probe_content(left == 1);
            return Some(self.send(now, content));
        }
        if let Some(size) = self.mtu.next_probe(now).filter(|_| self.rtt.is_known()) {
            self.mtu.on_sent(size);
            return Some(self.send_sized(now, PacketContent::MtuProbe, size));
        }
        if !self.is_window_open() {
            let wants_to_send = self.queue.wants_to_send();
            self.is_window_limited |= wants_to_send;
            self.pause = Some(match wants_to_send {
                true => Pause::Congestion,
                false => Pause::Idle,
            });
            return None;
        }
        if self.pacer.next_send_time() > now {
            self.is_window_limited |= self.queue.has_unsent();
            if !self.queue.wants_to_send() {
                self.pause = Some(Pause::Idle);
            }
            return None;
        }
        let span = match self.next_lost() {
            Some(span) => span,
            None => self.next_unsent()?,
        };
        Some(self.send(now, PacketContent::Payload(span)))
    }

    /// Takes the broker's feedback of this stream.
    ///
    /// # Errors
    /// [`AckFault`] when it claims what cannot be; nothing is changed then.
    pub fn on_feedback(&mut self, now: Timestamp, feedback: &Feedback) -> Result<(), AckFault> {
        self.check(feedback)?;
        self.probe_timer.on_feedback(now);
        if (feedback.blocked || self.is_blocked)
            && let Some(since) = &mut self.undelivered_since
        {
            // Payload for which the broker had no room says nothing about the path.
            *since = now;
        }
        self.is_blocked = feedback.blocked;
        if self.queue.on_feedback(feedback.committed, feedback.credit) {
            self.probe_timer.on_progress();
        }
        if self.on_received(now, feedback) {
            self.in_flight_limit.on_delivered(now, self.stats.delivered);
            self.probe_timer.on_ack();
            self.detect_lost(now);
            if self.is_window_open() {
                self.is_window_limited = false;
            }
        }
        if !self.sent.is_any_in_flight() && !self.queue.has_lost() {
            self.undelivered_since = None;
        }
        self.sent.prune(now, 3 * self.rtt.smoothed());
        Ok(())
    }

    fn check(&self, feedback: &Feedback) -> Result<(), AckFault> {
        let (claimed, sent) = (feedback.committed, self.queue.sent_batches());
        if claimed > sent {
            return Err(AckFault::Batch { claimed, sent });
        }
        let sent = self.next_packet();
        match feedback.received.first() {
            Some(&(_, claimed)) if claimed >= sent => Err(AckFault::Packet { claimed, sent }),
            _ => Ok(()),
        }
    }

    /// When [`Self::on_timeout`] is to be called, at the latest.
    #[must_use]
    pub fn next_timeout(&self) -> Timestamp {
        let mut next = self.probe_deadline();
        if let Some(at) = self.loss.loss_time() {
            next = next.min(at);
        }
        if let Some(at) = self.mtu.next_at().filter(|_| self.rtt.is_known()) {
            next = next.min(at);
        }
        if let Some(at) = self.wants_batch_at {
            next = next.min(at);
        }
        if self.queue.can_send() && self.is_window_open() {
            next = next.min(self.pacer.next_send_time());
        }
        next
    }

    /// Time has passed; [`Self::poll_transmit`] may have something afterwards.
    pub fn on_timeout(&mut self, now: Timestamp) {
        self.wants_batch_at = self.wants_batch_at.filter(|&at| at > now);
        if self.loss.loss_time().is_some_and(|at| at <= now) {
            self.detect_lost(now);
            return;
        }
        if self.probe_deadline() > now {
            return;
        }
        if !self.sent.is_any_in_flight() {
            self.probe_timer.on_idle();
            return;
        }
        self.stats.probe_timeouts += 1;
        let in_a_row = self.probe_timer.on_pto();
        if in_a_row == PERSISTENT_CONGESTION_PTOS {
            self.congestion.on_persistent_congestion(now);
        }
        if in_a_row == REDUCE_MTU_PTOS {
            self.reduce_mtu(now);
        }
    }

    /// The kernel says that a datagram of this packet's size cannot be sent. Returns whether smaller
    /// ones are left to be tried.
    pub fn on_too_large(&mut self, now: Timestamp, packet: u64) -> bool {
        let Some(sent) = self.sent.get(packet).copied() else {
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

    /// Sends a packet in any case, to find out whether the broker is there.
    pub fn probe(&mut self) {
        self.probe_timer.probe_now();
    }

    /// Number that the next packet will have.
    #[must_use]
    pub fn next_packet(&self) -> u64 {
        self.sent.next_number()
    }

    /// Batches committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.queue.committed()
    }

    /// Batches that are pushed and not committed.
    #[must_use]
    pub fn uncommitted(&self) -> usize {
        self.queue.uncommitted()
    }

    /// When the broker's last feedback arrived, or the stream began.
    #[must_use]
    pub fn last_feedback_at(&self) -> Timestamp {
        self.probe_timer.last_feedback_at()
    }

    /// Since when payload is on its way without any arriving; none while there is nothing to wait
    /// for. A path may answer pings and yet take no payload.
    #[must_use]
    pub fn undelivered_since(&self) -> Option<Timestamp> {
        self.undelivered_since
    }

    /// Whether the broker said last that it waits for room in the shared buffer.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.is_blocked
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
        SenderStats {
            credit_stalls: self.queue.credit_stalls(),
            ..self.stats
        }
    }

    /// Entries that are kept of all kinds.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.sent.entries() + self.queue.entries()
    }

    fn is_window_open(&self) -> bool {
        let full = u64::from(self.mtu.current());
        self.sent.bytes_in_flight() + full <= self.congestion.window()
    }

    /// When a silent path is probed, or an idle stream sends a ping.
    fn probe_deadline(&self) -> Timestamp {
        let waits_for = if self.sent.is_any_in_flight() {
            WaitsFor::Acks
        } else if self.queue.uncommitted() > 0 {
            WaitsFor::Progress
        } else {
            WaitsFor::Batches
        };
        self.probe_timer.deadline(&self.rtt, waits_for)
    }

    /// The next lost bytes to send again.
    fn next_lost(&mut self) -> Option<Span> {
        let span = self.queue.next_lost(self.segment())?;
        self.stats.retransmits += 1;
        Some(span)
    }

    /// The next bytes that were never sent; notes why there are none.
    fn next_unsent(&mut self) -> Option<Span> {
        let next = self.queue.next_unsent(self.segment());
        next.map_err(|pause| self.pause = Some(pause)).ok()
    }

    /// What wakes a silent broker best: payload that is not acked, new payload, or a ping.
    fn probe_content(&mut self, oldest: bool) -> PacketContent {
        if let Some(span) = self.next_lost() {
            return PacketContent::Payload(span);
        }
        let committed = self.queue.committed();
        if let Some(span) = self.sent.payload_in_flight(oldest, committed) {
            self.stats.retransmits += 1;
            return PacketContent::Payload(Span {
                len: span.len.min(self.segment()),
                ..span
            });
        }
        self.next_unsent()
            .map_or(PacketContent::Ping, PacketContent::Payload)
    }

    fn send(&mut self, now: Timestamp, content: PacketContent) -> Transmit {
        let payload = match content {
            PacketContent::Payload(span) => span.len,
            PacketContent::Ping | PacketContent::MtuProbe => 0,
        };
        self.send_sized(now, content, payload + DATA_LEN as u32)
    }

    fn send_sized(&mut self, now: Timestamp, content: PacketContent, size: u32) -> Transmit {
        let packet = self.sent.push(content, now, size);
        self.stats.packets += 1;
        self.probe_timer.on_sent(now);
        self.pacer.on_sent(now, size, &self.congestion, &self.rtt);
        let (what, pause) = match content {
            PacketContent::Payload(Span { seq, offset, len }) => {
                self.undelivered_since.get_or_insert(now);
                let batch = self.queue.batch(seq);
                let batch = *batch.expect("only what is uncommitted is sent");
                let chunk = Chunk { batch, offset };
                (Outgoing::Payload { chunk, len }, self.pause.take())
            }
            PacketContent::Ping | PacketContent::MtuProbe => {
                let padding = size - DATA_LEN as u32;
                (Outgoing::Ping { padding }, None)
            }
        };
        Transmit {
            packet,
            what,
            pause,
        }
    }

    /// Takes the packets that the broker received. Returns whether that was not known of any of them.
    fn on_received(&mut self, now: Timestamp, feedback: &Feedback) -> bool {
        let mut newly_acked = false;
        for &(low, high) in &feedback.received {
            if high < self.sent.first() {
                break;
            }
            for packet in low.max(self.sent.first())..=high {
                match self.sent.ack(packet) {
                    Ack::Unknown => break,
                    Ack::Repeated => {}
                    Ack::New { sent, is_largest } => {
                        newly_acked = true;
                        self.on_acked(now, packet, &sent, is_largest, feedback);
                    }
                }
            }
        }
        newly_acked
    }

    fn on_acked(
        &mut self,
        now: Timestamp,
        packet: u64,
        sent: &SentPacket,
        is_largest: bool,
        feedback: &Feedback,
    ) {
        if sent.state == PacketState::Lost {
            self.stats.spurious += 1;
            let largest = self.sent.largest_acked().unwrap_or(packet);
            self.loss
                .on_spurious_loss(largest.saturating_sub(packet) + 1);
        }
        // The broker reports its delay for the largest packet only.
        if is_largest && packet == feedback.received[0].1 {
            let elapsed = now - sent.sent_at;
            let delay = Nanos::from_micros(feedback.delay_us.into());
            self.rtt.sample(elapsed, delay);
            self.in_flight_limit.on_round_trip(now, elapsed);
        }
        self.mtu.on_packet_acked(sent.size);
        match sent.content {
            PacketContent::Payload(span) => {
                self.undelivered_since = Some(now);
                self.stats.delivered += u64::from(span.len);
            }
            PacketContent::MtuProbe => {
                self.mtu.on_acked(now, sent.size);
                self.congestion.set_segment(u64::from(self.mtu.current()));
            }
            PacketContent::Ping => {}
        }
        let (size, is_limited) = (u64::from(sent.size), self.is_window_limited);
        self.congestion
            .on_ack(now, sent.sent_at, size, &self.rtt, is_limited);
    }

    /// Declares packets lost that later ones have overtaken by too much.
    fn detect_lost(&mut self, now: Timestamp) {
        let delay = self.loss.start_pass(&self.rtt);
        let Some(largest) = self.sent.largest_acked() else {
            return;
        };
        for packet in self.sent.first()..largest {
            let Some(&sent) = self.sent.get(packet) else {
                break;
            };
            let is_in_flight = sent.state == PacketState::InFlight;
            if is_in_flight
                && self
                    .loss
                    .is_lost(now, largest - packet, sent.sent_at, delay)
            {
                self.on_lost(now, packet, &sent);
            }
        }
        if self.mtu.is_black_hole(now, ProbeTimer::pto(&self.rtt)) {
            self.reduce_mtu(now);
        }
    }

    fn on_lost(&mut self, now: Timestamp, packet: u64, sent: &SentPacket) {
        self.mark_lost(packet);
        self.stats.lost += 1;
        match sent.content {
            PacketContent::MtuProbe => self.mtu.on_lost(now, sent.size, false),
            PacketContent::Payload(_) | PacketContent::Ping => {
                self.congestion.on_loss(now, sent.sent_at, &self.rtt);
                self.mtu.on_packet_lost(now, sent.size);
            }
        }
    }

    /// Full packets do not get through: goes back to a size that surely does.
    fn reduce_mtu(&mut self, now: Timestamp) {
        if self.mtu.on_black_hole(now) {
            self.stats.black_holes += 1;
            self.congestion.set_segment(u64::from(self.mtu.current()));
        }
    }

    /// A packet is not in flight any more; what it carried goes out again.
    fn mark_lost(&mut self, packet: u64) {
        if let Some(sent) = self.sent.mark_lost(packet)
            && let PacketContent::Payload(span) = sent.content
        {
            self.queue.requeue(span);
        }
    }
}

#[cfg(test)]
mod tests {
    use penstock_wire::packet::StreamKey;

    use super::*;
    use crate::loss::PACKET_THRESHOLD;
    use crate::mtu::BASE_PLPMTU;
    use crate::probe_timer::{KEEP_ALIVE_INTERVAL, MAX_PTO};

    const MS: Nanos = Nanos::from_millis(1);
    const START: Timestamp = Timestamp::ZERO;

    fn sender() -> Sender {
        let config = SenderConfig {
            first_batch: 5,
            credit: 10_000,
            max_datagram: 1452,
            min_in_flight: 1 << 20,
            phase: Nanos::ZERO,
        };
        Sender::new(&config, START)
    }

    fn feedback(received: &[(u64, u64)], committed: u64) -> Feedback {
        Feedback {
            received: received.to_vec(),
            committed,
            credit: 10_000,
            ..Feedback::new(StreamKey { key: 0, stream: 0 })
        }
    }

    fn transmit_all(sender: &mut Sender, now: Timestamp) -> Vec<Transmit> {
        std::iter::from_fn(|| sender.poll_transmit(now)).collect()
    }

    #[test]
    fn lies_change_nothing() {
        let mut s = sender();
        s.push(500, 1, 0);
        assert_eq!(s.push(500, 1, 0), 6);
        s.poll_transmit(START).unwrap();
        let packet = AckFault::Packet {
            claimed: 1,
            sent: 1,
        };
        assert_eq!(
            s.on_feedback(START + MS, &feedback(&[(0, 1)], 5)),
            Err(packet)
        );
        let batch = AckFault::Batch {
            claimed: 7,
            sent: 6,
        };
        assert_eq!(
            s.on_feedback(START + MS, &feedback(&[(0, 0)], 7)),
            Err(batch)
        );
        assert_eq!((s.committed(), s.last_feedback_at()), (5, START));
        s.on_feedback(START + MS, &feedback(&[(0, 0)], 6)).unwrap();
        assert_eq!((s.committed(), s.uncommitted()), (6, 1));
    }

    #[test]
    fn no_more_than_the_credit_is_sent() {
        let mut s = sender();
        for _ in 0..20 {
            s.push(1000, 1, 0);
        }
        let mut now = START;
        let mut sent = 0;
        for _ in 0..100 {
            now += MS;
            let last = transmit_all(&mut s, now).last().map(|t| t.packet);
            sent = last.unwrap_or(sent);
            // Arrives, but is not committed: the credit stays.
            s.on_feedback(now, &feedback(&[(0, sent)], 5)).unwrap();
        }
        assert_eq!(s.queue.next, (15, 0));
        assert_eq!(s.stats().credit_stalls, 1);
        let more = Feedback {
            credit: 12_500,
            ..feedback(&[(0, sent)], 5)
        };
        s.on_feedback(now, &more).unwrap();
        let last = transmit_all(&mut s, now + MS);
        assert_eq!(s.queue.next, (17, 0), "half a batch is not worth a packet");
        let pauses: Vec<_> = last.iter().map(|t| t.pause).collect();
        assert_eq!(pauses, [Some(Pause::Credit), None], "reported once");
    }

    #[test]
    fn the_first_packet_after_a_pause_tells_why_it_was() {
        let pauses =
            |sent: &[Transmit]| -> Vec<_> { sent.iter().filter_map(|t| t.pause).collect() };
        let mut s = sender();
        s.push(1000, 1, 0);
        assert_eq!(pauses(&transmit_all(&mut s, START)), []);
        s.on_feedback(START + MS, &feedback(&[(0, 0)], 5)).unwrap();
        s.push(1000, 1, 0);
        assert_eq!(
            pauses(&transmit_all(&mut s, START + 10 * MS)),
            [Pause::Idle]
        );
        // The congestion window at first is smaller than this credit.
        let config = SenderConfig {
            first_batch: 0,
            credit: 1 << 20,
            max_datagram: 1452,
            min_in_flight: 1 << 20,
            phase: Nanos::ZERO,
        };
        let mut s = Sender::new(&config, START);
        for _ in 0..100 {
            s.push(1000, 1, 0);
        }
        let sent = transmit_all(&mut s, START + 5000 * MS);
        let last = sent.last().unwrap().packet;
        assert!(last < 99);
        let acked = feedback(&[(0, last)], 0);
        s.on_feedback(START + 5001 * MS, &acked).unwrap();
        let more = transmit_all(&mut s, START + 5002 * MS);
        assert_eq!(pauses(&more), [Pause::Congestion]);
    }

    #[test]
    fn a_lost_packet_goes_out_again_with_a_new_number() {
        let mut s = sender();
        for _ in 0..6 {
            s.push(1000, 1, 0);
        }
        let sent = transmit_all(&mut s, START + 100 * MS);
        assert!(sent.len() >= 5);
        s.on_feedback(START + 101 * MS, &feedback(&[(1, 4)], 5))
            .unwrap();
        let again = transmit_all(&mut s, START + 101 * MS);
        assert!(again.iter().any(|t| t.what == sent[0].what && t.packet > 4));
        assert_eq!((s.stats().lost, s.stats().retransmits), (1, 1));
        // It comes late: the next one is waited for longer.
        s.on_feedback(START + 102 * MS, &feedback(&[(0, 4)], 5))
            .unwrap();
        assert_eq!(s.stats().spurious, 1);
        assert!(s.loss.packet_threshold > PACKET_THRESHOLD);
    }

    #[test]
    fn a_silent_broker_is_probed_less_and_less_often() {
        let mut s = sender();
        s.push(1000, 1, 0);
        let mut now = START;
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
        const SECOND: Nanos = Nanos::from_secs(1);
        let mut s = sender();
        s.push(1000, 1, 0);
        transmit_all(&mut s, START);
        let mut blocked = feedback(&[], 0);
        blocked.blocked = true;
        s.on_feedback(START + 10 * SECOND, &blocked).unwrap();
        // It has room again: the time counts from now.
        s.on_feedback(START + 20 * SECOND, &feedback(&[], 0))
            .unwrap();
        assert_eq!(s.undelivered_since(), Some(START + 20 * SECOND));
        s.on_feedback(START + 24 * SECOND, &feedback(&[], 0))
            .unwrap();
        assert_eq!(s.undelivered_since(), Some(START + 20 * SECOND));
    }

    #[test]
    fn an_idle_stream_shows_that_it_lives() {
        let mut s = sender();
        let due = START + KEEP_ALIVE_INTERVAL;
        assert_eq!(s.next_timeout(), due);
        s.on_timeout(due);
        let sent = transmit_all(&mut s, due);
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
            phase: Nanos::ZERO,
        };
        let mut s = Sender::new(&config, START);
        s.push(50_000, 1, 0);
        s.poll_transmit(START).unwrap();
        s.on_feedback(START + MS, &feedback(&[(0, 0)], 0)).unwrap();
        let probe = s.poll_transmit(START + MS).unwrap();
        assert_eq!(
            probe.what,
            Outgoing::Ping {
                padding: 8972 - DATA_LEN as u32
            }
        );
        assert!(s.on_too_large(START + MS, probe.packet));
        assert!(s.mtu.next_probe(START + MS).is_some_and(|size| size < 8972));
        let largest = transmit_all(&mut s, START + 2 * MS)
            .iter()
            .filter_map(|t| match t.what {
                Outgoing::Payload { len, .. } => Some(len),
                Outgoing::Ping { .. } => None,
            })
            .max();
        assert_eq!(largest, Some(BASE_PLPMTU - DATA_LEN as u32));
        let last = s.next_packet() - 1;
        assert!(!s.on_too_large(START + 2 * MS, last), "none is smaller");
    }
}
