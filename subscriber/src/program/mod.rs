//! The program `penstock-subscriber`: prints, counts and checks the messages of a topic.

mod cli;
mod from;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod local;
mod output;
mod position_file;
mod remote;
mod sink;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use penstock_process::{Program, usage};
use signal_hook::consts::{SIGINT, SIGTERM};

pub use self::cli::Cli;

/// How the program presents itself.
pub const PROGRAM: Program = Program {
    name: "penstock-subscriber",
    log_variable: "RUST_LOG",
    log_level: "warn",
    log_target: true,
    log_thread: true,
};

/// Reads what the command line names.
///
/// # Errors
/// If it cannot be read, or the output not written.
#[allow(clippy::needless_pass_by_value, reason = "the program ends with it")]
pub fn run(cli: Cli) -> Result<ExitCode> {
    cli.check().map_err(usage)?;
    match cli.brokers.is_empty() {
        true => local::run(&cli),
        false => remote::run(&cli),
    }
}

/// A flag that the first signal sets; the second ends the process.
fn watch_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .context("cannot watch signals")?;
    }
    Ok(stop)
}

/// The result of reading, unless the reader of the output has closed it, as in `… | head`: the result then counts
/// what was read so far.
fn unless_reader_is_gone(read: Result<()>) -> Result<()> {
    read.or_else(|error| {
        let io = error.downcast_ref::<io::Error>();
        match io.is_some_and(penstock_process::output::is_reader_gone) {
            true => Ok(()),
            false => Err(error),
        }
    })
}
