//! The part that both paths share: a publisher's connection from accept to an admitted stream, limits on what it
//! may use, commits, replies, and counters.
//!
//! [`listen`] opens the listening socket; the [`Acceptor`] applies [`buffers`] to every accepted socket and
//! runs the handshake. A stream over tcp then enters the queue of a worker, and a stream over xdp waits as a
//! pending stream for its first packet.

pub(crate) mod accepted_stream;
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
mod worker_handle;

pub use accepted_stream::StreamQueue;
pub use acceptor::{Acceptor, DatagramPath, Limits, listen};
pub use pending_streams::PendingStreams;
pub use stats::{ConnectionReport, Counters, PathStage, Shared, WorkerStats};
pub use stream_filter::StreamFilter;
pub use worker_handle::WorkerHandle;

/// Bytes of batches that a stream over xdp may send before the first ACK.
pub const FIRST_CREDIT: u64 = 64 << 10;
