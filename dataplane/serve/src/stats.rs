//! What the worker counts.

use serde::Serialize;

/// Counters of the worker, and the subscribers that are connected now.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct ServeStats {
    /// Subscribers that it serves now.
    pub connected: u64,
    /// Batches delivered, to all subscribers together.
    pub batches: u64,
    /// Payload bytes of these.
    pub payload_bytes: u64,
    /// Of the batches, those sent from the log's file without a copy in this process.
    pub sent_from_file: u64,
    /// Batches that were overwritten before they could be sent.
    pub lost_batches: u64,
}
