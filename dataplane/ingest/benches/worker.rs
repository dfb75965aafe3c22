//! The xdp worker on packets that lie in memory: checks, placing, commits and ACKs, without a socket.
//!
//! Each iteration is 1,024 packets of one stream in batches of 60 KiB, received in bursts. A ring of 256 MiB is
//! cold: it fits in no cache, so each line of it is fetched and written back. One of 1 MiB stays in the cache.
//!
//! What is measured is CPU time of the thread, so that other programs on the machine count little.
//!
//! `cargo bench -p penstock-ingest --bench worker -- 200B/cold` measures one; as a test (`cargo test
//! --benches`) each runs once. Instructions: see docs/performance.md.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use penstock_auth::PacketKeys;
use penstock_ingest::xdp::bench_support::{BURST, SocketlessWorker, frame};
use penstock_log::{Access, Geometry, Log, LogOptions, Reader, RingFullPolicy, Start};
use penstock_wire::crc32c::{self, Joiner};
use penstock_wire::packet::{BatchInfo, Chunk, DATA_LEN, Data, StreamKey};
use penstock_xsk::Endpoint;
use tempfile::TempDir;
use zerocopy::IntoBytes;

const ROUND: u64 = 1024;
const BATCH: u32 = 60 << 10;
/// Ethernet, IPv4 and UDP headers.
const HEADERS: usize = 42;
const KEY: StreamKey = StreamKey {
    key: 0x5ec2_e7c0_ffee_0001,
    stream: 0,
};

/// A stream whose packets are made anew for each round.
struct Bed {
    worker: SocketlessWorker,
    reader: Option<Reader>,
    frames: Vec<Vec<u8>>,
    keys: Option<PacketKeys>,
    payload: Payload,
    packet: u64,
    batch: u64,
    offset: u32,
    _dir: TempDir,
}

/// Bytes that every packet carries, and their checksum.
struct Payload {
    bytes: Vec<u8>,
    sum: u32,
    joiner: Joiner,
    /// For the last packet of a batch, which is shorter.
    last_sum: u32,
    last_joiner: Joiner,
}

impl Payload {
    fn new(len: usize) -> Self {
        let bytes: Vec<u8> = (0..len).map(|n| ((n * n) >> 5) as u8).collect();
        let last = BATCH as usize % len;
        Self {
            sum: crc32c::checksum(&bytes),
            joiner: Joiner::new(len),
            last_sum: crc32c::checksum(&bytes[..last]),
            last_joiner: Joiner::new(last),
            bytes,
        }
    }
}

impl Bed {
    fn new(payload: usize, ring: u64, sealed: bool, is_read: bool) -> Self {
        // Like a broker's log: on a tmpfs, where there is one.
        let shm = std::path::Path::new("/dev/shm");
        let dir = match shm.is_dir() {
            true => TempDir::new_in(shm),
            false => TempDir::new(),
        };
        let dir = dir.expect("a directory");
        let path = dir.path().join("topic.log");
        let options = LogOptions {
            geometry: Geometry::new(ring, ring / 8, 1 << 14).expect("valid sizes"),
            full: RingFullPolicy::Overwrite,
            access: Access::default(),
            writers: 1,
        };
        let log = Arc::new(Log::open(&path, &options).expect("a log"));
        let end = |mac, address: &str| Endpoint {
            mac: [mac; 6],
            address: address.parse().expect("an address"),
        };
        let (from, to) = (end(2, "10.0.0.2:40000"), end(1, "10.0.0.1:1214"));
        let mut worker = SocketlessWorker::new().expect("a worker");
        let keys = || sealed.then(|| PacketKeys::new(&[1; 32]));
        worker
            .open(KEY, from.address, &log, keys())
            .expect("a stream");
        // Its ACK gives the credit that all the rest needs.
        let ping = Data::ping(KEY, 0, &[]);
        match &keys() {
            None => worker.receive(&[&frame(&from, &to, &ping, &[])]),
            Some(keys) => {
                let ping = Data::to_be_sealed(KEY, 0, None, None, 0);
                let tag = keys.seal_data(0, &[ping.as_bytes()]);
                worker.receive(&[&frame(&from, &to, &ping, &tag)])
            }
        };
        let payload = Payload::new(payload);
        let header = Data::ping(KEY, 0, &payload.bytes);
        let room = vec![0; if sealed { 16 } else { 0 }];
        let whole = [&room[..], &payload.bytes].concat();
        let frames = (0..ROUND).map(|_| frame(&from, &to, &header, &whole));
        Self {
            worker,
            frames: frames.collect(),
            reader: is_read.then(|| Reader::open(&path, Start::Oldest).expect("a reader")),
            keys: keys(),
            payload,
            packet: 1,
            batch: 0,
            offset: 0,
            _dir: dir,
        }
    }

    /// Gives each frame the header of the next packet; what lies behind a batch's end is padding.
    fn renumber(&mut self) {
        let payload = &self.payload;
        for frame in &mut self.frames {
            let left = BATCH - self.offset;
            let is_whole = left as usize >= payload.bytes.len();
            let (sum, joiner) = match is_whole {
                true => (payload.sum, &payload.joiner),
                false => (payload.last_sum, &payload.last_joiner),
            };
            let chunk = Chunk {
                batch: BatchInfo {
                    seq: self.batch,
                    len: BATCH,
                    messages: 60,
                    checksum: 0,
                },
                offset: self.offset,
            };
            let header = match &self.keys {
                None => Data::summed_payload(KEY, self.packet, &chunk, None, sum, joiner),
                Some(_) => {
                    Data::to_be_sealed(KEY, self.packet, Some(&chunk), None, joiner.len() as u16)
                }
            };
            frame[HEADERS..HEADERS + DATA_LEN].copy_from_slice(header.as_bytes());
            let mut behind = DATA_LEN;
            if let Some(keys) = &self.keys {
                let parts = [header.as_bytes(), &payload.bytes[..joiner.len()]];
                let tag = keys.seal_data(self.packet, &parts);
                frame[HEADERS + DATA_LEN..][..tag.len()].copy_from_slice(&tag);
                behind += tag.len();
            }
            let datagram = (8 + behind + joiner.len()) as u16;
            frame[HEADERS - 4..HEADERS - 2].copy_from_slice(&datagram.to_be_bytes());
            self.packet += 1;
            self.offset += joiner.len() as u32;
            if self.offset == BATCH {
                (self.offset, self.batch) = (0, self.batch + 1);
            }
        }
    }

    /// One round; returns how long the worker took, and the reader behind it.
    fn round(&mut self) -> Duration {
        self.renumber();
        let mut bursts: Vec<Vec<&[u8]>> = Vec::new();
        for burst in self.frames.chunks(BURST) {
            bursts.push(burst.iter().map(Vec::as_slice).collect());
        }
        let before = self.worker.placed();
        let mut sum = 0;
        let start = cpu_time();
        for burst in &bursts {
            self.worker.receive(burst);
            if let Some(reader) = &mut self.reader {
                while let Some(batch) = reader.next().expect("the reader is not lapped") {
                    sum ^= crc32c::checksum(batch.payload);
                }
            }
        }
        let elapsed = cpu_time() - start;
        black_box(sum);
        assert_eq!(
            self.worker.placed() - before,
            ROUND,
            "every packet is placed"
        );
        elapsed
    }

    /// Goes once round the ring, so that the kernel has given all its pages.
    fn warm(mut self, ring: u64) -> Self {
        for _ in 0..ring / (ROUND * self.payload.bytes.len() as u64) + 2 {
            self.round();
        }
        self
    }
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec, which outlives the call.
    let code = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(code, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn worker(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("worker");
    for (payload, name) in [(200, "200B"), (1416, "1416B"), (8900, "8900B")] {
        group.throughput(Throughput::ElementsAndBytes {
            elements: ROUND,
            bytes: ROUND * payload as u64,
        });
        for (case, ring, sealed, is_read) in [
            ("cold", 256 << 20, false, false),
            ("hot", 1 << 20, false, false),
            ("cold_read", 256 << 20, false, true),
            ("cold_sealed", 256 << 20, true, false),
        ] {
            let mut bed = None;
            group.bench_function(BenchmarkId::new(name, case), |bencher| {
                let new = || Bed::new(payload, ring, sealed, is_read).warm(ring);
                let bed = bed.get_or_insert_with(new);
                bencher.iter_custom(|rounds| (0..rounds).map(|_| bed.round()).sum());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, worker);
criterion_main!(benches);
