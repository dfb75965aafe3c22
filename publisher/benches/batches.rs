//! What a batch costs in the publisher: to be filled and sealed, and to be given to the kernel.

use std::hint::black_box;
use std::io::IoSlice;
use std::net::UdpSocket;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use penstock_wire::crc32c::Joiner;

#[allow(dead_code, unused_imports)]
#[path = "../src/batch/open_batch.rs"]
mod open_batch;
#[allow(dead_code, unused_imports)]
#[path = "../src/batch/payload.rs"]
mod payload;
#[allow(dead_code, unused_imports)]
#[path = "../src/net/udp.rs"]
mod udp;

use open_batch::{Appender, Extent};
use payload::Payload;
use udp::{Datagrams, MAX_SEGMENTS};

const BATCH: usize = 60 << 10;
/// Payload of a full packet at MTU 1500.
const PACKET: usize = 1416;

/// Fills batches with messages of one size and seals them, per message.
fn fill_and_seal(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fill and seal");
    for size in [64, 1024] {
        let message = vec![7; size];
        let messages = BATCH / (size + 4);
        group.throughput(Throughput::Elements(messages as u64));
        for (path, packets) in [("tcp", None), ("xdp", Some(Joiner::new(PACKET)))] {
            let mut payload = Payload::with_capacity(BATCH);
            let mut appender = Appender::new(Arc::default());
            group.bench_function(format!("{size} B, {path}"), |bencher| {
                bencher.iter(|| {
                    payload.reset(BATCH);
                    let mut filled = Extent::default();
                    for _ in 0..messages {
                        if appender.append(black_box(&message)) {
                            continue;
                        }
                        // As the publisher does with its lock held.
                        filled = appender.detach().unwrap_or(filled);
                        // SAFETY: the appender wrote so many bytes into the room that it had.
                        unsafe { payload.set_len(filled.len) };
                        payload.append(black_box(&message));
                        payload.sum_complete(packets.as_ref());
                        filled.messages += 1;
                        filled.len = payload.len();
                        let limit = payload.next_sum(packets.as_ref()).min(BATCH);
                        let start = payload.room_for(limit);
                        // SAFETY: there is room for `limit` bytes, used by nothing else.
                        unsafe { appender.attach(start, filled, limit) };
                    }
                    if let Some(filled) = appender.detach() {
                        // SAFETY: as above.
                        unsafe { payload.set_len(filled.len) };
                    }
                    payload.seal()
                });
            });
        }
    }
    group.finish();
}

/// Sends what one call can carry to a socket that nobody reads, per packet.
fn send_to_nobody(criterion: &mut Criterion) {
    let nobody = UdpSocket::bind("127.0.0.1:0").expect("a socket on loopback");
    let address = nobody.local_addr().expect("it is bound");
    let own = "127.0.0.1:0".parse().expect("an address");
    let mut datagrams = Datagrams::connect(own, address).expect("a connected socket");
    let (header, payload) = ([1; 56], [2; PACKET]);
    let count = (udp::MAX_BYTES / (PACKET + header.len())).min(MAX_SEGMENTS);
    let packets = vec![[IoSlice::new(&header), IoSlice::new(&payload)]; count];
    let mut group = criterion.benchmark_group("send to nobody");
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("one call", |bencher| {
        bencher.iter(|| datagrams.send(black_box(&packets)));
    });
    group.finish();
}

criterion_group!(benches, fill_and_seal, send_to_nobody);
criterion_main!(benches);
