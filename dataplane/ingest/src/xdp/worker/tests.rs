//! A worker without sockets, given frames from memory.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use fastrand::Rng;
use penstock_auth::PacketKeys;
use penstock_log::{Access, Geometry, Log, LogOptions, Reader, RingFullPolicy, Start};
use penstock_transport::{Nanos, Timestamp};
use penstock_wire::batch::{self, Header};
use penstock_wire::handshake::{AckLevel, Path};
use penstock_wire::packet::{BatchInfo, Chunk, DATA_LEN, Data, Feedback, StreamKey};
use penstock_xsk::frame;
use penstock_xsk::{Endpoint, FrameTemplate};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::admission::{Admission, StreamState};
use crate::session::stream_filter::FilterEntry;
use crate::session::stream_filter::tests::OddKeys;
use crate::session::test_support::{small_buffers, tenant};

mod claims;
mod readers;

const START: Timestamp = Timestamp::ZERO;
const KEY: StreamKey = StreamKey {
    key: 0x5ec2e7,
    stream: 0,
};

/// The publisher's host: the peer of the control connection, as far as the worker knows.
const PUBLISHER: u8 = 2;

/// A worker without sockets, and a stream that waits for its first packet.
struct Bench {
    worker: Worker,
    log: Arc<Log>,
    filter: Arc<OddKeys>,
    /// The publisher's end of the control connection.
    control: TcpStream,
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with_keys(None)
    }

    fn with_keys(keys: Option<PacketKeys>) -> Self {
        Self::with_log(
            Geometry::new(1 << 20, 1 << 16, 64).unwrap(),
            RingFullPolicy::Overwrite,
            keys,
        )
    }

    fn with_log(geometry: Geometry, full: RingFullPolicy, keys: Option<PacketKeys>) -> Self {
        let dir = TempDir::new().unwrap();
        let options = LogOptions {
            geometry,
            full,
            access: Access::default(),
            writers: 2,
        };
        let log = Arc::new(Log::open(&dir.path().join("topic.log"), &options).unwrap());
        let filter = Arc::new(OddKeys::default());
        let pending_streams = Arc::new(PendingStreams::new(Arc::clone(&filter) as _));
        let config = WorkerConfig {
            verify_on_receive: false,
            polling: Polling::Busy,
            idle_timeout: Duration::from_secs(30),
            capacity: 1 << 20,
        };
        let made = Worker::new(
            config,
            Vec::new(),
            pending_streams,
            Arc::default(),
            Arc::default(),
        );
        let (worker, _) = made.unwrap();
        let control = add_pending(&worker, &filter, &log, KEY, PUBLISHER, keys);
        Self {
            worker,
            log,
            filter,
            control,
            dir,
        }
    }

    /// Another stream, of a publisher on this host; returns the publisher's end of the control
    /// connection.
    fn open(&mut self, key: StreamKey, host: u8) -> TcpStream {
        add_pending(&self.worker, &self.filter, &self.log, key, host, None)
    }

    fn take(&mut self, frame: &[u8]) {
        let now = self.worker.table.now();
        self.take_at(now, frame);
    }

    /// Processes a frame at a given time of the worker's clock.
    fn take_at(&mut self, now: Timestamp, frame: &[u8]) {
        self.worker.table.datagram(0, &[frame], now);
        self.worker.table.commit_dirty(now);
    }

    fn tick_at(&mut self, now: Timestamp) {
        self.worker.tick(now).unwrap();
    }

    fn stats(&self) -> &XdpStats {
        &self.worker.table.metrics.xdp
    }

    fn open_streams(&self) -> usize {
        self.worker.table.streams.len()
    }

    /// The open stream with this key.
    fn find(&mut self, key: StreamKey) -> Option<&mut Stream> {
        let number = self.worker.table.index.find(key)?;
        Some(&mut self.worker.table.streams[number].stream)
    }

    /// Whether the first stream in the table is open.
    fn has_first(&self) -> bool {
        self.worker.table.streams.contains(0)
    }

    fn first(&mut self) -> &mut Stream {
        &mut self.worker.table.streams[0].stream
    }

    /// The feedback in the ACK of a stream, if one is due.
    fn feedback(&mut self, key: StreamKey, now: Timestamp) -> Option<Feedback> {
        let mut feedback = Feedback::new(key);
        let stream = self.find(key).unwrap();
        let len = stream.write_ack(now, &mut feedback, &mut [0; 2048]);
        len.map(|_| feedback)
    }

    /// Number of batches in the log, and destination of the stream's ACKs.
    fn stream(&self) -> (u64, SocketAddr) {
        let template = self.worker.table.streams[0].stream.route.template();
        (self.log.info().batches, template.unwrap().peer())
    }
}

/// A stream that waits for its first packet; returns the publisher's end of the control connection.
fn add_pending(
    worker: &Worker,
    filter: &Arc<OddKeys>,
    log: &Arc<Log>,
    key: StreamKey,
    host: u8,
    keys: Option<PacketKeys>,
) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let control = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    let peer = address(host);
    let accepted = AcceptedStream {
        buffers: small_buffers().apply_to_accepted(&socket).unwrap(),
        socket,
        peer,
        admission: Admission {
            log: Arc::clone(log),
            topic: "t".to_owned(),
            tenant: tenant(host, None),
            session: key.key,
            stream: 0,
            ack: AckLevel::Committed,
            path: Path::Xdp,
            max_payload: log.geometry().max_payload(),
            max_datagram: 1472,
            lease: Arc::new(StreamState::new(0)).lease().unwrap(),
        },
        keys: keys.map(Arc::new),
    };
    let filter_entry = FilterEntry::new(&(Arc::clone(filter) as _), key).unwrap();
    worker.table.pending_streams.insert(filter_entry, accepted);
    control
}

fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 1214))
}

/// A packet from a host of this network, as the broker's interface gets it.
fn frame(from: u8, header: &Data, payload: &[u8]) -> Vec<u8> {
    let end = |host| Endpoint {
        mac: [host; 6],
        address: address(host),
    };
    let headers = FrameTemplate::new(&end(from), &end(1));
    let mut frame = vec![0; headers.len()];
    let parts = [header.as_bytes(), payload];
    headers.write(&mut frame, &parts);
    frame.extend(parts.concat());
    frame
}

/// Batch `seq`, of one message, as a packet carries it whole.
fn batch_of_one(seq: u64) -> (Chunk, Vec<u8>) {
    let payload = [&4u32.to_le_bytes()[..], &(seq as u32).to_le_bytes()].concat();
    let chunk = Chunk {
        batch: BatchInfo {
            seq,
            len: payload.len() as u32,
            messages: 1,
            checksum: batch::checksum(seq, 1, &payload),
        },
        offset: 0,
    };
    (chunk, payload)
}

/// Batch `seq` in one packet.
fn whole(from: u8, key: StreamKey, packet: u64, seq: u64) -> Vec<u8> {
    let (chunk, payload) = batch_of_one(seq);
    let header = Data::payload(key, packet, &chunk, None, &payload);
    frame(from, &header, &payload)
}

/// Several packets in one datagram, as in generic mode without software segmentation.
fn row(packets: &[Vec<u8>]) -> Vec<u8> {
    let headers = packets[0].len() - frame::parse(&packets[0], packets[0].len()).unwrap().len;
    let rest: Vec<&[u8]> = packets.iter().map(|packet| &packet[headers..]).collect();
    let rest = rest.concat();
    let (header, payload) = rest.split_at(DATA_LEN);
    frame(2, Data::ref_from_bytes(header).unwrap(), payload)
}

#[test]
fn a_datagram_of_several_packets_counts_each_of_them() {
    let mut bench = Bench::new();
    let packets: Vec<_> = (0..5).map(|seq| whole(2, KEY, seq, seq)).collect();
    bench.take(&row(&packets[..3]));
    assert_eq!(bench.stream().0, 3);
    // What follows a damaged one cannot be found.
    let mut damaged = row(&packets[3..]);
    let end = damaged.len() - 1;
    damaged[end] ^= 1;
    bench.take(&damaged);
    assert_eq!(bench.stream().0, 4);
    damaged.truncate(end);
    bench.take(&damaged);
    let xdp = bench.stats();
    assert_eq!((xdp.placed, xdp.corrupt, xdp.malformed), (4, 1, 1));
}

/// Damaged, repeated and late packets of batches that take several: whatever of them lies in the ring
/// for a while, readers see what was sent.
#[test]
fn damaged_packets_of_long_batches_change_nothing() {
    const BATCHES: u64 = 36;
    const PARTS: u64 = 12;
    const PART: usize = 150;
    let mut bench = Bench::new();
    let mut rng = Rng::with_seed(3);
    let (mut packet, mut damaged) = (0, 0);
    // All of it within the first credit: no ACK is sent here.
    for seq in 0..BATCHES {
        let len = PARTS as usize * PART;
        let mut payload = ((len - 4) as u32).to_le_bytes().to_vec();
        payload.extend((4..len).map(|_| rng.u8(..)));
        let batch = BatchInfo {
            seq,
            len: len as u32,
            messages: 1,
            checksum: batch::checksum(seq, 1, &payload),
        };
        let mut order: Vec<usize> = (0..PARTS as usize).collect();
        for _ in 0..rng.usize(0..3) {
            order.swap(rng.usize(0..PARTS as usize), rng.usize(0..PARTS as usize));
        }
        for part in order {
            let offset = (part * PART) as u32;
            let bytes = &payload[part * PART..][..PART];
            let chunk = Chunk { batch, offset };
            let sent = frame(2, &Data::payload(KEY, packet, &chunk, None, bytes), bytes);
            packet += 1;
            let before = bench.stats().placed;
            for _ in 0..20 {
                let mut changed = sent.clone();
                let at = rng.usize(42..changed.len());
                changed[at] ^= 1 << rng.u8(..8);
                bench.take(&changed);
                damaged += 1;
            }
            assert_eq!(bench.stats().placed, before);
            bench.take(&sent);
            assert_eq!(bench.stats().placed, before + 1);
            if rng.bool() {
                bench.take(&sent);
            }
        }
        assert_eq!(bench.stream().0, seq + 1);
        let path = bench.dir.path().join("topic.log");
        let mut reader = Reader::open(&path, Start::Oldest).unwrap();
        let mut last = Vec::new();
        while let Some(batch) = reader.next().unwrap() {
            batch.verify().unwrap();
            last = batch.payload.to_vec();
        }
        assert_eq!(last, payload);
    }
    let xdp = bench.stats();
    let bad = xdp.corrupt + xdp.malformed + xdp.unknown_stream;
    assert_eq!((xdp.placed, bad), (BATCHES * PARTS, damaged));
}

/// Batch `seq` in one packet, sealed.
fn sealed(from: u8, keys: &PacketKeys, packet: u64, seq: u64) -> Vec<u8> {
    let (chunk, payload) = batch_of_one(seq);
    let header = Data::to_be_sealed(KEY, packet, Some(&chunk), None, payload.len() as u16);
    let tag = keys.seal_data(packet, &[header.as_bytes(), &payload]);
    frame(from, &header, &[&tag[..], &payload].concat())
}

#[test]
fn only_packets_of_its_publisher_reach_a_stream_with_keys() {
    let keys = PacketKeys::new(&[1; 32]);
    let mut bench = Bench::with_keys(Some(PacketKeys::new(&[1; 32])));
    // Anyone who sees its packets can forge others with a valid checksum, also before the first.
    let forged = whole(66, KEY, 0, 0);
    let other = sealed(66, &PacketKeys::new(&[2; 32]), 0, 0);
    bench.take(&forged);
    bench.take(&other);
    assert!(bench.worker.table.streams.is_empty(), "no worker claims it");
    for seq in 0..20 {
        let honest = sealed(2, &keys, seq, seq);
        for bit in 42 * 8..honest.len() * 8 {
            let mut changed = honest.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            bench.take(&changed);
            assert_eq!(bench.log.info().batches, seq, "bit {bit}");
        }
        bench.take(&honest);
        bench.take(&forged);
        bench.take(&other);
        bench.take(&honest);
        assert_eq!(bench.stream(), (seq + 1, address(2)));
    }
    let packets: Vec<_> = (20..24).map(|seq| sealed(2, &keys, seq, seq)).collect();
    bench.take(&row(&packets));
    assert_eq!(bench.stream().0, 24);
    assert_eq!(bench.stats().placed, 24);
    // Nor is one without keys reached by sealed ones.
    let mut open = Bench::new();
    open.take(&sealed(2, &keys, 0, 0));
    open.take(&whole(2, KEY, 0, 0));
    open.take(&sealed(2, &keys, 1, 1));
    assert_eq!(open.stream().0, 1);
}

#[test]
fn acks_of_a_stream_with_keys_are_sealed_each_with_a_counter_of_its_own() {
    let keys = PacketKeys::new(&[1; 32]);
    let mut bench = Bench::with_keys(Some(PacketKeys::new(&[1; 32])));
    let (mut frame, mut feedback) = (vec![0; 2048], Feedback::new(KEY));
    for seq in 0..5 {
        bench.take(&sealed(2, &keys, seq, seq));
        let entry = &mut bench.worker.table.streams[0];
        let len = entry
            .stream
            .write_ack(Timestamp::MAX, &mut feedback, &mut frame)
            .unwrap();
        let datagram = frame::parse(&frame, len).unwrap();
        let answer = &frame[datagram.start..][..datagram.len];
        let (counter, ack) = keys.open_ack(answer).unwrap();
        let mut read = Feedback::new(KEY);
        read.read(ack).unwrap();
        assert_eq!((counter, read.committed), (seq + 1, seq + 1));
    }
}

#[test]
fn forged_and_repeated_packets_change_nothing() {
    const STRANGER: u8 = 66;
    let mut bench = Bench::new();
    let mut rng = Rng::with_seed(1);
    let mut sent = Vec::new();
    for seq in 0..40 {
        let honest = whole(PUBLISHER, KEY, seq, seq);
        bench.take(&honest);
        sent.push(honest);
        let before = bench.stream();
        assert_eq!(before.0, seq + 1, "an honest packet is placed");
        for _ in 0..500 {
            // Well made, but of a stream that the stranger can only guess.
            let guess = StreamKey {
                key: rng.u64(..),
                stream: rng.u16(..2),
            };
            bench.take(&whole(STRANGER, guess, rng.u64(..100), seq + 1));
            // Seen on the way, and changed.
            let mut changed = sent[rng.usize(0..sent.len())].clone();
            let at = rng.usize(50..changed.len());
            changed[at] ^= 1 << rng.u8(..8);
            bench.take(&changed);
            // Seen on the way, and repeated from elsewhere.
            let mut repeated = sent[rng.usize(0..sent.len())].clone();
            repeated[6..12].fill(STRANGER);
            repeated[29] = STRANGER;
            bench.take(&repeated);
        }
        assert_eq!(bench.stream(), before, "after batch {seq}");
    }
    let table = &bench.worker.table;
    let kept = (
        table.streams.len(),
        table.writers.iter().count(),
        table.index.len(),
    );
    assert_eq!(kept, (1, 1, 1), "forged packets take no room");
    assert!(table.dirty.len() <= 1);
    assert_eq!(
        (table.metrics.xdp.placed, table.metrics.xdp.duplicates),
        (40, 40 * 500)
    );
    assert_eq!(table.metrics.xdp.unknown_stream, 40 * 500);
    let bad = table.metrics.xdp.corrupt + table.metrics.xdp.malformed;
    assert_eq!(bad, 40 * 500);
    let mut reader = Reader::open(&bench.dir.path().join("topic.log"), Start::Oldest).unwrap();
    for seq in 0..40 {
        let batch = reader.next().unwrap().unwrap();
        batch.verify().unwrap();
        assert_eq!(batch.batch_seq, seq);
    }
}

#[test]
fn repeated_packets_cause_few_acks() {
    let mut bench = Bench::new();
    let batch = whole(2, KEY, 0, 0);
    let ping = frame(2, &Data::ping(KEY, 1, &[]), &[]);
    let (mut out, mut feedback) = (vec![0; 2048], Feedback::new(KEY));
    let mut answers = |bench: &mut Bench, sent: &[u8], now: u64| {
        let now = Timestamp::from_nanos(now);
        let table = &mut bench.worker.table;
        table.datagram(0, &[sent], now);
        table.commit_dirty(now);
        let stream = &mut table.streams[0].stream;
        [now, now + Nanos::from_micros(100)]
            .map(|now| stream.write_ack(now, &mut feedback, &mut out).is_some())
    };
    // A committed batch and a ping are acknowledged at once.
    assert_eq!(answers(&mut bench, &batch, 1), [true, false]);
    assert_eq!(answers(&mut bench, &ping, 2), [true, false]);
    for now in 3..100 {
        let repeated = [&batch, &ping][now as usize % 2];
        assert_eq!(answers(&mut bench, repeated, now), [false, true]);
    }
}

#[test]
fn silent_control_connections_cost_no_system_call() {
    let mut bench = Bench::new();
    let key = |number: u64| StreamKey {
        key: 2 * number + 1,
        stream: 0,
    };
    let mut controls: Vec<_> = (0..64)
        .map(|number| bench.open(key(number), PUBLISHER))
        .collect();
    for number in 0..64 {
        bench.take(&whole(PUBLISHER, key(number), 0, 0));
    }
    let reads = |bench: &mut Bench, ticks| {
        let before = bench.stats().control_reads;
        for _ in 0..ticks {
            let now = bench.worker.table.now();
            bench.worker.tick(now).unwrap();
        }
        bench.stats().control_reads - before
    };
    reads(&mut bench, 10);
    assert_eq!(reads(&mut bench, 1000), 0);
    // An end frame in two parts is complete as well.
    let end = Header::for_end(1);
    let (first, second) = end.as_bytes().split_at(10);
    controls[7].write_all(first).unwrap();
    while reads(&mut bench, 1) == 0 {}
    assert_eq!(bench.open_streams(), 64);
    controls[7].write_all(second).unwrap();
    while bench.find(key(7)).is_some() {
        reads(&mut bench, 1);
    }
    let mut answer = Vec::new();
    controls[7].read_to_end(&mut answer).unwrap();
    assert!(!answer.is_empty());
    let counters = &bench.worker.table.shared.counters;
    assert_eq!(counters.streams_completed.load(Ordering::Relaxed), 1);
}

#[test]
fn the_filter_passes_packets_as_long_as_the_stream_is_open() {
    let mut bench = Bench::new();
    let admitted = |bench: &Bench| bench.filter.0.lock().unwrap().contains(&KEY.key);
    assert!(admitted(&bench), "before its first packet");
    bench.take(&whole(2, KEY, 0, 0));
    assert!(admitted(&bench));
    bench.control.shutdown(Shutdown::Both).unwrap();
    while bench.has_first() {
        assert!(admitted(&bench));
        let now = bench.worker.table.now();
        bench.worker.tick(now).unwrap();
    }
    assert!(!admitted(&bench));
}

/// The same packet from another UDP port.
fn from_port(mut sent: Vec<u8>, port: u16) -> Vec<u8> {
    sent[34..36].copy_from_slice(&port.to_be_bytes());
    sent
}

#[test]
fn acks_follow_a_publisher_whose_port_changes() {
    let mut bench = Bench::new();
    bench.take(&whole(PUBLISHER, KEY, 0, 0));
    bench.take(&from_port(whole(PUBLISHER, KEY, 1, 1), 4000));
    let before = (2, address(PUBLISHER));
    assert_eq!(bench.stream(), before, "one packet is not enough");
    bench.take(&from_port(whole(PUBLISHER, KEY, 2, 2), 4000));
    let mut there = address(PUBLISHER);
    there.set_port(4000);
    assert_eq!(bench.stream(), (3, there));
}

#[test]
fn acks_go_only_to_the_host_of_the_control_connection() {
    const VICTIM: u8 = 66;
    let mut bench = Bench::new();
    let (mut out, mut feedback) = (vec![0; 2048], Feedback::new(KEY));
    let mut answers = |bench: &mut Bench| {
        let stream = bench.first();
        let len = stream.write_ack(Timestamp::MAX, &mut feedback, &mut out)?;
        let datagram = frame::parse(&out[..len], len).unwrap();
        assert_eq!(datagram.len, out[datagram.start..len].len());
        Some(len)
    };
    // From the first packet on, for any number of packets.
    for packet in 0..20 {
        bench.take(&frame(VICTIM, &Data::ping(KEY, 2 * packet, &[]), &[]));
        assert_eq!(answers(&mut bench), None, "packet {packet}");
        let stream = &bench.worker.table.streams[0].stream;
        assert_eq!(stream.ack_due(), None, "nothing stays due");
    }
    for packet in 50..70 {
        bench.take(&frame(PUBLISHER, &Data::ping(KEY, 10 * packet, &[]), &[]));
        assert!(answers(&mut bench).is_some());
        for more in 1..5 {
            bench.take(&frame(
                VICTIM,
                &Data::ping(KEY, 10 * packet + more, &[]),
                &[],
            ));
        }
        answers(&mut bench);
        assert_eq!(bench.stream().1, address(PUBLISHER));
    }
    assert_eq!(bench.stats().foreign_source, 20 + 20 * 4);
}

#[test]
fn damaged_addresses_misdirect_no_acks() {
    let mut bench = Bench::new();
    let mut rng = Rng::with_seed(2);
    // Even if it is the first: two good ones put it right.
    for packet in 0..200 {
        let mut sent = whole(2, KEY, packet, packet);
        if packet % 3 == 0 {
            // Source: hardware address, IP address or port.
            let at = [rng.usize(6..12), rng.usize(26..30), rng.usize(34..36)][rng.usize(0..3)];
            sent[at] ^= 1 << rng.u8(..8);
        }
        bench.take(&sent);
        assert_eq!(bench.log.info().batches, packet + 1);
        if packet >= 2 {
            let stream = &bench.worker.table.streams[0].stream;
            let good = whole(2, KEY, 0, 0);
            let datagram = frame::parse(&good, good.len()).unwrap();
            assert!(
                stream.route.matches_sender(&good, &datagram),
                "after packet {packet}"
            );
        }
    }
}
