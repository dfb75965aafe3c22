//! Totals of a remote subscriber.

/// Totals of a remote subscriber.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemoteReport {
    /// Batches that came again, and were dropped.
    pub duplicates: u64,
    /// Batches that no broker had.
    pub missing: u64,
    /// Each broker.
    pub brokers: Vec<BrokerReport>,
}

/// Totals of one broker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BrokerReport {
    /// The broker.
    pub broker: String,
    /// Batches that came from it, duplicates included.
    pub batches: u64,
    /// Batches that it had overwritten.
    pub lost_batches: u64,
    /// Connections after the first one.
    pub reconnects: u64,
    /// Whether it is connected.
    pub is_connected: bool,
    pub(super) was_connected: bool,
}
