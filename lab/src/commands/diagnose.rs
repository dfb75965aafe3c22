//! `penstock-lab diagnose`: attaches to a running TCP server for some seconds and says what limits
//! it, with the evidence.

mod text;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use jiff::Timestamp;

use penstock_diagnose::{Diagnosis, Target, observe};
use penstock_process::{output, wrong_usage};

use crate::report::result_folder;
use crate::report::terminal::Screen;
use crate::settings::{Format, seconds_in};
use penstock_process::interrupt::Interrupt;

pub const EXAMPLES: &str = "\
Examples:
  # a Penstock broker or any other TCP server, in any network namespace
  sudo penstock-lab diagnose --port 1214

  # one of several servers, for ten seconds, as JSON
  sudo penstock-lab diagnose --pid $(pgrep -x nats-server) --duration 10 --format json

  # without privileges: says what it could not see
  penstock-lab diagnose --port 1214

  # list every cause that it knows
  penstock-lab diagnose --list-causes

The observed process is not changed, and its system calls are traced for a
part of the time only. Exit codes: 0 diagnosed, whatever the verdict, 1 failed,
2 wrong usage, 130 interrupted.";

/// Flags of `diagnose`.
#[derive(Debug, Args)]
pub struct Diagnose {
    /// Process to observe.
    #[arg(long, required_unless_present_any = ["port", "list_causes"],
          value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,
    /// TCP port that the server listens on.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// How long to observe, such as 5s; a number alone is seconds.
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = seconds)]
    pub duration: f64,
    /// How long to trace system calls within that time, such as 1s; 0 to trace none.
    #[arg(long, default_value = "1s", value_name = "DURATION", value_parser = seconds_or_none)]
    pub trace: f64,
    /// Output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Also write diagnosis.json and diagnosis.txt to a new folder there; the last line on stdout is
    /// its path.
    #[arg(long, value_name = "DIR")]
    pub results: Option<PathBuf>,
    /// List every cause that a verdict can name, and exit.
    #[arg(long)]
    pub list_causes: bool,
}

/// Runs the command.
pub fn run(options: &Diagnose, interrupt: &Interrupt) -> Result<bool> {
    if options.list_causes {
        output::print(text::causes(options.format, Screen::stdout())?)?;
        return Ok(true);
    }
    let mut unavailable = Vec::new();
    let target = match (options.pid, options.port) {
        (Some(pid), port) => Target::of_process(pid, port, &mut unavailable)?,
        (None, Some(port)) => Target::of_port(port, &mut unavailable)?,
        (None, None) => return Err(wrong_usage("give the server's --pid or --port")),
    };
    let duration = Duration::from_secs_f64(options.duration);
    let trace = Duration::from_secs_f64(options.trace);
    let sample = observe(&target, duration, trace, interrupt, &mut unavailable)?;
    let diagnosis = Diagnosis::of(sample, unavailable);
    let text = text::diagnosis(&diagnosis, options.format, Screen::stdout())?;
    output::print(text)?;
    if let Some(results) = &options.results {
        output::print_line(keep(&diagnosis, results)?.display())?;
    }
    Ok(true)
}

/// Writes a diagnosis in both forms to a new folder.
fn keep(diagnosis: &Diagnosis, results: &Path) -> Result<PathBuf> {
    let folder = result_folder::create_folder(results, Timestamp::now())?;
    for (name, format) in [
        ("diagnosis.json", Format::Json),
        ("diagnosis.txt", Format::Text),
    ] {
        let path = folder.join(name);
        fs::write(&path, text::diagnosis(diagnosis, format, Screen::PLAIN)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(folder)
}

/// Observes a process for `duration`, its system calls for `trace` of it; the diagnosis as JSON and as
/// text.
pub fn of_process(
    pid: u32,
    duration: Duration,
    trace: Duration,
    interrupt: &Interrupt,
) -> Result<(serde_json::Value, String)> {
    let mut unavailable = Vec::new();
    let target = Target::of_process(pid, None, &mut unavailable)?;
    let sample = observe(&target, duration, trace, interrupt, &mut unavailable)?;
    let diagnosis = Diagnosis::of(sample, unavailable);
    let text = text::diagnosis(&diagnosis, Format::Text, Screen::PLAIN)?;
    Ok((serde_json::to_value(&diagnosis)?, text))
}

/// Longest observation.
const LONGEST: Duration = Duration::from_secs(3600);

pub fn seconds(text: &str) -> Result<f64, String> {
    seconds_in(Duration::from_millis(500)..=LONGEST)(text)
}

fn seconds_or_none(text: &str) -> Result<f64, String> {
    seconds_in(Duration::ZERO..=LONGEST)(text)
}
