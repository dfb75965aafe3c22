//! `report.json` of `penstock-lab bench`; docs/operations.md describes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::measure::environment::Environment;
use crate::measure::host_load::HostLoad;
use crate::measure::stats::Spread;
use penstock_testbed::settings::{Profile, XdpMode};

/// The whole report.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bench {
    pub kind: String,
    /// Rounds: runs of each contender of a case.
    pub runs: u32,
    /// Approximate length of a run at full speed, and length of one at a rate.
    pub seconds: f64,
    /// What must hold, and whether it does.
    pub rows: Vec<BenchRow>,
    /// What was measured for it.
    pub cases: Vec<BenchCase>,
    /// Versions of the peers, or why they are absent.
    pub peers: BTreeMap<String, String>,
    /// Seconds that everything took.
    pub took_seconds: f64,
    /// False if it was written before the end, and more was to come.
    pub complete: bool,
    pub host_load: Option<HostLoad>,
    /// Why the figures mean little, if they do.
    pub warnings: Vec<String>,
    pub environment: Environment,
}

/// Contenders that alternated on the same links.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchCase {
    pub id: String,
    /// Name of `--rows`.
    pub group: String,
    pub profile: Profile,
    pub mtu: u32,
    /// Bytes.
    pub message_size: u64,
    /// Batches per second; null at full speed.
    pub rate: Option<u32>,
    /// Payload of a run, bytes; 0 where nothing is sent.
    pub payload_bytes: u64,
    pub contenders: Vec<BenchContender>,
}

/// One side of a case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchContender {
    /// `tcp`, `xdp`, `raw_af_xdp`, `iperf3`, `nats` or `aeron`.
    pub kind: String,
    /// How the XDP program ran; null where there is none, or the broker chose.
    pub mode: Option<XdpMode>,
    pub streams: u32,
    pub brokers: u32,
    /// By name, over the runs in their order.
    pub figures: BTreeMap<String, Spread>,
    /// Why runs failed; they do not count.
    pub failures: Vec<String>,
    /// Why there is no figure, if there is none.
    pub absent: Option<String>,
}

/// What must hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchRow {
    pub id: String,
    pub group: String,
    pub what: String,
    pub ours: Option<Side>,
    /// What it is compared with; null if the target is absolute.
    pub theirs: Option<Side>,
    /// The ratio of the medians, or the median; null if it was not measured.
    pub value: Option<f64>,
    /// Median, minimum and maximum of the ratio over rounds; null if the target is absolute or runs
    /// failed.
    pub of_rounds: Option<Spread>,
    /// `ratio`, or that of the median.
    pub unit: String,
    pub target: Target,
    pub verdict: Verdict,
    /// If it is lost, what was measured and what limits it; if it was not measured, why.
    pub sentence: Option<String>,
}

/// A figure of one contender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Side {
    pub name: String,
    /// Of the contender's `figures`, or what is computed from several.
    pub figure: String,
    pub spread: Spread,
}

/// Bound on a row's value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
}

/// Whether a row holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Met,
    Lost,
    NotMeasured,
}

impl Target {
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Lost => "lost",
            Self::NotMeasured => "not measured",
        }
    }
}

impl BenchContender {
    /// For people, such as `xdp native, 64 streams`.
    pub fn name(&self) -> String {
        let kind = match self.kind.as_str() {
            "raw_af_xdp" => "raw AF_XDP",
            "nats" => "nats-server",
            "aeron" => "Aeron",
            other => other,
        };
        let mode = self.mode.map(|mode| format!(" {}", mode.name()));
        let many = |count: u32, what: &str| match count {
            1 => String::new(),
            count => format!(", {count} {what}"),
        };
        format!(
            "{kind}{}{}{}",
            mode.unwrap_or_default(),
            many(self.streams, "streams"),
            many(self.brokers, "brokers")
        )
    }

    pub fn figure(&self, name: &str) -> Option<&Spread> {
        self.figures.get(name)
    }

    pub fn median(&self, name: &str) -> Option<f64> {
        self.figure(name).map(|spread| spread.median)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_inclusive() {
        assert!(Target::AtLeast(0.85).is_met(0.85) && !Target::AtLeast(0.85).is_met(0.849));
        assert!(Target::AtMost(0.7).is_met(0.7) && !Target::AtMost(0.7).is_met(0.701));
        assert!(!Target::AtLeast(1.0).is_met(f64::NAN) && !Target::AtMost(1.0).is_met(f64::NAN));
    }

    #[test]
    fn targets_and_verdicts_have_stable_names_in_json() {
        let json = serde_json::json!([Target::AtMost(1.5), Verdict::NotMeasured]);
        assert_eq!(json.to_string(), r#"[{"at_most":1.5},"not_measured"]"#);
    }
}
