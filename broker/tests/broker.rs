//! The program at the edges of its protocol: byte by byte, wrong, slow, too many, killed.

#[path = "broker/claims.rs"]
mod claims;
mod common;
#[path = "broker/schedules.rs"]
mod schedules;
#[path = "broker/subscribe.rs"]
mod subscribe;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use penstock_log::{ReadError, Reader, Start};
use penstock_wire::batch::{Header, payload_checksum};
use penstock_wire::handshake::{Answer, Hello, Refusal, Request, WELCOME_LEN, Welcome};
use penstock_wire::message::{Messages, append};
use penstock_wire::reply::{Fault, Parsed, REPLY_LEN, Reply};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use common::request;

/// Longer than anything here takes; a test that waits for it has failed anyhow.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A directory of logs; brokers come and go.
struct Buffers(TempDir);

/// A broker that runs on a port of its own choice.
struct Broker {
    child: Child,
    address: SocketAddr,
}

impl Buffers {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-broker"));
        if !flags.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command.arg("--buffer-dir");
        command
            .arg(self.0.path())
            .arg("--report")
            .arg(self.report_path());
        if !flags.contains(&"--ring-size") {
            command.args(["--ring-size", "256KiB"]);
        }
        if !flags.contains(&"--segment-size") {
            command.args(["--segment-size", "64KiB"]);
        }
        command.args(flags).env_remove("RUST_LOG");
        command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .stdout(Stdio::piped());
        command
    }

    fn start(&self, flags: &[&str]) -> Broker {
        let mut child = self.command(flags).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim_end()
            .strip_prefix("penstock-broker ready on ")
            .unwrap_or_else(|| panic!("the broker says {line:?}"));
        Broker {
            address: address.parse().unwrap(),
            child,
        }
    }

    /// What a broker says that must not start.
    fn refusal(&self, flags: &[&str]) -> String {
        let output = self.command(flags).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    }

    fn log(&self, topic: &str) -> PathBuf {
        self.0.path().join(format!("{topic}.log"))
    }

    fn socket(&self, broker: &Broker) -> PathBuf {
        let name = format!("broker-{}.sock", broker.address.port());
        self.0.path().join(name)
    }

    /// Figures of a running broker.
    fn ask(&self, broker: &Broker) -> serde_json::Value {
        let stream = UnixStream::connect(self.socket(broker)).unwrap();
        serde_json::from_reader(stream).unwrap()
    }

    fn report_path(&self) -> PathBuf {
        self.0.path().join("report.json")
    }

    fn report(&self) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.report_path()).unwrap()).unwrap()
    }

    /// Every message of a topic, checked.
    fn messages(&self, topic: &str) -> Vec<Vec<u8>> {
        let mut reader = Reader::open(&self.log(topic), Start::Oldest).unwrap();
        let mut messages = Vec::new();
        while let Some(batch) = reader.next().unwrap() {
            batch.verify().unwrap();
            messages.extend(Messages::new(batch.payload).map(|m| m.unwrap().to_vec()));
        }
        messages
    }
}

impl Broker {
    fn connect(&self) -> TcpStream {
        self.connect_from([127, 0, 0, 1])
    }

    fn connect_from(&self, host: [u8; 4]) -> TcpStream {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((host, 0)).into()).unwrap();
        socket.connect(&self.address.into()).unwrap();
        let socket = TcpStream::from(socket);
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_nodelay(true).unwrap();
        socket
    }

    fn ask(&self, topic: &str, request: &Request) -> Result<(Peer, u64), (u16, String)> {
        Self::greet(self.connect(), topic, request)
    }

    fn greet(
        mut socket: TcpStream,
        topic: &str,
        request: &Request,
    ) -> Result<(Peer, u64), (u16, String)> {
        let hello = Hello::new(request, topic.len());
        socket
            .write_all(&[hello.as_bytes(), topic.as_bytes()].concat())
            .unwrap();
        let mut welcome = [0; WELCOME_LEN];
        socket.read_exact(&mut welcome).unwrap();
        match Welcome::read_from_bytes(&welcome).unwrap().parse().unwrap() {
            Answer::Accepted(offer) => Ok((Peer { socket, next: 0 }, offer.session)),
            Answer::Refused { code, text_len } => {
                let mut text = vec![0; text_len];
                socket.read_exact(&mut text).unwrap();
                Err((code, String::from_utf8(text).unwrap()))
            }
        }
    }

    fn open(&self, topic: &str) -> Peer {
        self.ask(topic, &request()).expect("welcome").0
    }

    /// Ends the broker as a service manager does.
    fn stop(mut self) -> ExitStatus {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: the child has not been waited for, so the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        self.child.wait().unwrap()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // A test that failed leaves nothing running; otherwise it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The publisher's end of a stream.
struct Peer {
    socket: TcpStream,
    next: u64,
}

/// Header and payload of a batch.
fn frame(seq: u64, messages: &[&[u8]]) -> Vec<u8> {
    let mut payload = Vec::new();
    messages.iter().for_each(|m| append(&mut payload, m));
    let header = Header::for_batch(
        seq,
        messages.len() as u32,
        payload.len() as u32,
        payload_checksum(&payload),
    );
    [header.as_bytes(), &payload].concat()
}

impl Peer {
    fn send(&mut self, messages: &[&[u8]]) {
        self.socket.write_all(&frame(self.next, messages)).unwrap();
        self.next += 1;
    }

    fn reply(&mut self) -> Parsed {
        let mut reply = [0; REPLY_LEN];
        self.socket.read_exact(&mut reply).unwrap();
        Reply::read_from_bytes(&reply).unwrap().parse().unwrap()
    }

    /// Waits until all that was sent is acked.
    fn acked(&mut self) {
        loop {
            match self.reply() {
                Parsed::Ack { committed, .. } if committed == self.next => return,
                Parsed::Ack { committed, .. } => assert!(committed < self.next),
                other => panic!("{other:?}"),
            }
        }
    }

    fn end(mut self) {
        self.socket
            .write_all(Header::for_end(self.next).as_bytes())
            .unwrap();
        let mut replies = Vec::new();
        self.socket.read_to_end(&mut replies).unwrap();
        let (replies, rest) = replies.as_chunks::<REPLY_LEN>();
        assert!(rest.is_empty(), "half a reply");
        let last = Reply::read_from_bytes(replies.last().unwrap()).unwrap();
        let all = Parsed::Ack {
            committed: self.next,
            blocked: false,
        };
        assert_eq!(last.parse(), Ok(all));
    }

    /// The fault with which the broker ends the stream, and its words.
    fn fault(&mut self) -> (u16, String) {
        loop {
            if let Parsed::Error { code, text_len, .. } = self.reply() {
                let mut text = vec![0; text_len];
                self.socket.read_exact(&mut text).unwrap();
                return (code, String::from_utf8(text).unwrap());
            }
        }
    }
}

/// Until it holds; the failure names it.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < TIMEOUT, "never: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_stream_that_comes_byte_by_byte_is_the_same_stream() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[]);
    let mut socket = broker.connect();
    let hello = Hello::new(&request(), 1);
    let batches = [frame(0, &[b"one", b""]), frame(1, &[b"two"])].concat();
    let bytes = [
        hello.as_bytes(),
        b"t",
        &batches,
        Header::for_end(2).as_bytes(),
    ]
    .concat();
    for byte in bytes {
        socket.write_all(&[byte]).unwrap();
    }
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    let last = Reply::read_from_bytes(&answer[answer.len() - REPLY_LEN..]).unwrap();
    assert!(matches!(last.parse(), Ok(Parsed::Ack { committed: 2, .. })));
    assert!(broker.stop().success());
    assert_eq!(buffers.messages("t"), [&b"one"[..], b"", b"two"]);
}

#[test]
fn batches_from_many_streams_and_topics_are_all_there() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--workers", "3"]);
    thread::scope(|scope| {
        for number in 0..12 {
            let broker = &broker;
            scope.spawn(move || {
                let mut peer = broker.open(["even", "odd"][number % 2]);
                for batch in 0..50 {
                    peer.send(&[format!("{number} {batch}").as_bytes()]);
                }
                peer.end();
            });
        }
    });
    assert!(broker.stop().success());
    for (topic, first) in [("even", 0), ("odd", 1)] {
        let mut got = buffers.messages(topic);
        let mut wanted: Vec<_> = (first..12)
            .step_by(2)
            .flat_map(|n| (0..50).map(move |b| format!("{n} {b}").into_bytes()))
            .collect();
        got.sort();
        wanted.sort();
        assert_eq!(got, wanted);
    }
    let report = buffers.report();
    assert_eq!(report["batches"], 600);
    assert_eq!(report["counters"]["streams_completed"], 12);
    assert_eq!(report["connections"].as_array().unwrap().len(), 12);
}

/// Memory of the process that is its own, bytes.
fn own_memory(broker: &Broker) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", broker.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[test]
fn an_idle_stream_over_tcp_costs_little_memory() {
    const STREAMS: usize = 200;
    let buffers = Buffers::new();
    let broker = buffers.start(&[]);
    let mut peers = Vec::new();
    let mut open = |count: usize| {
        for _ in 0..count {
            let mut peer = broker.open("idle");
            peer.send(&[b"message"]);
            peer.acked();
            peers.push(peer);
        }
        own_memory(&broker)
    };
    // What the first ones need that others share.
    let before = open(20);
    let each = open(STREAMS).saturating_sub(before) / STREAMS as u64;
    assert!(each <= 16 << 10, "an idle stream costs {each} bytes");
}

#[test]
fn broken_batches_end_their_stream_with_a_reason_and_stay_out_of_the_log() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--verify-on-receive"]);
    let mut witness = broker.open("t");
    witness.send(&[b"before"]);
    witness.acked();

    let mut flipped = frame(0, &[b"damaged on the way"]);
    *flipped.last_mut().unwrap() ^= 1;
    let out_of_order = frame(7, &[b"the eighth"]);
    let oversized = Header::for_batch(0, 1, 40 << 10, 0);
    let cases: [(&[u8], Fault); 4] = [
        (&flipped, Fault::Checksum),
        (&out_of_order, Fault::Protocol),
        (oversized.as_bytes(), Fault::Protocol),
        (&[0xff; 24], Fault::Protocol),
    ];
    for (bytes, wanted) in cases {
        let mut peer = broker.open("t");
        peer.socket.write_all(bytes).unwrap();
        let (code, text) = peer.fault();
        assert_eq!(code, wanted as u16, "{text}");
        assert!(!text.is_empty());
    }

    witness.send(&[b"after"]);
    witness.end();
    assert!(broker.stop().success());
    assert_eq!(buffers.messages("t"), [&b"before"[..], b"after"]);
    let counters = &buffers.report()["counters"];
    assert_eq!(counters["checksum_errors"], 1);
    assert_eq!(counters["protocol_errors"], 3);
}

#[test]
fn whoever_stalls_inside_a_batch_is_dropped_and_holds_nobody_up() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--stall-timeout", "0.5"]);
    let mut staller = broker.open("t");
    let bytes = frame(0, &[&[1; 20_000]]);
    staller.socket.write_all(&bytes[..10_000]).unwrap();
    // Several times the ring passes meanwhile.
    let mut other = broker.open("t");
    for _ in 0..100 {
        other.send(&[&[2; 16_000]]);
        other.acked();
    }
    let (code, text) = staller.fault();
    assert_eq!(code, Fault::Stalled as u16, "{text}");
    other.send(&[b"last"]);
    other.end();
    assert!(broker.stop().success());
    let messages = buffers.messages("t");
    assert!(
        messages.iter().all(|m| m.first() != Some(&1)),
        "half a batch is in the log"
    );
    assert_eq!(messages.last().unwrap(), b"last");
    assert_eq!(buffers.report()["counters"]["stalled"], 1);
}

#[test]
fn silent_connections_time_out_and_the_oldest_goes_first() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--handshake-timeout", "2", "--max-handshakes", "4"]);
    let mut silent: Vec<_> = (0..8).map(|_| broker.connect()).collect();
    let start = Instant::now();
    for socket in &mut silent {
        // The first four to make room, the others for their time.
        assert!(matches!(socket.read(&mut [0]), Ok(0)));
    }
    assert!(start.elapsed() < TIMEOUT);
    broker.open("t").end();
    assert!(broker.stop().success());
    let counters = &buffers.report()["counters"];
    assert_eq!(counters["handshake_evictions"], 4);
    assert_eq!(counters["handshake_timeouts"], 4);
}

#[test]
fn a_host_with_many_silent_connections_takes_no_place_from_another() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--max-handshakes", "8"]);
    let honest = broker.connect_from([127, 0, 0, 2]);
    let mut silent: Vec<_> = (0..100).map(|_| broker.connect()).collect();
    for socket in &mut silent[..93] {
        assert!(matches!(socket.read(&mut [0]), Ok(0)));
    }
    let (peer, _) = Broker::greet(honest, "t", &request()).expect("it is still known");
    peer.end();
    assert!(broker.stop().success());
    assert_eq!(buffers.report()["counters"]["handshake_evictions"], 93);
}

#[test]
fn limits_are_named_to_those_who_meet_them() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--max-connections", "4", "--max-topics", "1"]);
    let mut first = broker.open("t");
    let (code, text) = broker.ask("second", &request()).err().unwrap();
    assert_eq!(code, Refusal::Topic as u16);
    let words = "1 of at most 1 topics; raise the broker's --max-topics";
    assert!(text.contains(words), "{text}");
    let (code, text) = broker.ask("../t", &request()).err().unwrap();
    assert_eq!(code, Refusal::Topic as u16, "{text}");
    let mut second = broker.open("t");
    for peer in [&mut first, &mut second] {
        peer.send(&[b"it is used"]);
        peer.acked();
    }
    // What one host may have leaves as much to others.
    let (code, text) = broker.ask("t", &request()).err().unwrap();
    assert_eq!(code, Refusal::Resources as u16);
    let words = "host 127.0.0.1 has 2 of at most 4 streams open";
    assert!(text.contains(words), "{text}");
    let elsewhere = broker.connect_from([127, 0, 0, 2]);
    let other = Broker::greet(elsewhere, "t", &request())
        .expect("another host")
        .0;
    // Once one has gone, another may come.
    first.end();
    eventually("a place becomes free", || {
        broker.ask("t", &request()).is_ok()
    });
    second.end();
    other.end();
    assert!(broker.stop().success());
}

/// Hellos that are refused make nothing; those that are welcome and then not used give way.
#[test]
fn a_host_that_opens_whatever_it_can_keeps_nobody_out() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--max-connections", "16", "--max-topics", "4"]);
    let mut early = broker.open("early");
    early.send(&[b"before"]);
    early.acked();
    let made_up = Request {
        session: 12_345,
        ..request()
    };
    for number in 0..16 {
        let (code, _) = broker
            .ask(&format!("junk{number}"), &made_up)
            .err()
            .unwrap();
        assert_eq!(code, Refusal::Session as u16);
        assert!(!buffers.log(&format!("junk{number}")).exists());
    }
    // Far more streams than there may be, and none is closed by its publisher.
    let mut held = Vec::new();
    let mut refused = 0;
    for number in 0..100 {
        match broker.ask(&format!("junk{}", number % 8), &request()) {
            Ok((peer, _)) => held.push(peer),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0, "topics have a limit");
    let honest = broker.connect_from([127, 0, 0, 2]);
    let (mut honest, _) = Broker::greet(honest, "honest", &request()).expect("another host");
    honest.send(&[b"after"]);
    honest.end();
    // The same host gets in as well: an unused stream gives way, and its stream in use stays.
    eventually("one ends for the next", || {
        broker.ask("early", &request()).is_ok()
    });
    early.send(&[b"after"]);
    early.acked();
    early.end();
    let mut codes = held.iter_mut().map(Peer::fault);
    let (code, text) = codes.next().unwrap();
    assert_eq!(code, Fault::Stalled as u16);
    assert!(text.contains("was idle"), "{text}");
    drop(held);
    assert!(broker.stop().success());
    assert_eq!(buffers.messages("early"), [b"before".as_slice(), b"after"]);
    let counters = &buffers.report()["counters"];
    assert!(counters["stream_evictions"].as_u64().unwrap() > 0);
}

#[test]
fn publishers_that_ask_for_topics_and_go_away_hold_up_nobody() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--topic", "t", "--ring-size", "64MiB"]);
    // They ask and go away at once.
    for number in 0..4 {
        let name = format!("gone{number}");
        let hello = Hello::new(&request(), name.len());
        let bytes = [hello.as_bytes(), name.as_bytes()].concat();
        broker.connect().write_all(&bytes).unwrap();
    }
    broker.open("t").end();
    let mut patient = broker.open("patient");
    patient.send(&[b"m"]);
    patient.end();
    assert!(broker.stop().success());
    assert_eq!(buffers.messages("patient"), [b"m"]);
}

#[test]
fn who_may_make_topics_is_told_with_the_flag_that_lets_them() {
    let buffers = Buffers::new();
    // From this host, without a flag.
    let mut broker = buffers.start(&["--listen", "0.0.0.0:0"]);
    broker.address.set_ip([127, 0, 0, 1].into());
    broker.open("demo").end();
    assert!(broker.stop().success());
    let broker = buffers.start(&["--create-topics", "never"]);
    // Its log is there.
    broker.open("demo").end();
    let (code, text) = broker.ask("other", &request()).err().unwrap();
    assert_eq!(code, Refusal::Topic as u16);
    let words = "start the broker with --topic other, or with --create-topics any";
    assert!(text.contains(words), "{text}");
    assert!(!buffers.log("other").exists());
    assert!(broker.stop().success());
    let broker = buffers.start(&["--topics", "trades.*,audit"]);
    broker.open("trades.eu").end();
    let (_, text) = broker.ask("other", &request()).err().unwrap();
    assert!(text.contains("--topics"), "{text}");
    assert!(broker.stop().success());
}

#[test]
fn a_stream_number_serves_once_in_its_session() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[]);
    let two = Request {
        streams: 2,
        ..request()
    };
    let (first, session) = broker.ask("t", &two).expect("welcome");
    let second = Request {
        session,
        stream: 1,
        ..two.clone()
    };
    let again = Request {
        session,
        ..two.clone()
    };
    let strange = Request {
        session: session ^ 1,
        ..second.clone()
    };
    for (refused, said) in [(&again, "opened before"), (&strange, "no session")] {
        let (code, text) = broker.ask("t", refused).err().unwrap();
        assert_eq!(code, Refusal::Session as u16);
        assert!(text.contains(said), "{text}");
    }
    let (_, text) = broker.ask("elsewhere", &second).err().unwrap();
    assert!(text.contains("another topic"), "{text}");
    let (peer, key) = broker.ask("t", &second).expect("welcome");
    assert_eq!(key, session);
    first.end();
    peer.end();
    assert!(broker.stop().success());
}

#[test]
fn a_registered_reader_holds_the_publisher_back_with_signs_of_life() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--topic", "t"]);
    let mut reader = Reader::open(&buffers.log("t"), Start::Oldest).unwrap();
    reader.register().unwrap();
    let mut peer = broker.open("t");
    peer.socket.set_write_timeout(Some(TIMEOUT)).unwrap();
    // Twice what the ring holds, while nobody reads.
    let mut sender = Peer {
        socket: peer.socket.try_clone().unwrap(),
        next: 0,
    };
    let sending = thread::spawn(move || (0..32).for_each(|n| sender.send(&[&[n; 16_000]])));
    loop {
        if let Parsed::Ack {
            blocked: true,
            committed,
        } = peer.reply()
        {
            assert!(committed < 32);
            break;
        }
    }
    let mut read = 0;
    eventually("the reader has all", || {
        while let Some(batch) = reader.next().unwrap() {
            batch.verify().unwrap();
            assert_eq!(batch.payload[4], read);
            read += 1;
        }
        read == 32
    });
    sending.join().unwrap();
    peer.next = 32;
    peer.end();
    assert!(broker.stop().success());
    assert!(
        buffers.report()["counters"]["waits_for_space"]
            .as_u64()
            .unwrap()
            > 0
    );
}

/// Reads what [`fill`] sends.
fn read_all(reader: &mut Reader) {
    let mut read = 0;
    eventually("the reader has all", || {
        while reader.next().unwrap().is_some() {
            read += 1;
        }
        read == 32
    });
}

/// A stream whose publisher sends twice the ring's size, in a thread of its own.
fn fill(broker: &Broker) -> (Peer, thread::JoinHandle<()>) {
    let peer = broker.open("t");
    let mut sender = Peer {
        socket: peer.socket.try_clone().unwrap(),
        next: 0,
    };
    let sending = thread::spawn(move || (0..32).for_each(|n| sender.send(&[&[n; 16_000]])));
    (Peer { next: 32, ..peer }, sending)
}

#[test]
fn a_reader_that_stops_is_reported_and_waited_for() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--topic", "t", "--reader-timeout", "0.1"]);
    let mut reader = Reader::open(&buffers.log("t"), Start::Oldest).unwrap();
    reader.register().unwrap();
    let (peer, sending) = fill(&broker);
    eventually("the reader is reported", || {
        buffers.ask(&broker)["counters"]["readers_stalled"] == 1
    });
    let figures = buffers.ask(&broker);
    let seen = &figures["topics"][0]["registered"][0];
    assert_eq!(seen["process"], std::process::id());
    assert_eq!(seen["holds_up"], true);
    assert!(seen["unread_bytes"].as_u64().unwrap() > 100_000);
    read_all(&mut reader);
    sending.join().unwrap();
    peer.end();
    assert!(broker.stop().success());
    assert_eq!(buffers.report()["counters"]["readers_evicted"], 0);
}

#[test]
fn a_reader_that_stops_is_evicted_if_asked_for_and_told() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[
        "--topic",
        "t",
        "--reader-timeout",
        "0.1",
        "--reader-timeout-action",
        "evict",
    ]);
    let mut reader = Reader::open(&buffers.log("t"), Start::Oldest).unwrap();
    reader.register().unwrap();
    let (peer, sending) = fill(&broker);
    sending.join().unwrap();
    peer.end();
    assert_eq!(reader.next().unwrap_err(), ReadError::Evicted);
    assert!(matches!(reader.next(), Err(ReadError::Lapped { .. })));
    assert!(broker.stop().success());
    let report = buffers.report();
    assert_eq!(report["counters"]["readers_evicted"], 1);
    assert_eq!(report["topics"][0]["messages"], 32);
}

#[test]
fn a_registry_that_is_deleted_alone_is_told() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--topic", "t"]);
    let mut reader = Reader::open(&buffers.log("t"), Start::Oldest).unwrap();
    reader.register().unwrap();
    std::fs::remove_file(buffers.log("t").with_extension("readers")).unwrap();
    eventually("it is noticed", || {
        buffers.ask(&broker)["counters"]["registries_lost"] == 1
    });
    // Who registered before is waited for all the same.
    let (peer, sending) = fill(&broker);
    eventually("the log is full", || {
        buffers.ask(&broker)["topics"][0]["registered"][0]["holds_up"] == true
    });
    read_all(&mut reader);
    sending.join().unwrap();
    peer.end();
    assert!(broker.stop().success());
    let counters = &buffers.report()["counters"];
    assert_eq!(counters["registries_lost"], 1);
    assert_eq!(counters["logs_lost"], 0);
}

#[test]
fn streams_of_a_deleted_log_end_and_the_next_ones_get_a_new_log() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--topic", "t"]);
    let mut peer = broker.open("t");
    peer.send(&[b"lost"]);
    peer.acked();
    let away = buffers.0.path().join("away");
    for lose in [&|| std::fs::remove_file(buffers.log("t")).unwrap(), &|| {
        std::fs::rename(buffers.log("t"), &away).unwrap()
    }] as [&dyn Fn(); 2]
    {
        lose();
        let (code, text) = peer.fault();
        assert_eq!(code, Fault::LogLost as u16, "{text}");
        assert!(text.contains("was deleted, moved or replaced"), "{text}");
        // The broker recreates its own topic without a request.
        eventually("there is a new log", || buffers.log("t").exists());
        peer = broker.open("t");
        peer.send(&[b"kept"]);
        peer.acked();
        assert_eq!(buffers.messages("t"), [b"kept"]);
    }
    peer.end();
    assert!(broker.stop().success());
    assert_eq!(buffers.report()["counters"]["logs_lost"], 2);
}

#[test]
fn a_truncated_log_is_renamed_and_its_topic_gets_a_new_one() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--topic", "t"]);
    let lost = buffers.log("t").with_extension("log.lost");
    for bytes in [4096, 0] {
        let mut peer = broker.open("t");
        peer.send(&[b"lost"]);
        peer.acked();
        // A stream in use could access a missing part before the broker notices.
        peer.end();
        let file = std::fs::File::options().write(true).open(buffers.log("t"));
        file.unwrap().set_len(bytes).unwrap();
        eventually("the truncated log is renamed", || {
            lost.metadata().is_ok_and(|about| about.len() == bytes)
        });
        eventually("there is a new log", || buffers.log("t").exists());
        let mut peer = broker.open("t");
        peer.send(&[b"kept"]);
        peer.acked();
        assert_eq!(buffers.messages("t"), [b"kept"]);
        peer.end();
    }
    assert!(broker.stop().success());
    assert_eq!(buffers.report()["counters"]["logs_lost"], 2);
}

#[test]
fn streams_of_a_deleted_log_go_on_in_a_new_one_if_asked_for() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--create-topics", "any", "--on-deleted-log", "recreate"]);
    let (mut peer, session) = broker.ask("t", &request()).unwrap();
    peer.send(&[b"lost"]);
    peer.acked();
    std::fs::remove_file(buffers.log("t")).unwrap();
    let (code, text) = peer.fault();
    assert_eq!(code, Fault::Shutdown as u16, "{text}");
    assert!(text.contains("are lost"), "{text}");
    let resume = Request {
        session,
        resume_from: Some(1),
        ..request()
    };
    let mut again = None;
    eventually("its publisher may go on", || {
        again = broker.ask("t", &resume).ok();
        again.is_some()
    });
    let (mut peer, _) = again.unwrap();
    peer.next = 1;
    peer.send(&[b"kept"]);
    peer.acked();
    peer.end();
    assert_eq!(buffers.messages("t"), [b"kept"]);
    assert!(broker.stop().success());
}

#[test]
fn whoever_asks_a_running_broker_is_told_what_it_waits_for() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--topic", "t"]);
    let socket = buffers.socket(&broker);
    let ask = || buffers.ask(&broker);
    let idle = ask();
    assert_eq!(idle["kind"], "broker-live");
    assert_eq!(idle["pid"], broker.child.id());
    assert_eq!(idle["workers"][0]["batches"], 0);
    assert_eq!(idle["topics"][0]["readers"], 0);

    let mut reader = Reader::open(&buffers.log("t"), Start::Oldest).unwrap();
    reader.register().unwrap();
    let peer = broker.open("t");
    let mut sender = Peer {
        socket: peer.socket.try_clone().unwrap(),
        next: 0,
    };
    // Ends when the broker does, for nobody reads.
    let sending = thread::spawn(move || {
        while sender
            .socket
            .write_all(&frame(sender.next, &[&[1; 16_000]]))
            .is_ok()
        {
            sender.next += 1;
        }
    });
    eventually("a connection waits for room", || {
        ask()["workers"][0]["blocked"] == 1
    });
    let full = ask();
    assert_eq!(full["workers"][0]["connections"], 1);
    assert_eq!(full["topics"][0]["readers"], 1);
    let unread = full["topics"][0]["unread_bytes"].as_u64().unwrap();
    assert!(unread > full["topics"][0]["ring_bytes"].as_u64().unwrap() / 2);
    assert!(full["workers"][0]["batches"].as_u64().unwrap() > 0);
    assert!(broker.stop().success());
    sending.join().unwrap();
    assert!(!socket.exists());
}

#[test]
fn a_broker_that_cannot_have_a_socket_for_figures_serves_all_the_same() {
    let above = tempfile::tempdir().unwrap();
    // Longer than a socket's address may be.
    let long = above.path().join("x".repeat(120));
    std::fs::create_dir(&long).unwrap();
    let buffers = Buffers(tempfile::tempdir_in(long).unwrap());
    let broker = buffers.start(&["--topic", "t"]);
    let mut peer = broker.open("t");
    peer.send(&[b"m"]);
    peer.acked();
    peer.end();
    assert!(broker.stop().success());
}

#[test]
fn what_was_acked_survives_kill_9_and_the_next_broker_goes_on() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[]);
    let mut peer = broker.open("t");
    for n in 0..10 {
        peer.send(&[format!("acked {n}").as_bytes()]);
    }
    peer.acked();
    let cut = frame(10, &[&[9; 20_000]]);
    peer.socket.write_all(&cut[..5000]).unwrap();
    broker.kill();
    let mut wanted: Vec<_> = (0..10).map(|n| format!("acked {n}").into_bytes()).collect();
    assert_eq!(buffers.messages("t"), wanted);

    let broker = buffers.start(&[]);
    let mut peer = broker.open("t");
    peer.send(&[b"after"]);
    peer.end();
    assert!(broker.stop().success());
    wanted.push(b"after".to_vec());
    assert_eq!(buffers.messages("t"), wanted);
}

#[test]
fn a_second_broker_on_the_same_log_or_port_is_refused() {
    let buffers = Buffers::new();
    let broker = buffers.start(&["--topic", "t"]);
    let said = buffers.refusal(&["--topic", "t"]);
    assert!(said.contains("t.log"), "{said}");
    let said = buffers.refusal(&["--listen", &broker.address.to_string()]);
    assert!(said.contains("another program has the port"), "{said}");
    broker.open("t").end();
    assert!(broker.stop().success());
}

#[test]
fn streams_are_told_when_the_broker_ends() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[]);
    let mut peer = broker.open("t");
    peer.send(&[b"in"]);
    peer.acked();
    assert!(broker.stop().success());
    let (code, _) = peer.fault();
    assert_eq!(code, Fault::Shutdown as u16);
    assert_eq!(buffers.messages("t"), [b"in"]);
}

#[test]
fn strangers_get_no_answer() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[]);
    let mut socket = broker.connect();
    socket.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut said = Vec::new();
    match socket.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    assert!(said.is_empty());
    assert!(broker.stop().success());
    assert_eq!(buffers.report()["counters"]["garbage"], 1);
}

#[test]
fn a_log_that_is_shortened_under_the_broker_is_told_with_its_name() {
    let buffers = Buffers::new();
    let mut broker = buffers.start(&["--topic", "t"]);
    let mut peer = broker.open("t");
    peer.send(&[b"m"]);
    peer.acked();
    let log = std::fs::File::options()
        .write(true)
        .open(buffers.log("t"))
        .unwrap();
    log.set_len(0).unwrap();
    // Whatever it does with it now; nothing is acked any more.
    let _ = peer.socket.write_all(&frame(peer.next, &[b"m"]));
    let status = broker.child.wait().unwrap();
    assert_eq!(status.code(), Some(1), "{status}");
}
