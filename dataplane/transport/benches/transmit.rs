//! What a packet costs the sending state machine: to be chosen, numbered, paced and acknowledged.
//!
//! Each iteration is at least 1,024 packets of one stream over a path that loses nothing, with an ACK every 50 µs.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use penstock_transport::{Nanos, Outgoing, Sender, SenderConfig, Timestamp};
use penstock_wire::packet::{Feedback, StreamKey};

const PACKETS: u64 = 1024;
const BATCH: u32 = 60 << 10;
const ROUND_TRIP: Nanos = Nanos::from_micros(50);
/// More than any benchmark sends.
const ENDLESS: u64 = 1 << 60;

fn transmit(criterion: &mut Criterion) {
    let config = SenderConfig {
        first_batch: 0,
        credit: ENDLESS,
        max_datagram: 1472,
        min_in_flight: 1 << 20,
        phase: Nanos::ZERO,
    };
    let mut now = Timestamp::ZERO;
    let mut sender = Sender::new(&config, now);
    let mut feedback = Feedback::new(StreamKey { key: 1, stream: 0 });
    feedback.credit = ENDLESS;
    let mut round = || {
        let mut packets = 0;
        while packets < PACKETS {
            while sender.uncommitted() < 16 {
                sender.push(BATCH, 60, 0);
            }
            let mut largest = None;
            while let Some(transmit) = sender.poll_transmit(now) {
                (packets, largest) = (packets + 1, Some(transmit.packet));
                if let Outgoing::Payload { chunk, len } = black_box(transmit.what)
                    && chunk.offset + len == chunk.batch.len
                {
                    feedback.committed = chunk.batch.seq + 1;
                }
            }
            now += ROUND_TRIP;
            if let Some(largest) = largest {
                feedback.received.clear();
                feedback.received.push((0, largest));
                sender
                    .on_feedback(now, &feedback)
                    .expect("an honest broker");
            }
        }
        packets
    };
    let mut group = criterion.benchmark_group("transport");
    group.throughput(Throughput::Elements(PACKETS));
    group.bench_function("transmit and acknowledge", |bencher| {
        bencher.iter(&mut round)
    });
    group.finish();
}

criterion_group!(benches, transmit);
criterion_main!(benches);
