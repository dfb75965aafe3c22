//! The subcommands. Each has its flags in `flags.rs`; what it measures becomes a report.

pub mod baseline;
pub mod bench;
pub mod chaos;
pub mod compare;
pub mod diagnose;
pub mod doctor;
pub mod experiment;
pub mod limits;
pub mod report;
pub mod soak;
pub mod throughput;
