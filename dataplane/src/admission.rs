//! Who may publish what, and how far each stream has come: shared by both paths.
//!
//! A stream outlives its connections: a publisher that lost one opens another for the same stream,
//! over either path, and goes on behind the last committed batch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use thiserror::Error;

use crate::auth::Key;
use crate::log::Log;
use crate::peer::Tenant;
use crate::wire::handshake::{AckLevel, Path, Refusal, Request};

/// Decides who may publish what; implemented by the broker.
pub trait Admit: Send {
    /// Opens a stream of `request` on `topic`, for the holder of `key`, who may publish there; for
    /// anybody without. `tenant` is charged for it.
    ///
    /// # Errors
    /// The refusal, with a text that says what to do.
    fn admit(
        &mut self,
        topic: &str,
        request: &Request,
        tenant: Tenant,
        key: Option<&Key>,
    ) -> Result<Admission, Refused>;
}

/// A stream that may publish.
#[derive(Debug)]
pub struct Admission {
    /// Where it writes.
    pub log: Arc<Log>,
    /// Topic.
    pub topic: String,
    /// Who publishes: what the stream holds is charged to its host and key.
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
    /// The stream's place; given back when it is dropped.
    pub lease: Lease,
}

/// A stream that may not.
#[derive(Debug, Error)]
#[error("{text}")]
pub struct Refused {
    /// Code for the publisher.
    pub refusal: Refusal,
    /// Text for the publisher's user.
    pub text: String,
}

/// A stream, over all its connections.
#[derive(Debug)]
pub struct StreamState {
    committed: AtomicU64,
    leased: AtomicBool,
    wanted: AtomicBool,
}

/// The right to write a stream: at most one connection has it at a time.
#[derive(Debug)]
pub struct Lease(Arc<StreamState>);

impl StreamState {
    /// A stream of which so many batches are committed.
    #[must_use]
    pub fn new(committed: u64) -> Self {
        Self {
            committed: AtomicU64::new(committed),
            leased: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
        }
    }

    /// Batches committed, as far as its last connection has told.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Acquire)
    }

    /// Whether a connection has it.
    #[must_use]
    pub fn is_leased(&self) -> bool {
        self.leased.load(Ordering::Acquire)
    }

    /// Takes the stream for a connection; none while another has it, which is told to end.
    #[must_use]
    pub fn lease(self: &Arc<Self>) -> Option<Lease> {
        if self.leased.swap(true, Ordering::AcqRel) {
            self.wanted.store(true, Ordering::Release);
            return None;
        }
        self.wanted.store(false, Ordering::Release);
        Some(Lease(Arc::clone(self)))
    }
}

impl Lease {
    /// Batches that are committed: the next has this number.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.0.committed()
    }

    /// So many batches are committed now.
    pub fn set_committed(&self, batches: u64) {
        self.0.committed.store(batches, Ordering::Release);
    }

    /// Whether another connection asks for the stream: this one is to end.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.0.wanted.load(Ordering::Acquire)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.leased.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_at_a_time_writes_a_stream() {
        let stream = Arc::new(StreamState::new(7));
        let first = stream.lease().unwrap();
        assert_eq!(first.committed(), 7);
        assert!(!first.is_wanted());
        assert!(stream.lease().is_none());
        assert!(first.is_wanted());
        first.set_committed(9);
        drop(first);
        let second = stream.lease().unwrap();
        assert!(!second.is_wanted());
        assert_eq!(second.committed(), 9);
    }
}
