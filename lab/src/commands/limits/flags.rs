//! The command line of `penstock-lab limits`.

use std::time::Duration;

use clap::Args;
use penstock_flags::{BareUnit, duration};

use crate::settings::Output;
use penstock_testbed::settings::Profile;

/// Flags of `limits`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Measurement")]
pub struct Limits {
    /// Only this profile [default: both].
    #[arg(long, value_enum)]
    pub profile: Option<Profile>,
    /// MTUs of the link, bytes.
    #[arg(long, value_delimiter = ',', default_value = "1500,9000",
          value_parser = clap::value_parser!(u32).range(576..=16384))]
    pub mtu: Vec<u32>,
    /// Runs of each measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Length of a run, such as 2s; a number alone is seconds.
    #[arg(long, default_value = "2s", value_name = "DURATION", value_parser = parse_whole_seconds)]
    pub seconds: u32,
    #[command(flatten)]
    pub output: Output,
}

/// Whole seconds of a run.
fn parse_whole_seconds(text: &str) -> Result<u32, String> {
    let range = Duration::from_secs(1)..=Duration::from_secs(60);
    let length = duration(BareUnit::Seconds, range)(text)?;
    match length.subsec_nanos() {
        0 => Ok(length.as_secs() as u32),
        _ => Err("not a whole number of seconds".to_owned()),
    }
}
