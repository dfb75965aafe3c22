//! A broker that is lost: its streams wait, fail, or continue at other brokers and return.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use penstock_publisher::{Config, Error, OnBrokerLoss, Publisher, Summary};
use penstock_wire::batch::Frame;
use penstock_wire::handshake::{AckLevel, Refusal, Welcome};
use penstock_wire::reply::{Fault, Reply};
use zerocopy::IntoBytes;

use crate::peer::*;

/// The session that a second broker chooses.
const OTHER_SESSION: u64 = 0x07e5;

type Batches = BTreeMap<u64, Vec<Vec<u8>>>;

/// What a broker's own stream brings, and what it takes over.
type Playing<T> = JoinHandle<(Vec<Vec<u8>>, T)>;

/// What brokers committed of a stream, each batch under its number.
#[derive(Default)]
struct Log(Batches);

impl Log {
    /// Takes a batch; `is_acked` says whether the publisher is told.
    fn take(&mut self, peer: &mut Peer, is_acked: bool) -> Option<u64> {
        match peer.frame() {
            Frame::Batch(batch) => {
                let messages = peer.messages(&batch);
                let last = self.0.insert(batch.batch_seq, messages);
                assert!(last.is_none(), "batch {} twice", batch.batch_seq);
                if is_acked {
                    peer.ack(batch.batch_seq + 1);
                }
                Some(batch.batch_seq)
            }
            Frame::End { batches } => {
                peer.ack(batches);
                None
            }
        }
    }

    /// Takes and acks everything to the end of the stream.
    fn take_all(&mut self, peer: &mut Peer) {
        while self.take(peer, true).is_some() {}
    }
}

/// All messages of a stream, from several logs. Doubles must be equal, and nothing may be missing.
fn union(logs: &[&Batches]) -> Vec<Vec<u8>> {
    let mut all = Batches::new();
    for (seq, messages) in logs.iter().flat_map(|log| log.iter()) {
        let earlier = all.insert(*seq, messages.clone());
        assert!(earlier.is_none_or(|earlier| earlier == *messages));
    }
    assert!(all.keys().copied().eq(0..all.len() as u64), "gaps");
    all.into_values().flatten().collect()
}

/// A broker whose own stream is good to the end, while it takes over streams of other brokers: `guest` plays those,
/// with the listener. Returns what the own stream brought, and what `guest` returned.
fn host<T: Send + 'static>(
    guest: impl FnOnce(&TcpListener) -> T + Send + 'static,
) -> (String, Playing<T>) {
    let (listener, address) = listen();
    let play = move || {
        let mut own = Peer::accept(&listener);
        own.welcome_as(OTHER_SESSION, 0);
        let own = thread::spawn(move || {
            let mut log = Log::default();
            log.take_all(&mut own);
            log.0
        });
        let guest = guest(&listener);
        (union(&[&own.join().unwrap()]), guest)
    };
    (address, thread::spawn(play))
}

/// The next connection to a stream of `SESSION`, of which `acked` batches are acknowledged.
fn guest(listener: &TcpListener, acked: u64) -> Peer {
    let mut peer = Peer::accept(listener);
    assert_eq!(peer.request.session, SESSION);
    assert_eq!(peer.request.resume_from, Some(acked));
    peer.welcome_as(SESSION, acked);
    peer
}

/// Publishes this many numbered messages.
fn publish(config: Config, count: usize) -> Result<Summary, Error> {
    let mut publisher = Publisher::connect(config)?;
    for message in numbered(count) {
        publisher.publish(&message)?;
    }
    publisher.close()
}

/// Publishes numbered messages until a broker is back, and some more; returns how many.
fn publish_until(publisher: &mut Publisher, is_back: &Receiver<()>) -> usize {
    let mut count = 0;
    let mut publish = |publisher: &mut Publisher| {
        for _ in 0..1000 {
            publisher.publish(count.to_string().as_bytes()).unwrap();
            count += 1;
        }
        publisher.flush().unwrap();
    };
    while is_back.try_recv().is_err() {
        publish(publisher);
    }
    for _ in 0..10 {
        publish(publisher);
    }
    count
}

/// Checks that all messages arrived, over all streams.
fn assert_all_arrived(summary: &Summary, count: usize, streams: Vec<Vec<Vec<u8>>>) {
    assert_eq!(summary.messages_acked, count as u64);
    for stream in &streams {
        let numbers = stream.iter().map(|message| number(message));
        assert!(numbers.is_sorted(), "a stream is out of order");
    }
    let mut all: Vec<_> = streams.concat().iter().map(|m| number(m)).collect();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..count), "lost or doubled");
}

fn number(message: &[u8]) -> usize {
    str::from_utf8(message).unwrap().parse().unwrap()
}

#[test]
fn what_a_lost_broker_has_not_acked_continues_elsewhere_under_the_same_identity() {
    const COUNT: usize = 40_000;
    let (lost, lost_address) = listen();
    let lost = thread::spawn(move || {
        let mut peer = Peer::accept(&lost);
        peer.welcome();
        let mut log = Log::default();
        for number in 0..5 {
            // The last two are committed, but the publisher never learns that.
            log.take(&mut peer, number < 3);
        }
        // The broker dies: nothing listens any more.
        drop(lost);
        peer.close();
        log.0
    });
    let (host, play) = host(|listener| {
        let mut log = Log::default();
        log.take_all(&mut guest(listener, 3));
        log.0
    });
    let summary = publish(config(&[&lost_address, &host]), COUNT).unwrap();
    let (own, continued) = play.join().unwrap();
    let lost = lost.join().unwrap();
    // The doubles have the same numbers and contents.
    assert!(continued.keys().next() == Some(&3) && lost.len() == 5);
    // What comes goes to streams whose brokers live.
    assert!(own.len() > continued.values().flatten().count());
    assert_all_arrived(&summary, COUNT, vec![own, union(&[&lost, &continued])]);
    let [home, other] = &summary.brokers[..] else {
        panic!("two brokers")
    };
    let stream = &home.streams[0];
    assert_eq!((stream.reroutes, stream.returns, stream.moves), (1, 0, 1));
    assert_eq!(stream.at.as_ref(), Some(&host));
    assert_eq!(home.session, format!("{SESSION:016x}"));
    assert_eq!(other.streams[0].reroutes, 0);
    assert_eq!((summary.reroutes, summary.returns), (1, 0));
    assert!(summary.detection_ms.is_some() && summary.recovery_ms.is_some());
}

#[test]
fn a_stream_returns_once_its_broker_is_back_and_continues_there() {
    let (home, home_address) = listen();
    let (gone, may_come_back) = channel();
    let (back, is_back) = channel();
    let home = thread::spawn(move || {
        let address = home.local_addr().unwrap();
        let mut peer = Peer::accept(&home);
        peer.welcome();
        let mut log = Log::default();
        for number in 0..3 {
            log.take(&mut peer, number < 2);
        }
        drop(home);
        peer.close();
        let acked: u64 = may_come_back.recv_timeout(TIMEOUT).unwrap();
        let home = TcpListener::bind(address).unwrap();
        let mut peer = Peer::accept_stream(&home);
        assert_eq!(peer.request.session, SESSION);
        let resume_from = peer.request.resume_from.unwrap();
        assert!(resume_from >= acked);
        peer.welcome_as(SESSION, resume_from);
        back.send(()).unwrap();
        log.take_all(&mut peer);
        log.0
    });
    let (host, play) = host(move |listener| {
        let mut peer = guest(listener, 2);
        let mut log = Log::default();
        let first = log.take(&mut peer, true).unwrap();
        gone.send(first + 1).unwrap();
        // Until the publisher leaves, all that it has sent is acknowledged.
        while !peer.is_closed() {
            log.take(&mut peer, true);
        }
        log.0
    });
    let mut publisher = Publisher::connect(config(&[&home_address, &host])).unwrap();
    let count = publish_until(&mut publisher, &is_back);
    let summary = publisher.close().unwrap();
    let (own, continued) = play.join().unwrap();
    let home = home.join().unwrap();
    assert!(
        home.keys()
            .any(|seq| continued.keys().all(|other| other < seq))
    );
    assert_all_arrived(&summary, count, vec![own, union(&[&home, &continued])]);
    let stream = &summary.brokers[0].streams[0];
    assert_eq!((stream.reroutes, stream.returns, stream.moves), (1, 1, 2));
    assert_eq!(stream.at, None);
}

/// A broker that takes five batches, acks none, and is gone.
fn dying() -> (String, JoinHandle<Batches>) {
    let (listener, address) = listen();
    let play = move || {
        let mut peer = Peer::accept(&listener);
        peer.welcome();
        let mut log = Log::default();
        for _ in 0..5 {
            log.take(&mut peer, false);
        }
        log.0
    };
    (address, thread::spawn(play))
}

/// A lost broker's stream is first asked for at a broker that plays `unhelpful`, and then at another one, which takes it:
/// all messages must arrive.
fn assert_passed_over(unhelpful: impl FnOnce(&TcpListener) + Send + 'static) {
    const COUNT: usize = 20_000;
    let (dying, lost) = dying();
    let takes = |listener: &TcpListener| {
        let mut log = Log::default();
        log.take_all(&mut guest(listener, 0));
        log.0
    };
    // The session's number decides whose turn is first: of two others, the one after the home.
    assert_eq!(SESSION % 2, 1, "the second one after the home is first");
    let (takes, taken) = host(takes);
    let (unhelpful, asked) = host(unhelpful);
    let summary = publish(config(&[&dying, &takes, &unhelpful]), COUNT).unwrap();
    let (second, ()) = asked.join().unwrap();
    let (third, continued) = taken.join().unwrap();
    let rerouted = union(&[&lost.join().unwrap(), &continued]);
    assert_all_arrived(&summary, COUNT, vec![second, third, rerouted]);
}

#[test]
fn a_broker_that_refuses_is_followed_by_the_next_one() {
    for refusal in [
        Refusal::Resources,
        Refusal::Permission,
        Refusal::Session,
        Refusal::Topic,
    ] {
        assert_passed_over(move |listener| {
            let mut peer = Peer::accept(listener);
            peer.say(&Welcome::refuse(refusal, "not here"));
        });
    }
}

/// A publisher to two brokers, of which the first is gone after a few batches, fails.
fn fails(on_broker_loss: OnBrokerLoss, timeout: Duration) -> (Error, String) {
    let (dying, lost) = dying();
    let (listener, other) = listen();
    let serve = thread::spawn(move || Peer::accept_welcome(&listener).ack_until_gone());
    let mut publisher = Publisher::connect(Config {
        on_broker_loss: Some(on_broker_loss),
        timeout,
        ..config(&[&dying, &other])
    })
    .unwrap();
    let error = failure_of(&mut publisher);
    drop(publisher);
    lost.join().unwrap();
    serve.join().unwrap();
    (error, dying)
}

#[test]
fn a_publisher_that_is_to_fail_does_so_at_once() {
    let (error, dying) = fails(OnBrokerLoss::Fail, TIMEOUT);
    assert!(
        matches!(&error, Error::BrokerLost { broker, unacked, .. } if *broker == dying && *unacked > 0),
        "{error}"
    );
    assert!(error.to_string().contains("--on-broker-loss"), "{error}");
}

#[test]
fn a_publisher_that_is_to_wait_does_not_go_elsewhere() {
    let (error, dying) = fails(OnBrokerLoss::Wait, BRIEF);
    assert!(
        matches!(&error, Error::NotResumed { broker, .. } if *broker == dying),
        "{error}"
    );
}

#[test]
fn when_no_broker_is_left_each_is_named() {
    let (first, lost) = dying();
    let (second, also_lost) = dying();
    let mut publisher = Publisher::connect(Config {
        timeout: BRIEF,
        ..config(&[&first, &second])
    })
    .unwrap();
    let error = failure_of(&mut publisher);
    assert!(matches!(error, Error::NoBroker { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&first) && text.contains(&second), "{text}");
    drop(publisher);
    lost.join().unwrap();
    also_lost.join().unwrap();
}

#[test]
fn no_broker_at_the_start_is_told_with_all_of_them() {
    let [first, second] = [listen().1, listen().1];
    let error = refusal_of(config(&[&first, &second]));
    assert!(matches!(error, Error::NoneReachable { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&first) && text.contains(&second), "{text}");
}

#[test]
fn a_broker_that_is_down_at_the_start_gets_its_streams_when_it_comes() {
    let (home, home_address) = listen();
    let at = home.local_addr().unwrap();
    drop(home);
    let (opened, is_open) = channel::<()>();
    let (back, is_back) = channel();
    let home = thread::spawn(move || {
        is_open.recv_timeout(TIMEOUT).unwrap();
        let home = TcpListener::bind(at).unwrap();
        let mut peer = Peer::accept_stream(&home);
        // The session is that of the broker that opened it.
        assert_eq!(peer.request.session, SESSION);
        let acked = peer.request.resume_from.unwrap();
        peer.welcome_as(SESSION, acked);
        back.send(()).unwrap();
        let mut log = Log::default();
        log.take_all(&mut peer);
        log.0
    });
    let (host, play) = host(move |listener| {
        let mut peer = Peer::accept(listener);
        assert_eq!((peer.request.session, peer.request.resume_from), (0, None));
        peer.welcome();
        let mut log = Log::default();
        opened.send(()).unwrap();
        while !peer.is_closed() {
            log.take(&mut peer, true);
        }
        log.0
    });
    let mut publisher = Publisher::connect(config(&[&home_address, &host])).unwrap();
    let count = publish_until(&mut publisher, &is_back);
    let summary = publisher.close().unwrap();
    let (own, continued) = play.join().unwrap();
    let home = home.join().unwrap();
    assert!(!home.is_empty(), "nothing came to the home");
    assert_all_arrived(&summary, count, vec![own, union(&[&home, &continued])]);
    assert_eq!((summary.reroutes, summary.returns), (1, 1));
    assert_eq!(summary.brokers[0].session, format!("{SESSION:016x}"));
}

#[test]
fn a_broker_that_hangs_is_left_although_its_host_answers() {
    const COUNT: usize = 20_000;
    let (hung, address) = listen();
    let (done, is_done) = channel::<()>();
    let hung = thread::spawn(move || {
        let mut peer = Peer::accept(&hung);
        peer.welcome();
        // It takes nothing, answers nothing, and its kernel accepts connections.
        is_done.recv_timeout(TIMEOUT).unwrap();
    });
    let (host, play) = host(|listener| {
        let mut log = Log::default();
        log.take_all(&mut guest(listener, 0));
        log.0
    });
    let summary = publish(config(&[&address, &host]), COUNT).unwrap();
    let (own, continued) = play.join().unwrap();
    assert_all_arrived(&summary, COUNT, vec![own, union(&[&continued])]);
    done.send(()).unwrap();
    hung.join().unwrap();
}

#[test]
fn a_broker_that_waits_for_room_all_the_time_is_left() {
    const COUNT: usize = 20_000;
    let (listener, address) = listen();
    let blocked = thread::spawn(move || {
        let mut peer = Peer::accept(&listener);
        peer.welcome();
        peer.socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        // It is alive, and would accept the stream again.
        while peer.tell(Reply::ack(0, true).as_bytes()) {
            peer.read_some();
        }
        listener
    });
    let (host, play) = host(|listener| {
        let mut log = Log::default();
        log.take_all(&mut guest(listener, 0));
        log.0
    });
    let settings = Config {
        timeout: Duration::from_secs(1),
        ..config(&[&address, &host])
    };
    let summary = publish(settings, COUNT).unwrap();
    let (own, continued) = play.join().unwrap();
    assert_all_arrived(&summary, COUNT, vec![own, union(&[&continued])]);
    blocked.join().unwrap();
}

#[test]
fn without_acks_the_publisher_goes_on_and_does_not_count_what_may_be_lost() {
    const COUNT: usize = 20_000;
    let (lost, address) = listen();
    let lost = thread::spawn(move || {
        let mut peer = Peer::accept(&lost);
        peer.welcome();
        let mut log = Log::default();
        log.take(&mut peer, false);
        log.take(&mut peer, false);
        peer.say(&Reply::error(Fault::Shutdown, 0, "it ends"));
    });
    let (host, play) = host(|listener| {
        let mut peer = Peer::accept(listener);
        assert_eq!(peer.request.session, SESSION);
        let sent = peer.request.resume_from.unwrap();
        peer.welcome_as(SESSION, sent);
        let mut log = Log::default();
        log.take_all(&mut peer);
        (sent, log.0)
    });
    let settings = Config {
        ack: AckLevel::None,
        ..config(&[&address, &host])
    };
    let summary = publish(settings, COUNT).unwrap();
    let (own, (sent, continued)) = play.join().unwrap();
    assert!(sent >= 2 && continued.keys().all(|seq| *seq >= sent));
    let arrived = own.len() + continued.values().flatten().count();
    assert_eq!(summary.messages_sent, COUNT as u64);
    assert_eq!(summary.messages_acked, arrived as u64);
    assert!(summary.messages_acked < summary.messages_sent);
    lost.join().unwrap();
}

#[test]
fn a_home_that_answers_but_refuses_leaves_the_stream_where_it_is() {
    let (home, home_address) = listen();
    let (refused, was_refused) = channel::<()>();
    let home = thread::spawn(move || {
        let mut peer = Peer::accept(&home);
        peer.welcome();
        let mut log = Log::default();
        log.take(&mut peer, false);
        drop(peer);
        refuse(&home, &refused);
        // Asked once more after a longer pause; what it says does not matter to the stream.
        refuse(&home, &refused);
        log.0
    });
    let (host, play) = host(|listener| {
        let mut log = Log::default();
        log.take_all(&mut guest(listener, 0));
        log.0
    });
    let mut publisher = Publisher::connect(config(&[&home_address, &host])).unwrap();
    let mut count = 0;
    let mut refusals = 0;
    while refusals < 2 {
        refusals += was_refused.try_iter().count();
        publisher.publish(count.to_string().as_bytes()).unwrap();
        publisher.flush().unwrap();
        count += 1;
    }
    let summary = publisher.close().unwrap();
    let (own, continued) = play.join().unwrap();
    let home = home.join().unwrap();
    assert_all_arrived(&summary, count, vec![own, union(&[&home, &continued])]);
    assert_eq!((summary.reroutes, summary.returns), (1, 0));
}

#[test]
fn a_stream_that_is_idle_elsewhere_returns_with_its_next_message() {
    let (home, home_address) = listen();
    let at = home.local_addr().unwrap();
    let (idle, is_idle) = channel::<u64>();
    let (flushed, is_flushed) = channel();
    let (back, is_back) = channel();
    let home = thread::spawn(move || {
        let mut peer = Peer::accept(&home);
        peer.welcome();
        let mut log = Log::default();
        log.take(&mut peer, false);
        drop(home);
        peer.close();
        let acked = is_idle.recv_timeout(TIMEOUT).unwrap();
        let home = TcpListener::bind(at).unwrap();
        // The first to connect is a probe; the stream has nothing to do yet.
        drop(home.accept().unwrap());
        back.send(()).unwrap();
        let mut peer = Peer::accept_stream(&home);
        assert_eq!(peer.request.resume_from, Some(acked));
        peer.welcome_as(SESSION, acked);
        log.take_all(&mut peer);
        log.0
    });
    let (host, play) = host(move |listener| {
        let mut peer = guest(listener, 0);
        let mut log = Log::default();
        let mut acked = 0;
        // Until all is acknowledged.
        while is_flushed.try_recv().is_err() {
            if peer.has_something() {
                acked = log.take(&mut peer, true).unwrap() + 1;
            }
        }
        peer.say(&Reply::error(Fault::Stalled, acked, "idle"));
        idle.send(acked).unwrap();
        log.0
    });
    let mut publisher = Publisher::connect(config(&[&home_address, &host])).unwrap();
    let first = numbered(1000);
    publish_all(&mut publisher, &first);
    publisher.flush().unwrap();
    flushed.send(()).unwrap();
    is_back.recv_timeout(TIMEOUT).unwrap();
    let mut count = first.len();
    while !home.is_finished() && count < 20_000 {
        publisher.publish(count.to_string().as_bytes()).unwrap();
        count += 1;
        if count.is_multiple_of(1000) {
            publisher.flush().unwrap();
        }
    }
    let summary = publisher.close().unwrap();
    let (own, continued) = play.join().unwrap();
    let home = home.join().unwrap();
    assert!(home.len() > 1, "nothing came to the home again");
    assert_all_arrived(&summary, count, vec![own, union(&[&home, &continued])]);
    assert_eq!((summary.reroutes, summary.returns), (1, 1));
}

#[test]
fn an_address_that_cannot_be_one_is_not_taken_for_a_broker_that_is_down() {
    let (_listener, host) = listen();
    let error = refusal_of(config(&[&"nonsense".to_owned(), &host]));
    assert!(matches!(error, Error::Address { .. }), "{error}");
}

/// Refuses the next stream that is asked for.
fn refuse(listener: &TcpListener, refused: &Sender<()>) {
    let mut peer = Peer::accept_stream(listener);
    peer.say(&Welcome::refuse(Refusal::Resources, "no room"));
    refused.send(()).unwrap();
}

/// It has at most the five batches that the lost one took, since nothing was acknowledged.
#[test]
fn a_broker_that_claims_impossible_batches_is_followed_by_the_next_one() {
    for claim in [1_000_000, u64::MAX] {
        assert_passed_over(move |listener| {
            let mut peer = Peer::accept(listener);
            peer.welcome_as(SESSION, claim);
            assert!(peer.is_closed(), "it is believed");
        });
    }
}

#[test]
fn a_new_stream_has_no_batches_yet() {
    let (listener, address) = listen();
    let play = thread::spawn(move || {
        Peer::accept(&listener).welcome_as(SESSION, 3);
        listener
    });
    let error = Publisher::connect(config(&[&address])).err().unwrap();
    assert!(
        matches!(&error, Error::BadResume { committed: 3, .. }),
        "{error}"
    );
    drop(play.join().unwrap());
}

/// It takes the stream again and again; another one would help.
#[test]
fn a_broker_that_accepts_but_acknowledges_nothing_is_passed_over() {
    assert_passed_over(|listener| {
        let mut peer = guest(listener, 0);
        peer.frame();
        peer.close();
    });
}
