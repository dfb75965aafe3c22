//! Whether a host is quiet and large enough for meaningful figures: how much CPU other programs and the
//! hypervisor used, how many cores there are, and how far the runs of one figure differ.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

use crate::measure::stats::Spread;
use penstock_diagnose::cpu::CoresSnapshot;

/// Publisher, broker, the kernel's packet processing, and the lab itself.
pub const MIN_CPUS: usize = 4;
/// Share of the host's CPU above which other programs affect the figures.
pub const MAX_OTHERS: f64 = 0.1;
pub const MAX_STEAL: f64 = 0.02;
/// Runs that differ by this share of their median say little about smaller differences.
const MAX_SPREAD: f64 = 0.3;
/// Maximum number of figures to name.
const MAX_NAMED: usize = 3;

/// What the host did besides the measured work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostLoad {
    pub cpus: usize,
    /// CPU that programs other than the lab's used, in cores.
    pub others_cores: f64,
    /// Share of the host's CPU that the hypervisor took, 0 to 1.
    pub steal: f64,
    /// Processes that ran or waited for a core, mean over the last minute.
    pub load_average: Option<f64>,
}

/// Observes the host until the work is done.
#[derive(Debug)]
pub struct HostWatch {
    began: Instant,
    cores: CoresSnapshot,
    own: f64,
}

impl HostWatch {
    /// Starts now.
    pub fn start() -> Result<Self> {
        Ok(Self {
            began: Instant::now(),
            cores: CoresSnapshot::now()?,
            own: own_cpu_seconds()?,
        })
    }

    /// Observes for this long.
    pub fn measure_for(time: Duration) -> Result<HostLoad> {
        let watch = Self::start()?;
        thread::sleep(time);
        watch.finish()
    }

    /// Ends now; children that still run count as other programs.
    pub fn finish(self) -> Result<HostLoad> {
        let seconds = self.began.elapsed().as_secs_f64();
        let cores = CoresSnapshot::now()?.since(&self.cores, seconds)?;
        let busy: f64 = cores.iter().map(|core| core.user + core.system).sum();
        let own = (own_cpu_seconds()? - self.own) / seconds;
        let steal: f64 = cores.iter().map(|core| core.steal).sum();
        Ok(HostLoad {
            cpus: cores.len(),
            others_cores: (busy - own).max(0.0),
            steal: steal / cores.len().max(1) as f64,
            load_average: load_average(),
        })
    }
}

/// CPU time of this process and of the children that it has waited for.
fn own_cpu_seconds() -> Result<f64> {
    let mut sum = 0.0;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        sum += seconds(usage.user_time()) + seconds(usage.system_time());
    }
    Ok(sum)
}

fn seconds(time: TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 * 1e-6
}

fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

impl HostLoad {
    /// Share of the host's CPU that other programs used.
    pub fn others(&self) -> f64 {
        self.others_cores / self.cpus.max(1) as f64
    }

    /// Reasons why figures of this host mean little; empty if there are none.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.others() >= MAX_OTHERS {
            warnings.push(format!(
                "Other programs kept {:.1} of {} cores busy during the run: repeat it without them (top -o %CPU shows which).",
                self.others_cores, self.cpus
            ));
        }
        if self.steal >= MAX_STEAL {
            warnings.push(format!(
                "The hypervisor took {:.0} % of this machine's CPU (steal): other machines share its cores, and figures vary with their load.",
                100.0 * self.steal
            ));
        }
        if self.cpus < MIN_CPUS {
            warnings.push(format!(
                "{} cores are too few to run publisher, broker and the kernel side by side: they compete for the cores, and only ratios within one run are meaningful.",
                self.cpus
            ));
        }
        warnings
    }
}

/// Figures whose runs differ so much that smaller differences between them mean nothing.
pub fn spread_warning<'a>(
    figures: impl IntoIterator<Item = (String, &'a Spread)>,
) -> Option<String> {
    let mut wide: Vec<(String, f64)> = figures
        .into_iter()
        .map(|(name, spread)| (name, spread.width()))
        .filter(|(_, width)| *width >= MAX_SPREAD)
        .collect();
    wide.sort_by(|a, b| b.1.total_cmp(&a.1));
    if wide.is_empty() {
        return None;
    }
    let named = wide.iter().take(MAX_NAMED);
    let named: Vec<_> = named
        .map(|(name, width)| format!("{name} by {:.0} %", 100.0 * width))
        .collect();
    let more = match wide.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!(
        "Runs of the same work differ by a large share of their median ({}{more}): smaller differences mean nothing; raise --runs.",
        named.join(", ")
    ))
}

/// A section of a report, in Markdown; `None` if all is well.
pub fn part(warnings: &[String]) -> Option<String> {
    let lines: Vec<_> = warnings.iter().map(|text| format!("- {text}")).collect();
    (!lines.is_empty()).then(|| format!("## Reliability of these figures\n\n{}", lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(cpus: usize, others_cores: f64, steal: f64) -> HostLoad {
        HostLoad {
            cpus,
            others_cores,
            steal,
            load_average: None,
        }
    }

    #[test]
    fn a_quiet_large_host_has_nothing_to_say() {
        assert_eq!(load(8, 0.2, 0.001).warnings(), Vec::<String>::new());
        assert_eq!(part(&[]), None);
    }

    #[test]
    fn busy_stolen_and_small_hosts_say_so() {
        for (load, words) in [
            (load(8, 2.0, 0.0), "2.0 of 8 cores"),
            (load(8, 0.0, 0.05), "5 % of this machine's CPU (steal)"),
            (load(2, 0.0, 0.0), "2 cores are too few"),
        ] {
            let warnings = load.warnings();
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            assert!(warnings[0].contains(words), "{warnings:?}");
        }
    }

    #[test]
    fn runs_that_differ_are_named_the_widest_first() {
        let spread = |runs: &[f64]| Spread::of(runs.to_vec());
        let (even, wide, wider) = (
            spread(&[100.0, 101.0, 105.0]),
            spread(&[100.0, 140.0, 90.0]),
            spread(&[1.0, 2.0, 3.0]),
        );
        let named = |name: &str| name.to_owned();
        assert_eq!(spread_warning([(named("even"), &even)]), None);
        let text = spread_warning([
            (named("a"), &wide),
            (named("b"), &wider),
            (named("c"), &even),
        ]);
        assert!(text.unwrap().contains("(b by 100 %, a by 50 %)"));
    }

    #[test]
    fn what_others_do_is_seen() {
        let watch = HostWatch::start().unwrap();
        let load = watch.finish().unwrap();
        assert!(load.cpus > 0 && load.others_cores >= 0.0);
    }
}
