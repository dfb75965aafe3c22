//! Flags that several subcommands share.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use penstock_flags::{BareUnit, duration};

#[derive(Debug, Args)]
#[command(next_help_heading = "Results")]
pub struct Output {
    /// Directory in which result folders are created.
    #[arg(long, value_name = "DIR", default_value = "results")]
    pub results: PathBuf,
    /// Output format; the path of the result folder follows as the last line.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Programs")]
pub struct Programs {
    /// Directory with penstock-broker and its companions [default: that of this program].
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

/// Paths whose processes are pinned to cores of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pin {
    Xdp,
    Both,
    None,
}

/// Seconds of a run.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    seconds_in(Duration::from_millis(100)..=Duration::from_secs(600))(text)
}

/// A parser for durations that are passed on as seconds.
pub fn seconds_in(
    range: RangeInclusive<Duration>,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    let parse = duration(BareUnit::Seconds, range);
    move |text| parse(text).map(|length| length.as_secs_f64())
}
