//! What an idle stream over xdp costs its broker: bytes that the process has allocated for it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use penstock_ingest::xdp::bench_support::{SocketlessWorker, frame};
use penstock_log::{Access, Geometry, Log, LogOptions, RingFullPolicy};
use penstock_wire::batch;
use penstock_wire::packet::{BatchInfo, Chunk, Data, StreamKey};
use penstock_xsk::Endpoint;
use tempfile::TempDir;

/// Most bytes that an idle stream may cost.
const MOST: usize = 16 << 10;

struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as our own.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as our own.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocated() -> usize {
    ALLOCATED.load(Ordering::Relaxed)
}

fn log(dir: &TempDir, name: usize) -> Arc<Log> {
    let options = LogOptions {
        geometry: Geometry::new(1 << 20, 1 << 16, 1 << 10).unwrap(),
        full: RingFullPolicy::Overwrite,
        access: Access::default(),
        writers: 1,
    };
    Arc::new(Log::open(&dir.path().join(format!("{name}.log")), &options).unwrap())
}

fn end(mac: u8, address: &str) -> Endpoint {
    Endpoint {
        mac: [mac; 6],
        address: address.parse().unwrap(),
    }
}

/// Batches of one packet, in reverse order: all are open until the first comes.
fn burst(key: StreamKey, batches: std::ops::Range<u64>) -> Vec<Vec<u8>> {
    let (from, to) = (end(2, "10.0.0.2:40000"), end(1, "10.0.0.1:1214"));
    let payload = [4, 0, 0, 0, 1, 2, 3, 4];
    let packet = |seq| {
        let batch = BatchInfo {
            seq,
            len: payload.len() as u32,
            messages: 1,
            checksum: batch::checksum(seq, 1, &payload),
        };
        let chunk = Chunk { batch, offset: 0 };
        let header = Data::payload(key, seq, &chunk, None, &payload);
        frame(&from, &to, &header, &payload)
    };
    batches.rev().map(packet).collect()
}

/// Bytes that each of `count` streams costs before its first packet, and once it is idle after bursts.
fn cost(count: usize, topics: usize) -> [usize; 2] {
    let dir = TempDir::new().unwrap();
    let mut worker = SocketlessWorker::new().unwrap();
    // Logs are the topics' own.
    let logs: Vec<_> = (0..topics).map(|name| log(&dir, name)).collect();
    let peer: SocketAddr = "10.0.0.2:40000".parse().unwrap();
    let key = |number: usize| StreamKey {
        key: 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(number as u64 + 1),
        stream: 0,
    };
    let before = allocated();
    for number in 0..count {
        let log = &logs[number % topics];
        worker.open(key(number), peer, log, None).unwrap();
    }
    let silent = (allocated() - before) / count;
    for number in 0..count {
        for batches in [0..1, 1..65, 65..129] {
            let frames = burst(key(number), batches);
            let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
            worker.receive(&frames);
        }
    }
    assert_eq!(worker.placed(), 129 * count as u64);
    for quarter in 1..8 {
        worker.tick(Duration::from_millis(260 * quarter)).unwrap();
    }
    [silent, allocated().saturating_sub(before) / count]
}

/// One test, for no other thread may allocate meanwhile.
#[test]
fn an_idle_stream_costs_little_memory() {
    for (count, topics) in [(64, 1), (64, 64)] {
        let costs = cost(count, topics);
        for bytes in costs {
            assert!(
                bytes <= MOST,
                "an idle stream costs {costs:?} bytes, {count} streams of {topics} topics"
            );
        }
    }
}
