//! What `report.json` holds; field names are an interface.

mod baseline;
mod bench;
pub mod bench_figures;
mod comparison;
pub mod diagnosis;
mod experiment;
mod throughput;
mod timeline;
mod units;

pub use baseline::{Baseline, BaselineRow};
pub use bench::{Bench, BenchCase, BenchContender, BenchRow, Side, Target, Verdict};
pub use comparison::{
    Compare, Limit, Limits, PercentOfLimit, Row, limit_of, ratio, ratio_of_pairs,
};
pub use diagnosis::Diagnosed;
pub use experiment::{
    Claim, OBSERVER, ObserverExperiment, ObserverPair, RCVBUF, RcvbufExperiment, RcvbufRow,
    RcvbufRun,
};
pub use throughput::{Broker, Publisher, Rerun, Throughput};
pub use timeline::{ConnectionPoint, HostCores, Point, Timeline};
pub use units::per_gb;
