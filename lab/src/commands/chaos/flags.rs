//! The command line of `penstock-lab faults`.

use clap::Args;

use super::fault_catalog::FAULT_CATALOG;
use super::path::FaultPath;
use crate::settings::{Output, Programs};

pub const EXAMPLES: &str = "\
Examples:
  # every fault once on each path, about six minutes
  sudo penstock-lab faults

  # twelve runs with some of them
  sudo penstock-lab faults --schedules 12 \\
      --faults broker-killed,link-down,loss

  # repeat only the schedule that failed in a run with seed 42
  sudo penstock-lab faults --seed 42 --only 17

  # list the faults
  penstock-lab faults --list

In each run one to three publishers send numbered lines to a broker for about
three seconds, while the run's own fault happens up to three times and up to
three other faults happen as well. Afterwards the lab compares a reader's
lines with those acknowledged: no acknowledged line may be missing, duplicated,
torn or out of order within its stream. What a killed publisher left must be a
prefix of what it sent. The last line on stdout is the result folder. Exit
codes: 0 no problem, 1 a problem was found, 2 wrong usage, 130 interrupted.";

/// Flags of `faults`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Runs")]
pub struct Faults {
    /// Number of fault runs [default: each fault once on each path].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub schedules: Option<u64>,
    /// Repeat the schedules of an earlier run by the seed in its report [default: random].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Only the schedule with this number.
    #[arg(
        long,
        value_name = "N",
        requires = "seed",
        conflicts_with = "schedules"
    )]
    pub only: Option<u64>,
    /// Paths; `fallback` is --mode auto while datagrams do not get through.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "tcp,xdp,fallback"
    )]
    pub paths: Vec<FaultPath>,
    /// Only runs with these faults; --list shows them.
    #[arg(long, value_delimiter = ',', value_name = "FAULT", value_parser = fault_kind())]
    pub faults: Vec<String>,
    /// List the faults, and exit.
    #[arg(long)]
    pub list: bool,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}

fn fault_kind() -> clap::builder::PossibleValuesParser {
    FAULT_CATALOG
        .iter()
        .map(|kind| kind.name)
        .collect::<Vec<_>>()
        .into()
}
