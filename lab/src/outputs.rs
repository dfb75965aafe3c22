//! What the other programs print as JSON, as far as the lab uses it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use penstock_dataplane::profile::StageReport;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// `penstock-broker --report`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Broker {
    pub active_seconds: f64,
    pub cpu_seconds: f64,
    pub peak_rss_bytes: u64,
    pub topics: Vec<Topic>,
    pub stages: Vec<StageReport>,
    pub batches: u64,
    pub recv_calls: u64,
    pub recv_calls_per_batch: f64,
    pub bytes_per_recv: f64,
    pub eagain: u64,
    pub connections: Vec<Connection>,
    pub counters: BTreeMap<String, u64>,
    /// The xdp path, if it was open.
    pub xdp: Option<BTreeMap<String, serde_json::Value>>,
}

/// One log of a broker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Topic {
    pub topic: String,
    pub path: String,
    pub ring_bytes: u64,
    pub messages: u64,
    pub batches: u64,
    pub payload_bytes: u64,
}

/// One payload connection of a broker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Connection {
    pub peer: String,
    pub path: String,
    pub topic: String,
    pub session: String,
    pub stream: u32,
    pub rcvbuf_requested: Option<u64>,
    pub rcvbuf_effective: u64,
    pub rcvbuf_capped: bool,
    pub sndbuf_requested: Option<u64>,
    pub sndbuf_effective: u64,
    pub window_scale: Option<u32>,
    pub batches: u64,
    pub payload_bytes: u64,
    pub ended: String,
}

/// `penstock-publisher --format json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Publisher {
    pub messages_sent: u64,
    pub messages_acked: u64,
    pub batches: u64,
    pub payload_bytes: u64,
    pub seconds: f64,
    pub bandwidth_mb_per_s: f64,
    pub cpu_seconds: f64,
    pub peak_rss_bytes: u64,
    pub stages: Vec<StageReport>,
    pub brokers: Vec<Session>,
}

/// One publisher/broker pair.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Session {
    pub address: String,
    pub session: String,
    pub streams: Vec<SentStream>,
}

/// One stream as its publisher counted it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SentStream {
    pub stream: u32,
    pub messages: u64,
    pub messages_acked: u64,
    pub batches: u64,
    pub payload_bytes: u64,
    pub sha256: Option<String>,
    pub path: String,
    pub moves: u64,
    pub transport: Option<BTreeMap<String, f64>>,
}

/// `penstock-subscriber --stat --format json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Subscriber {
    pub messages: u64,
    pub lost_batches: u64,
    pub lost_messages: u64,
    pub streams: Vec<ReadStream>,
}

/// One stream as it was read back from a log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReadStream {
    pub session: String,
    pub stream: u32,
    pub messages: u64,
    pub batches: u64,
    pub payload_bytes: u64,
    pub sha256: String,
}

/// Parses `text`, the JSON output of `program`.
pub fn parse<T: DeserializeOwned>(program: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).with_context(|| format!("cannot understand what {program} reported"))
}

/// Parses a file that `program` wrote.
pub fn parse_file<T: DeserializeOwned>(program: &str, path: &Path) -> Result<T> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("{program} left no report at {}", path.display()))?;
    parse(program, &text)
}
