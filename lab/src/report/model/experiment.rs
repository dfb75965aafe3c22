//! `report.json` of `penstock-lab experiment`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::measure::environment::Environment;
use crate::measure::stats::Spread;
use penstock_testbed::settings::{Mode, Profile};

/// Kind of the report of `experiment rcvbuf`.
pub const RCVBUF: &str = "experiment-rcvbuf";

/// `report.json` of `penstock-lab experiment rcvbuf`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RcvbufExperiment {
    pub kind: String,
    /// The result folder.
    pub folder: String,
    /// What a round trip takes longer, microseconds.
    pub delay_us: u64,
    /// Length of a run.
    pub seconds: f64,
    /// SO_RCVBUF asked for where it is set, bytes.
    pub rcvbuf_requested: u64,
    /// Third value of net.ipv4.tcp_rmem in the broker's namespace, bytes.
    pub tcp_rmem_max: u64,
    pub profile: Profile,
    pub mtu: u32,
    pub rows: Vec<RcvbufRow>,
    pub claims: Vec<Claim>,
    pub environment: Environment,
}

/// One case at one rmem_max. Sizes are bytes; those that vary are the median of the runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RcvbufRow {
    /// `none`, `accepted`, `listener`, `both` or `force`.
    pub case: String,
    pub rmem_max: u64,
    /// Null where nothing is set.
    pub rcvbuf_requested: Option<u64>,
    /// As the socket has it right after accept, and at the end.
    pub rcvbuf_effective: u64,
    pub rcvbuf_final: u64,
    pub rcvbuf_capped: bool,
    pub window_scale: u32,
    /// Right after accept, and at the end.
    pub rcv_ssthresh_first: u64,
    pub rcv_ssthresh_final: u64,
    pub rcv_space_first: u64,
    pub rcv_space_final: u64,
    /// Payload received from the first byte on, 10^6 bytes a second.
    pub mb_per_s: Spread,
    /// Of the run's time the sender waited for the receiver's window, and for its own buffer.
    pub rwnd_limited_percent: Spread,
    pub sndbuf_limited_percent: Spread,
    /// Smoothed, at the end.
    pub rtt_ms: Spread,
}

/// One run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RcvbufRun {
    pub rcvbuf_requested: Option<u64>,
    pub rcvbuf_effective: u64,
    pub rcvbuf_final: u64,
    pub rcvbuf_capped: bool,
    pub window_scale: u32,
    pub rcv_ssthresh_first: u64,
    pub rcv_ssthresh_final: u64,
    pub rcv_space_first: u64,
    pub rcv_space_final: u64,
    pub mb_per_s: f64,
    pub rwnd_limited_percent: f64,
    pub sndbuf_limited_percent: f64,
    pub rtt_ms: f64,
}

/// Kind of the report of `experiment diagnose`.
pub const OBSERVER: &str = "experiment-diagnose";

/// `report.json` of `penstock-lab experiment diagnose`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ObserverExperiment {
    pub kind: String,
    /// The result folder.
    pub folder: String,
    pub mode: String,
    pub profile: Profile,
    pub mtu: u32,
    pub pairs: Vec<ObserverPair>,
    /// Throughput observed / alone, by pair.
    pub ratio: Spread,
    /// Within which the true median lies with 95 % confidence; null for fewer than six pairs.
    pub ratio_low: Option<f64>,
    pub ratio_high: Option<f64>,
    /// Of cores, what the observer used.
    pub observer_cores: Spread,
    pub environment: Environment,
}

/// Two neighbouring intervals, one with and one without a diagnosis.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ObserverPair {
    /// Payload committed, 10^6 bytes a second.
    pub alone_mb_per_s: f64,
    pub observed_mb_per_s: f64,
    /// Cores that the diagnosis kept busy.
    pub observer_cores: f64,
}

impl ObserverExperiment {
    /// Sums up what was measured; there must be a pair at least.
    pub fn of(
        folder: &Path,
        mode: Mode,
        profile: Profile,
        mtu: u32,
        pairs: Vec<ObserverPair>,
        environment: Environment,
    ) -> Self {
        let ratio = |pair: &ObserverPair| pair.observed_mb_per_s / pair.alone_mb_per_s;
        let ratio = Spread::of(pairs.iter().map(ratio).collect());
        let (low, high) = ratio.confidence().unzip();
        let cores = pairs.iter().map(|pair| pair.observer_cores).collect();
        Self {
            kind: OBSERVER.to_owned(),
            folder: folder.display().to_string(),
            mode: mode.name().to_owned(),
            profile,
            mtu,
            ratio,
            ratio_low: low,
            ratio_high: high,
            observer_cores: Spread::of(cores),
            pairs,
            environment,
        }
    }
}

/// Something that was said about receive buffers, and whether these rows bear it out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    pub claim: String,
    /// `diagnosis`: of the diagnosis that Penstock began with; `kernel`: of how Linux works.
    pub of: String,
    /// Null where these rows do not tell.
    pub holds: Option<bool>,
    pub evidence: String,
}

impl RcvbufRow {
    /// The row of a case's runs; there must be one at least.
    pub fn of(case: &str, rmem_max: u64, runs: &[RcvbufRun]) -> Self {
        let spread = |of: fn(&RcvbufRun) -> f64| Spread::of(runs.iter().map(of).collect());
        // One of the values themselves, for a mean of two would be none that was seen.
        let middle = |of: fn(&RcvbufRun) -> u64| {
            let mut values: Vec<u64> = runs.iter().map(of).collect();
            values.sort_unstable();
            values[values.len() / 2]
        };
        Self {
            case: case.to_owned(),
            rmem_max,
            rcvbuf_requested: runs[0].rcvbuf_requested,
            rcvbuf_effective: middle(|run| run.rcvbuf_effective),
            rcvbuf_final: middle(|run| run.rcvbuf_final),
            rcvbuf_capped: runs[0].rcvbuf_capped,
            window_scale: runs[0].window_scale,
            rcv_ssthresh_first: middle(|run| run.rcv_ssthresh_first),
            rcv_ssthresh_final: middle(|run| run.rcv_ssthresh_final),
            rcv_space_first: middle(|run| run.rcv_space_first),
            rcv_space_final: middle(|run| run.rcv_space_final),
            mb_per_s: spread(|run| run.mb_per_s),
            rwnd_limited_percent: spread(|run| run.rwnd_limited_percent),
            sndbuf_limited_percent: spread(|run| run.sndbuf_limited_percent),
            rtt_ms: spread(|run| run.rtt_ms),
        }
    }
}
