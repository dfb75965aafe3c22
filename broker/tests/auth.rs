//! The program with keys: who gets in, who is told what, and whose session it is.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use penstock_auth::{Channel, Initiator, Key, PacketKeys, read_key};
use penstock_log::{Reader, Start};
use penstock_wire::auth_handshake::{
    AUTH_RESPONSE_LEN, AuthResponse, SEAL_LEN, SEALED_WELCOME_LEN, SealedHello, SealedWelcome,
};
use penstock_wire::batch::{Header, payload_checksum};
use penstock_wire::delivery::{
    self, DELIVERY_LEN, Delivery, DeliveryHeader, REQUEST_LEN, RequestFrame, StartAt,
};
use penstock_wire::handshake::{
    Answer, Hello, Offer, Purpose, Refusal, Request, WELCOME_LEN, Welcome,
};
use penstock_wire::message::{Messages, append};
use penstock_wire::packet::TAG_LEN;
use penstock_wire::reply::{self, Fault, Parsed, REPLY_LEN};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use common::request;

/// Longer than anything here takes; a test that waits for it has failed anyhow.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A broker with keys: `eu` may publish to `trades.*`, `us` to anything.
struct Broker {
    dir: TempDir,
    child: Child,
    address: SocketAddr,
}

type Refused = (u16, String);

fn broker(dir: &TempDir, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-broker"));
    command.args(["--ring-size", "256KiB", "--segment-size", "64KiB"]);
    command.arg("--buffer-dir").arg(dir.path().join("logs"));
    command.arg("--report").arg(dir.path().join("report.json"));
    command.args(flags).env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn keygen(dir: &TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(format!("{name}.key"));
    let mut command = broker(dir, &["--keygen"]);
    let output = command.arg(&path).output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("--auth-key"), "{said}");
    path
}

fn write_keys(dir: &TempDir, lines: &[String]) -> PathBuf {
    let path = dir.path().join("keys");
    fs::write(&path, lines.concat()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

fn line(dir: &TempDir, name: &str, topics: &str) -> String {
    let line = fs::read_to_string(dir.path().join(format!("{name}.key"))).unwrap();
    line.replace(" *\n", &format!(" {topics}\n"))
}

impl Broker {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        keygen(&dir, "eu");
        keygen(&dir, "us");
        let lines = [line(&dir, "eu", "trades.*"), line(&dir, "us", "*")];
        write_keys(&dir, &lines);
        Self::start_in(dir)
    }

    fn start_in(dir: TempDir) -> Self {
        Self::start_with(dir, &[])
    }

    fn start_with(dir: TempDir, more: &[&str]) -> Self {
        let keys = dir.path().join("keys");
        let flags = [
            "--listen",
            "127.0.0.1:0",
            "--auth-keys",
            keys.to_str().unwrap(),
        ];
        let mut child = broker(&dir, &[&flags, more].concat())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("penstock-broker ready on ");
        Self {
            address: address.expect("ready").parse().unwrap(),
            dir,
            child,
        }
    }

    fn restart(mut self) -> Self {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let dir = std::mem::replace(&mut self.dir, TempDir::new().unwrap());
        Self::start_in(dir)
    }

    fn key(&self, name: &str) -> Key {
        read_key(&self.dir.path().join(format!("{name}.key"))).unwrap()
    }

    fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: the child has not been waited for, so the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Ends it; returns its counters.
    fn stop(mut self) -> serde_json::Value {
        self.signal(libc::SIGTERM);
        assert!(self.child.wait().unwrap().success());
        let report = fs::read(self.dir.path().join("report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        report["counters"].clone()
    }

    fn connect(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket
    }

    /// Authenticates; returns the channel, or the refusal.
    fn authenticate(&self, key: &Key) -> Result<(TcpStream, Channel), Refused> {
        let mut socket = self.connect();
        let (publisher, init) = Initiator::start(key).unwrap();
        socket.write_all(init.as_bytes()).unwrap();
        let answer = read::<AUTH_RESPONSE_LEN>(&mut socket);
        match Welcome::read_from_bytes(&answer).unwrap().parse() {
            Ok(Answer::Refused { code, text_len }) => {
                let mut text = vec![0; text_len];
                socket.read_exact(&mut text).unwrap();
                Err((code, String::from_utf8(text).unwrap()))
            }
            Ok(Answer::Accepted(_)) => panic!("accepted without a question"),
            Err(_) => {
                let answer = AuthResponse::read_from_bytes(&answer).unwrap();
                Ok((socket, publisher.finish(&answer).unwrap()))
            }
        }
    }

    fn ask(
        &self,
        key: &Key,
        topic: &str,
        request: &Request,
    ) -> Result<(TcpStream, Offer), Refused> {
        let (socket, offer, _) = self.ask_for(key, topic, request, false)?;
        Ok((socket, offer))
    }

    /// Asks for a stream, with authenticated payload or without; returns the secret of it.
    fn ask_for(
        &self,
        key: &Key,
        topic: &str,
        request: &Request,
        packet_auth: bool,
    ) -> Result<(TcpStream, Offer, [u8; 32]), Refused> {
        self.open(key, topic, &Purpose::Publish(request.clone()), packet_auth)
    }

    /// Opens a connection for any purpose; returns the secret of its packets and frames.
    fn open(
        &self,
        key: &Key,
        topic: &str,
        purpose: &Purpose,
        packet_auth: bool,
    ) -> Result<(TcpStream, Offer, [u8; 32]), Refused> {
        let (mut socket, mut channel) = self.authenticate(key)?;
        let question = SealedHello::new(purpose, topic, packet_auth).unwrap();
        socket
            .write_all(&channel.seal(question.as_bytes()))
            .unwrap();
        let reply = channel
            .open(&read::<SEALED_WELCOME_LEN>(&mut socket))
            .unwrap();
        let reply = SealedWelcome::read_from_bytes(&reply).unwrap();
        match Welcome::read_from_bytes(&reply.welcome)
            .unwrap()
            .parse()
            .unwrap()
        {
            Answer::Accepted(offer) => Ok((socket, offer, reply.packets)),
            Answer::Refused { code, text_len } => {
                let mut text = vec![0; text_len + SEAL_LEN];
                socket.read_exact(&mut text).unwrap();
                let text = channel.open(&text).unwrap();
                Err((code, String::from_utf8(text).unwrap()))
            }
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // A test that failed leaves nothing running; otherwise it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read<const LEN: usize>(socket: &mut TcpStream) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    socket.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn only_holders_of_a_key_get_in_and_only_where_they_may() {
    let broker = Broker::start();
    let (eu, us) = (broker.key("eu"), broker.key("us"));
    broker.ask(&eu, "trades.eu", &request()).unwrap();
    broker.ask(&us, "audit", &request()).unwrap();
    let (code, said) = broker.ask(&eu, "audit", &request()).unwrap_err();
    assert_eq!(code, Refusal::Permission as u16);
    assert!(
        said.contains("key eu may not publish to topic \"audit\""),
        "{said}"
    );
    let (code, stranger) = broker.authenticate(&Key::new(&[9; 32])).unwrap_err();
    assert_eq!(code, Refusal::Authentication as u16);
    assert!(stranger.contains("does not accept the key"), "{stranger}");

    let mut socket = broker.connect();
    let hello = Hello::new(&request(), 5);
    socket
        .write_all(&[hello.as_bytes(), b"audit"].concat())
        .unwrap();
    let welcome = read::<WELCOME_LEN>(&mut socket);
    let Ok(Answer::Refused { code, .. }) = Welcome::read_from_bytes(&welcome).unwrap().parse()
    else {
        panic!("a publisher without a key got in")
    };
    assert_eq!(code, Refusal::Authentication as u16);
    let counters = broker.stop();
    assert_eq!(counters["streams_opened"], 2);
    assert_eq!(counters["streams_refused"], 3);
    assert_eq!(counters["unauthenticated"], 2);
    assert_eq!(counters["not_permitted"], 1);
}

#[test]
fn a_topic_that_a_key_may_not_publish_to_is_not_even_made() {
    let broker = Broker::start();
    broker
        .ask(&broker.key("eu"), "audit", &request())
        .unwrap_err();
    assert!(!broker.dir.path().join("logs/audit.log").exists());
}

#[test]
fn a_key_may_read_only_where_it_says_so() {
    let dir = TempDir::new().unwrap();
    keygen(&dir, "eu");
    let lines = [line(&dir, "eu", "trades.* read:trades.a")];
    write_keys(&dir, &lines);
    let broker = Broker::start_in(dir);
    let key = broker.key("eu");
    for topic in ["trades.a", "trades.b"] {
        broker.ask(&key, topic, &request()).unwrap();
    }
    let (code, text) = broker
        .open(&key, "trades.b", &Purpose::Subscribe, false)
        .unwrap_err();
    assert_eq!(code, Refusal::Permission as u16);
    assert!(text.contains("read:trades.b"), "{text}");
    // With tags on its frames and on what is delivered.
    let (mut socket, _, secret) = broker
        .open(&key, "trades.a", &Purpose::Subscribe, true)
        .unwrap();
    let keys = PacketKeys::new(&secret);
    let start = RequestFrame::new(&delivery::Request::Start(delivery::Start {
        at: StartAt::Oldest,
        is_registered: false,
        credit: 1 << 20,
    }));
    let tag = keys.seal_frame(0, &[start.as_bytes()]);
    socket
        .write_all(&[start.as_bytes(), &tag].concat())
        .unwrap();
    let header = read::<DELIVERY_LEN>(&mut socket);
    let tag = read::<TAG_LEN>(&mut socket);
    assert!(keys.verify_reply(0, &tag, &[&header]));
    let delivery = DeliveryHeader::read_from_bytes(&header).unwrap().parse(1);
    assert_eq!(delivery, Ok(Delivery::CaughtUp { next: 0 }));
    // A frame without a valid tag.
    socket.write_all(&[0; REQUEST_LEN + TAG_LEN]).unwrap();
    let header = read::<DELIVERY_LEN>(&mut socket);
    let delivery = DeliveryHeader::read_from_bytes(&header).unwrap().parse(1);
    let code = Fault::Authentication as u16;
    assert!(matches!(delivery, Ok(Delivery::Error { code: found, .. }) if found == code));
    let anonymous = Hello::for_subscriber("trades.a".len());
    let mut socket = broker.connect();
    socket
        .write_all(&[anonymous.as_bytes(), b"trades.a"].concat())
        .unwrap();
    let welcome = Welcome::read_from_bytes(&read::<WELCOME_LEN>(&mut socket)).unwrap();
    let code = Refusal::Authentication as u16;
    assert!(matches!(welcome.parse(), Ok(Answer::Refused { code: found, .. }) if found == code));
}

#[test]
fn a_recorded_opening_takes_nothing_over() {
    let broker = Broker::start();
    let key = broker.key("eu");
    let (publisher, init) = Initiator::start(&key).unwrap();
    let mut socket = broker.connect();
    socket.write_all(init.as_bytes()).unwrap();
    let answer = read::<AUTH_RESPONSE_LEN>(&mut socket);
    let mut channel = publisher
        .finish(&AuthResponse::read_from_bytes(&answer).unwrap())
        .unwrap();
    let question = channel.seal(
        SealedHello::new(&Purpose::Publish(request()), "trades.a", false)
            .unwrap()
            .as_bytes(),
    );
    socket.write_all(&question).unwrap();
    channel
        .open(&read::<SEALED_WELCOME_LEN>(&mut socket))
        .unwrap();

    let mut again = broker.connect();
    again.write_all(init.as_bytes()).unwrap();
    read::<AUTH_RESPONSE_LEN>(&mut again);
    again.write_all(&question).unwrap();
    let welcome = read::<WELCOME_LEN>(&mut again);
    let answer = Welcome::read_from_bytes(&welcome).unwrap().parse().unwrap();
    assert!(
        matches!(answer, Answer::Refused { code, .. } if code == Refusal::Authentication as u16),
        "{answer:?}"
    );
    // The stream that was recorded goes on.
    socket.set_nonblocking(true).unwrap();
    let read = socket.read(&mut [0]).unwrap_err();
    assert_eq!(read.kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(broker.stop()["streams_opened"], 1);
}

#[test]
fn a_session_is_taken_up_by_its_key_only_also_after_kill_9() {
    let broker = Broker::start();
    let (socket, offer) = broker
        .ask(&broker.key("eu"), "trades.a", &request())
        .unwrap();
    let resume = Request {
        session: offer.session,
        resume_from: Some(0),
        ..request()
    };
    let steal = |broker: &Broker| {
        let (code, said) = broker
            .ask(&broker.key("us"), "trades.a", &resume)
            .unwrap_err();
        assert_eq!(code, Refusal::Session as u16, "{said}");
    };
    steal(&broker);
    drop(socket);
    let broker = broker.restart();
    steal(&broker);
    let (_socket, back) = broker.ask(&broker.key("eu"), "trades.a", &resume).unwrap();
    assert_eq!(back.session, offer.session);
}

#[test]
fn keys_are_read_again_on_sighup() {
    let broker = Broker::start();
    let (eu, us) = (broker.key("eu"), broker.key("us"));
    // Wrong: what was read before stays.
    fs::write(broker.dir.path().join("keys"), "nonsense").unwrap();
    broker.signal(libc::SIGHUP);
    broker.ask(&eu, "trades.a", &request()).unwrap();
    write_keys(&broker.dir, &[line(&broker.dir, "us", "audit")]);
    broker.signal(libc::SIGHUP);
    let start = Instant::now();
    while broker.authenticate(&eu).is_ok() {
        assert!(start.elapsed() < TIMEOUT, "the key is taken for ever");
        std::thread::sleep(Duration::from_millis(10));
    }
    broker.ask(&us, "audit", &request()).unwrap();
    let (code, _) = broker.ask(&us, "trades.a", &request()).unwrap_err();
    assert_eq!(code, Refusal::Permission as u16);
}

/// The publisher's end of a stream whose frames carry tags.
struct Sealed {
    socket: TcpStream,
    keys: PacketKeys,
    frames: u64,
    replies: u64,
}

impl Sealed {
    fn open(broker: &Broker, packet_auth: bool) -> Self {
        let key = broker.key("us");
        let asked = broker.ask_for(&key, "t", &request(), packet_auth);
        let (socket, _, secret) = asked.unwrap();
        assert_ne!(secret, [0; 32]);
        Self {
            socket,
            keys: PacketKeys::new(&secret),
            frames: 0,
            replies: 0,
        }
    }

    /// The bytes of the next frame.
    fn frame(&mut self, header: Header, payload: &[u8]) -> Vec<u8> {
        let tag = self
            .keys
            .seal_frame(self.frames, &[header.as_bytes(), payload]);
        self.frames += 1;
        [header.as_bytes(), &tag, payload].concat()
    }

    fn batch(&mut self, seq: u64, message: &[u8]) -> Vec<u8> {
        let (header, payload) = batch(seq, message);
        self.frame(header, &payload)
    }

    fn reply(&mut self) -> (Parsed, String) {
        let head = read::<REPLY_LEN>(&mut self.socket);
        let tag = read::<TAG_LEN>(&mut self.socket);
        let parsed = reply::Reply::read_from_bytes(&head)
            .unwrap()
            .parse()
            .unwrap();
        let mut text = Vec::new();
        if let Parsed::Error { text_len, .. } = parsed {
            text.resize(text_len, 0);
            self.socket.read_exact(&mut text).unwrap();
        }
        assert!(self.keys.verify_reply(self.replies, &tag, &[&head, &text]));
        self.replies += 1;
        (parsed, String::from_utf8(text).unwrap())
    }
}

fn batch(seq: u64, message: &[u8]) -> (Header, Vec<u8>) {
    let mut payload = Vec::new();
    append(&mut payload, message);
    let sum = payload_checksum(&payload);
    (
        Header::for_batch(seq, 1, payload.len() as u32, sum),
        payload,
    )
}

fn messages(broker: &Broker) -> Vec<Vec<u8>> {
    let mut reader = Reader::open(&broker.dir.path().join("logs/t.log"), Start::Oldest).unwrap();
    let mut messages = Vec::new();
    while let Some(batch) = reader.next().unwrap() {
        messages.extend(Messages::new(batch.payload).map(|m| m.unwrap().to_vec()));
    }
    messages
}

/// Byte by byte and whole, the stream gets through, and what carries no tag of its own place does not.
#[test]
fn with_packet_auth_nobody_on_the_way_changes_a_stream_over_tcp() {
    let broker = Broker::start();
    let mut honest = Sealed::open(&broker, true);
    let mut bytes = honest.batch(0, b"pay alice 1");
    bytes.extend(honest.batch(1, b"pay bob 2"));
    for byte in &bytes {
        honest.socket.write_all(&[*byte]).unwrap();
    }
    let end = honest.frame(Header::for_end(2), &[]);
    honest.socket.write_all(&end).unwrap();
    loop {
        match honest.reply().0 {
            Parsed::Ack { committed: 2, .. } => break,
            Parsed::Ack { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    let (forged, payload) = batch(0, b"pay mallory 1");
    type Change = fn(&mut Sealed, Header, &[u8]) -> Vec<u8>;
    let changes: [(&str, Change); 5] = [
        ("checksums and all", |sealed, header, payload| {
            let good = sealed.batch(0, b"pay alice 1");
            let tag = &good[header.as_bytes().len()..][..TAG_LEN];
            [header.as_bytes(), tag, payload].concat()
        }),
        ("without a tag", |_, header, payload| {
            [header.as_bytes(), payload, &[0; 100]].concat()
        }),
        ("of another connection", |sealed, header, payload| {
            let tag = PacketKeys::new(&[9; 32]).seal_frame(sealed.frames, &[payload]);
            [header.as_bytes(), &tag, payload].concat()
        }),
        ("one left out", |sealed, _, _| {
            sealed.frames += 1;
            sealed.batch(0, b"pay alice 1")
        }),
        ("ended too early", |sealed, _, _| {
            let tag = sealed.keys.seal_frame(1, &[]);
            [Header::for_end(0).as_bytes(), &tag].concat()
        }),
    ];
    for (what, change) in changes {
        let mut sealed = Sealed::open(&broker, true);
        let bytes = change(&mut sealed, forged, &payload);
        sealed.socket.write_all(&bytes).unwrap();
        let (parsed, text) = sealed.reply();
        let wanted = Fault::Authentication as u16;
        assert!(
            matches!(parsed, Parsed::Error { code, committed: 0, .. } if code == wanted),
            "{what}: {parsed:?} {text}"
        );
        assert!(text.contains("changed on the path"), "{what}: {text}");
    }
    assert_eq!(messages(&broker), [b"pay alice 1".as_slice(), b"pay bob 2"]);
    assert_eq!(broker.stop()["forged"], 5);
}

#[test]
fn a_broker_with_packet_auth_takes_nothing_without_over_tcp() {
    let dir = TempDir::new().unwrap();
    keygen(&dir, "us");
    write_keys(&dir, &[line(&dir, "us", "*")]);
    let broker = Broker::start_with(dir, &["--packet-auth"]);
    // The publisher did not ask for it; the broker gives the secret, and wants tags.
    let mut plain = Sealed::open(&broker, false);
    let (header, payload) = batch(0, b"pay mallory 1");
    let bytes = [header.as_bytes(), &payload, &[0; 100]].concat();
    plain.socket.write_all(&bytes).unwrap();
    let (parsed, text) = plain.reply();
    assert!(matches!(parsed, Parsed::Error { code: 5, .. }), "{text}");
    let mut sealed = Sealed::open(&broker, false);
    let bytes = sealed.batch(0, b"pay alice 1");
    sealed.socket.write_all(&bytes).unwrap();
    assert!(matches!(sealed.reply().0, Parsed::Ack { committed: 1, .. }));
    assert_eq!(messages(&broker), [b"pay alice 1"]);
}

#[test]
fn a_file_of_keys_that_others_can_read_is_no_start() {
    let dir = TempDir::new().unwrap();
    keygen(&dir, "eu");
    let keys = write_keys(&dir, &[line(&dir, "eu", "*")]);
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o644)).unwrap();
    let mut command = broker(&dir, &["--listen", "127.0.0.1:0", "--auth-keys"]);
    let output = command.arg(&keys).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains(&format!("chmod 600 {}", keys.display())),
        "{said}"
    );
    let again = dir.path().join("eu.key");
    let mut command = broker(&dir, &["--keygen"]);
    let output = command.arg(&again).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "a key was written over");
}
