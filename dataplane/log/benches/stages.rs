//! What a payload byte costs elsewhere: its checksum, a commit, a read.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use penstock_log::{
    Access, Commit, Geometry, Log, LogOptions, Reader, RingFullPolicy, Start, Writer,
};
use penstock_wire::crc32c;
use tempfile::TempDir;

const COMMIT: Commit = Commit {
    session: 1,
    stream: 0,
    batch_seq: 0,
    messages: 1,
    checksum: 0,
    arrival_unix_ns: 0,
};

fn checksum(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("crc32c");
    let bytes = vec![7; 60 << 10];
    for len in [48, 200, 1416, 8900, 60 << 10] {
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::from_parameter(len), |bencher| {
            bencher.iter(|| crc32c::checksum(black_box(&bytes[..len])));
        });
    }
    group.finish();
}

/// A log as a broker has it, on a tmpfs where there is one.
fn log() -> (TempDir, Arc<Log>, Writer) {
    let shm = Path::new("/dev/shm");
    let dir = match shm.is_dir() {
        true => TempDir::new_in(shm),
        false => TempDir::new(),
    };
    let dir = dir.expect("a directory");
    let options = LogOptions {
        geometry: Geometry::new(1 << 20, 1 << 17, 1 << 14).expect("valid sizes"),
        full: RingFullPolicy::Overwrite,
        access: Access::default(),
        writers: 1,
    };
    let log = Arc::new(Log::open(&dir.path().join("topic.log"), &options).expect("a log"));
    let writer = log.writer();
    (dir, log, writer)
}

fn commit(criterion: &mut Criterion) {
    let (_dir, _log, mut writer) = log();
    criterion.bench_function("log/reserve and commit", |bencher| {
        bencher.iter(|| {
            let reservation = writer.reserve(1024);
            assert!(writer.is_granted(&reservation));
            writer.commit(reservation, &COMMIT)
        });
    });
}

fn read(criterion: &mut Criterion) {
    let (dir, _log, mut writer) = log();
    let mut reader = Reader::open(&dir.path().join("topic.log"), Start::End).expect("a reader");
    criterion.bench_function("log/commit and read", |bencher| {
        bencher.iter(|| {
            let reservation = writer.reserve(1024);
            assert!(writer.is_granted(&reservation));
            writer.commit(reservation, &COMMIT);
            let batch = reader.next().expect("not lapped").expect("just committed");
            batch.payload.len()
        });
    });
}

criterion_group!(benches, checksum, commit, read);
criterion_main!(benches);
