//! Sessions: which streams exist, the progress of each, and who may continue it.

mod session;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use crossbeam_channel::Sender;
use penstock_ingest::session::admission::{
    Admission, Admit, Lease, Outcome, Refused, StreamRequest,
};
use penstock_ingest::session::peer::Tenant;
use penstock_ingest::session::shares::{Exceeded, Shares, Use};
use penstock_log::Log;
use penstock_wire::handshake::{Refusal, Request};

use self::session::{Session, refuse};
use crate::topics::{Job, Topic, Topics};

/// Maximum number of streams, open or not, that are remembered; peers can create them faster than they
/// expire.
const MAX_KEPT: usize = 65_536;

/// Admits streams to topics.
#[derive(Debug)]
pub struct Sessions {
    topics: Arc<Topics>,
    /// Channel to the thread that opens logs.
    jobs: Sender<Job>,
    sessions: HashMap<u64, Session>,
    /// Remembered streams, listed by session.
    shares: Shares<u64>,
}

impl Sessions {
    /// No sessions yet. `percent` is the maximum share of one host, of what others leave free.
    pub fn new(topics: Arc<Topics>, share_percent: u8, jobs: Sender<Job>) -> Self {
        Self {
            topics,
            jobs,
            sessions: HashMap::new(),
            shares: Shares::new(MAX_KEPT, share_percent),
        }
    }

    /// Whether the stream may be opened, as far as that is known without its log.
    fn check_session(&self, asked: &StreamRequest<'_>) -> Result<(), Refused> {
        let Request {
            session: key,
            stream: number,
            resume_from,
            ..
        } = *asked.request;
        if key == 0 {
            return Ok(());
        }
        if asked.key.is_some_and(|owner| !owner.owns(key, asked.topic)) {
            // The same answer as for an unknown session: a publisher must not learn of others'
            // sessions.
            return refuse(format!(
                "this broker has no session {key:016x}; connect anew"
            ));
        }
        let Some(session) = self.sessions.get(&key) else {
            return match resume_from {
                Some(_) => Ok(()),
                None => refuse(format!(
                    "this broker has no session {key:016x}; connect anew"
                )),
            };
        };
        if session.topic != asked.topic || session.streams != asked.request.streams {
            return refuse(format!(
                "session {key:016x} is for another topic or stream count"
            ));
        }
        match (session.opened_streams.get(&number), resume_from) {
            (Some(_), None) => opened_before(key, number),
            (Some(stream), Some(_)) => stream.lease(key, number).map(drop),
            (None, _) => Ok(()),
        }
    }

    /// Ensures that one more stream of this session, or of a new one, can be remembered. If necessary
    /// it drops another session without open streams, first one that committed nothing.
    fn make_room(&mut self, asked: &StreamRequest<'_>) -> Result<(), Refused> {
        let key = asked.request.session;
        let session = self.sessions.get(&key);
        if session.is_some_and(|s| s.opened_streams.contains_key(&asked.request.stream)) {
            return Ok(());
        }
        let tenant = session.map_or(asked.tenant, |session| session.tenant);
        let Err(exceeded) = self.shares.check(&tenant) else {
            return Ok(());
        };
        match self.evict(&tenant, exceeded, key) {
            true => Ok(()),
            false => Err(no_room(&tenant, exceeded)),
        }
    }

    /// Drops a session without open streams, other than `kept`.
    fn evict(&mut self, tenant: &Tenant, exceeded: Exceeded, kept: u64) -> bool {
        let sessions = &self.sessions;
        let look = |key: &u64| match sessions.get(key) {
            None => Use::Gone,
            Some(_) if *key == kept => Use::InUse,
            Some(session) => session.usage(),
        };
        let Some((_, key)) = self.shares.evict(tenant, exceeded, look) else {
            return false;
        };
        self.forget(key);
        true
    }

    /// Drops a session; the topic keeps the positions of its streams.
    fn forget(&mut self, key: u64) {
        let Some(session) = self.sessions.remove(&key) else {
            return;
        };
        let streams = session.opened_streams.len();
        self.shares.release(&session.tenant, streams);
        if !session.state.has_commits() {
            return;
        }
        // When a closed log is opened again, its index has the positions. A lost log has none to keep, nor
        // has the log that replaced it.
        let topic = self.topics.find(&session.topic);
        let is_same = |log: &Arc<Log>| Weak::ptr_eq(&session.log, &Arc::downgrade(log));
        let keeps = |log: &Arc<Log>| log.lost().is_none() && is_same(log);
        let Some(topic) = topic.filter(|topic| keeps(&topic.log)) else {
            return;
        };
        let frontier = topic.log.info().batches;
        let mut earlier = topic.earlier();
        for (number, stream) in session.opened_streams {
            if stream.has_commits() {
                earlier.remember(key, number, stream.state.committed(), frontier);
            }
        }
    }

    /// Drops sessions whose publishers did not come back.
    fn expire(&mut self, now: Instant) {
        let sessions = self.sessions.iter_mut();
        let gone: Vec<_> = sessions
            .filter_map(|(key, session)| (!session.is_live(now)).then_some(*key))
            .collect();
        gone.into_iter().for_each(|key| self.forget(key));
        let sessions = &self.sessions;
        let look = |key: &u64| sessions.get(key).map_or(Use::Gone, Session::usage);
        self.shares.refresh(look);
    }

    /// The session's key, and the stream's place in it. The caller has checked the request and made
    /// room.
    fn join(&mut self, topic: &Topic, asked: &StreamRequest<'_>) -> Result<(u64, Lease), Refused> {
        let request = asked.request;
        let key = match request.session {
            0 => self.new_key(topic, asked)?,
            key => key,
        };
        let number = request.stream;
        let found = topic.earlier().committed(key, number);
        let is_known = self.sessions.get(&key);
        let is_known = is_known.is_some_and(|s| s.opened_streams.contains_key(&number));
        if request.resume_from.is_none() && found.is_some() && !is_known {
            // A stream's batch numbers never restart.
            return opened_before(key, number);
        }
        let session = self.sessions.entry(key).or_insert_with(|| {
            Session::new(asked.topic, &topic.log, request.streams, asked.tenant)
        });
        let tenant = session.tenant;
        let is_first = session.opened_streams.is_empty();
        if !is_known {
            // A resumed stream continues after the last batch that the topic knows, and at least after the
            // last batch that its publisher got an ack for.
            let stream = session.new_stream(request.resume_from.unwrap_or(0), found);
            session.opened_streams.insert(number, stream);
        }
        let stream = session.opened_streams.get_mut(&number);
        let stream = stream.expect("it is known by now");
        let lease = stream.lease(key, number);
        if let (Ok(lease), Some(acked)) = (&lease, request.resume_from) {
            stream.continue_after(lease, acked);
        }
        if !is_known {
            self.shares.charge(&tenant, 1);
        }
        if is_first {
            let sessions = &self.sessions;
            let is_gone = |key: &u64| !sessions.contains_key(key);
            self.shares.list(&tenant, key, is_gone);
        }
        Ok((key, lease?))
    }

    /// A key for a new session.
    fn new_key(&self, topic: &Topic, asked: &StreamRequest<'_>) -> Result<u64, Refused> {
        loop {
            let random = random()?;
            let key = match asked.key {
                None => random,
                Some(owner) => owner.session(random as u32, asked.topic),
            };
            let is_earlier = topic.earlier().has_session(key);
            if key != 0 && !is_earlier && !self.sessions.contains_key(&key) {
                return Ok(key);
            }
        }
    }
}

impl Admit for Sessions {
    fn check(&mut self, asked: &StreamRequest<'_>) -> Result<(), Refused> {
        self.topics.check(asked)?;
        self.check_session(asked)
    }

    fn admit(&mut self, asked: &StreamRequest<'_>) -> Result<Outcome, Refused> {
        // Checked again, because the publisher may have waited for its topic.
        self.check_session(asked)?;
        self.make_room(asked)?;
        let Some(topic) = self.topics.find_or_open(asked, &self.jobs)? else {
            return Ok(Outcome::TopicOpening);
        };
        let (session, lease) = self.join(&topic, asked)?;
        self.topics.claim(asked.topic);
        let request = asked.request;
        Ok(Outcome::Admitted(Box::new(Admission {
            max_payload: topic.log.geometry().max_payload(),
            log: topic.log,
            topic: asked.topic.to_owned(),
            tenant: asked.tenant,
            session,
            stream: request.stream,
            ack: request.ack,
            path: request.path,
            max_datagram: request.max_datagram,
            lease,
        })))
    }

    fn find_log(&mut self, topic: &str, tenant: Tenant) -> Result<Option<Arc<Log>>, Refused> {
        self.topics.find_log(topic, tenant, &self.jobs)
    }

    fn topics_changed(&mut self) -> bool {
        self.topics.take_news()
    }

    fn tick(&mut self, now: Instant) {
        self.expire(now);
        self.topics.tick(&self.jobs);
    }
}

fn opened_before<T>(key: u64, number: u32) -> Result<T, Refused> {
    refuse(format!(
        "stream {number} of session {key:016x} has been opened before"
    ))
}

fn no_room(tenant: &Tenant, exceeded: Exceeded) -> Refused {
    let text = match exceeded {
        Exceeded::Total => {
            format!(
                "this broker remembers at most {MAX_KEPT} streams, and all of them are open; try again later"
            )
        }
        Exceeded::Host { held } => format!(
            "host {} has {held} streams of at most {MAX_KEPT} that this broker remembers, which is its whole share; try again later, or raise the broker's --max-share",
            tenant.host
        ),
        Exceeded::Site { held } => format!(
            "hosts of site {} have {held} streams of at most {MAX_KEPT} that this broker remembers, which is their whole share; try again later, or raise the broker's --max-share",
            tenant.host.site()
        ),
        Exceeded::Key { held } => format!(
            "publishers with this key have {held} streams of at most {MAX_KEPT} that this broker remembers, which is their whole share; try again later, or raise the broker's --max-share"
        ),
    };
    Refused {
        refusal: Refusal::Resources,
        text,
    }
}

/// A random key that no peer can guess; never 0.
fn random() -> Result<u64, Refused> {
    let key = getrandom::u64().map_err(|e| Refused {
        refusal: Refusal::Resources,
        text: format!("the broker got no random numbers from the kernel: {e}"),
    })?;
    Ok(key.max(1))
}
