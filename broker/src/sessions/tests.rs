//! Tests of sessions, over topics in a temporary directory.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crossbeam_channel::Receiver;
use penstock_auth::Key;
use penstock_ingest::session::peer::Host;
use penstock_log::{Access, Geometry, LogOptions, RingFullPolicy};
use penstock_wire::handshake::{AckLevel, OrderLevel, Path};
use tempfile::TempDir;

use super::session::SESSION_GRACE;
use super::*;
use crate::buffer_dir;
use crate::liveness::Pulse;
use crate::topic_policy::{Creators, TopicPolicy};
use crate::topics::TopicConfig;

/// Sessions, and the thread that opens logs, which the test runs step by step.
struct Bench {
    sessions: Sessions,
    opener: Receiver<Job>,
    logs: PathBuf,
}

impl Bench {
    fn new(dir: &TempDir) -> Self {
        Self::with(dir, 4, Creators::Any, &[])
    }

    fn with(dir: &TempDir, max: usize, creators: Creators, patterns: &[&str]) -> Self {
        let options = LogOptions {
            geometry: Geometry::new(1 << 16, 1 << 12, 16).unwrap(),
            full: RingFullPolicy::Block,
            access: Access::default(),
            writers: 1,
        };
        let logs = dir.path().join("logs");
        buffer_dir::make(&logs, None, Access::default()).unwrap();
        let config = TopicConfig {
            max,
            share_percent: 50,
            policy: TopicPolicy {
                creators,
                patterns: patterns.iter().map(|p| p.parse().unwrap()).collect(),
            },
        };
        let (jobs, opener) = crossbeam_channel::unbounded();
        let topics = Arc::new(Topics::new(logs.clone(), options, config).unwrap());
        Self {
            sessions: Sessions::new(topics, 50, jobs),
            opener,
            logs,
        }
    }

    fn work(&self) {
        let (sender, jobs) = crossbeam_channel::unbounded();
        self.opener
            .try_iter()
            .for_each(|job| sender.send(job).unwrap());
        drop(sender);
        self.sessions.topics.serve(&jobs, &Pulse::default(), || {});
    }

    /// The result for a stream, once its topic is open.
    fn ask(&mut self, asked: &StreamRequest<'_>) -> Result<Admission, Refused> {
        self.sessions.check(asked)?;
        match self.sessions.admit(asked)? {
            Outcome::Admitted(admission) => return Ok(*admission),
            Outcome::TopicOpening => self.work(),
        }
        assert!(self.sessions.topics_changed());
        match self.sessions.admit(asked)? {
            Outcome::Admitted(admission) => Ok(*admission),
            Outcome::TopicOpening => panic!("the topic is open"),
        }
    }

    fn admit(&mut self, topic: &str, request: &Request) -> Result<Admission, Refused> {
        self.ask(&asked(topic, request, 1, None))
    }

    fn kept(&self) -> usize {
        assert_eq!(self.sessions.shares.total(), {
            let sessions = self.sessions.sessions.values();
            sessions.map(|s| s.opened_streams.len()).sum::<usize>()
        });
        self.sessions.sessions.len()
    }

    fn files(&self) -> Vec<String> {
        let files = fs::read_dir(&self.logs).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name.ends_with(".log")).collect();
        names.sort();
        names
    }
}

fn asked<'a>(
    topic: &'a str,
    request: &'a Request,
    host: u8,
    key: Option<&'a Key>,
) -> StreamRequest<'a> {
    StreamRequest {
        topic,
        request,
        tenant: Tenant {
            host: Host::of(([10, 0, 0, host], 1).into()),
            key: key.map(|key| *key.id()),
        },
        key,
        is_local: false,
    }
}

fn request(session: u64, stream: u32) -> Request {
    Request {
        session,
        stream,
        streams: 2,
        ack: AckLevel::Committed,
        order: OrderLevel::PerStream,
        max_payload: 1024,
        path: Path::Tcp,
        resume_from: None,
        max_datagram: 0,
    }
}

#[test]
fn streams_join_their_session_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let first = bench.admit("a", &request(0, 0)).unwrap();
    let second = bench.admit("a", &request(first.session, 1)).unwrap();
    assert_eq!(first.session, second.session);
    let other = bench.admit("a", &request(0, 0)).unwrap();
    assert_ne!(other.session, first.session);
    bench.admit("b", &request(0, 0)).unwrap();
    let mut refused = |topic, request| bench.admit(topic, &request).unwrap_err().text;
    assert!(refused("a", request(first.session, 1)).contains("opened before"));
    assert!(refused("b", request(first.session, 1)).contains("another topic"));
    assert!(refused("a", request(first.session ^ 1, 1)).contains("connect anew"));
}

#[test]
fn a_stream_goes_on_over_another_connection() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let first = bench.admit("a", &request(0, 0)).unwrap();
    first.lease.set_committed(5);
    let resume = |acked| Request {
        resume_from: Some(acked),
        ..request(first.session, 0)
    };
    let busy = bench.admit("a", &resume(3)).unwrap_err();
    assert_eq!(busy.refusal, Refusal::Busy);
    assert!(first.lease.is_superseded());
    drop(first.lease);
    let second = bench.admit("a", &resume(3)).unwrap();
    assert_eq!(second.lease.committed(), 5);
}

#[test]
fn a_stream_that_comes_back_continues_after_what_other_brokers_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let first = bench.admit("a", &request(0, 0)).unwrap();
    let session = first.session;
    first.lease.set_committed(5);
    drop(first);
    let resume = |acked| Request {
        resume_from: Some(acked),
        ..request(session, 0)
    };
    // Batches 5 to 8 are at another broker.
    let back = bench.admit("a", &resume(9)).unwrap();
    assert_eq!(back.lease.committed(), 9);
    drop(back);
    // It never goes back, even if the session is forgotten meanwhile.
    assert_eq!(bench.admit("a", &resume(7)).unwrap().lease.committed(), 9);
    let start = Instant::now();
    bench.sessions.expire(start);
    bench.sessions.expire(start + SESSION_GRACE);
    assert_eq!(bench.kept(), 0);
    assert_eq!(bench.admit("a", &resume(7)).unwrap().lease.committed(), 9);
}

#[test]
fn a_claim_to_continue_further_on_is_not_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let first = bench.admit("a", &request(0, 0)).unwrap();
    let session = first.session;
    drop(first);
    let resume = |acked| Request {
        resume_from: Some(acked),
        ..request(session, 0)
    };
    drop(bench.admit("a", &resume(1000)).unwrap());
    let start = Instant::now();
    bench.sessions.expire(start);
    bench.sessions.expire(start + Duration::from_secs(5));
    assert_eq!(
        bench.kept(),
        0,
        "it committed nothing, so it is dropped soon"
    );
    assert_eq!(bench.admit("a", &resume(2)).unwrap().lease.committed(), 2);
}

#[test]
fn a_session_is_forgotten_once_it_has_been_without_streams_for_long() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let start = Instant::now();
    let after = |seconds| start + Duration::from_secs(seconds);
    let open = bench.admit("a", &request(0, 0)).unwrap();
    let used = bench.admit("a", &request(0, 0)).unwrap();
    used.lease.set_committed(1);
    drop(used.lease);
    let unused = bench.admit("a", &request(0, 0)).unwrap();
    drop(unused.lease);
    // A session's age does not matter: its time starts when its last stream ends.
    bench.sessions.expire(after(5000));
    bench.sessions.expire(after(5000 + 4));
    assert_eq!(bench.kept(), 3);
    // Dropping the session that committed nothing loses nothing.
    bench.sessions.expire(after(5000 + 5));
    assert_eq!(bench.kept(), 2);
    bench.sessions.expire(after(5000 + 599));
    assert_eq!(bench.kept(), 2);
    bench.sessions.expire(after(5000 + 600));
    assert_eq!(bench.kept(), 1);
    assert!(bench.sessions.sessions.contains_key(&open.session));
    drop(open.lease);
    bench.sessions.expire(after(6000));
    // It came back in time, so it stays.
    let again = Request {
        resume_from: Some(0),
        ..request(open.session, 0)
    };
    let again = bench.admit("a", &again).unwrap();
    bench.sessions.expire(after(7000));
    assert_eq!(bench.kept(), 1);
    drop(again);
}

fn made_up(session: u64) -> Request {
    Request {
        resume_from: Some(1000),
        ..request(session, 0)
    }
}

#[test]
fn sessions_without_a_commit_keep_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let early = bench.admit("a", &request(0, 0)).unwrap();
    let used = bench.admit("a", &request(0, 1)).unwrap();
    used.lease.set_committed(1);
    drop(used.lease);
    // More than the maximum, half of them invented, whatever they claim to have committed.
    for session in 1..=MAX_KEPT as u64 {
        bench.admit("a", &request(0, 0)).unwrap();
        bench.admit("a", &made_up(session)).unwrap();
    }
    assert_eq!(bench.kept(), MAX_KEPT / 2, "the share of one host");
    // A session with an open stream stays, and so does one that committed something.
    for known in [early.session, used.session] {
        assert!(bench.sessions.sessions.contains_key(&known));
    }
    let honest = request(0, 0);
    bench.ask(&asked("a", &honest, 2, None)).unwrap();
    bench.admit("a", &honest).unwrap();
}

#[test]
fn each_stream_of_a_session_counts() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let streams = 1024;
    let many = |session, stream| Request {
        streams,
        ..request(session, stream)
    };
    let mut held = Vec::new();
    for _ in 0..MAX_KEPT / 2 / streams as usize {
        let first = bench.admit("a", &many(0, 0)).unwrap();
        let admitted = (1..streams).map_while(|n| bench.admit("a", &many(first.session, n)).ok());
        let count = admitted.count();
        held.push((first, count));
    }
    assert_eq!(bench.sessions.shares.total(), MAX_KEPT / 2);
    let said = bench.admit("a", &many(0, 0)).map(|_| ());
    drop(held);
    let said = said.unwrap_err().text;
    assert!(said.contains("host 10.0.0.1 has 32768 streams"), "{said}");
    bench.admit("a", &many(0, 0)).unwrap();
}

#[test]
fn a_stream_of_an_earlier_broker_goes_on_where_its_publisher_left_off() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let resume = Request {
        resume_from: Some(9),
        ..request(77, 1)
    };
    let admission = bench.admit("a", &resume).unwrap();
    assert_eq!((admission.session, admission.lease.committed()), (77, 9));
}

#[test]
fn a_forgotten_stream_that_is_resumed_repeats_no_batch() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let first = bench.admit("a", &request(0, 0)).unwrap();
    let session = first.session;
    first.lease.set_committed(5);
    // Of the last two batches the publisher never sees an ack.
    let resume = Request {
        resume_from: Some(3),
        ..request(session, 0)
    };
    drop(first);
    let start = Instant::now();
    bench.sessions.expire(start);
    bench.sessions.expire(start + SESSION_GRACE);
    assert_eq!(bench.kept(), 0);
    let again = bench.admit("a", &resume).unwrap();
    assert_eq!(again.lease.committed(), 5);
    // Nothing new was committed: it is not forgotten for all that.
    drop(again);
    let tenant = asked("a", &resume, 1, None).tenant;
    assert!(bench.sessions.evict(&tenant, Exceeded::Host { held: 1 }, 0));
    assert_eq!(bench.kept(), 0);
    assert_eq!(bench.admit("a", &resume).unwrap().lease.committed(), 5);
    assert!(bench.sessions.evict(&tenant, Exceeded::Host { held: 1 }, 0));
    // Nor can it be opened anew after another stream of its session was resumed.
    let other = Request {
        resume_from: Some(0),
        ..request(session, 1)
    };
    bench.admit("a", &other).unwrap();
    let anew = bench.admit("a", &request(session, 0)).unwrap_err();
    assert!(anew.text.contains("opened before"), "{anew}");
    assert_eq!(bench.admit("a", &resume).unwrap().lease.committed(), 5);
}

#[test]
fn only_its_key_takes_a_session_up_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let [mine, yours] = [1, 2].map(|byte| Key::new(&[byte; 32]));
    let session = {
        let mut bench = Bench::new(&dir);
        let first = request(0, 0);
        let first = bench.ask(&asked("a", &first, 1, Some(&mine))).unwrap();
        let join = request(first.session, 1);
        let stolen = bench.ask(&asked("a", &join, 1, Some(&yours)));
        assert_eq!(stolen.unwrap_err().refusal, Refusal::Session);
        assert!(!first.lease.is_superseded(), "its owner is not disturbed");
        bench.ask(&asked("a", &join, 1, Some(&mine))).unwrap();
        first.session
    };
    let resume = Request {
        resume_from: Some(3),
        ..request(session, 0)
    };
    let mut restarted = Bench::new(&dir);
    let stolen = restarted.ask(&asked("a", &resume, 1, Some(&yours)));
    assert_eq!(stolen.unwrap_err().refusal, Refusal::Session);
    let elsewhere = restarted.ask(&asked("b", &resume, 1, Some(&mine)));
    assert_eq!(elsewhere.unwrap_err().refusal, Refusal::Session);
    let back = restarted.ask(&asked("a", &resume, 1, Some(&mine))).unwrap();
    assert_eq!((back.session, back.lease.committed()), (session, 3));
}

#[test]
fn a_stream_that_is_refused_makes_no_log() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let none = request(12345, 0);
    let refused = bench.admit("junk", &none).unwrap_err();
    assert_eq!(refused.refusal, Refusal::Session);
    let key = Key::new(&[1; 32]);
    let refused = bench.ask(&asked("junk", &made_up(1), 1, Some(&key)));
    assert_eq!(refused.unwrap_err().refusal, Refusal::Session);
    assert!(bench.opener.is_empty() && bench.files().is_empty());
}

#[test]
fn publishers_make_topics_as_the_policy_says() {
    let dir = tempfile::tempdir().unwrap();
    let key = Key::new(&[1; 32]);
    let first = request(0, 0);
    let remote = asked("trades.eu", &first, 1, None);
    let local = StreamRequest {
        is_local: true,
        ..remote
    };
    let keyed = asked("trades.eu", &first, 1, Some(&key));
    for (creators, may) in [
        (Creators::Never, [false, false, false]),
        (Creators::Local, [false, true, false]),
        (Creators::Keyed, [false, false, true]),
        (Creators::Any, [true, true, true]),
    ] {
        for (asked, may) in [remote, local, keyed].iter().zip(may) {
            let dir = tempfile::tempdir().unwrap();
            let mut bench = Bench::with(&dir, 4, creators, &[]);
            match bench.ask(asked) {
                Ok(_) => assert!(may, "{creators:?}: {asked:?}"),
                Err(refused) => {
                    assert!(!may && refused.refusal == Refusal::Topic, "{refused}");
                    let flags = "--topic trades.eu, or with --create-topics any";
                    assert!(refused.text.contains(flags), "{refused}");
                }
            }
        }
    }
    let mut bench = Bench::with(&dir, 4, Creators::Any, &["audit", "trades.*"]);
    bench.ask(&remote).unwrap();
    let refused = bench.admit("trades", &first).unwrap_err();
    assert!(refused.text.contains("--topics"), "{refused}");
    assert_eq!(bench.files(), ["trades.eu.log"]);
    drop(bench);
    // Under any policy, an existing log is a topic.
    let mut bench = Bench::with(&dir, 4, Creators::Never, &["audit"]);
    bench.ask(&remote).unwrap();
}

#[test]
fn a_host_makes_no_more_topics_than_its_share() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let first = request(0, 0);
    let held: Vec<_> = ["a", "b"]
        .map(|topic| bench.admit(topic, &first).unwrap())
        .into();
    let refused = bench.admit("c", &first).unwrap_err();
    assert_eq!(refused.refusal, Refusal::Topic);
    let words = "the share of host 10.0.0.1, which has created 2 of at most 4 topics";
    assert!(refused.text.contains(words), "{refused}");
    let other = bench.ask(&asked("d", &first, 2, None)).unwrap();
    assert_eq!(bench.files(), ["a.log", "b.log", "d.log"]);
    // An empty log that no stream uses gives way to another topic.
    drop((held, other));
    bench.admit("c", &first).unwrap();
    bench.work();
    assert_eq!(bench.files(), ["b.log", "c.log", "d.log"]);
}

#[test]
fn a_log_that_was_made_for_nobody_does_not_remain() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    let first = request(0, 0);
    let waits = asked("a", &first, 1, None);
    assert!(matches!(
        bench.sessions.admit(&waits),
        Ok(Outcome::TopicOpening)
    ));
    bench.work();
    assert_eq!(bench.files(), ["a.log"]);
    // Its publisher is gone and does not ask again.
    bench.sessions.topics.backdate(Duration::from_secs(2));
    bench.sessions.tick(Instant::now());
    bench.work();
    assert!(bench.files().is_empty());
    assert!(bench.sessions.topics.list().is_empty());
    bench.admit("a", &first).unwrap();
}

#[test]
fn a_log_that_cannot_be_made_is_told_to_those_who_wait_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(&dir);
    fs::create_dir(bench.logs.join("a.new")).unwrap();
    let refused = bench.admit("a", &request(0, 0)).unwrap_err();
    assert_eq!(refused.refusal, Refusal::Resources);
    fs::remove_dir(bench.logs.join("a.new")).unwrap();
    bench.sessions.topics.backdate(Duration::from_secs(1));
    bench.admit("a", &request(0, 0)).unwrap();
}
