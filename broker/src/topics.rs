//! Topics and sessions: which log a stream writes, and whether it may.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::unistd::{AccessFlags, Uid, User, access, geteuid};
use penstock_dataplane::admission::{Admission, Admit, Lease, Refused, StreamState};
use penstock_dataplane::auth::Key;
use penstock_dataplane::log::{Log, LogOptions};
use penstock_dataplane::peer::Tenant;
use penstock_dataplane::wire::handshake::{Refusal, Request};
use tracing::info;

/// A session that has been without open streams for so long is forgotten: its publisher would have
/// been back by now. One that comes later all the same is taken up from what the log's index tells.
const SESSION_GRACE: Duration = Duration::from_secs(600);
/// How often the sessions are looked through.
const LOOK: Duration = Duration::from_secs(1);
/// Most sessions that are kept; peers can make them faster than they are forgotten.
const MAX_SESSIONS: usize = 65_536;

/// Every topic's log; shared with the report.
#[derive(Debug)]
pub struct Topics {
    directory: PathBuf,
    options: LogOptions,
    max: usize,
    logs: Mutex<HashMap<String, Topic>>,
}

/// A topic that is open.
#[derive(Debug, Clone)]
struct Topic {
    log: Arc<Log>,
    /// How far streams had come when the log was opened, after an earlier broker.
    earlier: Arc<HashMap<(u64, u32), u64>>,
}

impl Topics {
    /// Topics with their logs in `directory`, which must be there.
    pub fn new(directory: PathBuf, options: LogOptions, max: usize) -> Result<Self> {
        check_writable(&directory)?;
        Ok(Self {
            directory,
            options,
            max,
            logs: Mutex::default(),
        })
    }

    /// The log of a topic, opened or made when first asked for.
    pub fn open(&self, topic: &str) -> Result<Arc<Log>, Refused> {
        self.topic(topic).map(|topic| topic.log)
    }

    fn topic(&self, topic: &str) -> Result<Topic, Refused> {
        let mut logs = self.logs.lock().expect("no holder of this lock panics");
        if let Some(open) = logs.get(topic) {
            return Ok(open.clone());
        }
        if logs.len() >= self.max {
            let text = format!(
                "topic {topic:?} would be one more than this broker's --max-topics {}",
                self.max
            );
            return Err(Refused {
                refusal: Refusal::Topic,
                text,
            });
        }
        let path = self.directory.join(format!("{topic}.log"));
        let log = Log::open(&path, &self.options).map_err(|e| Refused {
            refusal: Refusal::Resources,
            text: e.to_string(),
        })?;
        let found = log.info();
        info!(
            topic,
            path = %path.display(),
            ring_bytes = found.ring_bytes,
            epoch = found.epoch,
            batches = found.batches,
            "log open"
        );
        let open = Topic {
            earlier: Arc::new(log.streams()),
            log: Arc::new(log),
        };
        logs.insert(topic.to_owned(), open.clone());
        Ok(open)
    }

    /// Open logs by topic, sorted.
    pub fn list(&self) -> Vec<(String, Arc<Log>)> {
        let logs = self.logs.lock().expect("no holder of this lock panics");
        let mut list: Vec<_> = logs
            .iter()
            .map(|(name, topic)| (name.clone(), Arc::clone(&topic.log)))
            .collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }
}

/// Makes the directory of the logs, if need be; a new one is `owner`'s, and of the group of the logs
/// if one is given.
pub fn make_directory(directory: &Path, owner: Option<&User>, group: Option<u32>) -> Result<()> {
    if directory.exists() {
        return Ok(());
    }
    let make = || {
        fs::create_dir_all(directory)?;
        let uid = owner.map(|user| user.uid.as_raw());
        let gid = group.or(owner.map(|user| user.gid.as_raw()));
        match (uid, gid) {
            (None, None) => Ok(()),
            (uid, gid) => chown(directory, uid, gid),
        }
    };
    make().with_context(|| {
        format!(
            "cannot make {}; name another --buffer-dir",
            directory.display()
        )
    })
}

/// Root without capabilities is no more than the user of that name, so this is worth a check.
fn check_writable(directory: &Path) -> Result<()> {
    let Err(error) = access(directory, AccessFlags::W_OK | AccessFlags::X_OK) else {
        return Ok(());
    };
    let name = |uid: Uid| match User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    };
    let me = name(geteuid());
    let owner = fs::metadata(directory).map(|data| name(Uid::from_raw(data.uid())));
    let owner = owner.unwrap_or_else(|_| "somebody else".to_owned());
    bail!(
        "user {me} cannot make logs in {dir}, which is {owner}'s: {error}; chown {me} {dir}, start the broker as {owner} (--user), or name another --buffer-dir",
        dir = directory.display()
    )
}

/// One publisher's relation to one topic.
#[derive(Debug)]
struct Session {
    topic: String,
    streams: u32,
    /// Streams that have been opened. A number never begins anew, so that (session, stream, batch)
    /// names one batch only.
    opened_streams: HashMap<u32, Arc<StreamState>>,
    /// When it was first seen without an open stream, if it has none.
    idle_since: Option<Instant>,
}

impl Session {
    fn new(topic: &str, streams: u32) -> Self {
        Self {
            topic: topic.to_owned(),
            streams,
            opened_streams: HashMap::new(),
            idle_since: None,
        }
    }

    /// Whether its publisher may still come back.
    fn is_live(&mut self, now: Instant) -> bool {
        let mut streams = self.opened_streams.values();
        if streams.any(|stream| stream.is_leased()) {
            self.idle_since = None;
            return true;
        }
        now - *self.idle_since.get_or_insert(now) < SESSION_GRACE
    }
}

/// Admits streams to topics.
#[derive(Debug)]
pub struct Sessions {
    topics: Arc<Topics>,
    sessions: HashMap<u64, Session>,
    looked: Instant,
}

impl Sessions {
    pub fn new(topics: Arc<Topics>) -> Self {
        Self {
            topics,
            sessions: HashMap::new(),
            looked: Instant::now(),
        }
    }

    /// Forgets sessions whose publishers do not come back; there is room for one more then, or it
    /// is refused.
    fn make_room(&mut self, now: Instant) -> Result<(), Refused> {
        if now - self.looked >= LOOK {
            self.looked = now;
            self.sessions.retain(|_, session| session.is_live(now));
        }
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Refused {
                refusal: Refusal::Resources,
                text: format!("this broker keeps {MAX_SESSIONS} sessions at most; try later"),
            });
        }
        Ok(())
    }

    /// The session's key, and the stream's place in it.
    fn join(
        &mut self,
        name: &str,
        topic: &Topic,
        request: &Request,
        owner: Option<&Key>,
    ) -> Result<(u64, Lease), Refused> {
        let asked = request.session;
        if asked != 0 && owner.is_some_and(|owner| !owner.owns(asked, name)) {
            // As if there were no such session: whose it is is none of this publisher's business.
            return refuse(format!("no session {asked:016x} here; connect anew"));
        }
        let known = self.sessions.contains_key(&asked);
        if !known && (asked == 0 || request.resume_from.is_some()) {
            self.make_room(Instant::now())?;
        }
        let key = match asked {
            0 => self.open(name, topic, request.streams, owner)?,
            key => key,
        };
        if let Some(acked) = request.resume_from {
            self.revive(key, name, topic, request, acked);
        }
        let Some(session) = self.sessions.get_mut(&key) else {
            return refuse(format!("no session {key:016x} here; connect anew"));
        };
        if session.topic != name || session.streams != request.streams {
            return refuse(format!(
                "session {key:016x} is for another topic or stream count"
            ));
        }
        let number = request.stream;
        let stream = match (session.opened_streams.get(&number), request.resume_from) {
            (Some(_), None) => {
                return refuse(format!(
                    "stream {number} of session {key:016x} has been opened before"
                ));
            }
            (Some(stream), Some(_)) => Arc::clone(stream),
            (None, _) => {
                let stream = Arc::new(StreamState::new(0));
                session.opened_streams.insert(number, Arc::clone(&stream));
                stream
            }
        };
        let Some(lease) = stream.lease() else {
            return Err(Refused {
                refusal: Refusal::Busy,
                text: format!("stream {number} of session {key:016x} has not ended yet; ask again"),
            });
        };
        let (committed, acked) = (lease.committed(), request.resume_from.unwrap_or(0));
        if acked > committed {
            return refuse(format!(
                "stream {number} of session {key:016x} has {committed} batches here, not {acked}; connect anew"
            ));
        }
        Ok((key, lease))
    }

    /// A stream of an earlier broker goes on: it left what the log's index tells, and at least
    /// what its publisher got acks for.
    fn revive(&mut self, key: u64, name: &str, topic: &Topic, request: &Request, acked: u64) {
        let session = self
            .sessions
            .entry(key)
            .or_insert_with(|| Session::new(name, request.streams));
        session
            .opened_streams
            .entry(request.stream)
            .or_insert_with(|| {
                let found = topic.earlier.get(&(key, request.stream));
                Arc::new(StreamState::new(
                    found.map_or(acked, |next| acked.max(*next)),
                ))
            });
    }

    fn open(
        &mut self,
        name: &str,
        topic: &Topic,
        streams: u32,
        owner: Option<&Key>,
    ) -> Result<u64, Refused> {
        let key = loop {
            let random = random()?;
            let key = match owner {
                None => random,
                Some(owner) => owner.session(random as u32, name),
            };
            let earlier =
                owner.is_some() && topic.earlier.keys().any(|(session, _)| *session == key);
            if key != 0 && !earlier && !self.sessions.contains_key(&key) {
                break key;
            }
        };
        self.sessions.insert(key, Session::new(name, streams));
        Ok(key)
    }
}

impl Admit for Sessions {
    fn admit(
        &mut self,
        topic: &str,
        request: &Request,
        tenant: Tenant,
        owner: Option<&Key>,
    ) -> Result<Admission, Refused> {
        let open = self.topics.topic(topic)?;
        let (session, lease) = self.join(topic, &open, request, owner)?;
        Ok(Admission {
            max_payload: open.log.geometry().max_payload(),
            log: open.log,
            topic: topic.to_owned(),
            tenant,
            session,
            stream: request.stream,
            ack: request.ack,
            path: request.path,
            max_datagram: request.max_datagram,
            lease,
        })
    }
}

/// A key that nobody can guess; never 0.
fn random() -> Result<u64, Refused> {
    let key = getrandom::u64().map_err(|e| Refused {
        refusal: Refusal::Resources,
        text: format!("the broker's host gives no random numbers: {e}"),
    })?;
    Ok(key.max(1))
}

fn refuse<T>(text: String) -> Result<T, Refused> {
    Err(Refused {
        refusal: Refusal::Session,
        text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_dataplane::log::{Access, Full, Geometry};
    use penstock_dataplane::peer::Host;
    use penstock_dataplane::wire::handshake::{AckLevel, OrderLevel, Path};

    fn sessions(dir: &tempfile::TempDir) -> Sessions {
        let geometry = Geometry::new(1 << 16, 1 << 12, 16).unwrap();
        let options = LogOptions {
            geometry,
            full: Full::Block,
            access: Access::default(),
            writers: 1,
        };
        let logs = dir.path().join("logs");
        make_directory(&logs, None, None).unwrap();
        Sessions::new(Arc::new(Topics::new(logs, options, 2).unwrap()))
    }

    fn tenant() -> Tenant {
        Tenant {
            host: Host::of(([10, 0, 0, 1], 1).into()),
            key: None,
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
        let mut sessions = sessions(&dir);
        let first = sessions.admit("a", &request(0, 0), tenant(), None).unwrap();
        let second = sessions
            .admit("a", &request(first.session, 1), tenant(), None)
            .unwrap();
        assert_eq!(first.session, second.session);
        assert_ne!(
            sessions
                .admit("a", &request(0, 0), tenant(), None)
                .unwrap()
                .session,
            first.session
        );
        let mut refused = |topic, request| {
            sessions
                .admit(topic, &request, tenant(), None)
                .unwrap_err()
                .to_string()
        };
        assert!(refused("a", request(first.session, 1)).contains("opened before"));
        assert!(refused("b", request(first.session, 1)).contains("another topic"));
        assert!(refused("a", request(first.session ^ 1, 1)).contains("connect anew"));
        assert!(refused("c", request(0, 0)).contains("--max-topics 2"));
    }

    #[test]
    fn a_stream_goes_on_over_another_connection() {
        let dir = tempfile::tempdir().unwrap();
        let mut sessions = sessions(&dir);
        let first = sessions.admit("a", &request(0, 0), tenant(), None).unwrap();
        first.lease.set_committed(5);
        let resume = |acked| Request {
            resume_from: Some(acked),
            ..request(first.session, 0)
        };
        let busy = sessions.admit("a", &resume(3), tenant(), None).unwrap_err();
        assert_eq!(busy.refusal, Refusal::Busy);
        assert!(first.lease.is_wanted());
        drop(first.lease);
        let lie = sessions.admit("a", &resume(6), tenant(), None).unwrap_err();
        assert!(lie.text.contains("not 6"), "{lie}");
        let second = sessions.admit("a", &resume(3), tenant(), None).unwrap();
        assert_eq!(second.lease.committed(), 5);
    }

    #[test]
    fn a_session_is_forgotten_once_it_has_been_without_streams_for_long() {
        let dir = tempfile::tempdir().unwrap();
        let mut sessions = sessions(&dir);
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let open = sessions.admit("a", &request(0, 0), tenant(), None).unwrap();
        let idle = sessions.admit("a", &request(0, 0), tenant(), None).unwrap();
        drop(idle.lease);
        // However old a session is: its time begins when its last stream ends.
        sessions.make_room(after(5000)).unwrap();
        assert_eq!(sessions.sessions.len(), 2);
        sessions.make_room(after(5000 + 599)).unwrap();
        assert_eq!(sessions.sessions.len(), 2);
        sessions.make_room(after(5000 + 600)).unwrap();
        assert_eq!(
            sessions.sessions.keys().collect::<Vec<_>>(),
            [&open.session]
        );
        drop(open.lease);
        sessions.make_room(after(6000)).unwrap();
        // Back in time, it lives again.
        let again = Request {
            resume_from: Some(0),
            ..request(open.session, 0)
        };
        let again = sessions.admit("a", &again, tenant(), None).unwrap();
        sessions.make_room(after(7000)).unwrap();
        assert_eq!(sessions.sessions.len(), 1);
        drop(again);
    }

    #[test]
    fn made_up_sessions_take_bounded_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut sessions = sessions(&dir);
        let made_up = |session| Request {
            resume_from: Some(0),
            ..request(session, 0)
        };
        for session in 1..=MAX_SESSIONS as u64 {
            sessions
                .admit("a", &made_up(session), tenant(), None)
                .unwrap();
        }
        let one_more = made_up(MAX_SESSIONS as u64 + 1);
        let refused = sessions.admit("a", &one_more, tenant(), None).unwrap_err();
        assert_eq!(refused.refusal, Refusal::Resources);
        assert_eq!(sessions.sessions.len(), MAX_SESSIONS);
        // Those that are known are served as before.
        sessions.admit("a", &made_up(7), tenant(), None).unwrap();
    }

    #[test]
    fn a_stream_of_an_earlier_broker_goes_on_where_its_publisher_left_off() {
        let dir = tempfile::tempdir().unwrap();
        let mut sessions = sessions(&dir);
        let resume = Request {
            resume_from: Some(9),
            ..request(77, 1)
        };
        let admission = sessions.admit("a", &resume, tenant(), None).unwrap();
        assert_eq!((admission.session, admission.lease.committed()), (77, 9));
    }

    #[test]
    fn only_its_key_takes_a_session_up_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let [mine, yours] = [1, 2].map(|byte| Key::new(&[byte; 32]));
        let session = {
            let mut sessions = sessions(&dir);
            let first = sessions
                .admit("a", &request(0, 0), tenant(), Some(&mine))
                .unwrap();
            let join = request(first.session, 1);
            let stolen = sessions
                .admit("a", &join, tenant(), Some(&yours))
                .unwrap_err();
            assert_eq!(stolen.refusal, Refusal::Session);
            assert!(!first.lease.is_wanted(), "its owner notices nothing");
            sessions.admit("a", &join, tenant(), Some(&mine)).unwrap();
            first.session
        };
        let resume = Request {
            resume_from: Some(3),
            ..request(session, 0)
        };
        let mut restarted = sessions(&dir);
        let stolen = restarted
            .admit("a", &resume, tenant(), Some(&yours))
            .unwrap_err();
        assert_eq!(stolen.refusal, Refusal::Session);
        let elsewhere = restarted
            .admit("b", &resume, tenant(), Some(&mine))
            .unwrap_err();
        assert_eq!(elsewhere.refusal, Refusal::Session);
        let back = restarted
            .admit("a", &resume, tenant(), Some(&mine))
            .unwrap();
        assert_eq!((back.session, back.lease.committed()), (session, 3));
    }
}
