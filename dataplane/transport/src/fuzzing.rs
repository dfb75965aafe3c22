//! Both ends of a stream, driven by arbitrary bytes: by libFuzzer in `fuzz/`, and by tests over their corpora.

use std::collections::HashMap;

use penstock_wire::packet::{
    BatchInfo, Chunk, Feedback, MAX_ACK_LEN, MAX_GAPS, MAX_PACKET, StreamKey,
};

use crate::{
    DropReason, Limits, MAX_OPEN_BATCHES, Nanos, Offer, Outgoing, Receiver, Sender, SenderConfig,
    Timestamp,
};

const STREAM: StreamKey = StreamKey { key: 7, stream: 3 };

fn check_ranges(feedback: &Feedback) {
    assert!(feedback.received.len() <= MAX_GAPS + 1);
    let mut below = MAX_PACKET;
    for &(low, high) in &feedback.received {
        assert!(low <= high && high < below, "{:?}", feedback.received);
        below = low;
    }
}

/// Numbers out of arbitrary bytes; zeros when there are no more.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// Small ones mostly, and those at the edges of their types.
    fn number(&mut self) -> u64 {
        let value = u64::from(self.byte());
        match value {
            0..=247 => value,
            248..=251 => value << (4 * (value - 247)),
            252 => u64::from(u32::MAX),
            253 => MAX_PACKET - 1,
            254 => u64::MAX - 1,
            _ => u64::from(self.byte()) << 32 | u64::from(self.byte()),
        }
    }

    fn length(&mut self) -> u32 {
        (self.number() as u32).wrapping_mul(17) % 5000
    }
}

/// Window of the receiver at first, and largest batch, bytes.
const FIRST_WINDOW: u64 = 8192;
const MAX_PAYLOAD: u32 = 4096;

/// A receiver, and what it must have received.
struct ReceiverModel {
    receiver: Receiver<()>,
    feedback: Feedback,
    credit: u64,
    /// Distinct payload bytes so far.
    taken: u64,
    /// Received bytes of each open batch.
    open: HashMap<u64, (BatchInfo, Vec<bool>)>,
}

/// Any sequence of packets, commits and ACKs at a stream's receiving end: it never accepts more than its
/// credit, and commits only complete batches.
pub fn receiver(data: &[u8]) {
    let mut numbers = Numbers(data);
    let first = numbers.number() % MAX_PACKET;
    let limits = Limits {
        max_payload: MAX_PAYLOAD,
        window: FIRST_WINDOW,
    };
    let mut model = ReceiverModel {
        receiver: Receiver::new(STREAM, first, limits, Timestamp::ZERO),
        feedback: Feedback::new(STREAM),
        credit: FIRST_WINDOW,
        taken: 0,
        open: HashMap::new(),
    };
    let mut now = Timestamp::ZERO;
    while !numbers.0.is_empty() {
        now += Nanos::from_nanos(numbers.number() % 1_000_000);
        match numbers.byte() % 8 {
            0..=4 => model.payload(&mut numbers, now),
            5 => _ = model.receiver.arrived(now, numbers.number() % MAX_PACKET),
            6 => model.commit(),
            _ => model.acknowledge(&mut numbers, now),
        }
        let opened: usize = model.open.values().map(|(_, bytes)| bytes.len()).sum();
        assert!(opened <= FIRST_WINDOW as usize + 2 * MAX_PAYLOAD as usize);
        assert!(model.open.len() <= MAX_OPEN_BATCHES);
    }
    let ReceiverModel { receiver, open, .. } = model;
    assert_eq!(receiver.into_placements().count(), open.len());
}

impl ReceiverModel {
    fn payload(&mut self, numbers: &mut Numbers<'_>, now: Timestamp) {
        let seq = self
            .receiver
            .committed()
            .saturating_add(numbers.number())
            .saturating_sub(2);
        let len = numbers.length().max(1);
        let offset = numbers.length() % len;
        let part = (numbers.length() % (len - offset)).max(1);
        let batch = BatchInfo {
            seq,
            len,
            messages: 1 + u32::from(numbers.byte() % 2),
            checksum: 0,
        };
        let packet = numbers.number() % MAX_PACKET;
        let chunk = Chunk { batch, offset };
        let receiver = &mut self.receiver;
        let is_next = receiver.offer_next(packet, &chunk, part).is_some();
        let offered = match receiver.offer(packet, &chunk, part) {
            Ok(Offer::OpenBatch(offered)) => offered,
            Ok(Offer::NewBatch(new)) => {
                assert!(!is_next, "the batch is not open yet");
                let before = self.open.insert(seq, (batch, vec![false; len as usize]));
                assert!(before.is_none(), "opened twice");
                new.open(())
            }
            Err(reason) => {
                assert!(!is_next, "{reason}");
                let known = self.open.get(&seq);
                let is_known = known.is_some_and(|(known, _)| *known == batch);
                assert!(reason != DropReason::Contradiction || !is_known);
                return;
            }
        };
        let (known, bytes) = self.open.get_mut(&seq).expect("it is open");
        assert_eq!(*known, batch);
        for byte in &mut bytes[offset as usize..][..part as usize] {
            assert!(!is_next || !*byte, "its place is free");
            self.taken += u64::from(!*byte);
            *byte = true;
        }
        match is_next {
            true => {
                let next = receiver.offer_next(packet, &chunk, part);
                next.expect("as before").placed(now);
            }
            false => _ = offered.placed(now),
        }
        let (taken, credit) = (self.taken, self.credit);
        assert!(taken <= credit, "{taken} bytes with a credit of {credit}");
    }

    fn commit(&mut self) {
        while let Some((info, ())) = self.receiver.next_complete() {
            let (known, bytes) = self.open.remove(&info.seq).expect("it was open");
            assert_eq!(known, info);
            assert!(bytes.iter().all(|byte| *byte), "committed with a hole");
            assert_eq!(self.receiver.committed(), info.seq + 1);
        }
    }

    fn acknowledge(&mut self, numbers: &mut Numbers<'_>, now: Timestamp) {
        self.receiver.set_window(u64::from(numbers.length()));
        let blocked = numbers.byte().is_multiple_of(4);
        let feedback = &mut self.feedback;
        let before = feedback.credit;
        self.receiver.feedback(now, blocked, feedback);
        assert!(feedback.credit >= before && feedback.credit >= self.credit);
        assert!(!blocked || feedback.credit == self.credit);
        self.credit = feedback.credit;
        assert_eq!(feedback.committed, self.receiver.committed());
        check_ranges(feedback);
        feedback.write(&mut [0; MAX_ACK_LEN]);
    }
}

/// A sending end, and what is known about it from outside.
struct SenderModel {
    sender: Sender,
    feedback: Feedback,
    credit: u64,
    now: Timestamp,
    first: u64,
    /// Length and position of each batch.
    batches: Vec<(u32, u64)>,
    /// Position behind the last batch.
    end: u64,
    /// Packets sent.
    packets: u64,
}

/// Any sequence of batches, ACKs and moments at a stream's sending end: whatever a broker reports, it
/// sends only what it has, and never beyond the credit.
pub fn sender(data: &[u8]) {
    let mut numbers = Numbers(data);
    let first = numbers.number() % (1 << 40);
    let credit = numbers.number();
    let config = SenderConfig {
        first_batch: first,
        credit,
        max_datagram: 1200 + numbers.length(),
        min_in_flight: 1 << 20,
        phase: Nanos::ZERO,
    };
    let mut model = SenderModel {
        sender: Sender::new(&config, Timestamp::ZERO),
        feedback: Feedback::new(STREAM),
        credit,
        now: Timestamp::ZERO,
        first,
        batches: Vec::new(),
        end: 0,
        packets: 0,
    };
    while !numbers.0.is_empty() {
        model.now += Nanos::from_micros(numbers.number() % (1 << 40));
        let (now, packets) = (model.now, model.packets);
        match numbers.byte() % 8 {
            0 | 1 if model.sender.has_room() => model.push(numbers.length().max(1)),
            2 | 3 => model.transmit(),
            4 if model.sender.next_timeout() <= now => model.sender.on_timeout(now),
            5 if packets > 0 => {
                let packet = packets - 1 - numbers.number() % packets;
                model.sender.on_too_large(now, packet);
            }
            6 => model.sender.probe(),
            _ => model.take_feedback(&mut numbers),
        }
        assert!(model.sender.uncommitted() <= MAX_OPEN_BATCHES);
        assert!(model.sender.committed() <= first + model.batches.len() as u64);
        let _ = model.sender.next_timeout();
    }
}

impl SenderModel {
    fn push(&mut self, len: u32) {
        let seq = self.sender.push(len, 1, 0);
        assert_eq!(seq, self.first + self.batches.len() as u64);
        self.batches.push((len, self.end));
        self.end += u64::from(len);
    }

    fn transmit(&mut self) {
        for _ in 0..64 {
            let Some(transmit) = self.sender.poll_transmit(self.now) else {
                return;
            };
            assert_eq!(
                transmit.packet, self.packets,
                "a number is used once, in order"
            );
            self.packets += 1;
            let Outgoing::Payload { chunk, len } = transmit.what else {
                continue;
            };
            assert!(chunk.batch.seq >= self.sender.committed());
            let (whole, position) = self.batches[(chunk.batch.seq - self.first) as usize];
            assert_eq!(whole, chunk.batch.len);
            assert!(len > 0 && chunk.offset + len <= whole);
            let (reach, credit) = (position + u64::from(chunk.offset + len), self.credit);
            assert!(reach <= credit, "{reach} with a credit of {credit}");
        }
    }

    fn take_feedback(&mut self, numbers: &mut Numbers<'_>) {
        let before = self.sender.committed();
        let feedback = &mut self.feedback;
        feedback.committed = before.saturating_add(numbers.number()).saturating_sub(1);
        feedback.credit = self
            .credit
            .saturating_add(numbers.number().saturating_mul(64))
            .saturating_sub(64);
        feedback.blocked = numbers.byte().is_multiple_of(8);
        feedback.delay_us = numbers.number() as u32;
        feedback.received.clear();
        // As a packet can report it: falling, with gaps between.
        let mut below = self.packets + 1;
        for _ in 0..numbers.byte() % 8 {
            let high = below.saturating_sub(1 + numbers.number() % 64);
            let low = high.saturating_sub(numbers.number() % 64);
            if high == 0 || low == 0 {
                break;
            }
            feedback.received.push((low - 1, high - 1));
            below = low - 1;
        }
        if self.sender.on_feedback(self.now, feedback).is_ok() {
            self.credit = self.credit.max(feedback.credit);
            assert!(self.sender.committed() >= before);
        } else {
            assert_eq!(self.sender.committed(), before);
        }
    }
}

#[cfg(test)]
mod tests {
    use penstock_fuzz_replay::replay;

    #[test]
    fn kept_and_mutated_receivers() {
        replay("receiver", 2000, super::receiver);
    }

    #[test]
    fn kept_and_mutated_senders() {
        replay("sender", 2000, super::sender);
    }
}
