//! Topics and sessions: which log a stream writes, and whether it may.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use penstock_dataplane::log::{Log, LogOptions};
use penstock_dataplane::tcp::{Admission, Admit, Refused};
use penstock_dataplane::wire::handshake::{Refusal, Request};
use tracing::info;

/// A session without open streams is forgotten after so long: its publisher opens all its streams
/// in one go.
const SESSION_GRACE: Duration = Duration::from_secs(60);

/// Every topic's log; shared with the report.
#[derive(Debug)]
pub struct Topics {
    directory: PathBuf,
    options: LogOptions,
    max: usize,
    logs: Mutex<HashMap<String, Arc<Log>>>,
}

impl Topics {
    /// Topics with their logs in `directory`, which is made if need be.
    pub fn new(directory: PathBuf, options: LogOptions, max: usize) -> Result<Self> {
        std::fs::create_dir_all(&directory).with_context(|| {
            format!(
                "cannot make {}; name another --buffer-dir",
                directory.display()
            )
        })?;
        Ok(Self {
            directory,
            options,
            max,
            logs: Mutex::default(),
        })
    }

    /// The log of a topic, opened or made when first asked for.
    pub fn open(&self, topic: &str) -> Result<Arc<Log>, Refused> {
        let mut logs = self.logs.lock().expect("no holder of this lock panics");
        if let Some(log) = logs.get(topic) {
            return Ok(Arc::clone(log));
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
        let log = Arc::new(log);
        logs.insert(topic.to_owned(), Arc::clone(&log));
        Ok(log)
    }

    /// Open logs by topic, sorted.
    pub fn list(&self) -> Vec<(String, Arc<Log>)> {
        let logs = self.logs.lock().expect("no holder of this lock panics");
        let mut list: Vec<_> = logs
            .iter()
            .map(|(t, log)| (t.clone(), Arc::clone(log)))
            .collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }
}

/// One publisher's relation to one topic.
#[derive(Debug)]
struct Session {
    topic: String,
    streams: u32,
    /// Streams that have been opened; a number is never used twice, so that (session, stream,
    /// batch) names one batch only.
    leases: HashMap<u32, Weak<()>>,
    opened: Instant,
}

/// Admits streams to topics.
#[derive(Debug)]
pub struct Sessions {
    topics: Arc<Topics>,
    sessions: HashMap<u64, Session>,
}

impl Sessions {
    pub fn new(topics: Arc<Topics>) -> Self {
        Self {
            topics,
            sessions: HashMap::new(),
        }
    }

    fn join(&mut self, topic: &str, request: &Request) -> Result<(u64, Arc<()>), Refused> {
        let refuse = |text: String| {
            Err(Refused {
                refusal: Refusal::Session,
                text,
            })
        };
        let key = match request.session {
            0 => self.open(topic, request.streams)?,
            key => key,
        };
        let Some(session) = self.sessions.get_mut(&key) else {
            return refuse(format!("no session {key:016x} here; connect anew"));
        };
        if session.topic != topic || session.streams != request.streams {
            return refuse(format!(
                "session {key:016x} is for another topic or stream count"
            ));
        }
        if session.leases.contains_key(&request.stream) {
            return refuse(format!(
                "stream {} of session {key:016x} has been opened before",
                request.stream
            ));
        }
        let lease = Arc::new(());
        session
            .leases
            .insert(request.stream, Arc::downgrade(&lease));
        Ok((key, lease))
    }

    fn open(&mut self, topic: &str, streams: u32) -> Result<u64, Refused> {
        let now = Instant::now();
        self.sessions.retain(|_, session| {
            now - session.opened < SESSION_GRACE
                || session
                    .leases
                    .values()
                    .any(|lease| lease.strong_count() > 0)
        });
        let key = loop {
            let key = getrandom::u64().map_err(|e| Refused {
                refusal: Refusal::Resources,
                text: format!("the broker's host gives no random numbers: {e}"),
            })?;
            if key != 0 && !self.sessions.contains_key(&key) {
                break key;
            }
        };
        let session = Session {
            topic: topic.to_owned(),
            streams,
            leases: HashMap::new(),
            opened: now,
        };
        self.sessions.insert(key, session);
        Ok(key)
    }
}

impl Admit for Sessions {
    fn admit(&mut self, topic: &str, request: &Request) -> Result<Admission, Refused> {
        let log = self.topics.open(topic)?;
        let (session, lease) = self.join(topic, request)?;
        Ok(Admission {
            max_payload: log.geometry().max_payload(),
            log,
            topic: topic.to_owned(),
            session,
            stream: request.stream,
            ack: request.ack,
            lease,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_dataplane::log::{Full, Geometry};
    use penstock_dataplane::wire::handshake::{AckLevel, OrderLevel};

    fn sessions(dir: &tempfile::TempDir) -> Sessions {
        let geometry = Geometry::new(1 << 16, 1 << 12, 16).unwrap();
        let options = LogOptions {
            geometry,
            full: Full::Block,
            writers: 1,
        };
        Sessions::new(Arc::new(
            Topics::new(dir.path().join("logs"), options, 2).unwrap(),
        ))
    }

    fn request(session: u64, stream: u32) -> Request {
        Request {
            session,
            stream,
            streams: 2,
            ack: AckLevel::Committed,
            order: OrderLevel::PerStream,
            max_payload: 1024,
        }
    }

    #[test]
    fn streams_join_their_session_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut sessions = sessions(&dir);
        let first = sessions.admit("a", &request(0, 0)).unwrap();
        let second = sessions.admit("a", &request(first.session, 1)).unwrap();
        assert_eq!(first.session, second.session);
        assert_ne!(
            sessions.admit("a", &request(0, 0)).unwrap().session,
            first.session
        );
        let mut refused = |topic, request| sessions.admit(topic, &request).unwrap_err().to_string();
        assert!(refused("a", request(first.session, 1)).contains("opened before"));
        assert!(refused("b", request(first.session, 1)).contains("another topic"));
        assert!(refused("a", request(first.session ^ 1, 1)).contains("connect anew"));
        assert!(refused("c", request(0, 0)).contains("--max-topics 2"));
    }
}
