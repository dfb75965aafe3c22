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
    /// publisher's word, or at other brokers since.
    before: u64,
    /// Whether it committed batches here and later continued after batches that other brokers have.
    skipped_after_commits: bool,
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
            skipped_after_commits: false,
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
    /// The right to write it; `key` and `number` name it.
    pub fn lease(&self, key: u64, number: u32) -> Result<Lease, Refused> {
        self.state.lease().ok_or_else(|| Refused {
            refusal: Refusal::Busy,
            text: format!(
                "stream {number} of session {key:016x} is still open over another connection; try again"
            ),
        })
    }

    /// Continues after this many acknowledged batches. Those beyond what this broker has were acknowledged by
    /// other brokers, which took the stream over while its publisher could not reach this one.
    pub fn continue_after(&mut self, lease: &Lease, acked: u64) {
        let committed = lease.committed();
        if acked > committed {
            self.skipped_after_commits |= committed > self.before;
            self.before = acked;
            lease.skip_to(acked);
        }
    }

    /// Whether the stream has committed batches here in this session.
    pub fn has_commits(&self) -> bool {
        self.skipped_after_commits || self.state.committed() > self.before
    }
}

/// Refuses a request about a session.
pub fn refuse<T>(text: String) -> Result<T, Refused> {
    Err(Refused {
        refusal: Refusal::Session,
        text,
    })
}
