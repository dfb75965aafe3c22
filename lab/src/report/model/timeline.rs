//! The part of `report.json` about a run over time.

use serde::{Deserialize, Serialize};

/// A throughput run, sample by sample.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// Minimum time between two samples.
    pub interval_ms: u64,
    pub points: Vec<Point>,
}

/// What happened since the sample before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Since the publisher was started.
    pub seconds: f64,
    /// Payload committed by each broker, 10^6 bytes a second.
    pub mb_per_s: Vec<f64>,
    /// Cores that the publisher, and all brokers together, kept busy.
    pub publisher_cores: f64,
    pub broker_cores: f64,
    pub host: HostCores,
    /// Those to the first eight brokers, as they are at this moment.
    pub connections: Vec<ConnectionPoint>,
}

/// What the host's cores did, in cores: together as many as there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct HostCores {
    pub user: f64,
    pub system: f64,
    /// Interrupts as well.
    pub softirq: f64,
    pub steal: f64,
    pub idle: f64,
}

/// A connection, bytes: the receiver's end first, then the sender's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConnectionPoint {
    pub broker: usize,
    pub peer: String,
    /// So far.
    pub bytes_received: u64,
    /// Window that is offered; 0 before Linux 6.2.
    pub rcv_wnd: u32,
    /// Largest one that may be offered.
    pub rcv_ssthresh: u32,
    /// Received and not read.
    pub recv_q: u32,
    /// Congestion window.
    pub cwnd_bytes: u64,
    /// Written and not acknowledged.
    pub send_q: u32,
    pub rtt_us: u32,
}
