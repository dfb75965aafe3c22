//! The runs of one contender of a case.

use std::collections::BTreeMap;

use super::plan::Contender;
use crate::commands::compare::host_time::HostCpuTimes;
use crate::commands::compare::trial::Trial;
use crate::measure::stats::Spread;
use crate::report::model::{BenchContender, bench_figures};

/// Number of failed runs after which a contender is left out of its case.
const MAX_FAILURES: usize = 3;

/// The figures of one run, by the names of [`bench_figures`].
pub type Figures = BTreeMap<&'static str, f64>;

/// The runs of one contender.
pub struct Tally {
    pub figures: BTreeMap<&'static str, Vec<f64>>,
    pub failures: Vec<String>,
    pub absent: Option<String>,
}

impl Tally {
    pub fn new(absent: Option<String>) -> Self {
        Self {
            figures: BTreeMap::new(),
            failures: Vec::new(),
            absent,
        }
    }

    /// Whether it does not run any more.
    pub fn is_out(&self) -> bool {
        self.absent.is_some() || self.failures.len() >= MAX_FAILURES
    }

    /// Notes a run, and says how it went.
    pub fn add(&mut self, outcome: Result<Figures, String>) -> String {
        match outcome {
            Ok(figures) => {
                let shown = shown(&figures);
                for (name, value) in figures {
                    self.figures.entry(name).or_default().push(value);
                }
                shown
            }
            Err(why) => {
                self.failures.push(why);
                "failed".to_owned()
            }
        }
    }

    pub fn report(self, of: &Contender) -> BenchContender {
        let figures = self.figures.into_iter();
        BenchContender {
            figures: figures
                .map(|(name, runs)| (name.to_owned(), Spread::of(runs)))
                .collect(),
            failures: self.failures,
            absent: self.absent,
            ..described(of)
        }
    }
}

/// A contender without figures.
pub fn described(of: &Contender) -> BenchContender {
    BenchContender {
        kind: of.kind.name().to_owned(),
        mode: of.kind.mode(),
        streams: of.streams,
        brokers: of.brokers,
        figures: BTreeMap::new(),
        failures: Vec::new(),
        absent: None,
    }
}

fn shown(figures: &Figures) -> String {
    let part = |name, unit: &str| {
        let value: Option<&f64> = figures.get(name);
        value.map(|value| format!("{value:.0} {unit}"))
    };
    let parts = [
        part(bench_figures::PAYLOAD, "MB/s"),
        part(bench_figures::P50, "µs ack p50"),
        part(bench_figures::IDLE_STREAM, "bytes per idle stream"),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Figures of a trial.
pub fn figures_of(trial: &Trial) -> Figures {
    let mut figures = Figures::from([
        (bench_figures::PAYLOAD, trial.payload_mb_per_s),
        (bench_figures::MESSAGES, trial.messages_per_s),
        (bench_figures::HOST_CPU, trial.host_cpu_s_per_gb),
        (bench_figures::PUBLISHER_CPU, trial.publisher_cpu_s_per_gb),
        (bench_figures::P50, trial.ack_latency_us.p50),
        (bench_figures::P99, trial.ack_latency_us.p99),
        (bench_figures::HOST_BUSY, trial.host_busy),
        (bench_figures::PUBLISHER_CORES, trial.publisher_cores),
        (bench_figures::OTHER_CORES, trial.other_cores),
        ("drops", trial.drops as f64),
        ("retransmits", trial.retransmits as f64),
    ]);
    let brokers = [
        (bench_figures::BROKER_CPU, trial.broker_cpu_s_per_gb),
        (bench_figures::BROKER_CORES, trial.broker_cores),
    ];
    figures.extend(
        brokers
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    figures
}

/// CPU time of both hosts.
pub fn figures_of_hosts(of: &HostCpuTimes) -> Figures {
    Figures::from([
        (bench_figures::SENDING_HOST, of.sending),
        (bench_figures::RECEIVING_HOST, of.receiving),
        (
            bench_figures::WITHOUT_CONVERSION,
            of.receiving_without_conversion,
        ),
        (bench_figures::HOST_CPU, of.both),
        (bench_figures::PAYLOAD, of.payload_mb_per_s),
        (bench_figures::PROBE_OVERHEAD, of.probe_overhead),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::plan::Kind;

    #[test]
    fn failed_runs_do_not_count_and_three_end_it() {
        let mut tally = Tally::new(None);
        tally.add(Ok(Figures::from([(bench_figures::PAYLOAD, 1.0)])));
        assert_eq!(tally.add(Err("it fell back".to_owned())), "failed");
        assert!(!tally.is_out());
        tally.add(Err("again".to_owned()));
        assert!(!tally.is_out());
        tally.add(Err("and again".to_owned()));
        assert!(tally.is_out());
        let report = tally.report(&Contender::of(Kind::Tcp));
        assert_eq!(report.figures[bench_figures::PAYLOAD].runs, [1.0]);
        assert_eq!(report.failures, ["it fell back", "again", "and again"]);
        assert!(Tally::new(Some("absent".to_owned())).is_out());
    }
}
