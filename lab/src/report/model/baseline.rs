//! `report.json` of `baseline`.

use serde::{Deserialize, Serialize};

use crate::measure::environment::Environment;
use crate::measure::host_load::HostLoad;
use crate::measure::stats::Spread;
use penstock_testbed::settings::Profile;

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
}
