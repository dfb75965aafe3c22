//! The runs of one contender of a case.

use std::collections::BTreeMap;

use super::plan::Contender;
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
