//! Reports for people: the Markdown files and the tables on the terminal.

mod baseline;
mod bench;
mod comparison;
mod diagnosis;
mod experiment;
mod markdown;
mod throughput;

pub use baseline::{baseline, baseline_summary};
pub use bench::{bench, bench_tables};
pub use comparison::{compare, compare_summary, limits, limits_table, panels};
pub use diagnosis::{figures as diagnosis_figures, rerun};
pub use experiment::{observer, observer_summary, rcvbuf, rcvbuf_summary};
pub use throughput::{throughput, throughput_summary};

#[cfg(test)]
pub use {bench::tests::example as bench_example, comparison::tests::example as compare_example};

#[cfg(test)]
pub mod tests;
