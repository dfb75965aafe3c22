//! Streams that wait for registered readers, over xdp: none is ended for it, and none gains by it.

use std::net::TcpStream;

use penstock_log::Commit;

use super::*;

const SECOND: Nanos = Nanos::from_secs(1);
const MILLISECOND: Nanos = Nanos::from_millis(1);
/// Bytes of a batch that one packet carries.
const PIECE: u32 = 32 << 10;

/// A log with a registered reader that does not read.
struct Stopped {
    bench: Bench,
    reader: Reader,
}

/// A publisher that sends one large batch, piece by piece, and again what was dropped.
struct Large {
    _control: TcpStream,
    key: StreamKey,
    len: u32,
    packet: u64,
    /// Offsets of pieces that have not been placed.
    missing: Vec<u32>,
}

fn key(number: u64) -> StreamKey {
    StreamKey {
        key: 2 * number + 1,
        stream: 0,
    }
}

/// Commits batches until the ring is full of what a registered reader has not read.
fn fill(log: &Arc<Log>) {
    let mut writer = log.writer();
    let len = log.geometry().max_payload();
    for batch_seq in 0.. {
        let reservation = writer.reserve(len);
        if !writer.is_granted(&reservation) {
            return writer.abort(reservation);
        }
        let commit = Commit {
            session: 1,
            stream: 7,
            batch_seq,
            messages: 1,
            checksum: 0,
            arrival_unix_ns: 0,
        };
        writer.commit(reservation, &commit);
    }
}

impl Stopped {
    fn new(geometry: Geometry) -> Self {
        let bench = Bench::with_log(geometry, RingFullPolicy::Block, None);
        let mut reader = Reader::open(&bench.dir.path().join("topic.log"), Start::Oldest).unwrap();
        reader.register().unwrap();
        fill(&bench.log);
        Self { bench, reader }
    }

    /// The reader reads all that there is; returns how many batches of sessions that are not the
    /// filling's.
    fn read_on(&mut self) -> usize {
        let mut read = 0;
        while let Some(batch) = self.reader.next().unwrap() {
            read += usize::from(batch.stream != 7);
        }
        read
    }
}

impl Bench {
    fn is_open(&mut self, key: StreamKey) -> bool {
        self.find(key).is_some()
    }

    fn ping(&mut self, key: StreamKey, packet: u64, now: Timestamp) {
        self.take_at(now, &frame(PUBLISHER, &Data::ping(key, packet, &[]), &[]));
    }
}

impl Large {
    fn new(bench: &mut Bench, number: u64, len: u32) -> Self {
        Self {
            _control: bench.open(key(number), PUBLISHER),
            key: key(number),
            len,
            packet: 0,
            missing: (0..len).step_by(PIECE as usize).collect(),
        }
    }

    /// Sends the next piece that is missing; whether it was placed.
    fn send(&mut self, bench: &mut Bench, now: Timestamp) -> bool {
        let Some(&offset) = self.missing.first() else {
            return false;
        };
        let batch = BatchInfo {
            seq: 0,
            len: self.len,
            messages: 1,
            checksum: 0,
        };
        let bytes = vec![9; PIECE.min(self.len - offset) as usize];
        let header = Data::payload(
            self.key,
            self.packet,
            &Chunk { batch, offset },
            None,
            &bytes,
        );
        self.packet += 1;
        let before = bench.stats().placed;
        bench.take_at(now, &frame(PUBLISHER, &header, &bytes));
        let is_placed = bench.stats().placed > before;
        if is_placed {
            self.missing.remove(0);
        }
        // An ACK grants it more credit.
        bench.feedback(self.key, now + MILLISECOND);
        is_placed
    }

    fn ping(&mut self, bench: &mut Bench, now: Timestamp) {
        self.packet += 1;
        bench.ping(self.key, self.packet, now);
    }
}

/// Each sends its next piece; whether any was placed.
fn send_all(publishers: &mut [Large], bench: &mut Bench, now: Timestamp) -> bool {
    let mut any = false;
    for publisher in publishers {
        any |= publisher.send(bench, now);
    }
    any
}

#[test]
fn large_batches_wait_for_a_reader_when_memory_is_used_up() {
    let mut stopped = Stopped::new(Geometry::new(64 << 20, 16 << 20, 64).unwrap());
    let bench = &mut stopped.bench;
    // Of one host, half again as much as it may have outside of the ring.
    let mut publishers: Vec<_> = (10..13).map(|n| Large::new(bench, n, 8 << 20)).collect();
    let mut now = START + SECOND;
    while send_all(&mut publishers, bench, now) {
        now += MILLISECOND;
    }
    assert!(bench.stats().no_memory > 0);
    assert!(publishers.iter().all(|p| !p.missing.is_empty()));
    // Far longer than any batch may take, while they send again what was dropped.
    for _ in 0..1000 {
        now += SECOND;
        for publisher in &mut publishers {
            publisher.ping(bench, now);
            publisher.send(bench, now);
        }
        bench.tick_at(now);
        let ended = publishers.iter().filter(|p| !bench.is_open(p.key)).count();
        assert_eq!(ended, 0, "after {} s", (now - START) / SECOND);
    }
    // ACKs make them wait, also those for dropped packets.
    for publisher in &mut publishers {
        publisher.send(bench, now);
        assert!(bench.find(publisher.key).unwrap().is_blocked());
    }
    // The reader continues, and so do they.
    stopped.read_on();
    let bench = &mut stopped.bench;
    for _ in 0..1000 {
        now += MILLISECOND;
        bench.tick_at(now);
        for publisher in &mut publishers {
            publisher.send(bench, now);
        }
    }
    bench.tick_at(now + MILLISECOND);
    assert!(publishers.iter().all(|p| p.missing.is_empty()));
    assert_eq!(stopped.read_on(), 3);
    drop(publishers);
}

#[test]
fn packets_dropped_for_lack_of_memory_are_answered() {
    let mut stopped = Stopped::new(Geometry::new(64 << 20, 16 << 20, 64).unwrap());
    let bench = &mut stopped.bench;
    let mut publishers: Vec<_> = (10..13).map(|n| Large::new(bench, n, 8 << 20)).collect();
    let now = START + SECOND;
    while send_all(&mut publishers, bench, now) {}
    bench.tick_at(now + MILLISECOND);
    let publisher = &mut publishers[0];
    let feedback = bench.feedback(publisher.key, now + 2 * MILLISECOND);
    assert!(
        feedback.is_some_and(|feedback| feedback.blocked),
        "it has begun to wait"
    );
    let later = now + SECOND;
    let (chunk, bytes) = (publisher.missing[0], vec![9; PIECE as usize]);
    let batch = BatchInfo {
        seq: 0,
        len: publisher.len,
        messages: 1,
        checksum: 0,
    };
    let chunk = Chunk {
        batch,
        offset: chunk,
    };
    let header = Data::payload(publisher.key, 10_000, &chunk, None, &bytes);
    bench.take_at(later, &frame(PUBLISHER, &header, &bytes));
    let feedback = bench.feedback(publisher.key, later + MILLISECOND);
    assert!(feedback.is_some_and(|feedback| feedback.blocked));
}

/// One byte of batch `seq`, which claims `len` bytes.
fn byte_of(key: StreamKey, packet: u64, seq: u64, len: u32) -> Vec<u8> {
    let batch = BatchInfo {
        seq,
        len,
        messages: 1,
        checksum: 0,
    };
    let chunk = Chunk { batch, offset: 0 };
    let header = Data::payload(key, packet, &chunk, None, b"x");
    frame(PUBLISHER, &header, b"x")
}

#[test]
fn a_publisher_with_room_to_send_times_out_while_a_reader_blocks() {
    let mut stopped = Stopped::new(Geometry::new(1 << 20, 1 << 16, 64).unwrap());
    let bench = &mut stopped.bench;
    let _control = bench.open(key(10), PUBLISHER);
    let mut now = START + SECOND;
    bench.take_at(now, &byte_of(key(10), 0, 0, 32 << 10));
    for second in 1..32 {
        assert!(bench.is_open(key(10)), "second {second}");
        now += SECOND;
        bench.ping(key(10), second, now);
        bench.tick_at(now);
    }
    assert!(
        !bench.is_open(key(10)),
        "memory has room for what it does not send"
    );
}

#[test]
fn a_wait_for_a_reader_extends_no_other_deadline() {
    let mut stopped = Stopped::new(Geometry::new(1 << 20, 1 << 16, 64).unwrap());
    let bench = &mut stopped.bench;
    let other = TempDir::new().unwrap();
    let options = LogOptions {
        geometry: Geometry::new(1 << 20, 1 << 16, 64).unwrap(),
        full: RingFullPolicy::Block,
        access: Access::default(),
        writers: 1,
    };
    let other = Arc::new(Log::open(&other.path().join("other.log"), &options).unwrap());
    let (here, there) = (key(10), key(11));
    let _controls = [
        bench.open(here, PUBLISHER),
        add_pending(&bench.worker, &bench.filter, &other, there, PUBLISHER, None),
    ];
    let mut now = START + SECOND;
    // Here one batch is complete, and another has one byte.
    bench.take_at(now, &whole(PUBLISHER, here, 0, 0));
    bench.take_at(now, &byte_of(here, 1, 1, 32 << 10));
    bench.take_at(now, &byte_of(there, 0, 0, 32 << 10));
    for second in 1..100 {
        now += SECOND;
        bench.ping(here, 10 + second, now);
        if bench.is_open(there) {
            bench.ping(there, 10 + second, now);
        }
        bench.tick_at(now);
        assert!(bench.is_open(here));
        assert_eq!(bench.is_open(there), second <= 30, "second {second}");
    }
    stopped.read_on();
    let bench = &mut stopped.bench;
    let mut second = 0;
    while bench.is_open(here) {
        second += 1;
        assert!(second < 40, "its time counts again");
        now += SECOND;
        bench.ping(here, 200 + second, now);
        bench.tick_at(now);
    }
    assert!(second >= 30, "second {second}: only its own time counts");
}

#[test]
fn a_batch_that_blocks_the_ring_leaves_it_although_its_stream_waits() {
    let mut bench = Bench::new();
    let largest = bench.log.geometry().max_payload();
    let (slow, honest) = (key(10), key(11));
    let others = [20, 21, 22, 23, 24, 25, 26].map(key);
    let _controls = others.map(|key| bench.open(key, PUBLISHER));
    let _others = [bench.open(slow, PUBLISHER), bench.open(honest, 3)];
    let now = START + SECOND;
    // The slow stream's second batch has room in the ring. Its first one has none, because its host has used up its share.
    bench.take_at(now, &byte_of(slow, 0, 1, largest));
    for other in others {
        bench.take_at(now, &byte_of(other, 0, 0, largest));
    }
    let (mut chunk, payload) = batch_of_one(0);
    chunk.batch.checksum = 0;
    let first = |packet, offset: u32, bytes: &[u8]| {
        let chunk = Chunk { offset, ..chunk };
        let header = Data::payload(slow, packet, &chunk, None, bytes);
        frame(PUBLISHER, &header, bytes)
    };
    bench.take_at(now, &first(1, 0, &payload[..4]));
    assert_eq!(bench.stats().aside, 1);
    // At this moment the ring fills up until the batch blocks it.
    let mut packet = 0;
    let mut seq = 0;
    let mut publish = |bench: &mut Bench, now: Timestamp| {
        let before = bench.log.info().batches;
        for offset in (0..largest).step_by(8 << 10) {
            let batch = BatchInfo {
                seq,
                len: largest,
                messages: 1,
                checksum: 0,
            };
            let bytes = [7; 8 << 10];
            let header = Data::payload(honest, packet, &Chunk { batch, offset }, None, &bytes);
            packet += 1;
            bench.take_at(now, &frame(3, &header, &bytes));
            bench.feedback(honest, now + MILLISECOND);
        }
        seq += 1;
        bench.log.info().batches > before
    };
    while publish(&mut bench, now) {}
    // The first batch of the slow stream is complete, and waits.
    bench.take_at(now, &first(2, 4, &payload[4..]));
    let before = bench.log.info().batches;
    for more in 1..1000 {
        bench.tick_at(now + more * MILLISECOND);
    }
    assert_eq!(bench.log.info().batches, before + 2, "both go on");
}
