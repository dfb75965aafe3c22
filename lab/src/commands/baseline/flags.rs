//! The command line of `penstock-lab baseline`.

use bytesize::ByteSize;
use clap::Args;
use penstock_flags::size;

use crate::settings::{Output, Programs};
use penstock_testbed::settings::{MAX_TOTAL, Profile, Route, Workload};

/// Flags of `baseline`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Comparison")]
pub struct Baseline {
    /// Runs of each program per case.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Payload per run.
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = size(1..=MAX_TOTAL))]
    pub size: ByteSize,
    /// MTU of the link, bytes.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65535))]
    pub mtu: u32,
    /// Only this profile [default: both].
    #[arg(long, value_enum)]
    pub profile: Option<Profile>,
    /// Numbers of connections to compare.
    #[arg(long, value_delimiter = ',', default_value = "1,4",
          value_parser = clap::value_parser!(u32).range(1..=128))]
    pub connections: Vec<u32>,
    #[command(flatten)]
    pub route: Route,
    #[command(flatten)]
    pub workload: Workload,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}
