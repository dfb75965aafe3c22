//! The command line of `penstock-lab soak`.

use std::time::Duration;

use clap::Args;
use penstock_flags::{BareUnit, duration};

use crate::settings::{Output, Programs};

pub const EXAMPLES: &str = "\
Examples:
  # an hour
  sudo penstock-lab soak --minutes 60

  # half a minute, with the script of an earlier run
  sudo penstock-lab soak --minutes 0.5 --seed 42

The run succeeds if every acknowledged message is in the log once, in order
and whole; what a killed publisher left is a prefix of what it sent; brokers
and readers report the same counts; each broker's memory has not grown (median
of the last quarter of the run at most 2 % and 4 MiB above that of the second
quarter); and as many descriptors are open at the end as before the first
publisher. The last line on stdout is the result folder. Exit codes: 0
success, 1 a check failed, 2 wrong usage, 130 interrupted.";

/// Flags of `soak`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Run")]
pub struct Soak {
    /// Length of the run, such as 30m or 2h; a number alone is minutes.
    #[arg(long, default_value = "10m", value_name = "DURATION", value_parser = parse_minutes)]
    pub minutes: f64,
    /// Repeat the script of an earlier run by the seed in its report [default: random].
    #[arg(long)]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}

fn parse_minutes(text: &str) -> Result<f64, String> {
    let range = Duration::from_secs(6)..=Duration::from_secs(100_000 * 60);
    let length = duration(BareUnit::Minutes, range)(text)?;
    Ok(length.as_secs_f64() / 60.0)
}
