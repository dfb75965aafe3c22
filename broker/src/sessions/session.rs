//! One publisher's session with one topic, and its streams.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use penstock_ingest::session::admission::{Lease, Refused, SessionState, StreamState};
use penstock_ingest::session::peer::Tenant;
use penstock_ingest::session::shares::Use;
use penstock_log::Log;
use penstock_wire::handshake::Refusal;

/// Time after which a session without open streams is dropped: its publisher would have come back by
/// now. If it comes back later, the broker resumes it from the positions that the topic keeps.
pub const SESSION_GRACE: Duration = Duration::from_secs(600);
/// The same for a session that committed nothing: dropping it loses nothing.
const UNUSED_GRACE: Duration = Duration::from_secs(5);

/// One publisher's relation to one topic.
#[derive(Debug)]
pub struct Session {
    pub topic: String,
    /// The log that its streams were committed to; the topic may have another one by now.
    pub log: Weak<Log>,
    /// Maximum number of streams.
    pub streams: u32,
    /// The tenant that opened it: its streams are charged to this tenant.
    pub tenant: Tenant,
    /// Streams that have been opened. A stream number is never reused, so (session, stream, batch)
    /// identifies one batch.
    pub opened_streams: HashMap<u32, Stream>,
    /// What its streams report of it.
    pub state: Arc<SessionState>,
    /// Since when it has had no open stream; `None` if it has one.
    idle_since: Option<Instant>,
}

/// One stream of a session.
#[derive(Debug)]
pub struct Stream {
    pub state: Arc<StreamState>,
    /// Number of batches that were committed before this session was created, by the log's index or its
    /// publisher's word.
    pub before: u64,
}

impl Session {
    pub fn new(topic: &str, log: &Arc<Log>, streams: u32, tenant: Tenant) -> Self {
        Self {
            topic: topic.to_owned(),
            log: Arc::downgrade(log),
            streams,
            tenant,
            opened_streams: HashMap::new(),
            state: Arc::default(),
            idle_since: None,
        }
    }

    /// Creates a stream that continues after the batches that its publisher claims and those that the topic
    /// knows.
    pub fn new_stream(&self, claimed: u64, found: Option<u64>) -> Stream {
        if found.is_some() {
            self.state.set_has_commits();
        }
        let before = claimed.max(found.unwrap_or(0));
        Stream {
            state: Arc::new(StreamState::in_session(before, Arc::clone(&self.state))),
            before,
        }
    }

    /// Whether it may be dropped when another session needs room.
    pub fn usage(&self) -> Use {
        match (self.state.is_leased(), self.state.has_commits()) {
            (true, _) => Use::InUse,
            (false, true) => Use::Spare,
            (false, false) => Use::Unused,
        }
    }

    /// Whether its publisher may still come back.
    pub fn is_live(&mut self, now: Instant) -> bool {
        if self.state.is_leased() {
            self.idle_since = None;
            return true;
        }
        let grace = match self.state.has_commits() {
            true => SESSION_GRACE,
            false => UNUSED_GRACE,
        };
        now.saturating_duration_since(*self.idle_since.get_or_insert(now)) < grace
    }
}

impl Stream {
    /// The right to write it, with this many acknowledged batches; `key` and `number` name it.
    pub fn lease(&self, key: u64, number: u32, acked: u64) -> Result<Lease, Refused> {
        let Some(lease) = self.state.lease() else {
            return Err(Refused {
                refusal: Refusal::Busy,
                text: format!(
                    "stream {number} of session {key:016x} is still open over another connection; try again"
                ),
            });
        };
        let committed = lease.committed();
        if acked > committed {
            return refuse(format!(
                "stream {number} of session {key:016x} has {committed} committed batches on this broker, not {acked}; connect anew"
            ));
        }
        Ok(lease)
    }
}

/// Refuses a request about a session.
pub fn refuse<T>(text: String) -> Result<T, Refused> {
    Err(Refused {
        refusal: Refusal::Session,
        text,
    })
}
