//! Remote subscribers: what the broker delivers, to whom, and what it takes from them.

use penstock_wire::delivery::{
    BatchInfo, DELIVERY_LEN, Delivery, DeliveryHeader, Progress, Request as SubscriberRequest,
    RequestFrame, Start as StartFrame, StartAt,
};

use super::*;

/// Credit that no test uses up.
const PLENTY: u64 = 1 << 40;
const ANYONE: [&str; 2] = ["--remote-subscribers", "any"];
/// So that publishers wait for anyone.
const REGISTERING: [&str; 4] = [
    "--remote-subscribers",
    "any",
    "--remote-registration",
    "any",
];
/// Payload of a batch that goes out from the log's file.
const LARGE: usize = 20 << 10;

/// The subscriber's end of a connection.
struct Subscriber {
    socket: TcpStream,
    max_payload: u32,
}

/// A delivery with its payload or text.
type Delivered = (Delivery, Vec<u8>);

impl Broker {
    /// A connection that has been admitted, before its first frame.
    fn admit(&self, topic: &str) -> Result<Subscriber, (u16, String)> {
        let mut socket = self.connect();
        let hello = Hello::for_subscriber(topic.len());
        socket
            .write_all(&[hello.as_bytes(), topic.as_bytes()].concat())
            .unwrap();
        let mut welcome = [0; WELCOME_LEN];
        socket.read_exact(&mut welcome).unwrap();
        match Welcome::read_from_bytes(&welcome).unwrap().parse().unwrap() {
            Answer::Accepted(offer) => Ok(Subscriber {
                socket,
                max_payload: offer.max_payload,
            }),
            Answer::Refused { code, text_len } => {
                let mut text = vec![0; text_len];
                socket.read_exact(&mut text).unwrap();
                Err((code, String::from_utf8(text).unwrap()))
            }
        }
    }

    fn subscribe(&self, topic: &str, at: StartAt, is_registered: bool, credit: u64) -> Subscriber {
        let mut subscriber = self.admit(topic).expect("admitted");
        subscriber.request(SubscriberRequest::Start(StartFrame {
            at,
            is_registered,
            credit,
        }));
        subscriber
    }
}

impl Subscriber {
    fn request(&mut self, request: SubscriberRequest) {
        self.socket
            .write_all(RequestFrame::new(&request).as_bytes())
            .unwrap();
    }

    fn progress(&mut self, needed_from: u64, credit: u64) {
        let progress = Progress {
            needed_from,
            credit,
        };
        self.request(SubscriberRequest::Progress(progress));
    }

    fn next(&mut self) -> Delivered {
        let mut header = [0; DELIVERY_LEN];
        self.socket.read_exact(&mut header).unwrap();
        let header = DeliveryHeader::read_from_bytes(&header).unwrap();
        let delivery = header.parse(self.max_payload).unwrap();
        let len = match delivery {
            Delivery::Batch(batch) => batch.payload_len as usize,
            Delivery::Error { text_len, .. } => text_len,
            _ => 0,
        };
        let mut body = vec![0; len];
        self.socket.read_exact(&mut body).unwrap();
        (delivery, body)
    }

    /// The next batch, checked; signs of life are passed over.
    fn batch(&mut self) -> (BatchInfo, Vec<u8>) {
        loop {
            match self.next() {
                (Delivery::Batch(batch), payload) => {
                    let sum =
                        penstock_wire::batch::checksum(batch.batch_seq, batch.messages, &payload);
                    assert_eq!(sum, batch.checksum);
                    return (batch, payload);
                }
                (Delivery::CaughtUp { .. }, _) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The fault with which the broker ends the connection, and its words.
    fn fault(&mut self) -> (u16, String) {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < TIMEOUT, "the connection goes on");
            if let (Delivery::Error { code, .. }, text) = self.next() {
                let rest = self.socket.read(&mut [0]).unwrap();
                assert_eq!(rest, 0, "the connection is closed");
                return (code, String::from_utf8(text).unwrap());
            }
        }
    }

    fn caught_up(&mut self) -> u64 {
        match self.next().0 {
            Delivery::CaughtUp { next } => next,
            other => panic!("{other:?}"),
        }
    }
}

fn only_message(payload: &[u8]) -> Vec<u8> {
    let messages: Vec<_> = Messages::new(payload)
        .map(|m| m.unwrap().to_vec())
        .collect();
    let [message] = &messages[..] else {
        panic!("{} messages", messages.len())
    };
    message.clone()
}

#[test]
fn batches_are_delivered_as_they_were_published() {
    let buffers = Buffers::new();
    let broker = buffers.start(&ANYONE);
    let mut peer = broker.open("t");
    let large = vec![7; LARGE];
    peer.send(&[b"small"]);
    peer.send(&[&large]);
    peer.acked();
    let mut subscriber = broker.subscribe("t", StartAt::Oldest, false, PLENTY);
    let expected = |subscriber: &mut Subscriber, index: u64, message: &[u8]| {
        let (batch, payload) = subscriber.batch();
        assert_eq!((batch.index, batch.batch_seq), (index, index));
        assert_eq!(only_message(&payload), message);
    };
    expected(&mut subscriber, 0, b"small");
    expected(&mut subscriber, 1, &large);
    assert_eq!(subscriber.caught_up(), 2);
    // What comes later is delivered without a request.
    for index in 2..20 {
        peer.send(&[if index % 2 == 0 { &large[..] } else { b"small" }]);
        let message = if index % 2 == 0 { &large[..] } else { b"small" };
        expected(&mut subscriber, index, message);
    }
    // A second one, and signs of life.
    let mut other = broker.subscribe("t", StartAt::Index(19), false, PLENTY);
    assert_eq!(other.batch().0.index, 19);
    assert_eq!((other.caught_up(), other.caught_up()), (20, 20));
    peer.end();
    let figures = &buffers.ask(&broker)["subscribers"];
    assert_eq!(figures["connected"], 2);
    assert!(figures["sent_from_file"].as_u64() > Some(0), "{figures}");
    drop((subscriber, other));
    eventually("both have ended", || {
        buffers.ask(&broker)["subscribers"]["connected"] == 0
    });
    assert!(broker.stop().success());
    assert_eq!(buffers.report()["subscribers"]["batches"], 21);
}

#[test]
fn a_subscriber_starts_where_it_says() {
    let buffers = Buffers::new();
    let broker = buffers.start(&ANYONE);
    let mut peer = broker.open("t");
    (0..3).for_each(|_| peer.send(&[b"early"]));
    peer.acked();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap().as_nanos() as u64;
    peer.send(&[b"late"]);
    peer.acked();
    let first = |at| broker.subscribe("t", at, false, PLENTY).next().0;
    let index_of = |delivery| match delivery {
        Delivery::Batch(batch) => batch.index,
        other => panic!("{other:?}"),
    };
    assert_eq!(index_of(first(StartAt::Oldest)), 0);
    assert_eq!(index_of(first(StartAt::Index(2))), 2);
    assert_eq!(index_of(first(StartAt::Time(now))), 3);
    assert_eq!(first(StartAt::End), Delivery::CaughtUp { next: 4 });
    let (code, text) = broker
        .subscribe("t", StartAt::Index(5), false, PLENTY)
        .fault();
    assert_eq!(code, Fault::LogLost as u16);
    assert!(text.contains("has 4 batches"), "{text}");
}

#[test]
fn nothing_is_sent_beyond_the_credit() {
    let buffers = Buffers::new();
    let broker = buffers.start(&ANYONE);
    let mut peer = broker.open("t");
    (0..4).for_each(|_| peer.send(&[&[1; LARGE]]));
    peer.acked();
    let size = (DELIVERY_LEN + LARGE + 4) as u64;
    let mut subscriber = broker.subscribe("t", StartAt::Oldest, false, 1);
    assert_eq!(subscriber.batch().0.index, 0);
    // Two more may begin; a probe for one byte shows that nothing else came.
    subscriber.progress(0, 2 * size + 1);
    assert_eq!(subscriber.batch().0.index, 1);
    assert_eq!(subscriber.batch().0.index, 2);
    let quiet = Duration::from_millis(100);
    subscriber.socket.set_read_timeout(Some(quiet)).unwrap();
    let error = subscriber.socket.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    subscriber.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    subscriber.progress(0, PLENTY);
    assert_eq!(subscriber.batch().0.index, 3);
    assert_eq!(subscriber.caught_up(), 4);
}

#[test]
fn a_registered_subscriber_is_waited_for_and_another_learns_what_it_missed() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[&REGISTERING[..], &["--full", "block"]].concat());
    let mut peer = broker.open("t");
    peer.send(&[&[0; LARGE]]);
    peer.acked();
    let mut registered = broker.subscribe("t", StartAt::Oldest, true, PLENTY);
    let mut unregistered = broker.subscribe("t", StartAt::Oldest, false, 1);
    assert_eq!(registered.batch().0.index, 0);
    assert_eq!(unregistered.batch().0.index, 0);
    // More than the ring holds: the broker cannot take all before it is released.
    let total = 40;
    let sender = thread::spawn(move || {
        (1..total).for_each(|_| peer.send(&[&[0; LARGE]]));
        peer.acked();
        peer
    });
    let waits = || buffers.ask(&broker)["workers"][0]["blocked"] == 1;
    eventually("the publisher waits", waits);
    let mut got = 1;
    while got < total {
        registered.progress(got, PLENTY);
        assert_eq!(registered.batch().0.index, got, "nothing is lost");
        got += 1;
    }
    registered.progress(got, PLENTY);
    let peer = sender.join().unwrap();
    unregistered.progress(0, PLENTY);
    let (delivery, _) = unregistered.next();
    let Delivery::Lost {
        next,
        batches,
        messages,
    } = delivery
    else {
        panic!("{delivery:?}")
    };
    assert_eq!((1 + batches, messages), (next, batches));
    assert_eq!(unregistered.batch().0.index, next);
    // A subscriber that goes is not waited for.
    drop(registered);
    eventually("its slot is free", || {
        buffers.ask(&broker)["topics"][0]["readers"] == 0
    });
    peer.end();
}

#[test]
fn only_those_who_may_read_are_served() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[]);
    broker.open("t").end();
    let (code, text) = broker.admit("t").err().unwrap();
    assert_eq!(code, Refusal::Permission as u16);
    assert!(text.contains("--remote-subscribers any"), "{text}");
    drop(broker);
    let broker = buffers.start(&["--remote-subscribers", "never"]);
    let (code, text) = broker.admit("t").err().unwrap();
    assert_eq!(code, Refusal::Unsupported as u16);
    assert!(text.contains("--remote-subscribers never"), "{text}");
    assert_eq!(buffers.ask(&broker)["subscribers"], serde_json::Value::Null);
    drop(broker);
    let flags = [&ANYONE[..], &["--auth-keys", "keys"]].concat();
    let output = buffers.command(&flags).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("is for brokers without keys"), "{said}");
}

#[test]
fn a_topic_that_does_not_exist_is_not_created_for_a_subscriber() {
    let buffers = Buffers::new();
    let broker = buffers.start(&ANYONE);
    let (code, text) = broker.admit("t").err().unwrap();
    assert_eq!(code, Refusal::Topic as u16);
    assert!(text.contains("has no topic \"t\""), "{text}");
    assert!(!buffers.log("t").exists());
    let mut peer = broker.open("t");
    peer.send(&[b"kept"]);
    peer.acked();
    peer.end();
    drop(broker);
    // Another broker has the log, but nobody has opened it yet.
    let broker = buffers.start(&ANYONE);
    let mut subscriber = broker.subscribe("t", StartAt::Oldest, false, PLENTY);
    assert_eq!(only_message(&subscriber.batch().1), b"kept");
}

#[test]
fn subscribers_that_break_the_protocol_are_told_and_ended() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[&ANYONE[..], &["--handshake-timeout", "300ms"]].concat());
    broker.open("t").end();
    let protocol = Fault::Protocol as u16;
    let mut garbage = broker.admit("t").unwrap();
    garbage.socket.write_all(&[0x55; 32]).unwrap();
    assert_eq!(garbage.fault().0, protocol);
    let mut early = broker.admit("t").unwrap();
    early.progress(0, PLENTY);
    assert_eq!(early.fault().0, protocol);
    for (needed_from, credit) in [(1, PLENTY), (0, PLENTY - 1)] {
        let mut subscriber = broker.subscribe("t", StartAt::Oldest, false, PLENTY);
        subscriber.progress(needed_from, credit);
        let (code, text) = subscriber.fault();
        assert_eq!(code, protocol, "{text}");
    }
    let mut twice = broker.subscribe("t", StartAt::Oldest, false, PLENTY);
    twice.request(SubscriberRequest::Start(StartFrame {
        at: StartAt::Oldest,
        is_registered: false,
        credit: PLENTY,
    }));
    assert_eq!(twice.fault().0, protocol);
    let mut silent = broker.admit("t").unwrap();
    assert_eq!(silent.fault().0, Fault::Stalled as u16);
    // With --full overwrite there is nothing to register with.
    drop(broker);
    let broker = buffers.start(&[&REGISTERING[..], &["--full", "overwrite"]].concat());
    let mut registered = broker.subscribe("t", StartAt::Oldest, true, PLENTY);
    let (code, text) = registered.fault();
    assert_eq!(code, protocol);
    assert!(text.contains("--full block"), "{text}");
}

#[test]
fn places_are_limited() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[&ANYONE[..], &["--max-subscribers", "1"]].concat());
    let mut peer = broker.open("t");
    let mut first = broker.subscribe("t", StartAt::Oldest, false, PLENTY);
    assert_eq!(first.caught_up(), 0);
    let (code, text) = broker.admit("t").err().unwrap();
    assert_eq!(code, Refusal::Resources as u16);
    assert!(text.contains("--max-subscribers"), "{text}");
    peer.send(&[b"one"]);
    assert_eq!(first.batch().0.index, 0);
    drop(first);
    eventually("the place is free", || broker.admit("t").is_ok());
}

#[test]
fn a_right_to_read_is_no_right_to_make_publishers_wait() {
    let buffers = Buffers::new();
    let broker = buffers.start(&ANYONE);
    broker.open("t").end();
    let mut subscriber = broker.subscribe("t", StartAt::Oldest, true, PLENTY);
    let (code, text) = subscriber.fault();
    assert_eq!(code, Fault::Permission as u16);
    assert!(text.contains("--remote-registration any"), "{text}");
    assert_eq!(buffers.ask(&broker)["topics"][0]["readers"], 0);
}

#[test]
fn a_registered_subscriber_that_makes_no_progress_is_ended() {
    let buffers = Buffers::new();
    let broker = buffers.start(&[&REGISTERING[..], &["--reader-timeout", "1s"]].concat());
    let mut peer = broker.open("t");
    peer.send(&[b"first"]);
    peer.acked();
    // It starts where the index no longer knows anything, and gives no credit.
    let mut registered = broker.subscribe("t", StartAt::Index(0), true, 0);
    (0..40).for_each(|_| peer.send(&[&[0; LARGE]]));
    let (code, text) = registered.fault();
    assert_eq!(code, Fault::Stalled as u16);
    assert!(text.contains("--reader-timeout"), "{text}");
    peer.acked();
    // What is gone is not waited for, wherever a reader says that it starts.
    let _registered = broker.subscribe("t", StartAt::Index(0), true, 0);
    eventually("it is registered", || {
        buffers.ask(&broker)["topics"][0]["readers"] == 1
    });
    peer.send(&[b"goes in"]);
    peer.acked();
}

#[test]
fn a_flood_of_requests_holds_up_nobody_else() {
    let buffers = Buffers::new();
    let broker = buffers.start(&ANYONE);
    let mut peer = broker.open("t");
    let mut flooding = broker.subscribe("t", StartAt::Oldest, false, PLENTY);
    let flood = thread::spawn(move || {
        let progress = SubscriberRequest::Progress(Progress {
            needed_from: 0,
            credit: PLENTY,
        });
        let frames = RequestFrame::new(&progress).as_bytes().repeat(4096);
        // Until the broker ends.
        while flooding.socket.write_all(&frames).is_ok() {}
    });
    let mut other = broker.subscribe("t", StartAt::Oldest, false, PLENTY);
    for index in 0..50 {
        peer.send(&[b"one"]);
        assert_eq!(other.batch().0.index, index);
    }
    peer.end();
    assert!(broker.stop().success());
    flood.join().unwrap();
}

#[test]
fn subscribers_are_told_when_the_broker_ends_or_the_log_is_lost() {
    let buffers = Buffers::new();
    let broker = buffers.start(&ANYONE);
    let mut peer = broker.open("t");
    peer.send(&[b"one"]);
    peer.acked();
    let mut subscriber = broker.subscribe("t", StartAt::End, false, PLENTY);
    assert_eq!(subscriber.caught_up(), 1);
    std::fs::remove_file(buffers.log("t")).unwrap();
    assert_eq!(subscriber.fault().0, Fault::LogLost as u16);
    broker.open("u").end();
    let mut subscriber = broker.subscribe("u", StartAt::End, false, PLENTY);
    assert_eq!(subscriber.caught_up(), 0);
    broker.stop();
    assert_eq!(subscriber.fault().0, Fault::Shutdown as u16);
}
