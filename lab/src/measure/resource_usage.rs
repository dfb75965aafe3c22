//! Resource usage of a process: memory and descriptors, and whether they grow.

use std::fs;

use anyhow::{Context, Result};
use procfs::process::Process;
use serde::{Deserialize, Serialize};

/// Growth of memory that does not count: the kernel accounts pages per thread in batches.
const MEMORY_SLACK: u64 = 4 << 20;
/// Further growth that does not count, as a share, for sessions that the broker keeps after they ended.
const MEMORY_SHARE: f64 = 0.02;

/// One sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ResourceUsage {
    /// Resident memory including mapped logs, bytes.
    pub rss_bytes: u64,
    pub address_space_bytes: u64,
    pub descriptors: u64,
}

impl ResourceUsage {
    pub fn at(pid: u32) -> Result<Self> {
        let number = pid.try_into().context("no process has this number")?;
        let process = Process::new(number).with_context(|| format!("there is no process {pid}"))?;
        let status = process.status();
        let status = status.with_context(|| format!("cannot sample process {pid}"))?;
        // Not `fd_count` of procfs: before Linux 6.2 it counts `.` and `..` as well.
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .with_context(|| format!("cannot count the descriptors of process {pid}"))?;
        // One that has ended and was not waited for has no memory.
        let bytes = |kib: Option<u64>| {
            let kib = kib.with_context(|| format!("process {pid} has ended"))?;
            anyhow::Ok(kib * 1024)
        };
        Ok(Self {
            rss_bytes: bytes(status.vmrss)?,
            address_space_bytes: bytes(status.vmsize)?,
            descriptors: descriptors.count() as u64,
        })
    }
}

/// All samples of a process.
#[derive(Debug, Default)]
pub struct UsageHistory(Vec<ResourceUsage>);

/// Summary of one figure over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trend {
    pub first: u64,
    pub last: u64,
    pub max: u64,
    /// Medians of the second and of the last quarter.
    pub early: u64,
    pub late: u64,
}

impl UsageHistory {
    pub fn add(&mut self, sample: ResourceUsage) {
        self.0.push(sample);
    }

    pub fn memory(&self) -> Trend {
        self.trend(|sample| sample.rss_bytes)
    }

    pub fn descriptors(&self) -> Trend {
        self.trend(|sample| sample.descriptors)
    }

    fn trend(&self, figure: impl Fn(&ResourceUsage) -> u64) -> Trend {
        let figures: Vec<u64> = self.0.iter().map(figure).collect();
        let quarter = figures.len() / 4;
        let median = |part: &[u64]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part.get(part.len() / 2).copied().unwrap_or_default()
        };
        Trend {
            first: figures.first().copied().unwrap_or_default(),
            last: figures.last().copied().unwrap_or_default(),
            max: figures.iter().copied().max().unwrap_or_default(),
            early: median(&figures[quarter..(2 * quarter).max(quarter + 1).min(figures.len())]),
            late: median(&figures[figures.len() - quarter.max(1).min(figures.len())..]),
        }
    }
}

/// Whether memory has grown: the median of the last quarter exceeds that of the second by more than 2 %
/// and 4 MiB. The first quarter is for warming up.
pub fn has_grown(memory: &Trend) -> bool {
    let slack = MEMORY_SLACK + (memory.early as f64 * MEMORY_SHARE) as u64;
    memory.late > memory.early + slack
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trend(figures: impl IntoIterator<Item = u64>) -> Trend {
        let samples = figures.into_iter().map(|mib| ResourceUsage {
            rss_bytes: mib << 20,
            address_space_bytes: mib << 20,
            descriptors: mib,
        });
        UsageHistory(samples.collect()).memory()
    }

    #[test]
    fn memory_that_warms_up_and_stays_is_flat() {
        let flat = trend((0..25).chain((0..75).map(|n| 100 + n % 3)));
        assert!(!has_grown(&flat), "{flat:?}");
        assert_eq!((flat.first, flat.max), (0, 102 << 20));
        assert!(!has_grown(&trend([100])) && !has_grown(&trend([])));
        // A single high sample is no growth.
        assert!(!has_grown(&trend((0..40).map(|n| if n == 39 {
            200
        } else {
            100
        }))));
    }

    #[test]
    fn memory_that_rises_is_noticed() {
        let rising = trend(100..200);
        assert!(has_grown(&rising), "{rising:?}");
        assert!(has_grown(&trend((0..40).map(|n| if n < 25 {
            100
        } else {
            107
        }))));
        assert!(!has_grown(&trend((0..40).map(|n| if n < 25 {
            100
        } else {
            105
        }))));
    }

    #[test]
    fn a_process_can_be_looked_at() {
        let sample = ResourceUsage::at(std::process::id()).unwrap();
        assert!(sample.rss_bytes > 1 << 20 && sample.descriptors >= 3);
        assert!(sample.address_space_bytes >= sample.rss_bytes);
        assert!(ResourceUsage::at(u32::MAX).is_err());
    }
}
