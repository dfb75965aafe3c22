//! Remote subscribers against brokers that are slow, cut connections, lie, or are no brokers at all.

use std::io::Write;
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use penstock_auth::Key;
use penstock_subscriber::{
    Error, Position, RemoteConfig, RemoteEvent, RemoteStart, RemoteSubscriber, Start,
};
use penstock_wire::delivery::{BatchInfo, Delivery, DeliveryHeader, Request, StartAt};
use penstock_wire::handshake::Refusal;
use zerocopy::IntoBytes;

#[path = "support/fake_broker.rs"]
mod fake_broker;

use fake_broker::{FakeBroker, SESSION};

fn config(brokers: &[&FakeBroker]) -> RemoteConfig {
    let mut config = RemoteConfig::new(brokers.iter().map(|broker| broker.address()), "t");
    config.gap_timeout = Duration::from_secs(60);
    config
}

fn connect(brokers: &[&FakeBroker]) -> RemoteSubscriber {
    RemoteSubscriber::connect(config(brokers)).unwrap()
}

/// What the caller is told, up to the end of every log, without batches; and the messages.
fn read_all(subscriber: &mut RemoteSubscriber) -> (Vec<String>, Vec<String>) {
    let (mut messages, mut others) = (Vec::new(), Vec::new());
    loop {
        match subscriber.next().unwrap() {
            RemoteEvent::Batch(batch) => messages.extend(text(&batch)),
            RemoteEvent::CaughtUp => return (messages, others),
            RemoteEvent::Idle => {}
            other => others.push(format!("{other:?}")),
        }
    }
}

fn text(batch: &penstock_subscriber::Received<'_>) -> Vec<String> {
    let text = |message: &[u8]| String::from_utf8_lossy(message).into_owned();
    batch.messages().map(|m| text(m.unwrap())).collect()
}

fn next_error(subscriber: &mut RemoteSubscriber) -> Error {
    loop {
        if let Err(error) = subscriber.next() {
            return error;
        }
    }
}

fn numbers(range: std::ops::Range<u64>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

fn publish_numbers(broker: &FakeBroker, range: std::ops::Range<u64>) {
    for number in range {
        broker.publish_as(0, number, &[number.to_string().as_bytes()]);
    }
}

#[test]
fn a_connection_that_is_cut_at_any_byte_loses_and_repeats_nothing() {
    // A welcome, two batches, and the sign that there is no more.
    let all = 56 + 2 * (64 + 5) + 64;
    let cut = |at: usize| {
        let broker = FakeBroker::start();
        publish_numbers(&broker, 0..2);
        broker.set(|state| state.cuts = vec![at, at.max(57) - 56]);
        let mut subscriber = connect(&[&broker]);
        let read = read_all(&mut subscriber);
        assert_eq!(read, (numbers(0..2), vec![]), "cut at {at}");
    };
    thread::scope(|scope| {
        for start in 1..33 {
            scope.spawn(move || (start..=all).step_by(32).for_each(cut));
        }
    });
}

#[test]
fn a_stream_that_continues_on_another_broker_is_read_once_and_in_order() {
    let brokers = [(); 2].map(|()| FakeBroker::start());
    publish_numbers(&brokers[1], 3..8);
    publish_numbers(&brokers[0], 0..5);
    publish_numbers(&brokers[0], 8..10);
    let mut subscriber = connect(&[&brokers[0], &brokers[1]]);
    assert_eq!(read_all(&mut subscriber), (numbers(0..10), vec![]));
    assert_eq!(subscriber.report().duplicates, 2);
    assert_eq!(subscriber.report().missing, 0);
}

#[test]
fn batches_that_no_broker_has_are_reported() {
    let brokers = [(); 2].map(|()| FakeBroker::start());
    publish_numbers(&brokers[0], 0..2);
    publish_numbers(&brokers[0], 5..6);
    publish_numbers(&brokers[1], 3..4);
    let mut subscriber = connect(&[&brokers[0], &brokers[1]]);
    let (messages, others) = read_all(&mut subscriber);
    assert_eq!(messages, ["0", "1", "3", "5"]);
    let missing =
        |first| format!("Missing {{ session: {SESSION}, stream: 0, first: {first}, batches: 1 }}");
    assert_eq!(others, [missing(2), missing(4)]);
    assert_eq!(subscriber.report().missing, 2);
}

#[test]
fn a_broker_that_is_away_is_waited_for_until_the_gap_timeout() {
    let broker = FakeBroker::start();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = config(&[&broker]);
    config.brokers.push(gone.local_addr().unwrap().to_string());
    drop(gone);
    config.gap_timeout = Duration::from_millis(300);
    publish_numbers(&broker, 2..3);
    let mut subscriber = RemoteSubscriber::connect(config).unwrap();
    loop {
        match subscriber.next().unwrap() {
            RemoteEvent::Batch(batch) => break assert_eq!(text(&batch), ["2"]),
            RemoteEvent::Idle => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(!subscriber.report().brokers[1].is_connected);
}

#[test]
fn a_wrong_checksum_is_asked_for_again_once() {
    let broker = FakeBroker::start();
    publish_numbers(&broker, 0..4);
    broker.set(|state| state.corrupt = [(1, 1), (2, 9)].into());
    let mut subscriber = connect(&[&broker]);
    let (messages, others) = read_all(&mut subscriber);
    assert_eq!(messages, ["0", "1", "3"]);
    assert_eq!(others.len(), 2, "{others:?}");
    assert!(others[0].starts_with("Corrupt") && others[0].contains("index: 2"));
    assert!(others[1].starts_with("Missing") && others[1].contains("first: 2, batches: 1"));
    assert_eq!(subscriber.report().brokers[0].reconnects, 2);
    let state = broker.state.lock().unwrap();
    let starts = state.requests.iter().filter_map(|request| match request {
        Request::Start(start) => Some(start.at),
        Request::Progress(_) => None,
    });
    let starts: Vec<_> = starts.collect();
    assert_eq!(
        starts,
        [StartAt::Oldest, StartAt::Index(1), StartAt::Index(2)]
    );
}

#[test]
fn with_a_key_requests_and_deliveries_are_authenticated() {
    let broker = FakeBroker::start();
    broker.set(|state| state.secret = Some([5; 32]));
    for _ in 0..40 {
        broker.publish(0, &[&[b'x'; 1000]]);
    }
    let connect = |secret: [u8; 32]| {
        let mut config = config(&[&broker]);
        config.window = 4096;
        config.key = Some(Key::new(&secret));
        config.packet_auth = true;
        RemoteSubscriber::connect(config).unwrap()
    };
    // What is changed once is requested again, like a wrong checksum.
    broker.set(|state| state.corrupt = [(7, 1)].into());
    let (messages, others) = read_all(&mut connect([5; 32]));
    assert_eq!((messages.len(), others), (40, vec![]));
    broker.set(|state| state.corrupt = [(7, 2)].into());
    let error = next_error(&mut connect([5; 32]));
    assert!(matches!(error, Error::Forged { .. }), "{error}");
}

#[test]
fn a_broker_sends_no_more_than_it_was_asked_for() {
    let broker = FakeBroker::start();
    for _ in 0..50 {
        broker.publish(0, &[&[b'x'; 1000]]);
    }
    let mut config = config(&[&broker]);
    config.window = 4096;
    config.register = true;
    let mut subscriber = RemoteSubscriber::connect(config).unwrap();
    let mut finished = 0;
    for index in 0..50 {
        let batch = loop {
            if let RemoteEvent::Batch(batch) = subscriber.next().unwrap() {
                break batch;
            }
        };
        assert_eq!(batch.index, index);
        for request in &broker.state.lock().unwrap().requests {
            let (credit, needed_from) = match request {
                Request::Start(start) => (start.credit, 0),
                Request::Progress(progress) => (progress.credit, progress.needed_from),
            };
            assert!(credit <= finished + 4096 && needed_from <= index);
        }
        finished += 64 + 1004;
    }
    read_all(&mut subscriber);
    // The last batch is released as well, although nothing comes after it.
    loop {
        subscriber.next().unwrap();
        match broker.state.lock().unwrap().requests.last() {
            Some(Request::Progress(progress)) if progress.needed_from == 50 => break,
            _ => {}
        }
    }
}

#[test]
fn credit_is_raised_while_a_batch_is_held_from_an_earlier_connection() {
    let brokers = [(); 2].map(|()| FakeBroker::start());
    brokers[0].set(|state| state.oldest = 7);
    brokers[1].set(|state| state.is_silent = true);
    // Stream 1 waits for the other broker; stream 0 goes on.
    brokers[0].publish_as(1, 5, &[&b"held"[..]]);
    for _ in 0..20 {
        brokers[0].publish(0, &[&[b'x'; 500]]);
    }
    let mut config = config(&[&brokers[0], &brokers[1]]);
    config.window = 4096;
    config.register = true;
    config.start = RemoteStart::Each(Start::Oldest);
    let mut subscriber = RemoteSubscriber::connect(config).unwrap();
    let mut read = 0;
    while read < 20 {
        if let RemoteEvent::Batch(batch) = subscriber.next().unwrap() {
            read += 1;
            assert_eq!(batch.stream, 0);
            if read == 10 {
                brokers[0].set(|state| state.epoch += 1);
            }
        }
    }
    assert_eq!(subscriber.position().brokers[&brokers[0].address()].next, 7);
    brokers[1].set(|state| state.is_silent = false);
    assert_eq!(read_all(&mut subscriber).0, ["held"]);
}

fn lie(raw: Vec<u8>) -> Error {
    let broker = FakeBroker::start();
    broker.set(|state| state.raw = Some(raw));
    next_error(&mut connect(&[&broker]))
}

#[test]
fn brokers_that_lie_are_refused() {
    let claim = BatchInfo {
        index: 0,
        session: 1,
        stream: 0,
        batch_seq: 0,
        messages: 1,
        payload_len: fake_broker::MAX_PAYLOAD + 1,
        checksum: 0,
        arrival_unix_ns: 0,
    };
    let header = DeliveryHeader::new(&Delivery::Batch(claim));
    let long = lie(header.as_bytes().to_vec()).to_string();
    assert!(long.contains("batch of 1048577 bytes"), "{long}");
    let noise = lie(b"HTTP/1.1 400 Bad Request\r\n".repeat(4)).to_string();
    assert!(noise.contains("first byte 0x48"), "{noise}");
    let back = [
        Delivery::Damaged { index: 5 },
        Delivery::Damaged { index: 4 },
    ];
    let back = back.map(|delivery| DeliveryHeader::new(&delivery));
    let back = lie(back
        .iter()
        .flat_map(|header| header.as_bytes().to_vec())
        .collect());
    assert!(
        back.to_string()
            .contains("goes back from batch 6 to batch 4"),
        "{back}"
    );
    let huge = FakeBroker::start();
    huge.set(|state| state.max_payload = Some(u32::MAX));
    let error = next_error(&mut connect(&[&huge])).to_string();
    assert!(
        error.contains("claims batches of up to 4294967295 bytes"),
        "{error}"
    );
}

#[test]
fn a_flood_beyond_the_credit_ends_the_connection() {
    let caught_up = DeliveryHeader::new(&Delivery::CaughtUp { next: 0 });
    let broker = FakeBroker::start();
    broker.set(|state| state.raw = Some(caught_up.as_bytes().repeat(1000)));
    let mut config = config(&[&broker]);
    config.window = RemoteConfig::MIN_WINDOW;
    let mut subscriber = RemoteSubscriber::connect(config).unwrap();
    // The caller takes nothing meanwhile.
    while broker.state.lock().unwrap().connections < 3 {
        thread::sleep(Duration::from_millis(1));
    }
    let error = next_error(&mut subscriber).to_string();
    assert!(error.contains("bytes that were requested"), "{error}");
}

#[test]
fn a_refusal_that_cannot_change_ends_the_subscriber() {
    let refused = |refusal, text: &str| {
        let broker = FakeBroker::start();
        broker.set(|state| state.refusal = Some((refusal, text.to_owned())));
        next_error(&mut connect(&[&broker])).to_string()
    };
    let older = refused(Refusal::Unsupported, "path 2\x1b[2J");
    assert!(older.contains("is an older release that serves no remote subscribers"));
    assert!(older.contains("path 2\\x1b[2J"), "{older}");
    let denied = refused(Refusal::Permission, "may not read");
    assert!(denied.contains("refused the subscriber: may not read"));
    // No broker at all.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        listener
            .accept()
            .unwrap()
            .0
            .write_all(b"SSH-2.0-OpenSSH_9.9\r\n")
    });
    let config = RemoteConfig::new([address], "t");
    let error = next_error(&mut RemoteSubscriber::connect(config).unwrap()).to_string();
    assert!(error.contains("not a Penstock broker"), "{error}");
}

#[test]
fn what_may_change_is_tried_again() {
    let broker = FakeBroker::start();
    broker.set(|state| state.refusal = Some((Refusal::Topic, "no such topic yet".to_owned())));
    let mut config = config(&[&broker]);
    config.wait = Duration::from_millis(100);
    let error = next_error(&mut RemoteSubscriber::connect(config).unwrap());
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("no such topic yet"), "{error}");
    let mut subscriber = connect(&[&broker]);
    while broker.state.lock().unwrap().connections < 4 {
        subscriber.next().unwrap();
    }
    broker.set(|state| state.refusal = None);
    publish_numbers(&broker, 0..1);
    assert_eq!(read_all(&mut subscriber).0, ["0"]);
}

#[test]
fn a_silent_broker_is_left() {
    let broker = FakeBroker::start();
    publish_numbers(&broker, 0..1);
    broker.set(|state| state.is_silent = true);
    let mut config = config(&[&broker]);
    config.keepalive = Duration::from_secs(1);
    let mut subscriber = RemoteSubscriber::connect(config).unwrap();
    while broker.state.lock().unwrap().connections < 2 {
        subscriber.next().unwrap();
    }
    broker.set(|state| state.is_silent = false);
    assert_eq!(read_all(&mut subscriber).0, ["0"]);
}

#[test]
fn a_log_that_was_made_anew_is_read_from_its_beginning() {
    for id in [0, 7] {
        let broker = FakeBroker::start();
        broker.set(|state| state.id = id);
        publish_numbers(&broker, 0..3);
        let mut subscriber = connect(&[&broker]);
        assert_eq!(read_all(&mut subscriber).0, numbers(0..3));
        broker.set(|state| {
            state.log.clear();
            state.id += 1;
            state.epoch += 1;
        });
        // With an identity, it is noticed even if the new log is as long.
        publish_numbers(&broker, 3..5 + id.min(2));
        let (messages, others) = read_all(&mut subscriber);
        assert_eq!(messages, numbers(3..5 + id.min(2)));
        assert_eq!(others.len(), 1);
        assert!(others[0].starts_with("NewLog"), "{others:?}");
        let position = subscriber.position();
        assert_eq!(position.brokers[&broker.address()].next, 2 + id.min(2));
    }
}

#[test]
fn a_subscriber_that_starts_at_a_position_delivers_the_rest() {
    let brokers = [(); 2].map(|()| FakeBroker::start());
    publish_numbers(&brokers[0], 0..5);
    publish_numbers(&brokers[1], 3..8);
    publish_numbers(&brokers[0], 8..10);
    let resume = |position: Position| {
        let mut config = config(&[&brokers[0], &brokers[1]]);
        config.start = RemoteStart::Position {
            position,
            otherwise: Start::Oldest,
        };
        RemoteSubscriber::connect(config).unwrap()
    };
    for stop in 0..=10 {
        let mut messages = Vec::new();
        let mut subscriber = connect(&[&brokers[0], &brokers[1]]);
        while messages.len() < stop {
            if let RemoteEvent::Batch(batch) = subscriber.next().unwrap() {
                messages.extend(text(&batch));
            }
        }
        let mut position = subscriber.position();
        drop(subscriber);
        // Another subscriber reads one of the brokers only, and forgets nothing of the other.
        if stop > 5 {
            let before = position.brokers.clone();
            let mut config = config(&[&brokers[0]]);
            config.start = RemoteStart::Position {
                position,
                otherwise: Start::End,
            };
            position = RemoteSubscriber::connect(config).unwrap().position();
            assert_eq!(position.brokers, before);
        }
        let stored = serde_json::to_string(&position).unwrap();
        let mut subscriber = resume(serde_json::from_str(&stored).unwrap());
        messages.extend(read_all(&mut subscriber).0);
        assert_eq!(messages, numbers(0..10), "stopped after {stop}");
    }
}

#[test]
fn what_was_overwritten_is_told() {
    let broker = FakeBroker::start();
    broker.set(|state| state.oldest = 5);
    publish_numbers(&broker, 5..7);
    let mut config = config(&[&broker]);
    config.start = RemoteStart::Each(Start::Index(2));
    let mut subscriber = RemoteSubscriber::connect(config).unwrap();
    let (messages, others) = read_all(&mut subscriber);
    assert_eq!(messages, ["5", "6"]);
    assert!(others[0].contains("batches: 3, messages: 3"), "{others:?}");
    let mut beyond = self::config(&[&broker]);
    beyond.start = RemoteStart::Each(Start::Index(8));
    let error = next_error(&mut RemoteSubscriber::connect(beyond).unwrap()).to_string();
    assert!(
        error.contains("has 7 batches, so none with index 8"),
        "{error}"
    );
}

#[test]
fn wrong_settings_are_explained() {
    let check = |change: fn(&mut RemoteConfig)| {
        let mut config = RemoteConfig::new(["a:1", "b:1"], "t");
        change(&mut config);
        config.check().unwrap_err().to_string()
    };
    for (change, words) in [
        (
            (|c| c.topic = "../x".to_owned()) as fn(&mut RemoteConfig),
            "topic name",
        ),
        (|c| c.brokers.clear(), "0 brokers"),
        (|c| c.brokers[1] = "a:1".to_owned(), "a:1 is named twice"),
        (|c| c.brokers[1] = "b".to_owned(), "it has no port"),
        (|c| c.window = 1, "window of 1 bytes"),
        (|c| c.packet_auth = true, "needs a key"),
        (
            |c| c.start = RemoteStart::Each(Start::Index(3)),
            "another batch in each broker's log",
        ),
    ] {
        let error = check(change);
        assert!(error.contains(words), "{words}: {error}");
    }
}
