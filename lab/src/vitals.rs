//! What a process holds on to: memory and descriptors, and whether they stay what they are.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Growth of memory that is none: the kernel counts in pages that it hands to threads in lots.
const MEMORY_SLACK: u64 = 4 << 20;
/// And this share of what there is, for sessions that are kept for a while after they ended.
const MEMORY_SHARE: f64 = 0.02;

/// One look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Look {
    /// Resident memory, with the logs that are mapped, bytes.
    pub rss_bytes: u64,
    pub address_space_bytes: u64,
    pub descriptors: u64,
}

impl Look {
    pub fn at(pid: u32) -> Result<Self> {
        let proc = Path::new("/proc").join(pid.to_string());
        let status = fs::read_to_string(proc.join("status"))
            .with_context(|| format!("cannot look at process {pid}"))?;
        let descriptors = fs::read_dir(proc.join("fd"))
            .with_context(|| format!("cannot count the descriptors of process {pid}"))?;
        let field = |name| kib(&status, name).with_context(|| format!("process {pid} has ended"));
        Ok(Self {
            rss_bytes: field("VmRSS:")?,
            address_space_bytes: field("VmSize:")?,
            descriptors: descriptors.count() as u64,
        })
    }
}

/// A field of a process's status that is in KiB, in bytes.
fn kib(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// All looks at a process.
#[derive(Debug, Default)]
pub struct Vitals(Vec<Look>);

/// What became of one figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Course {
    pub first: u64,
    pub last: u64,
    pub max: u64,
    /// Median of the second quarter, and of the last.
    pub early: u64,
    pub late: u64,
}

impl Vitals {
    pub fn add(&mut self, look: Look) {
        self.0.push(look);
    }

    pub fn memory(&self) -> Course {
        self.course(|look| look.rss_bytes)
    }

    pub fn descriptors(&self) -> Course {
        self.course(|look| look.descriptors)
    }

    fn course(&self, figure: impl Fn(&Look) -> u64) -> Course {
        let figures: Vec<u64> = self.0.iter().map(figure).collect();
        let quarter = figures.len() / 4;
        let median = |part: &[u64]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part.get(part.len() / 2).copied().unwrap_or_default()
        };
        Course {
            first: figures.first().copied().unwrap_or_default(),
            last: figures.last().copied().unwrap_or_default(),
            max: figures.iter().copied().max().unwrap_or_default(),
            early: median(&figures[quarter..(2 * quarter).max(quarter + 1).min(figures.len())]),
            late: median(&figures[figures.len() - quarter.max(1).min(figures.len())..]),
        }
    }
}

/// Whether memory stayed what it was: the rule is that the median of the last quarter is at most 2 %
/// and 4 MiB above that of the second quarter, the first being for warming up.
pub fn grew(memory: &Course) -> bool {
    let slack = MEMORY_SLACK + (memory.early as f64 * MEMORY_SHARE) as u64;
    memory.late > memory.early + slack
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(figures: impl IntoIterator<Item = u64>) -> Course {
        let looks = figures.into_iter().map(|mib| Look {
            rss_bytes: mib << 20,
            address_space_bytes: mib << 20,
            descriptors: mib,
        });
        Vitals(looks.collect()).memory()
    }

    #[test]
    fn memory_that_warms_up_and_stays_is_flat() {
        let flat = course((0..25).chain((0..75).map(|n| 100 + n % 3)));
        assert!(!grew(&flat), "{flat:?}");
        assert_eq!((flat.first, flat.max), (0, 102 << 20));
        assert!(!grew(&course([100])) && !grew(&course([])));
        // One look that is high is no growth.
        assert!(!grew(&course((0..40).map(|n| if n == 39 {
            200
        } else {
            100
        }))));
    }

    #[test]
    fn memory_that_rises_is_noticed() {
        let rising = course(100..200);
        assert!(grew(&rising), "{rising:?}");
        assert!(grew(&course((0..40).map(|n| if n < 25 {
            100
        } else {
            107
        }))));
        assert!(!grew(&course((0..40).map(|n| if n < 25 {
            100
        } else {
            105
        }))));
    }

    #[test]
    fn a_process_can_be_looked_at() {
        let look = Look::at(std::process::id()).unwrap();
        assert!(look.rss_bytes > 1 << 20 && look.descriptors >= 3);
        assert!(look.address_space_bytes >= look.rss_bytes);
        assert!(Look::at(u32::MAX).is_err());
    }
}
