//! The bytes of every frame and packet: `golden/frames.txt` has one of each.
//!
//! `UPDATE_GOLDEN=1 cargo test -p penstock-wire --test golden` writes the file anew. If it changes, so does the
//! protocol, and old peers no longer understand new ones: raise `VERSION`, and edit docs/protocol.md.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use penstock_wire::auth_handshake::{
    AuthInit, AuthResponse, KEY_ID_LEN, NOISE_LEN, Preamble, SealedHello, SealedWelcome,
};
use penstock_wire::batch::{self, Header};
use penstock_wire::delivery::{self, Delivery, DeliveryHeader, RequestFrame, StartAt};
use penstock_wire::handshake::{
    self, AckLevel, DatagramOffer, Hello, Offer, OrderLevel, Purpose, Refusal, Request,
    WELCOME_LEN, Welcome,
};
use penstock_wire::message;
use penstock_wire::packet::{BatchInfo, Chunk, Data, Feedback, MAX_ACK_LEN, Pause, StreamKey};
use penstock_wire::reply::{Fault, Reply};
use zerocopy::IntoBytes;

const STREAM: StreamKey = StreamKey {
    key: 0x0123_4567_89ab_cdef,
    stream: 3,
};

fn request(path: handshake::Path) -> Request {
    Request {
        session: 0x1122_3344_5566_7788,
        stream: 3,
        streams: 4,
        ack: AckLevel::Committed,
        order: OrderLevel::PerStream,
        max_payload: 61_440,
        path,
        resume_from: (path == handshake::Path::Tcp).then_some(9),
        max_datagram: if path == handshake::Path::Xdp {
            1472
        } else {
            0
        },
    }
}

fn offer(datagrams: Option<DatagramOffer>) -> Offer {
    Offer {
        session: 0x1122_3344_5566_7788,
        max_payload: 1 << 20,
        committed: 9,
        datagrams,
    }
}

fn payload() -> Vec<u8> {
    let mut payload = Vec::new();
    message::append(&mut payload, b"one");
    message::append(&mut payload, b"four");
    payload
}

fn handshake_frames() -> Vec<(&'static str, Vec<u8>)> {
    let datagrams = DatagramOffer {
        key: STREAM.key,
        credit: 65_536,
        max_datagram: 1472,
    };
    let publish = Purpose::Publish(request(handshake::Path::Xdp));
    let sealed = SealedHello::new(&publish, "trades", true).unwrap();
    let of = |path| {
        Hello::new(&request(path), "trades".len())
            .as_bytes()
            .to_vec()
    };
    vec![
        ("hello, tcp", of(handshake::Path::Tcp)),
        ("hello, xdp", of(handshake::Path::Xdp)),
        (
            "welcome, tcp",
            Welcome::accept(offer(None)).as_bytes().to_vec(),
        ),
        (
            "welcome, xdp",
            Welcome::accept(offer(Some(datagrams))).as_bytes().to_vec(),
        ),
        ("refusal", Welcome::refuse(Refusal::Busy, "try again")),
        (
            "auth init",
            AuthInit::new(Preamble::new([7; KEY_ID_LEN]), [8; NOISE_LEN])
                .as_bytes()
                .to_vec(),
        ),
        (
            "auth response",
            AuthResponse::new([9; NOISE_LEN]).as_bytes().to_vec(),
        ),
        ("sealed hello, opened", sealed.as_bytes().to_vec()),
        (
            "sealed welcome, opened",
            SealedWelcome::new([5; WELCOME_LEN]).as_bytes().to_vec(),
        ),
    ]
}

fn tcp_frames() -> Vec<(&'static str, Vec<u8>)> {
    let payload = payload();
    let sum = batch::payload_checksum(&payload);
    let header = Header::for_batch(9, 2, payload.len() as u32, sum);
    vec![
        ("batch", [header.as_bytes(), &payload].concat()),
        ("end", Header::for_end(10).as_bytes().to_vec()),
        ("ack", Reply::ack(10, false).as_bytes().to_vec()),
        ("ack, blocked", Reply::ack(10, true).as_bytes().to_vec()),
        (
            "error",
            Reply::error(Fault::Shutdown, 10, "the broker is shutting down"),
        ),
    ]
}

fn delivery_frames() -> Vec<(&'static str, Vec<u8>)> {
    let payload = payload();
    let start = delivery::Start {
        at: StartAt::Index(41),
        is_registered: true,
        credit: 1 << 20,
    };
    let progress = delivery::Progress {
        needed_from: 42,
        credit: 1 << 21,
    };
    let batch = delivery::BatchInfo {
        index: 41,
        session: 0x1122_3344_5566_7788,
        stream: 3,
        batch_seq: 9,
        messages: 2,
        payload_len: payload.len() as u32,
        checksum: batch::checksum(9, 2, &payload),
        arrival_unix_ns: 1_700_000_000_000_000_000,
    };
    let lost = Delivery::Lost {
        next: 50,
        batches: 9,
        messages: 18,
    };
    let request = |request| RequestFrame::new(&request).as_bytes().to_vec();
    let of = |delivery| DeliveryHeader::new(&delivery).as_bytes().to_vec();
    vec![
        (
            "hello, subscribe",
            Hello::for_subscriber("trades".len()).as_bytes().to_vec(),
        ),
        ("start", request(delivery::Request::Start(start))),
        ("progress", request(delivery::Request::Progress(progress))),
        (
            "delivered batch",
            [of(Delivery::Batch(batch)), payload].concat(),
        ),
        ("lost", of(lost)),
        ("damaged", of(Delivery::Damaged { index: 41 })),
        ("caught up", of(Delivery::CaughtUp { next: 42 })),
        ("evicted", of(Delivery::Evicted)),
        (
            "delivery error",
            DeliveryHeader::error(Fault::Shutdown, "the broker is shutting down"),
        ),
    ]
}

fn packets() -> Vec<(&'static str, Vec<u8>)> {
    let payload = payload();
    let chunk = Chunk {
        batch: BatchInfo {
            seq: 9,
            len: payload.len() as u32,
            messages: 2,
            checksum: batch::checksum(9, 2, &payload),
        },
        offset: 0,
    };
    let of = |header: Data, rest: &[u8]| [header.as_bytes(), rest].concat();
    let paused = Some(Pause::Idle);
    let sealed = Data::to_be_sealed(STREAM, 5, Some(&chunk), None, payload.len() as u16);
    let mut feedback = Feedback::new(STREAM);
    feedback.received.extend([(8, 9), (2, 5), (0, 0)]);
    (feedback.delay_us, feedback.committed, feedback.credit) = (250, 9, 1 << 20);
    feedback.blocked = true;
    let mut ack = [0; MAX_ACK_LEN];
    let len = feedback.write(&mut ack);
    vec![
        (
            "data",
            of(Data::payload(STREAM, 5, &chunk, None, &payload), &payload),
        ),
        (
            "data, first after a pause",
            of(Data::payload(STREAM, 5, &chunk, paused, &payload), &payload),
        ),
        ("data, before it is sealed", of(sealed, &payload)),
        ("ping", of(Data::ping(STREAM, 6, &[0; 8]), &[0; 8])),
        ("ack packet", ack[..len].to_vec()),
    ]
}

#[test]
fn golden_frames_are_written_byte_for_byte() {
    let mut now = String::new();
    let frames = [
        handshake_frames(),
        tcp_frames(),
        packets(),
        delivery_frames(),
    ]
    .concat();
    for (name, bytes) in frames {
        writeln!(now, "{name} ({} bytes)", bytes.len()).unwrap();
        for line in bytes.chunks(32) {
            let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(now, "  {hex}").unwrap();
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/frames.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &now).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap();
    assert_eq!(now, golden, "{} has changed", path.display());
}
