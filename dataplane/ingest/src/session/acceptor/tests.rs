//! Tests of the accept loop, with connections over loopback.

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use penstock_wire::handshake::{AckLevel, Hello, OrderLevel, Path, Request};
use zerocopy::IntoBytes;

use super::{Acceptor, Limits, listen};
use crate::session::admission::{Admit, Outcome, Refused, StreamRequest};
use crate::session::stats::Shared;
use crate::session::test_support::small_buffers;

/// Longer than anything here takes.
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// Reports each request; topics never open.
struct ReportRequests(mpsc::Sender<String>);

impl Admit for ReportRequests {
    fn check(&mut self, request: &StreamRequest<'_>) -> Result<(), Refused> {
        self.0.send(request.topic.to_owned()).unwrap();
        Ok(())
    }

    fn admit(&mut self, _: &StreamRequest<'_>) -> Result<Outcome, Refused> {
        Ok(Outcome::TopicOpening)
    }
}

#[test]
fn connections_that_wait_for_their_topic_do_not_count_as_handshakes() {
    let buffers = small_buffers();
    let listener = listen("127.0.0.1:0".parse().unwrap(), &buffers).unwrap();
    let address = listener.local_addr().unwrap();
    let (report, requests) = mpsc::channel();
    let limits = Limits {
        max_handshakes: 2,
        handshake_timeout: TEST_TIMEOUT,
        ..Limits::default()
    };
    let shared = Arc::new(Shared::default());
    let acceptor = Acceptor::new(
        listener,
        buffers,
        limits,
        ReportRequests(report),
        Vec::new(),
        None,
        Arc::clone(&shared),
    )
    .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (waker, flag) = (acceptor.poller(), Arc::clone(&stop));
    let thread = thread::spawn(move || acceptor.run(&flag));
    let request = Request {
        session: 0,
        stream: 0,
        streams: 1,
        ack: AckLevel::Committed,
        order: OrderLevel::PerStream,
        max_payload: 1024,
        path: Path::Tcp,
        resume_from: None,
        max_datagram: 0,
    };
    let say_hello = |socket: &mut TcpStream, topic: &str| {
        let hello = Hello::new(&request, topic.len());
        let bytes = [hello.as_bytes(), topic.as_bytes()].concat();
        socket.write_all(&bytes).unwrap();
        assert_eq!(requests.recv_timeout(TEST_TIMEOUT).as_deref(), Ok(topic));
    };
    let connect = || TcpStream::connect(address).unwrap();
    let mut waiting = Vec::new();
    for topic in ["a", "b", "c", "d"] {
        let mut socket = connect();
        say_hello(&mut socket, topic);
        waiting.push(socket);
    }
    let (mut first, mut second) = (connect(), connect());
    say_hello(&mut second, "e");
    say_hello(&mut first, "f");
    let evictions = &shared.counters.handshake_evictions;
    assert_eq!(evictions.load(Ordering::Relaxed), 0);
    stop.store(true, Ordering::Relaxed);
    waker.notify().unwrap();
    thread.join().unwrap().unwrap();
}
