//! The library against brokers that this file plays: good ones, slow ones, dying and lying ones.

mod peer;
mod reroute;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use penstock_publisher::{Config, Error, OnBrokerLoss, Publisher};
use penstock_wire::batch::{Frame, HEADER_LEN};
use penstock_wire::handshake::{AckLevel, HELLO_LEN, Hello, Refusal, Welcome};
use penstock_wire::reply::{Fault, Reply};
use zerocopy::{FromBytes, IntoBytes};

use crate::peer::*;

#[test]
fn messages_are_spread_over_brokers_and_streams_and_arrive_once_in_order() {
    const COUNT: usize = 20_000;
    let (addresses, brokers): (Vec<_>, Vec<_>) = (0..2).map(|_| good_broker(2)).unzip();
    let mut publisher = Publisher::connect(Config {
        threads_per_broker: 2,
        ..config(&addresses.iter().collect::<Vec<_>>())
    })
    .unwrap();
    publish_all(&mut publisher, &numbered(COUNT));
    let summary = publisher.close().unwrap();
    assert_eq!(summary.messages_sent, COUNT as u64);
    assert_eq!(summary.messages_acked, COUNT as u64);
    let waited = summary.ack_latency_us.unwrap();
    assert_eq!(waited.count, summary.batches);
    assert!(waited.p50 > 0.0 && waited.p50 <= waited.p99, "{waited:?}");
    assert!(
        waited.p99 <= waited.p999 && waited.p999 <= waited.max,
        "{waited:?}"
    );
    let mut arrived = Vec::new();
    for broker in brokers {
        for (number, served) in broker.join().unwrap().into_iter().enumerate() {
            assert_eq!(served.topic, "t");
            assert_eq!(served.request.stream as usize, number);
            assert_eq!(served.request.streams, 2);
            assert_eq!(
                served.request.session,
                if number == 0 { 0 } else { SESSION }
            );
            let numbers: Vec<usize> = served
                .batches
                .concat()
                .iter()
                .map(|message| str::from_utf8(message).unwrap().parse().unwrap())
                .collect();
            assert!(!numbers.is_empty(), "a stream got nothing");
            assert!(numbers.is_sorted(), "a stream is out of order");
            arrived.extend(numbers);
        }
    }
    arrived.sort_unstable();
    assert_eq!(arrived, (0..COUNT).collect::<Vec<_>>());
}

/// Two brokers, one I/O thread: `hold_up` plays the first until it gets word that the second has taken a lot
/// meanwhile, and returns what it got; the second is good. Checks that everything arrived.
fn does_not_hold_up(hold_up: impl FnOnce(TcpListener, Receiver<()>) -> usize + Send + 'static) {
    const BATCHES: u64 = 100;
    let (held_up, address) = listen();
    let (go, may_go) = channel();
    let held_up = thread::spawn(move || hold_up(held_up, may_go));
    let (good, play) = broker(move |mut peer| {
        peer.welcome();
        peer.ack_all(|committed| {
            if committed == BATCHES {
                go.send(()).unwrap();
            }
        })
    });
    let mut publisher = Publisher::connect(Config {
        io_threads: Some(1),
        on_broker_loss: Some(OnBrokerLoss::Wait),
        ..config(&[&address, &good])
    })
    .unwrap();
    // The first takes what waits in front of it at most.
    let messages = numbered(40_000);
    publish_all(&mut publisher, &messages);
    let summary = publisher.close().unwrap();
    assert_eq!(summary.messages_acked, messages.len() as u64);
    assert_eq!(
        held_up.join().unwrap() + play.join().unwrap(),
        messages.len()
    );
}

#[test]
fn a_broker_that_reads_nothing_does_not_hold_up_other_streams_of_the_thread() {
    does_not_hold_up(|listener, go| {
        let mut peer = Peer::accept(&listener);
        // A small buffer, which the stream fills.
        let small = socket2::SockRef::from(&peer.socket).set_recv_buffer_size(4096);
        small.unwrap();
        peer.welcome();
        go.recv_timeout(TIMEOUT).unwrap();
        peer.ack_all(|_| ())
    });
}

#[test]
fn a_stream_that_connects_again_does_not_hold_up_other_streams_of_the_thread() {
    does_not_hold_up(|listener, go| {
        let mut peer = Peer::accept(&listener);
        peer.welcome();
        peer.batch();
        drop(peer);
        // Accepted, but no answer to the handshake until the other stream got far.
        let peer = Peer::accept(&listener);
        go.recv_timeout(TIMEOUT).unwrap();
        drop(peer);
        Peer::accept(&listener).serve().concat().len()
    });
}

#[test]
fn io_threads_are_as_many_as_asked_for_and_no_more_than_streams() {
    for (wanted, streams, threads) in [("1", 4, 1), ("3", 4, 3), ("8", 2, 2)] {
        let (listener, address) = listen();
        let mut child = Command::new(env!("CARGO_BIN_EXE_penstock-publisher"))
            .args(["--brokers", &address, "--topic", "t", "--input", "-"])
            .args(["--threads-per-broker", &streams.to_string()])
            .args(["--io-threads", wanted])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut peers: Vec<_> = (0..streams)
            .map(|_| Peer::accept_welcome(&listener))
            .collect();
        // Once a message has come, all threads run.
        stdin.write_all(b"a message\n").unwrap();
        peers[0].batch();
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
        let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
        let count = names.filter(|name| name.as_ref().is_ok_and(|name| name == "io\n"));
        assert_eq!(count.count(), threads);
        kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL).unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn no_more_than_the_window_is_sent_before_an_ack() {
    let (seen, taken) = channel();
    let (go, may_ack) = channel::<()>();
    let (address, play) = broker(move |mut peer| {
        peer.welcome();
        for _ in 0..3 {
            peer.batch();
        }
        let quiet = Duration::from_millis(300);
        peer.socket.set_read_timeout(Some(quiet)).unwrap();
        let error = peer.socket.read(&mut [0]).expect_err("beyond the window");
        seen.send(error.kind()).unwrap();
        may_ack.recv().unwrap();
        peer.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut committed = 3;
        peer.ack(committed);
        while let Frame::Batch(batch) = peer.frame() {
            peer.messages(&batch);
            committed += 1;
            peer.ack(committed);
        }
        peer.ack(committed);
    });
    let mut publisher = Publisher::connect(Config {
        in_flight: 3,
        ..config(&[&address])
    })
    .unwrap();
    let progress = publisher.progress();
    // Each fills a batch; more of them than window and queue hold, so this waits.
    let publishing = thread::spawn(move || {
        publish_all(&mut publisher, &vec![vec![7; 990]; 50]);
        publisher.close()
    });
    assert_eq!(taken.recv_timeout(TIMEOUT).unwrap(), ErrorKind::WouldBlock);
    assert!(!publishing.is_finished());
    assert_eq!(progress.messages_acked(), 0);
    go.send(()).unwrap();
    assert_eq!(publishing.join().unwrap().unwrap().messages_acked, 50);
    play.join().unwrap();
}

#[test]
fn a_broker_that_dies_for_good_is_named_and_what_was_acked_stays_counted() {
    let (address, play) = broker(|mut peer| {
        peer.welcome();
        let first = peer.batch().len();
        peer.ack(1);
        peer.batch();
        first as u64
    });
    let mut publisher = Publisher::connect(Config {
        timeout: BRIEF,
        ..config(&[&address])
    })
    .unwrap();
    let progress = publisher.progress();
    let error = failure_of(&mut publisher);
    assert!(
        matches!(&error, Error::NotResumed { broker, unacked, .. } if *broker == address && *unacked > 0),
        "{error}"
    );
    assert_eq!(progress.messages_acked(), play.join().unwrap());
    assert!(publisher.flush().is_err());
    assert!(publisher.close().is_err());
}

/// A publisher whose first connection `lose` ends, `committed` batches being in the log by then,
/// and whose second is good; checks that everything arrived once and in order.
fn goes_on(lose: impl FnOnce(Peer) -> Vec<Vec<u8>> + Send + 'static, acked: u64, committed: u64) {
    let (listener, address) = listen();
    let play = thread::spawn(move || {
        let mut arrived = lose(Peer::accept(&listener));
        let peer = Peer::accept(&listener);
        assert_eq!(peer.request.session, SESSION);
        assert_eq!(peer.request.resume_from, Some(acked));
        arrived.extend(peer.serve_from(committed).concat());
        arrived
    });
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    let messages = numbered(20_000);
    publish_all(&mut publisher, &messages);
    publisher.flush().unwrap();
    let summary = publisher.close().unwrap();
    assert_eq!(summary.messages_acked, messages.len() as u64);
    assert_eq!(summary.brokers[0].streams[0].moves, 1);
    assert_eq!(play.join().unwrap(), messages);
}

#[test]
fn a_stream_goes_on_after_its_connection_was_lost_inside_a_batch() {
    let lose = |mut peer: Peer| {
        peer.welcome();
        let mut arrived: Vec<_> = (0..5).flat_map(|_| peer.batch()).collect();
        peer.ack(3);
        // Committed, but the ack is lost with the connection.
        arrived.extend(peer.batch());
        peer.socket.read_exact(&mut [0; HEADER_LEN + 10]).unwrap();
        arrived
    };
    goes_on(lose, 3, 6);
}

#[test]
fn a_stream_goes_on_after_an_ordinary_restart() {
    let lose = |mut peer: Peer| {
        peer.welcome();
        let arrived = peer.batch();
        peer.say(&Reply::error(Fault::Shutdown, 1, "down for an upgrade"));
        peer.socket.shutdown(Shutdown::Write).unwrap();
        peer.drain();
        arrived
    };
    goes_on(lose, 1, 1);
}

#[test]
fn a_stream_goes_on_once_the_broker_has_room_for_it_again() {
    let (listener, address) = listen();
    let play = thread::spawn(move || {
        let mut peer = Peer::accept(&listener);
        peer.welcome();
        let arrived = peer.batch();
        peer.socket.shutdown(Shutdown::Both).unwrap();
        for _ in 0..3 {
            let mut peer = Peer::accept(&listener);
            assert_eq!(peer.request.resume_from, Some(0));
            peer.say(&Welcome::refuse(Refusal::Resources, "all are in use"));
        }
        let rest = Peer::accept(&listener).serve_from(1);
        [arrived, rest.concat()].concat()
    });
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    let messages = numbered(20_000);
    publish_all(&mut publisher, &messages);
    publisher.close().unwrap();
    assert_eq!(play.join().unwrap(), messages);
}

#[test]
fn a_stream_that_was_ended_because_it_was_idle_comes_back_with_its_next_message() {
    let (listener, address) = listen();
    let (back, is_back) = channel();
    let play = thread::spawn(move || {
        let mut peer = Peer::accept(&listener);
        peer.welcome();
        let mut arrived = peer.batch();
        peer.ack(1);
        peer.say(&Reply::error(Fault::Stalled, 1, "idle"));
        peer.drain();
        let peer = Peer::accept(&listener);
        back.send(()).unwrap();
        assert_eq!(peer.request.resume_from, Some(1));
        arrived.extend(peer.serve_from(1).concat());
        arrived
    });
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    publisher.publish(b"first").unwrap();
    publisher.flush().unwrap();
    // One that comes back without a message does so at once.
    assert!(is_back.recv_timeout(Duration::from_millis(300)).is_err());
    publisher.publish(b"second").unwrap();
    publisher.flush().unwrap();
    publisher.close().unwrap();
    assert_eq!(play.join().unwrap(), [&b"first"[..], b"second"]);
}

/// A publisher of one message whose broker dies once it has it; `then` plays those that come after,
/// to the last of which nothing is left to be sent.
fn one_message(then: impl FnOnce(&TcpListener, Peer) + Send + 'static) {
    let (listener, address) = listen();
    let play = thread::spawn(move || {
        let mut peer = Peer::accept(&listener);
        peer.welcome();
        let arrived = peer.batch();
        then(&listener, peer);
        arrived
    });
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    publisher.publish(b"only").unwrap();
    assert_eq!(publisher.close().unwrap().messages_acked, 1);
    assert_eq!(play.join().unwrap(), [b"only"]);
}

#[test]
fn a_stream_goes_on_when_only_the_confirmation_of_its_end_is_lost() {
    one_message(|listener, mut peer| {
        assert!(matches!(peer.frame(), Frame::End { batches: 1 }));
        drop(peer);
        assert!(Peer::accept(listener).serve_from(1).is_empty());
    });
}

#[test]
fn a_stream_goes_on_when_nobody_tells_that_its_next_connection_is_gone() {
    one_message(|listener, peer| {
        drop(peer);
        // As if the reset of a broker that died with it in the queue were lost.
        let unanswered = Peer::accept(listener);
        assert!(Peer::accept(listener).serve_from(1).is_empty());
        drop(unanswered);
    });
}

#[test]
fn a_broker_that_takes_connections_but_no_batches_is_given_up() {
    let (listener, address) = listen();
    let (stop, stopped) = channel::<()>();
    let play = thread::spawn(move || {
        // The last connection is the one that wakes this after the end.
        while stopped.try_recv() == Err(TryRecvError::Empty) {
            let (mut socket, _) = listener.accept().unwrap();
            let mut hello = [0; HELLO_LEN + 1];
            if socket.read_exact(&mut hello).is_ok() {
                let mut peer = Peer {
                    socket,
                    topic: String::new(),
                    request: Hello::read_from_bytes(&hello[..HELLO_LEN])
                        .unwrap()
                        .parse()
                        .unwrap()
                        .1
                        .into_request()
                        .unwrap(),
                };
                peer.welcome();
            }
        }
    });
    let mut publisher = Publisher::connect(Config {
        timeout: BRIEF,
        ..config(&[&address])
    })
    .unwrap();
    let error = failure_of(&mut publisher);
    assert!(
        matches!(&error, Error::Lost { unacked, .. } if *unacked > 0),
        "{error}"
    );
    drop((publisher, stop));
    TcpStream::connect(address).unwrap();
    play.join().unwrap();
}

#[test]
fn refusals_and_strangers_are_told_apart() {
    let (address, play) = broker(|mut peer| {
        peer.say(&Welcome::refuse(Refusal::Version, "use another release"));
    });
    let error = refusal_of(config(&[&address]));
    assert!(
        matches!(&error, Error::Refused { text, .. } if text == "use another release"),
        "{error}"
    );
    play.join().unwrap();

    let (address, play) = broker(|mut peer| peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
    let error = refusal_of(config(&[&address]));
    assert!(matches!(&error, Error::NotABroker { .. }), "{error}");
    assert!(error.to_string().contains("check the address"), "{error}");
    play.join().unwrap();

    let (address, play) = broker(|_| ());
    let error = refusal_of(config(&[&address]));
    assert!(matches!(&error, Error::Connect { .. }), "{error}");
    play.join().unwrap();

    let (listener, address) = listen();
    drop(listener);
    let error = refusal_of(config(&[&address]));
    assert!(matches!(&error, Error::Connect { .. }), "{error}");
    assert!(error.to_string().contains(&address), "{error}");
}

#[test]
fn a_broker_that_says_why_it_ends_is_quoted() {
    let (address, play) = broker(|mut peer| {
        peer.welcome();
        peer.batch();
        peer.say(&Reply::error(Fault::Checksum, 1, "bits have flipped"));
        // Not closed yet, or the text could be lost to a reset.
        peer.drain();
    });
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    let error = failure_of(&mut publisher);
    assert!(
        matches!(&error, Error::Ended { text, .. } if text == "bits have flipped"),
        "{error}"
    );
    drop(publisher);
    play.join().unwrap();
}

/// The failure of a publisher whose broker takes one batch and then does this.
fn failure_after(act: fn(&mut Peer)) -> Error {
    let (address, play) = broker(move |mut peer| {
        peer.welcome();
        peer.batch();
        act(&mut peer);
        peer.drain();
    });
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    let error = failure_of(&mut publisher);
    drop(publisher);
    play.join().unwrap();
    error
}

#[test]
fn lies_are_not_believed() {
    let garbage = failure_after(|peer| peer.say(&[0xff; 16]));
    assert!(matches!(garbage, Error::BadReply { .. }), "{garbage}");
    let future = failure_after(|peer| peer.ack(1_000_000));
    assert!(matches!(future, Error::BadAck { .. }), "{future}");
    let taken_back = failure_after(|peer| {
        peer.ack(1);
        peer.ack(0);
    });
    assert!(matches!(taken_back, Error::BadAck { .. }), "{taken_back}");
}

#[test]
fn a_silent_broker_is_given_up() {
    let (address, play) = broker(|mut peer| {
        peer.welcome();
        peer.drain();
    });
    let mut publisher = Publisher::connect(Config {
        timeout: BRIEF,
        ..config(&[&address])
    })
    .unwrap();
    let error = failure_of(&mut publisher);
    assert!(matches!(&error, Error::Silent { .. }), "{error}");
    drop(publisher);
    play.join().unwrap();
}

/// A broker that, after `taken` batches, keeps reporting that it waits for room.
fn blocked_broker(taken: usize) -> (String, JoinHandle<()>) {
    broker(move |mut peer| {
        peer.welcome();
        for _ in 0..taken {
            peer.batch();
        }
        let sign_of_life = Reply::ack(taken as u64, true);
        while peer.socket.write_all(sign_of_life.as_bytes()).is_ok() {
            thread::sleep(BRIEF / 10);
        }
    })
}

#[test]
fn a_broker_that_waits_for_room_is_given_up_with_the_reason() {
    let (address, play) = blocked_broker(1);
    let mut publisher = Publisher::connect(Config {
        timeout: BRIEF,
        ..config(&[&address])
    })
    .unwrap();
    let error = failure_of(&mut publisher);
    assert!(
        matches!(&error, Error::Blocked { broker, unacked, .. } if *broker == address && *unacked > 0),
        "{error}"
    );
    assert!(error.to_string().contains("registered reader"), "{error}");
    drop(publisher);
    play.join().unwrap();
}

#[test]
fn the_time_is_over_while_the_end_of_a_stream_is_waited_for() {
    for ack in [AckLevel::None, AckLevel::Committed] {
        let (address, play) = blocked_broker(0);
        let mut publisher = Publisher::connect(Config {
            ack,
            timeout: BRIEF,
            ..config(&[&address])
        })
        .unwrap();
        publisher.publish(b"only").unwrap();
        let error = publisher.close().unwrap_err();
        assert!(matches!(&error, Error::Blocked { .. }), "{error}");
        play.join().unwrap();
    }
}

#[test]
fn a_cancelled_publisher_tells_what_was_acked() {
    let (address, play) = blocked_broker(1);
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    let (canceller, progress) = (publisher.canceller(), publisher.progress());
    let waiting = thread::spawn(move || {
        let error = failure_of(&mut publisher);
        assert!(matches!(error, Error::Failed), "{error}");
        publisher.close().unwrap()
    });
    while progress.messages_acked() == 0 {
        thread::sleep(BRIEF / 10);
    }
    canceller.cancel();
    let summary = waiting.join().unwrap();
    let acked = progress.messages_acked();
    assert_eq!(summary.messages_acked, acked);
    assert_eq!(summary.brokers[0].streams[0].messages_acked, acked);
    assert!(summary.messages_sent > acked);
    play.join().unwrap();
}

#[test]
fn the_first_signal_ends_a_publisher_that_its_broker_holds_up() {
    let (has_batch, is_at_work) = channel();
    let (address, play) = broker(move |mut peer| {
        peer.welcome();
        peer.batch();
        has_batch.send(()).unwrap();
        let sign_of_life = Reply::ack(1, true);
        while peer.socket.write_all(sign_of_life.as_bytes()).is_ok() {
            thread::sleep(BRIEF / 10);
        }
    });
    let mut child = Command::new(env!("CARGO_BIN_EXE_penstock-publisher"))
        .args(["--brokers", &address, "--topic", "t", "--timeout", "3600"])
        .args(["--total-size", "1GiB", "--format", "json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    is_at_work.recv_timeout(TIMEOUT).unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let (ended, watched) = channel();
    let waiting = thread::spawn(move || {
        let mut output = String::new();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_to_string(&mut output).unwrap();
        ended.send((child.wait().unwrap(), output)).unwrap();
    });
    let (status, output) = watched.recv_timeout(TIMEOUT).expect("it ends soon");
    assert_eq!(status.code(), Some(130), "{output}");
    assert!(output.contains("\"messages_acked\""), "{output}");
    waiting.join().unwrap();
    play.join().unwrap();
}

#[test]
fn a_message_that_fits_in_no_batch_changes_nothing() {
    let (address, play) = broker(Peer::serve);
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    publisher.publish(b"before").unwrap();
    let error = publisher
        .publish(&vec![0; MAX_PAYLOAD as usize])
        .unwrap_err();
    assert!(matches!(error, Error::MessageTooLarge { .. }), "{error}");
    // Larger than a batch usually is, but the broker takes it: a batch of its own.
    let large = vec![1; 100_000];
    publisher.publish(&large).unwrap();
    publisher.publish(b"").unwrap();
    let summary = publisher.close().unwrap();
    assert_eq!(summary.messages_acked, 3);
    assert_eq!(summary.payload_bytes, 6 + 100_000);
    let batches = play.join().unwrap();
    assert_eq!(
        batches,
        [vec![b"before".to_vec()], vec![large], vec![vec![]]]
    );
}

#[test]
fn a_batch_that_is_not_full_goes_after_the_linger_time() {
    let (told, arrived) = channel();
    let (address, play) = broker(move |mut peer| {
        peer.welcome();
        told.send(peer.batch()).unwrap();
        peer.drain();
    });
    let mut publisher = Publisher::connect(Config {
        linger: Duration::from_millis(5),
        ..config(&[&address])
    })
    .unwrap();
    publisher.publish(b"lonely").unwrap();
    assert_eq!(arrived.recv_timeout(TIMEOUT).unwrap(), [b"lonely"]);
    drop(publisher);
    play.join().unwrap();
}

/// Waits until so many messages are acked, without asking for it.
fn wait_until_acked(publisher: &Publisher, messages: u64) {
    let deadline = Instant::now() + TIMEOUT;
    while publisher.progress().messages_acked() < messages {
        assert!(Instant::now() < deadline, "no batch went by itself");
        thread::yield_now();
    }
}

#[test]
fn after_the_linger_time_a_batch_goes_on_where_it_was() {
    let (address, play) = broker(Peer::serve);
    let mut publisher = Publisher::connect(Config {
        linger: Duration::from_millis(1),
        ..config(&[&address])
    })
    .unwrap();
    let messages = numbered(4000);
    // Silence after each of the first, silence in the middle of a batch, none at all, and a flush.
    let mut published = 0;
    for part in [1, 1, 2, 3, 100, 5, 1000, 1, 2000] {
        publish_all(&mut publisher, &messages[published..published + part]);
        published += part;
        wait_until_acked(&publisher, published as u64);
    }
    publish_all(&mut publisher, &messages[published..published + 7]);
    publisher.flush().unwrap();
    assert_eq!(publisher.progress().messages_acked(), published as u64 + 7);
    publish_all(&mut publisher, &messages[published + 7..]);
    let summary = publisher.close().unwrap();
    assert_eq!(
        (summary.messages_sent, summary.messages_acked),
        (4000, 4000)
    );
    assert_eq!(play.join().unwrap().concat(), messages);
}

#[test]
fn batches_that_the_linger_time_sends_while_messages_come_lose_and_repeat_none() {
    let (address, play) = broker(Peer::serve);
    let mut publisher = Publisher::connect(Config {
        linger: Duration::from_micros(1),
        // Batches that fill slowly enough to be sent before they are full.
        batch_size: 60_000,
        ..config(&[&address])
    })
    .unwrap();
    let messages = numbered(20_000);
    for (number, message) in messages.iter().enumerate() {
        publisher.publish(message).unwrap();
        if number % 16 == 0 {
            thread::yield_now();
        }
        if number % 2000 == 0 {
            wait_until_acked(&publisher, number as u64 + 1);
        }
    }
    let summary = publisher.close().unwrap();
    assert_eq!(summary.messages_sent, 20_000);
    assert_eq!(summary.messages_acked, 20_000);
    assert_eq!(play.join().unwrap().concat(), messages);
}

#[test]
fn a_publisher_may_move_between_threads() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Publisher>();
}

#[test]
fn a_cancelled_publisher_counts_what_it_has_not_sent() {
    let (address, play) = broker(|mut peer| {
        peer.welcome();
        peer.drain();
    });
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    publish_all(&mut publisher, &numbered(10));
    publisher.canceller().cancel();
    let summary = publisher.close().unwrap();
    assert_eq!((summary.messages_sent, summary.messages_acked), (10, 0));
    play.join().unwrap();
}

#[test]
fn flush_returns_once_all_is_acked_and_the_publisher_goes_on() {
    let (address, play) = broker(Peer::serve);
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    let progress = publisher.progress();
    for round in 1..=20 {
        publish_all(&mut publisher, &numbered(10));
        publisher.flush().unwrap();
        assert_eq!(progress.messages_acked(), 10 * round);
    }
    publisher.flush().unwrap();
    publisher.close().unwrap();
    assert_eq!(play.join().unwrap().concat().len(), 200);
}

#[test]
fn at_ack_level_0_no_window_holds_up_and_the_end_is_confirmed() {
    let (address, play) = broker(Peer::serve);
    let mut publisher = Publisher::connect(Config {
        ack: AckLevel::None,
        in_flight: 1,
        ..config(&[&address])
    })
    .unwrap();
    let messages = numbered(5000);
    publish_all(&mut publisher, &messages);
    publisher.flush().unwrap();
    let summary = publisher.close().unwrap();
    assert_eq!(
        (summary.messages_sent, summary.messages_acked),
        (5000, 5000)
    );
    assert_eq!(summary.ack_latency_us, None);
    assert_eq!(play.join().unwrap().concat(), messages);
}

#[test]
fn a_dropped_publisher_gives_up_at_once() {
    let (address, play) = broker(|mut peer| {
        peer.welcome();
        // Never acks; sees the connection go.
        peer.drain();
    });
    let mut publisher = Publisher::connect(config(&[&address])).unwrap();
    publish_all(&mut publisher, &numbered(1000));
    drop(publisher);
    play.join().unwrap();
}

#[test]
fn impossible_settings_are_refused_before_any_connection() {
    let nobody = "127.0.0.1:1".to_owned();
    let good = config(&[&nobody]);
    let broken = [
        Config {
            batch_size: 0,
            ..good.clone()
        },
        Config {
            threads_per_broker: 0,
            ..good.clone()
        },
        Config {
            io_threads: Some(0),
            ..good.clone()
        },
        Config {
            in_flight: 0,
            ..good.clone()
        },
        config(&[]),
    ];
    for config in broken {
        let error = refusal_of(config);
        assert!(matches!(error, Error::Config(_)), "{error}");
    }
    let error = refusal_of(Config {
        topic: "../etc".to_owned(),
        ..good
    });
    assert!(matches!(error, Error::Topic(_)), "{error}");
    let error = refusal_of(config(&[&"nonsense".to_owned()]));
    assert!(matches!(error, Error::Address { .. }), "{error}");
}

#[test]
fn a_failure_that_the_linger_time_brings_up_is_told_to_the_next_caller() {
    let (address, play) = broker(|mut peer| peer.welcome());
    let mut publisher = Publisher::connect(Config {
        linger: Duration::from_millis(1),
        timeout: BRIEF,
        ..config(&[&address])
    })
    .unwrap();
    play.join().unwrap();
    let error = loop {
        // Time for the batch to be sent without anybody asking.
        thread::sleep(Duration::from_millis(10));
        if let Err(error) = publisher.publish(b"lonely") {
            break error;
        }
    };
    assert!(matches!(error, Error::NotResumed { .. }), "{error}");
}
