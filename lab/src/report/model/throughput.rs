//! `report.json` of `throughput`.

use std::collections::BTreeMap;

use penstock_runtime::profile::StageReport;
use serde::{Deserialize, Serialize};

use super::comparison::Limit;
use super::diagnosis::Diagnosed;
use super::timeline::Timeline;
use super::units::per_gb;
use crate::measure::environment::Environment;
use crate::measure::host_load::HostLoad;
use penstock_testbed::delay::DelayReport;
use penstock_testbed::faults::FaultReport;
use penstock_testbed::program_reports::{self, AckLatency, Connection, Session};
use penstock_testbed::settings::Profile;
use penstock_testbed::verify::StreamCheck;

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
    pub fn from_output(output: program_reports::Publisher) -> Self {
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
        output: program_reports::Broker,
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

/// The same work once more, with the cause removed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rerun {
    /// The cause that it is for.
    pub cause: String,
    /// What was changed; null when the lab can do nothing about the cause.
    pub fix: Option<String>,
    /// Why nothing was.
    pub why_not: Option<String>,
    /// Folder of the second run, inside the result folder.
    pub folder: Option<String>,
    pub bandwidth_mb_per_s: Option<f64>,
    /// Second bandwidth / first.
    pub ratio: Option<f64>,
    /// What is named first now.
    pub cause_after: Option<String>,
    /// Why the second run does not count as a success.
    pub problems: Vec<String>,
}

impl Rerun {
    /// Nothing can be done.
    pub fn not_made(cause: &str, why: &str) -> Self {
        Self {
            cause: cause.to_owned(),
            fix: None,
            why_not: Some(why.to_owned()),
            folder: None,
            bandwidth_mb_per_s: None,
            ratio: None,
            cause_after: None,
            problems: Vec::new(),
        }
    }

    /// A second run, `after`, with `fix`.
    pub fn made(
        cause: &str,
        fix: String,
        folder: &str,
        before: &Throughput,
        after: &Throughput,
    ) -> Self {
        let cause_after = after.diagnosis.as_ref().and_then(Diagnosed::cause);
        Self {
            cause: cause.to_owned(),
            fix: Some(fix),
            why_not: None,
            folder: Some(folder.to_owned()),
            bandwidth_mb_per_s: Some(after.bandwidth_mb_per_s),
            ratio: Some(after.bandwidth_mb_per_s / before.bandwidth_mb_per_s),
            cause_after: cause_after.map(str::to_owned),
            problems: after.problems.clone(),
        }
    }
}
