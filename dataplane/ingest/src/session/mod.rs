//! The part that both paths share: a publisher's connection from accept to an admitted stream, limits on what it
//! may use, commits, replies, and counters.
//!
//! [`listen`] opens the listening socket; the [`Acceptor`] applies [`buffers`] to every accepted socket and
//! runs the handshake. A stream over tcp then enters the queue of a worker, a stream over xdp waits as a pending
//! stream for its first packet, and a remote subscriber goes to the worker that serves it (crate penstock-serve).

pub(crate) mod accepted_stream;
pub(crate) mod accepted_subscriber;
mod acceptor;
pub mod admission;
pub mod buffers;
pub mod claims;
pub(crate) mod commit;
pub(crate) mod frame_parser;
pub(crate) mod handshake;
mod log_quota;
pub mod peer;
pub(crate) mod pending_streams;
pub mod permits;
pub(crate) mod reply_queue;
pub mod shares;
pub(crate) mod stats;
pub(crate) mod stream_filter;
#[cfg(test)]
pub(crate) mod test_support;
pub(crate) mod work_queue;
mod worker_handle;

pub use accepted_subscriber::AcceptedSubscriber;
pub use acceptor::{Acceptor, DatagramPath, Limits, ReadAccess, SubscriberService, listen};
pub use pending_streams::PendingStreams;
pub use stats::{ConnectionReport, Counters, PathStage, Shared, WorkerStats};
pub use stream_filter::StreamFilter;
pub use work_queue::{StreamQueue, SubscriberQueue};
pub use worker_handle::WorkerHandle;

/// Bytes of batches that a stream over xdp may send before the first ACK.
pub const FIRST_CREDIT: u64 = 64 << 10;
