//! The tcp path: an accept loop that sizes socket buffers, and workers that receive straight into
//! the shared buffer.
//!
//! [`listen`] opens the listening socket; the [`Acceptor`] applies [`buffers`] to every accepted
//! socket, speaks the handshake and queues the connection to a [`Worker`], which receives each
//! payload byte at its final place in the log, commits, and acknowledges.

mod acceptor;
pub mod buffers;
mod connection;
pub(crate) mod greeting;
mod outbox;
mod stats;
mod worker;

pub use acceptor::{Acceptor, DatagramPath, Limits, listen};
pub use buffers::Effective;
pub(crate) use connection::Opened;
pub(crate) use outbox::Outbox;
pub use stats::{ConnectionReport, Counters, PathStage, Shared, WorkerSnapshot, WorkerStats};
pub use worker::{Worker, WorkerConfig, WorkerHandle};

use std::time::Duration;

/// How long a peer that was told an error may take to read it before the socket goes.
const LINGER: Duration = Duration::from_secs(1);
