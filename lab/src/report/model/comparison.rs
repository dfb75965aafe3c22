//! `report.json` of `penstock-lab compare` and `limits`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::measure::environment::Environment;
use crate::measure::host_load::HostLoad;
use crate::measure::stats::Spread;
use penstock_testbed::settings::{Profile, XdpMode};

/// `report.json` of `penstock-lab limits`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    pub kind: String,
    pub limits: Vec<Limit>,
    pub environment: Environment,
}

/// What the host can do at best.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// `raw_af_xdp_native`, `raw_af_xdp_generic`, `iperf3_<streams>` or `memory_copy`.
    pub name: String,
    /// Null where no link takes part.
    pub profile: Option<Profile>,
    pub mtu: Option<u32>,
    /// Median of the runs, 10^6 bytes of payload a second.
    pub mb_per_s: f64,
    pub min: f64,
    pub max: f64,
    pub runs: Vec<f64>,
    /// How the XDP program ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<XdpMode>,
    /// UDP payload of a packet, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub datagram: Option<usize>,
    /// Packets that did not arrive, all runs together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_percent: Option<f64>,
}

impl Limit {
    /// One of the whole host.
    pub fn of_host(name: &str, figures: Spread) -> Self {
        Self {
            name: name.to_owned(),
            profile: None,
            mtu: None,
            mb_per_s: figures.median,
            min: figures.min,
            max: figures.max,
            runs: figures.runs,
            mode: None,
            datagram: None,
            lost_percent: None,
        }
    }

    /// One of a link.
    pub fn of_link(name: &str, profile: Profile, mtu: u32, figures: Spread) -> Self {
        Self {
            profile: Some(profile),
            mtu: Some(mtu),
            ..Self::of_host(name, figures)
        }
    }
}

/// The limit of a path, from those of its link: for xdp what an AF_XDP socket takes in the same mode
/// of the program, or the better mode where none is named; for tcp the best of iperf3.
pub fn limit_of(limits: &[Limit], path: &str, mode: Option<XdpMode>) -> Option<f64> {
    let wanted = |limit: &&Limit| match path {
        "tcp" => limit.name.starts_with("iperf3"),
        _ => limit.mode.is_some() && (mode.is_none() || limit.mode == mode),
    };
    let rates = limits.iter().filter(wanted).map(|limit| limit.mb_per_s);
    rates.max_by(f64::total_cmp)
}

/// `report.json` of `penstock-lab compare`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Compare {
    pub kind: String,
    pub brokers: u32,
    pub threads_per_broker: u32,
    /// Bytes, in runs at full speed.
    pub message_size: u64,
    /// Payload of a run at full speed, bytes.
    pub size_bytes: u64,
    /// Length of a run at a rate, seconds.
    pub latency_seconds: f64,
    /// Batches a second; the other rate of the rows is the high one.
    pub low_rate: u32,
    /// Where the brokers ran, if not on this host.
    pub remote: Option<String>,
    pub rows: Vec<Row>,
    pub limits: Vec<Limit>,
    /// Why no row has the CPU time of each host, if none has although brokers ran on this one.
    #[serde(default)]
    pub host_times_unavailable: Option<String>,
    /// What the host did besides; null in reports of older labs.
    #[serde(default)]
    pub host_load: Option<HostLoad>,
    /// Why the figures mean little, if they do.
    #[serde(default)]
    pub warnings: Vec<String>,
    pub environment: Environment,
}

/// One figure of both paths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `wire`, `offload`, or `remote`.
    pub profile: String,
    pub mtu: u32,
    /// `sending_host_cpu_s_per_gb`, `receiving_host_cpu_s_per_gb`,
    /// `receiving_host_without_conversion_cpu_s_per_gb`, `payload_mb_per_s`, `host_cpu_s_per_gb`, `broker_cpu_s_per_gb`, `publisher_cpu_s_per_gb`,
    /// `ack_latency_us_p50`, `_p99`, `_p999`, `drops`, `retransmits`.
    pub metric: String,
    /// Batches a second; null at full speed.
    pub rate: Option<u32>,
    /// Messages of a batch, bytes; null at full speed, where it is the publisher's to choose.
    pub batch_bytes: Option<u64>,
    /// What the xdp workers did while no packet came; null where that is the remote broker's.
    pub poll: Option<String>,
    /// How the XDP program ran: the mode that was better; null where that is the remote broker's.
    pub xdp_mode: Option<XdpMode>,
    pub xdp: Spread,
    pub tcp: Spread,
    /// Median of xdp / median of tcp; null if the latter is 0.
    pub ratio: Option<f64>,
    /// Median of xdp / tcp over pairs of neighbouring runs.
    pub ratio_of_pairs: Option<f64>,
    /// Every mode that was measured.
    pub xdp_by_mode: BTreeMap<String, Spread>,
    /// The medians in percent of what the host can do at best; payload only.
    pub percent_of_limit: Option<PercentOfLimit>,
}

/// A median in percent of the path's limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PercentOfLimit {
    pub xdp: Option<f64>,
    pub tcp: Option<f64>,
}

/// `a / b`, if that is a number.
pub fn ratio(a: f64, b: f64) -> Option<f64> {
    (b != 0.0).then(|| a / b)
}

/// Median of the ratios of neighbouring runs, those that are numbers.
pub fn ratio_of_pairs(a: &Spread, b: &Spread) -> Option<f64> {
    let pairs = a.runs.iter().zip(&b.runs);
    let ratios: Vec<_> = pairs.filter_map(|(a, b)| ratio(*a, *b)).collect();
    (!ratios.is_empty()).then(|| Spread::of(ratios).median)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(name: &str, mode: Option<XdpMode>, mb_per_s: f64) -> Limit {
        Limit {
            mode,
            ..Limit::of_link(name, Profile::Wire, 1500, Spread::of(vec![mb_per_s]))
        }
    }

    #[test]
    fn each_path_has_its_own_limit() {
        let limits = [
            limit("raw_af_xdp_native", Some(XdpMode::Native), 900.0),
            limit("raw_af_xdp_generic", Some(XdpMode::Generic), 700.0),
            limit("iperf3_1", None, 650.0),
            limit("iperf3_4", None, 750.0),
            Limit::of_host("memory_copy", Spread::of(vec![9000.0])),
        ];
        let generic = Some(XdpMode::Generic);
        assert_eq!(limit_of(&limits, "xdp", generic), Some(700.0));
        assert_eq!(limit_of(&limits, "xdp", None), Some(900.0));
        assert_eq!(limit_of(&limits, "tcp", None), Some(750.0));
        assert_eq!(limit_of(&limits[2..], "xdp", None), None);
    }

    #[test]
    fn ratios_leave_out_what_is_no_number() {
        let (a, b) = (Spread::of(vec![2.0, 3.0]), Spread::of(vec![0.0, 2.0]));
        assert_eq!(ratio_of_pairs(&a, &b), Some(1.5));
        assert_eq!(ratio(1.0, 0.0), None);
        assert_eq!(ratio_of_pairs(&a, &Spread::of(vec![0.0, 0.0])), None);
    }
}
