//! Batches that are claimed and not sent, over tcp.

use super::*;

/// The largest batch of a broker with [`LARGE`] segments.
const CLAIM: u32 = 8 << 20;
const LARGE: [&str; 4] = ["--ring-size", "64MiB", "--segment-size", "16MiB"];
/// What a broker of this test may have of its own, beside what is bounded for peers.
const OWN_MEMORY: u64 = 24 << 20;

impl Broker {
    fn open_from(&self, host: u8) -> Peer {
        let request = Request {
            max_payload: CLAIM,
            ..request()
        };
        let socket = self.connect_from([127, 0, 0, host]);
        Self::greet(socket, "t", &request).expect("welcome").0
    }

    /// Memory that is not of files, bytes.
    fn anonymous_memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() << 10
    }
}

impl Peer {
    /// Claims a batch of the largest size and sends this many bytes of it.
    fn claim(&mut self, bytes: usize) {
        let header = Header::for_batch(0, 1, CLAIM, 0);
        self.socket.write_all(header.as_bytes()).unwrap();
        self.socket.set_nonblocking(true).unwrap();
        let part = vec![0; bytes];
        let mut sent = 0;
        // Bytes that the broker does not accept are dropped here.
        while sent < bytes {
            match self.socket.write(&part[sent..]) {
                Ok(more) => sent += more,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.socket.set_nonblocking(false).unwrap();
    }

    fn publish(&mut self, batches: usize) {
        for _ in 0..batches {
            self.send(&[&[2; 30_000]]);
            self.acked();
        }
    }
}

#[test]
fn claims_cost_what_came_of_them_and_hold_up_nobody() {
    let buffers = Buffers::new();
    let broker = buffers.start(&LARGE);
    let mut honest = broker.open("t");
    honest.publish(1);
    let before = broker.anonymous_memory();
    // Twelve times what the ring holds; nothing or one byte of each comes.
    let mut claimants = Vec::new();
    for number in 0..100 {
        let mut peer = broker.open_from(2 + number % 3);
        peer.claim(usize::from(number % 2));
        claimants.push(peer);
    }
    // One from elsewhere, one from a host of theirs; the ring passes more than once.
    let mut neighbour = broker.open_from(2);
    for _ in 0..15 {
        honest.publish(100);
        neighbour.publish(100);
    }
    let after = broker.anonymous_memory();
    assert!(after < before + (8 << 20), "{before} bytes, then {after}");
    honest.end();
    neighbour.end();
    assert!(broker.stop().success());
    let counters = &buffers.report()["counters"];
    assert_eq!(counters["stalled"], 0, "nobody is ended for a claim alone");
    assert_eq!(counters["streams_completed"], 2);
}

#[test]
fn claims_that_are_not_filled_overwrite_little() {
    let buffers = Buffers::new();
    let broker = buffers.start(&LARGE);
    let mut honest = broker.open("t");
    honest.send(&[b"first"]);
    honest.acked();
    // Each would take an eighth of the ring, and with it what readers have not read.
    for _ in 0..50 {
        let mut peer = broker.open_from(2);
        peer.claim(0);
    }
    honest.send(&[b"last"]);
    honest.acked();
    honest.end();
    assert!(broker.stop().success());
    assert_eq!(buffers.messages("t"), [&b"first"[..], b"last"]);
}

#[test]
fn batches_that_are_nearly_complete_take_no_more_memory_than_all_may() {
    let buffers = Buffers::new();
    let broker = buffers.start(&LARGE);
    let mut honest = broker.open("t");
    honest.publish(1);
    let mut claimants = Vec::new();
    for number in 0..24 {
        let mut peer = broker.open_from(2 + number % 4);
        peer.claim(CLAIM as usize - 1);
        claimants.push(peer);
    }
    let mut neighbour = broker.open_from(2);
    let mut most = 0;
    for _ in 0..15 {
        honest.publish(100);
        neighbour.publish(100);
        most = most.max(broker.anonymous_memory());
    }
    assert!(most < (32 << 20) + OWN_MEMORY, "{most} bytes");
    honest.end();
    neighbour.end();
    assert!(broker.stop().success());
}

#[test]
fn a_batch_that_drips_is_ended_however_often_a_byte_comes() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--stall-timeout", "0.5"]);
    let mut peer = broker.open("t");
    let bytes = frame(0, &[&[1; 20_000]]);
    let mut socket = peer.socket.try_clone().unwrap();
    let dripping = thread::spawn(move || {
        for byte in bytes.chunks(1) {
            if socket.write_all(byte).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let (code, text) = peer.fault();
    assert_eq!(code, Fault::Stalled as u16, "{text}");
    assert!(text.contains("send smaller batches"), "{text}");
    drop(peer);
    dripping.join().unwrap();
    assert!(broker.stop().success());
    assert_eq!(buffers.report()["counters"]["stalled"], 1);
}

#[test]
fn large_batches_wait_for_a_reader_beyond_the_memory_there_is() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[&LARGE[..], &["--topic", "t", "--stall-timeout", "0.5"]].concat());
    let mut reader = Reader::open(&buffers.log("t"), Start::Oldest).unwrap();
    reader.register().unwrap();
    let message = vec![1; CLAIM as usize - 4];
    // The ring is full of what the reader has not read.
    let mut filler = broker.open_from(9);
    (0..8).for_each(|_| filler.send(&[&message]));
    filler.acked();
    // One host sends three times what it may have in the ring, or in memory: all of it can only wait.
    let mut waiting: Vec<_> = (0..6).map(|_| broker.open_from(2)).collect();
    let sending: Vec<_> = waiting
        .iter_mut()
        .map(|peer| {
            let (mut socket, bytes) = (peer.socket.try_clone().unwrap(), frame(0, &[&message]));
            peer.next = 1;
            thread::spawn(move || socket.write_all(&bytes))
        })
        .collect();
    for peer in &mut waiting {
        // The broker says so once a second, which is longer than a publisher may stall.
        for _ in 0..3 {
            match peer.reply() {
                Parsed::Ack { blocked, .. } => assert!(blocked),
                Parsed::Error { .. } => panic!("a stream that waits for a reader is ended"),
            }
        }
    }
    let mut read = 0;
    eventually("the reader has all", || {
        while reader.next().unwrap().is_some() {
            read += 1;
        }
        read == 8 + 6
    });
    for sent in sending {
        sent.join().unwrap().unwrap();
    }
    for mut peer in waiting {
        peer.acked();
        peer.end();
    }
    filler.end();
    assert!(broker.stop().success());
    let counters = &buffers.report()["counters"];
    assert_eq!(counters["stalled"], 0);
    assert_eq!(counters["streams_completed"], 7);
}
