//! The parts of `report.json` about what limited a run, and about a run without that limit.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A diagnosis of a broker while a run lasted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Diagnosed {
    pub broker: usize,
    /// When it began, from the publisher's start.
    pub after_seconds: f64,
    /// All that `diagnose --format json` prints: `verdicts`, `unavailable`, `sample`.
    #[serde(flatten)]
    pub found: Value,
}

/// The part of a diagnosis that reports show.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Findings {
    #[serde(default)]
    pub verdicts: Vec<Verdict>,
    #[serde(default)]
    pub unavailable: Vec<Unavailable>,
    #[serde(default)]
    pub sample: Sample,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Verdict {
    pub cause: String,
    pub title: String,
    pub confidence: f64,
    pub reason: Option<String>,
    pub evidence_for: Vec<String>,
    pub evidence_against: Vec<String>,
    pub next_command: String,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Unavailable {
    pub what: String,
    pub why: String,
    pub how: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Sample {
    pub seconds: f64,
    #[serde(default)]
    pub connections: Vec<Connection>,
    #[serde(default)]
    pub processes: Vec<Process>,
    #[serde(default)]
    pub cores: Vec<Core>,
    pub syscalls: Option<Vec<Syscall>>,
    pub broker: Option<Broker>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Broker {
    pub workers: Vec<Worker>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Worker {
    pub thread: String,
    pub xdp: Option<Xdp>,
}

/// A worker's packets.
#[derive(Debug, Clone, Deserialize)]
pub struct Xdp {
    pub packets: u64,
    pub bytes: u64,
    pub dropped: BTreeMap<String, u64>,
    pub missing: u64,
    pub hit_rate: f64,
    pub full_looks: f64,
    pub idle: f64,
    pub credit: f64,
    pub congestion: f64,
    pub window: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Connection {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub receives: bool,
    pub end: End,
    pub peer: Option<End>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct End {
    pub recv_q: f64,
    pub receive_buffer: u64,
    pub rcv_space: u64,
    pub rcv_ssthresh: u64,
    pub rcv_wscale: u32,
    pub busy: f64,
    pub rwnd_limited: f64,
    pub sndbuf_limited: f64,
    pub app_limited: f64,
    pub cwnd_full: f64,
    pub rtt_us: f64,
    pub retransmits: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Process {
    pub name: String,
    pub threads: Vec<Thread>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Thread {
    pub name: String,
    pub run: f64,
    pub wait: f64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Core {
    pub idle: f64,
    pub softirq: f64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Syscall {
    pub thread: String,
    pub name: String,
    pub per_second: f64,
    pub mean_us: f64,
    pub time: f64,
}

impl Diagnosed {
    /// What reports show of it.
    pub fn findings(&self) -> Result<Findings> {
        serde_json::from_value(self.found.clone()).context("cannot understand the diagnosis")
    }

    /// The cause that is named first.
    pub fn cause(&self) -> Option<&str> {
        self.found.get("verdicts")?.get(0)?.get("cause")?.as_str()
    }
}

impl Connection {
    /// The end that receives payload, and the one that sends it.
    pub fn receiver(&self) -> Option<&End> {
        match self.receives {
            true => Some(&self.end),
            false => self.peer.as_ref(),
        }
    }

    pub fn sender(&self) -> Option<&End> {
        match self.receives {
            true => self.peer.as_ref(),
            false => Some(&self.end),
        }
    }
}
