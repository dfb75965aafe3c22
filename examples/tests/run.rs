//! Runs the examples: publishes to the embedded broker, reads its log in place; reads from other brokers.

use std::thread;

use penstock_ingest::session::listen;
use tempfile::TempDir;

#[allow(dead_code, reason = "only its function is used")]
#[path = "../embed.rs"]
mod embed;
#[allow(dead_code, reason = "only its function is used")]
#[path = "../publish.rs"]
mod publish;
#[allow(dead_code, reason = "only its function is used")]
#[path = "../read_in_place.rs"]
mod read_in_place;

#[path = "../../subscriber/tests/support/fake_broker.rs"]
mod fake_broker;
#[allow(dead_code, reason = "only its function is used")]
#[path = "../read_remote.rs"]
mod read_remote;

#[test]
fn messages_are_read_from_two_brokers() {
    let brokers = [(); 2].map(|()| fake_broker::FakeBroker::start());
    brokers[0].publish(0, &[b"one", b"two"]);
    brokers[1].publish(1, &[b"three"]);
    let addresses = brokers.each_ref().map(|broker| broker.address());
    let (messages, position) = read_remote::read("demo", &addresses).unwrap();
    assert_eq!((messages, position.streams.len()), (3, 2));
}

#[test]
fn published_messages_are_read_in_place() {
    let dir = TempDir::new().unwrap();
    let log = dir.path().join("demo.log");
    let listener = listen("127.0.0.1:0".parse().unwrap(), &embed::BUFFERS).unwrap();
    let broker = listener.local_addr().unwrap().to_string();
    let served = log.clone();
    let broker_thread = thread::spawn(move || embed::serve(listener, &served));

    let summary = publish::publish(&broker, "demo").unwrap();
    assert_eq!(summary.messages_acked, 1000);
    // "message " and the number's digits.
    let digits = 10 + 90 * 2 + 900 * 3;
    assert_eq!(read_in_place::read(&log, 1000).unwrap(), 8 * 1000 + digits);
    assert!(!broker_thread.is_finished(), "the broker serves on");
}
