//! What the other programs print as JSON, as far as the lab uses it.

#![allow(missing_docs, reason = "fields have the names of the JSON keys")]

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use penstock_runtime::profile::StageReport;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::settings::XdpMode;

use penstock_process::foreign_json;

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

impl Broker {
    /// How the interface ran the XDP program, if the xdp path was open.
    pub fn xdp_mode(&self) -> Option<XdpMode> {
        let mode = self.xdp.as_ref()?.get("xdp_mode")?;
        serde_json::from_value(mode.clone()).ok()
    }

    /// A counter of the xdp path; 0 if it was not open.
    pub fn xdp_counter(&self, name: &str) -> u64 {
        let counter = self.xdp.as_ref().and_then(|xdp| xdp.get(name));
        counter.and_then(serde_json::Value::as_u64).unwrap_or(0)
    }
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
    /// Right after accept, bytes; null in reports of older brokers.
    pub rcv_ssthresh_first: Option<u64>,
    pub rcv_space_first: Option<u64>,
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
    pub ack_latency_us: Option<AckLatency>,
    pub stages: Vec<StageReport>,
    pub brokers: Vec<Session>,
}

impl Publisher {
    /// The path that every stream took, from its beginning to its end.
    pub fn path(&self) -> Option<&str> {
        let mut streams = self.brokers.iter().flat_map(|session| &session.streams);
        let path = streams.clone().next()?.path.as_str();
        streams
            .all(|stream| stream.path == path && stream.moves == 0)
            .then_some(path)
    }

    /// A figure of the transport, summed up over all streams; 0 over tcp.
    pub fn transport_sum(&self, name: &str) -> f64 {
        let streams = self.brokers.iter().flat_map(|session| &session.streams);
        streams
            .filter_map(|stream| stream.transport.as_ref()?.get(name))
            .sum()
    }
}

/// Time from a batch being sealed to its ack, microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AckLatency {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    pub count: u64,
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
    /// How datagrams left, over xdp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx: Option<String>,
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
    foreign_json::from_process(text.as_bytes())
        .with_context(|| format!("cannot parse the report of {program}"))
}

/// Parses a file that `program` wrote.
pub fn parse_file<T: DeserializeOwned>(program: &str, path: &Path) -> Result<T> {
    let text = foreign_json::read_file(path)
        .with_context(|| format!("{program} left no report at {}", path.display()))?;
    parse(program, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publisher(streams: &[(&str, u64)]) -> Publisher {
        let streams: Vec<_> = streams
            .iter()
            .map(|(path, moves)| {
                serde_json::json!({
                    "stream": 0, "messages": 1, "messages_acked": 1, "batches": 1,
                    "payload_bytes": 1, "sha256": null, "path": path, "moves": moves,
                    "transport": { "retransmits": 3.0 },
                })
            })
            .collect();
        let json = serde_json::json!({
            "messages_sent": 1, "messages_acked": 1, "batches": 1, "payload_bytes": 1,
            "seconds": 1.0, "bandwidth_mb_per_s": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1,
            "ack_latency_us": { "p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0, "count": 1 },
            "stages": [], "brokers": [{ "address": "", "session": "", "streams": streams }],
        });
        parse("publisher", &json.to_string()).unwrap()
    }

    #[test]
    fn only_a_path_that_all_streams_kept_is_the_path() {
        assert_eq!(publisher(&[("xdp", 0), ("xdp", 0)]).path(), Some("xdp"));
        assert_eq!(publisher(&[("xdp", 0), ("tcp", 0)]).path(), None);
        assert_eq!(publisher(&[("tcp", 1)]).path(), None);
        assert_eq!(publisher(&[]).path(), None);
    }

    #[test]
    fn figures_of_streams_are_summed_up() {
        let report = publisher(&[("xdp", 0), ("xdp", 0)]);
        assert_eq!(report.transport_sum("retransmits"), 6.0);
        assert_eq!(report.transport_sum("lost"), 0.0);
    }
}
