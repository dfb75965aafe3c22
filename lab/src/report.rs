//! What `report.json` holds; field names are an interface.

mod bench;
mod comparison;
pub mod diagnosis;
mod experiment;
mod timeline;

use std::collections::BTreeMap;

use penstock_runtime::profile::StageReport;
use serde::{Deserialize, Serialize};

use crate::cli::Profile;
use crate::delay::DelayReport;
use crate::environment::Environment;
use crate::faults::FaultReport;
use crate::host_load::HostLoad;
use crate::outputs::{self, AckLatency, Connection, Session};
use crate::spread::Spread;
use crate::verify::StreamCheck;

pub use bench::{Bench, BenchCase, BenchContender, BenchRow, Side, Target, Verdict};
pub use comparison::{
    Compare, Limit, Limits, PercentOfLimit, Row, limit_of, ratio, ratio_of_pairs,
};
pub use diagnosis::{Diagnosed, Rerun};
pub use experiment::{
    Claim, OBSERVER, ObserverExperiment, ObserverPair, RCVBUF, RcvbufExperiment, RcvbufRow,
    RcvbufRun,
};
pub use timeline::{ConnectionPoint, HostCores, Point, Timeline};

/// 1 GB = 10^9 bytes, as 1 MB = 10^6 bytes.
const BYTES_PER_GB: f64 = 1e9;

/// `report.json` of `penstock-lab throughput`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Throughput {
    pub kind: String,
    pub mode: String,
    pub profile: Profile,
    pub mtu: u32,
    pub num_brokers: u32,
    /// Bytes; null when a file was published.
    pub message_size: Option<u64>,
    pub ack: u8,
    pub order: u8,
    pub threads_per_broker: u32,
    pub input: Option<String>,
    pub messages_sent: u64,
    pub messages_acked: u64,
    pub messages_in_logs: u64,
    /// Bytes of messages, without framing.
    pub payload_bytes: u64,
    pub seconds: f64,
    pub bandwidth_mb_per_s: f64,
    /// What the host can do at best, when `--limits` was given.
    pub limits: Option<Vec<Limit>>,
    /// The bandwidth in percent of the path's limit.
    pub percent_of_limit: Option<f64>,
    /// Why the run does not count as a success; empty when it does.
    pub problems: Vec<String>,
    pub publisher: Publisher,
    pub brokers: Vec<Broker>,
    /// One entry per stream when `--verify` was given.
    pub verification: Option<Vec<StreamCheck>>,
    /// What the links did to packets when `--faults` was given.
    pub faults: Option<FaultReport>,
    /// What the lines carried when `--delay` was given.
    pub delay: Option<DelayReport>,
    /// The run over time; null in reports of older labs.
    pub timeline: Option<Timeline>,
    /// What limited it, when `--diagnose` was given and there was time.
    pub diagnosis: Option<Diagnosed>,
    /// Why there is none although it was asked for.
    pub not_diagnosed: Option<String>,
    /// The same with the cause removed, when `--fix` was given.
    pub rerun: Option<Rerun>,
    /// What the host did besides; null in reports of older labs.
    #[serde(default)]
    pub host_load: Option<HostLoad>,
    /// Why the figures mean little, if they do.
    #[serde(default)]
    pub warnings: Vec<String>,
    pub environment: Environment,
}

/// The publisher's part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Publisher {
    pub batches: u64,
    pub cpu_seconds: f64,
    pub cpu_seconds_per_gb: f64,
    pub peak_rss_bytes: u64,
    /// Null at ack level 0.
    pub ack_latency_us: Option<AckLatency>,
    pub stages: Vec<StageReport>,
    pub sessions: Vec<Session>,
}

/// One broker's part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Broker {
    pub index: usize,
    pub address: String,
    pub messages_in_log: u64,
    pub payload_bytes: u64,
    pub batches: u64,
    pub ring_bytes: u64,
    pub peak_rss_bytes: u64,
    pub active_seconds: f64,
    pub cpu_seconds: f64,
    pub cpu_seconds_per_gb: f64,
    pub recv_calls: u64,
    pub recv_calls_per_batch: f64,
    pub bytes_per_recv: f64,
    pub eagain: u64,
    pub stages: Vec<StageReport>,
    pub connections: Vec<Connection>,
    pub counters: BTreeMap<String, u64>,
    /// The xdp path, if it was open.
    pub xdp: Option<BTreeMap<String, serde_json::Value>>,
}

impl Publisher {
    pub fn from_output(output: outputs::Publisher) -> Self {
        Self {
            batches: output.batches,
            cpu_seconds: output.cpu_seconds,
            cpu_seconds_per_gb: per_gb(output.cpu_seconds, output.payload_bytes),
            peak_rss_bytes: output.peak_rss_bytes,
            ack_latency_us: output.ack_latency_us,
            stages: output.stages,
            sessions: output.brokers,
        }
    }
}

impl Broker {
    /// The part of broker `index`; only the log of `topic` counts.
    pub fn from_output(
        index: usize,
        address: String,
        topic: &str,
        output: outputs::Broker,
    ) -> Self {
        let mut topics = output.topics.into_iter();
        let log = topics.find(|t| t.topic == topic);
        let (messages, payload_bytes, ring_bytes) = log
            .map(|log| (log.messages, log.payload_bytes, log.ring_bytes))
            .unwrap_or_default();
        Self {
            index,
            address,
            messages_in_log: messages,
            payload_bytes,
            batches: output.batches,
            ring_bytes,
            peak_rss_bytes: output.peak_rss_bytes,
            active_seconds: output.active_seconds,
            cpu_seconds: output.cpu_seconds,
            cpu_seconds_per_gb: per_gb(output.cpu_seconds, payload_bytes),
            recv_calls: output.recv_calls,
            recv_calls_per_batch: output.recv_calls_per_batch,
            bytes_per_recv: output.bytes_per_recv,
            eagain: output.eagain,
            stages: output.stages,
            connections: output.connections,
            counters: output.counters,
            xdp: output.xdp,
        }
    }
}

/// `report.json` of `penstock-lab baseline`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Baseline {
    pub kind: String,
    pub mode: String,
    pub message_size: u64,
    /// Payload per run, bytes.
    pub size_bytes: u64,
    pub iperf3_version: String,
    pub rows: Vec<BaselineRow>,
    /// What the host did besides; null in reports of older labs.
    #[serde(default)]
    pub host_load: Option<HostLoad>,
    /// Why the figures mean little, if they do.
    #[serde(default)]
    pub warnings: Vec<String>,
    pub environment: Environment,
}

/// One case; rates are payload, MB/s.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BaselineRow {
    pub profile: Profile,
    pub mtu: u32,
    pub connections: u32,
    pub penstock: Spread,
    pub iperf3: Spread,
    /// Median of penstock / iperf3 over pairs of neighbouring runs.
    pub ratio: f64,
    pub ratio_min: f64,
    pub ratio_max: f64,
    pub ratio_of_medians: f64,
}

impl BaselineRow {
    /// Pairs the runs in the order in which they ran.
    pub fn of(profile: Profile, mtu: u32, connections: u32, runs: &[(f64, f64)]) -> Self {
        let ratio = Spread::of(runs.iter().map(|(ours, theirs)| ours / theirs).collect());
        let penstock = Spread::of(runs.iter().map(|run| run.0).collect());
        let iperf3 = Spread::of(runs.iter().map(|run| run.1).collect());
        Self {
            profile,
            mtu,
            connections,
            ratio: ratio.median,
            ratio_min: ratio.min,
            ratio_max: ratio.max,
            ratio_of_medians: penstock.median / iperf3.median,
            penstock,
            iperf3,
        }
    }
}

/// CPU seconds per 10^9 bytes of payload.
pub fn per_gb(seconds: f64, bytes: u64) -> f64 {
    if bytes == 0 {
        return 0.0;
    }
    seconds * BYTES_PER_GB / bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_neighbours() {
        let row = BaselineRow::of(
            Profile::Wire,
            1500,
            4,
            &[(100.0, 200.0), (90.0, 90.0), (80.0, 40.0)],
        );
        assert_eq!((row.ratio, row.ratio_min, row.ratio_max), (1.0, 0.5, 2.0));
        assert_eq!(row.penstock.median, 90.0);
        assert_eq!(row.iperf3.runs, [200.0, 90.0, 40.0]);
        assert_eq!(row.ratio_of_medians, 1.0);
    }

    #[test]
    fn cpu_time_is_per_billion_bytes() {
        assert_eq!(per_gb(3.0, 2_000_000_000), 1.5);
        assert_eq!(per_gb(3.0, 0), 0.0);
    }
}
