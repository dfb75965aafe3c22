//! The tcp path: workers that receive straight into the shared buffer.
//!
//! A [`Worker`] takes streams from its queue, receives each payload byte at its final place in the log,
//! commits, and acknowledges.

mod connection;
mod worker;

pub use worker::{Worker, WorkerConfig, WorkerHandle, WorkerSnapshot};
