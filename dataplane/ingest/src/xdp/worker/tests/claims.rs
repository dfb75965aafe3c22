//! Limits on what publishers take before they have sent it, over xdp.

use std::net::TcpStream;

use super::*;
use crate::session::claims::MEMORY;

/// The largest batch that the bench's log accepts.
const LARGEST: u32 = 32 << 10;
const SECOND: Nanos = Nanos::from_secs(1);
const MILLISECOND: Nanos = Nanos::from_millis(1);

/// A key that the bench's filter accepts.
fn key(number: u64) -> StreamKey {
    StreamKey {
        key: 2 * number + 1,
        stream: 0,
    }
}

/// A part of batch `seq`, which claims the maximum length.
fn part(from: u8, key: StreamKey, packet: u64, seq: u64, offset: u32, bytes: &[u8]) -> Vec<u8> {
    let batch = BatchInfo {
        seq,
        len: LARGEST,
        messages: 1,
        checksum: 0,
    };
    let header = Data::payload(key, packet, &Chunk { batch, offset }, None, bytes);
    frame(from, &header, bytes)
}

impl Bench {
    /// Publishes whole batches from another host, some time apart; panics if one is not committed.
    fn publish(&mut self, control: &Honest, batches: u64, now: &mut Timestamp) {
        for seq in control.next.get()..control.next.get() + batches {
            let before = self.log.info().batches;
            for (index, offset) in (0..LARGEST).step_by(1024).enumerate() {
                let packet = 32 * seq + index as u64;
                let sent = part(control.host, control.key, packet, seq, offset, &[9; 1024]);
                self.take_at(*now, &sent);
            }
            for _ in 0..1000 {
                *now += MILLISECOND;
                self.tick_at(*now);
                if self.log.info().batches > before {
                    break;
                }
            }
            let xdp = self.stats();
            assert_eq!(self.log.info().batches, before + 1, "batch {seq}: {xdp:?}");
            // Give credit for more.
            assert!(self.feedback(control.key, *now).is_some());
        }
        control.next.set(control.next.get() + batches);
    }

    fn honest(&mut self, number: u64, host: u8) -> Honest {
        Honest {
            _control: self.open(key(number), host),
            key: key(number),
            host,
            next: std::cell::Cell::new(0),
        }
    }
}

struct Honest {
    _control: TcpStream,
    key: StreamKey,
    host: u8,
    next: std::cell::Cell<u64>,
}

#[test]
fn incomplete_batches_take_memory_only_for_received_bytes_and_block_no_other() {
    let mut bench = Bench::new();
    let honest = bench.honest(1, 3);
    let mut now = START + SECOND;
    bench.publish(&honest, 1, &mut now);
    // Three one-byte packets on each of a hundred streams.
    let controls: Vec<_> = (10..110)
        .map(|number| bench.open(key(number), 66))
        .collect();
    for number in 10..110 {
        for seq in 0..3 {
            bench.take_at(now, &part(66, key(number), seq, seq, seq as u32, b"x"));
        }
    }
    let claims = bench.worker.table.shared.claims.clone();
    let held = claims.memory_held();
    assert!(held <= 300 * 4096, "{held} bytes for 300 that arrived");
    assert!(
        held >= 270 * 4096,
        "a host has a quarter of the ring: {held}"
    );
    // The ring passes ten times while pings continue.
    for round in 0..10 {
        bench.publish(&honest, 32, &mut now);
        for number in 10..110 {
            bench.take_at(
                now,
                &frame(66, &Data::ping(key(number), 10 + round, &[]), &[]),
            );
        }
    }
    assert!(claims.memory_held() <= 300 * 4096);
    assert_eq!(bench.open_streams(), 101, "all streams are there");
    drop(controls);
    now += MILLISECOND;
    while bench.open_streams() > 1 {
        now += MILLISECOND;
        bench.tick_at(now);
    }
    assert_eq!(claims.memory_held(), 0);
}

#[test]
fn neither_pings_nor_single_bytes_extend_the_time_of_a_batch() {
    let mut bench = Bench::new();
    let start = START + SECOND;
    bench.take_at(start, &part(PUBLISHER, KEY, 0, 0, 0, b"x"));
    for second in 1..30 {
        let now = start + second * SECOND;
        let packet = 2 * second;
        bench.take_at(now, &frame(PUBLISHER, &Data::ping(KEY, packet, &[]), &[]));
        bench.take_at(
            now,
            &part(PUBLISHER, KEY, packet + 1, 0, second as u32, b"x"),
        );
        bench.tick_at(now);
        assert_eq!(bench.open_streams(), 1, "second {second}");
    }
    let now = start + 31 * SECOND;
    bench.take_at(now, &part(PUBLISHER, KEY, 100, 0, 31, b"x"));
    bench.tick_at(now);
    assert_eq!(bench.open_streams(), 0);
    let counters = &bench.worker.table.shared.counters;
    assert_eq!(counters.stalled.load(Ordering::Relaxed), 1);
}

#[test]
fn a_batch_over_a_slow_link_is_committed() {
    let mut bench = Bench::new();
    let start = START + SECOND;
    // In total far longer than the stall timeout.
    for (index, offset) in (0..LARGEST).step_by(1024).enumerate() {
        let now = start + index as u64 * 29 * SECOND;
        for second in 0..29 {
            bench.tick_at(now - 29 * SECOND * u64::from(index > 0) + second * SECOND);
        }
        if index == 1 {
            // 1 KiB in 29 s is too slow.
            break;
        }
        bench.take_at(
            now,
            &part(PUBLISHER, KEY, index as u64, 0, offset, &[1; 1024]),
        );
    }
    let mut bench = Bench::new();
    for (index, offset) in (0..LARGEST).step_by(1024).enumerate() {
        // At the minimum rate, with a pause of 29 s.
        let now = start + index as u64 * SECOND / 16 + 29 * SECOND * u64::from(index >= 10);
        bench.tick_at(now);
        bench.take_at(
            now,
            &part(PUBLISHER, KEY, index as u64, 0, offset, &[1; 1024]),
        );
    }
    assert_eq!(bench.log.info().batches, 1);
}

#[test]
fn memory_of_slow_batches_goes_to_smaller_holders() {
    let mut bench = Bench::new();
    let mut now = START + SECOND;
    // Streams of three hosts fill all of the memory with batches that lack one byte.
    let mut controls = Vec::new();
    let mut number = 10;
    let claims = bench.worker.table.shared.claims.clone();
    for host in [66, 67, 68] {
        for _ in 0..160 {
            number += 1;
            controls.push(bench.open(key(number), host));
            for (packet, (seq, offset)) in (0..2)
                .flat_map(|seq| (0..LARGEST).step_by(1024).map(move |offset| (seq, offset)))
                .enumerate()
            {
                let len = if offset + 1024 == LARGEST { 1023 } else { 1024 };
                let bytes = &[7; 1024][..len];
                bench.take_at(
                    now,
                    &part(host, key(number), packet as u64, seq, offset, bytes),
                );
            }
        }
    }
    let full = claims.memory_held();
    assert!(full >= MEMORY / 2, "{full} bytes are held");
    assert!(full <= MEMORY);
    // Now they have been silent for some time.
    now += 3 * SECOND;
    let honest = bench.honest(1, 3);
    bench.publish(&honest, 64, &mut now);
    assert!(claims.memory_held() <= MEMORY);
}

#[test]
fn state_of_open_batches_is_charged() {
    let mut bench = Bench::new();
    let claims = bench.worker.table.shared.claims.clone();
    // Two-byte batches of which one byte arrives, as many as may be open.
    for seq in 0..1024u64 {
        let batch = BatchInfo {
            seq,
            len: 5,
            messages: 1,
            checksum: 0,
        };
        let chunk = Chunk { batch, offset: 0 };
        let header = Data::payload(KEY, seq, &chunk, None, b"x");
        bench.take_at(START + SECOND, &frame(PUBLISHER, &header, b"x"));
    }
    let held = claims.memory_held();
    assert!(held >= 100 << 10, "{held} bytes are charged");
    // They end, and what was charged is given back.
    for seq in 0..1024u64 {
        let batch = BatchInfo {
            seq,
            len: 5,
            messages: 1,
            checksum: 0,
        };
        let chunk = Chunk { batch, offset: 1 };
        let header = Data::payload(KEY, 2000 + seq, &chunk, None, b"yyyy");
        bench.take_at(START + SECOND, &frame(PUBLISHER, &header, b"yyyy"));
    }
    bench.tick_at(START + 2 * SECOND);
    assert_eq!(bench.log.info().batches, 1024);
    assert_eq!(claims.memory_held(), 0);
}
