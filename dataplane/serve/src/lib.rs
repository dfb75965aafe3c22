//! The broker's side of remote subscribers: one thread sends batches from the mapped logs to all of them.
//!
//! The accept loop of penstock-ingest admits a subscriber and queues its connection for the [`Worker`]. Payload goes
//! from the log's pages to the socket by sendfile(2), so it does not pass through this process; small batches are
//! copied, because that is cheaper than a system call for each. Credit from the subscriber bounds what is in flight.

mod outbox;
mod request_reader;
mod stats;
mod subscription;
mod worker;

pub use stats::ServeStats;
pub use worker::{Config, Worker, WorkerHandle};
