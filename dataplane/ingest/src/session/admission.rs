//! Which streams may publish, and the progress of each stream: shared by both paths.
//!
//! A stream outlives its connections: a publisher that lost one opens another for the same stream,
//! over either path, and continues after the last committed batch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use penstock_auth::Key;
use penstock_log::Log;
use penstock_wire::handshake::{AckLevel, Path, Refusal, Request};
use thiserror::Error;

use crate::session::peer::Tenant;
use crate::session::permits::StreamPermit;

/// Decides which streams may publish; implemented by the broker.
///
/// The caller first checks the stream, then takes a permit, then admits it. A stream that may not be
/// opened therefore takes no resources, and nothing is created for it.
pub trait Admit: Send {
    /// Whether the stream may be opened, as far as that is known without creating anything.
    ///
    /// # Errors
    /// The refusal, with a text that says what to do.
    fn check(&mut self, request: &StreamRequest<'_>) -> Result<(), Refused>;

    /// Opens the stream, or starts to open its topic.
    ///
    /// # Errors
    /// As [`Self::check`].
    fn admit(&mut self, request: &StreamRequest<'_>) -> Result<Outcome, Refused>;

    /// The log of a topic for a subscriber to read; `None` while it is being opened. No log is created for it.
    ///
    /// # Errors
    /// As [`Self::check`].
    fn find_log(&mut self, topic: &str, tenant: Tenant) -> Result<Option<Arc<Log>>, Refused> {
        let _ = (topic, tenant);
        Err(Refused {
            refusal: Refusal::Unsupported,
            text: "this broker serves no remote subscribers".to_owned(),
        })
    }

    /// Whether topics were opened, or failed to open, since the last call.
    fn topics_changed(&mut self) -> bool {
        false
    }

    /// Runs time-based work; called about once a second.
    fn tick(&mut self, _now: Instant) {}
}

/// A stream that a publisher requests.
#[derive(Debug, Clone, Copy)]
pub struct StreamRequest<'a> {
    /// A valid topic name.
    pub topic: &'a str,
    /// The request.
    pub request: &'a Request,
    /// The tenant that the stream is charged to.
    pub tenant: Tenant,
    /// The publisher's key, which permits the topic; `None` on a broker without keys.
    pub key: Option<&'a Key>,
    /// Whether the publisher is on the broker's own host.
    pub is_local: bool,
}

/// The result for a stream that may be opened.
#[derive(Debug)]
pub enum Outcome {
    /// It is open.
    Admitted(Box<Admission>),
    /// Its topic is being opened: try again when [`Admit::topics_changed`] returns true.
    TopicOpening,
}

/// Error text for a publisher whose stream the broker ended because it was unused.
pub(crate) const REVOKED: &str =
    "the stream was idle and another stream needs its place: reconnect";

/// A stream that may publish.
#[derive(Debug)]
pub struct Admission {
    /// Where it writes.
    pub log: Arc<Log>,
    /// Topic.
    pub topic: String,
    /// The publisher: the broker charges the stream to its host and key.
    pub tenant: Tenant,
    /// Session key.
    pub session: u64,
    /// Stream inside the session.
    pub stream: u32,
    /// When batches are acknowledged.
    pub ack: AckLevel,
    /// Path that payload takes.
    pub path: Path,
    /// Largest batch payload, bytes.
    pub max_payload: u32,
    /// Largest UDP payload that the publisher's interface takes, bytes; 0 over tcp.
    pub max_datagram: u32,
    /// The exclusive right to write the stream; dropping it returns the right.
    pub lease: Lease,
}

/// The refusal of a stream.
#[derive(Debug, Clone, Error)]
#[error("{text}")]
pub struct Refused {
    /// Code for the publisher.
    pub refusal: Refusal,
    /// Text for the publisher's user.
    pub text: String,
}

/// State of a session, which its streams maintain.
#[derive(Debug, Default)]
pub struct SessionState {
    leased: AtomicUsize,
    has_commits: AtomicBool,
}

impl SessionState {
    /// Whether a connection holds one of its streams.
    #[must_use]
    pub fn is_leased(&self) -> bool {
        self.leased.load(Ordering::Acquire) > 0
    }

    /// Whether a batch of the session was committed.
    #[must_use]
    pub fn has_commits(&self) -> bool {
        self.has_commits.load(Ordering::Acquire)
    }

    /// Notes that a batch of the session was committed.
    pub fn set_has_commits(&self) {
        // Written once: all its streams read it for each batch.
        if !self.has_commits.load(Ordering::Relaxed) {
            self.has_commits.store(true, Ordering::Release);
        }
    }
}

/// A stream, over all its connections.
#[derive(Debug)]
pub struct StreamState {
    committed: AtomicU64,
    leased: AtomicBool,
    superseded: AtomicBool,
    session: Arc<SessionState>,
}

/// The right to write a stream: at most one connection has it at a time.
#[derive(Debug)]
pub struct Lease {
    stream: Arc<StreamState>,
    permit: Option<StreamPermit>,
}

impl StreamState {
    /// A stream with this many committed batches, in a session of its own.
    #[must_use]
    pub fn new(committed: u64) -> Self {
        Self::in_session(committed, Arc::default())
    }

    /// A stream of a session.
    #[must_use]
    pub fn in_session(committed: u64, session: Arc<SessionState>) -> Self {
        Self {
            committed: AtomicU64::new(committed),
            leased: AtomicBool::new(false),
            superseded: AtomicBool::new(false),
            session,
        }
    }

    /// Batches committed, according to its last connection.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Acquire)
    }

    /// Whether a connection holds it.
    #[must_use]
    pub fn is_leased(&self) -> bool {
        self.leased.load(Ordering::Acquire)
    }

    /// Leases the stream to a connection; `None` while another connection holds it, which then has to end.
    #[must_use]
    pub fn lease(self: &Arc<Self>) -> Option<Lease> {
        if self.leased.swap(true, Ordering::AcqRel) {
            self.superseded.store(true, Ordering::Release);
            return None;
        }
        self.session.leased.fetch_add(1, Ordering::AcqRel);
        self.superseded.store(false, Ordering::Release);
        Some(Lease {
            stream: Arc::clone(self),
            permit: None,
        })
    }
}

impl Lease {
    /// Number of committed batches, which is the sequence number of the next one.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.stream.committed()
    }

    /// Sets the number of committed batches.
    pub fn set_committed(&self, batches: u64) {
        // Only the lease's holder writes it.
        if batches > self.stream.committed.load(Ordering::Relaxed) {
            self.stream.session.set_has_commits();
        }
        self.stream.committed.store(batches, Ordering::Release);
        if let Some(permit) = &self.permit {
            permit.note_batch();
        }
    }

    /// Continues after batches that other brokers have. Unlike a commit, this is only the publisher's word: it
    /// does not make the session worth keeping.
    pub fn skip_to(&self, batches: u64) {
        self.stream.committed.store(batches, Ordering::Release);
    }

    /// Ties a permit to the lease.
    #[must_use]
    pub fn with_permit(mut self, permit: StreamPermit) -> Self {
        self.permit = Some(permit);
        self
    }

    /// Whether the stream must end because it is unused and another one needs its place.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.permit.as_ref().is_some_and(StreamPermit::is_revoked)
    }

    /// Whether another connection has requested the stream, so that this one must end.
    #[must_use]
    pub fn is_superseded(&self) -> bool {
        self.stream.superseded.load(Ordering::Acquire)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.stream.leased.store(false, Ordering::Release);
        self.stream.session.leased.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_at_a_time_holds_a_stream() {
        let stream = Arc::new(StreamState::new(7));
        let first = stream.lease().unwrap();
        assert_eq!(first.committed(), 7);
        assert!(!first.is_superseded());
        assert!(stream.lease().is_none());
        assert!(first.is_superseded());
        first.set_committed(9);
        drop(first);
        let second = stream.lease().unwrap();
        assert!(!second.is_superseded());
        assert_eq!(second.committed(), 9);
    }
}
