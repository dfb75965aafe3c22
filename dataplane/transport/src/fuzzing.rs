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

/// Any sequence of packets, commits and looks at a stream's receiving end: it never takes more than
/// it gave credit for, and what it commits was all there.
pub fn receiver(data: &[u8]) {
    let mut numbers = Numbers(data);
    let max_payload = 4096;
    let mut window = 8192;
    let first = numbers.number() % MAX_PACKET;
    let limits = Limits {
        max_payload,
        window,
    };
    let mut receiver: Receiver<()> = Receiver::new(STREAM, first, limits, Timestamp::ZERO);
    let mut told = Feedback::new(STREAM);
    let mut credit = window;
    let (mut now, mut taken) = (Timestamp::ZERO, 0);
    // What came of each batch that is open.
    let mut open: HashMap<u64, (BatchInfo, Vec<bool>)> = HashMap::new();
    while !numbers.0.is_empty() {
        now += Nanos::from_nanos(numbers.number() % 1_000_000);
        match numbers.byte() % 8 {
            0..=4 => {
                let seq = receiver
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
                let is_next = receiver.offer_next(packet, &chunk, part).is_some();
                let offered = match receiver.offer(packet, &chunk, part) {
                    Ok(Offer::OpenBatch(offered)) => offered,
                    Ok(Offer::NewBatch(new)) => {
                        assert!(!is_next, "the batch is not open yet");
                        let before = open.insert(seq, (batch, vec![false; len as usize]));
                        assert!(before.is_none(), "opened twice");
                        new.open(())
                    }
                    Err(reason) => {
                        assert!(!is_next, "{reason}");
                        let is_known = open.get(&seq).is_some_and(|(known, _)| *known == batch);
                        assert!(reason != DropReason::Contradiction || !is_known);
                        continue;
                    }
                };
                let (known, bytes) = open.get_mut(&seq).expect("it is open");
                assert_eq!(*known, batch);
                for byte in &mut bytes[offset as usize..][..part as usize] {
                    assert!(!is_next || !*byte, "its place is free");
                    taken += u64::from(!*byte);
                    *byte = true;
                }
                match is_next {
                    true => {
                        let next = receiver.offer_next(packet, &chunk, part);
                        next.expect("as before").placed(now);
                    }
                    false => _ = offered.placed(now),
                }
                assert!(taken <= credit, "{taken} bytes with a credit of {credit}");
            }
            5 => {
                receiver.arrived(now, numbers.number() % MAX_PACKET);
            }
            6 => {
                while let Some((info, ())) = receiver.next_complete() {
                    let (known, bytes) = open.remove(&info.seq).expect("it was open");
                    assert_eq!(known, info);
                    assert!(bytes.iter().all(|byte| *byte), "committed with a hole");
                    assert_eq!(receiver.committed(), info.seq + 1);
                }
            }
            _ => {
                window = u64::from(numbers.length());
                receiver.set_window(window);
                let blocked = numbers.byte() % 4 == 0;
                let before = told.credit;
                receiver.feedback(now, blocked, &mut told);
                assert!(told.credit >= before && told.credit >= credit);
                assert!(!blocked || told.credit == credit);
                credit = told.credit;
                assert_eq!(told.committed, receiver.committed());
                check_ranges(&told);
                told.write(&mut [0; MAX_ACK_LEN]);
            }
        }
        let opened: usize = open.values().map(|(_, bytes)| bytes.len()).sum();
        assert!(opened <= 8192 + 2 * max_payload as usize);
        assert!(open.len() <= MAX_OPEN_BATCHES);
    }
    assert_eq!(receiver.into_placements().count(), open.len());
}

/// Any sequence of batches, ACKs and moments at a stream's sending end: whatever a broker tells, it
/// sends only what it has, and never beyond the credit.
pub fn sender(data: &[u8]) {
    let mut numbers = Numbers(data);
    let first = numbers.number() % (1 << 40);
    let mut credit = numbers.number();
    let config = SenderConfig {
        first_batch: first,
        credit,
        max_datagram: 1200 + numbers.length(),
        min_in_flight: 1 << 20,
        phase: Nanos::ZERO,
    };
    let mut sender = Sender::new(&config, Timestamp::ZERO);
    let mut told = Feedback::new(STREAM);
    let mut now = Timestamp::ZERO;
    // Length and position of each batch.
    let mut batches: Vec<(u32, u64)> = Vec::new();
    let (mut end, mut packets) = (0, 0);
    while !numbers.0.is_empty() {
        now += Nanos::from_micros(numbers.number() % (1 << 40));
        match numbers.byte() % 8 {
            0 | 1 if sender.has_room() => {
                let len = numbers.length().max(1);
                let seq = sender.push(len, 1, 0);
                assert_eq!(seq, first + batches.len() as u64);
                batches.push((len, end));
                end += u64::from(len);
            }
            2 | 3 => {
                for _ in 0..64 {
                    let Some(transmit) = sender.poll_transmit(now) else {
                        break;
                    };
                    assert_eq!(transmit.packet, packets, "a number is used once, in order");
                    packets += 1;
                    let Outgoing::Payload { chunk, len } = transmit.what else {
                        continue;
                    };
                    assert!(chunk.batch.seq >= sender.committed());
                    let (whole, position) = batches[(chunk.batch.seq - first) as usize];
                    assert_eq!(whole, chunk.batch.len);
                    assert!(len > 0 && chunk.offset + len <= whole);
                    let reach = position + u64::from(chunk.offset + len);
                    assert!(reach <= credit, "{reach} with a credit of {credit}");
                }
            }
            4 if sender.next_timeout() <= now => sender.on_timeout(now),
            5 if packets > 0 => {
                sender.on_too_large(now, packets - 1 - numbers.number() % packets);
            }
            6 => sender.probe(),
            _ => {
                told.committed = sender
                    .committed()
                    .saturating_add(numbers.number())
                    .saturating_sub(1);
                told.credit = credit
                    .saturating_add(numbers.number().saturating_mul(64))
                    .saturating_sub(64);
                told.blocked = numbers.byte() % 8 == 0;
                told.delay_us = numbers.number() as u32;
                told.received.clear();
                // As a packet can tell it: falling, with gaps between.
                let mut below = packets + 1;
                for _ in 0..numbers.byte() % 8 {
                    let high = below.saturating_sub(1 + numbers.number() % 64);
                    let low = high.saturating_sub(numbers.number() % 64);
                    if high == 0 || low == 0 {
                        break;
                    }
                    told.received.push((low - 1, high - 1));
                    below = low - 1;
                }
                let before = sender.committed();
                if sender.on_feedback(now, &told).is_ok() {
                    credit = credit.max(told.credit);
                    assert!(sender.committed() >= before);
                } else {
                    assert_eq!(sender.committed(), before);
                }
            }
        }
        assert!(sender.uncommitted() <= MAX_OPEN_BATCHES);
        assert!(sender.committed() <= first + batches.len() as u64);
        let _ = sender.next_timeout();
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
