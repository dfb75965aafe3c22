//! The broker: takes batches from publishers into shared buffers.
//!
//! This library is what the program `penstock-broker` does. A program that wants the ingest path without the
//! broker's process around it uses `penstock-ingest` and `penstock-log`.

mod buffer_dir;
mod cli;
mod earlier;
mod end;
mod following;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod keys;
mod liveness;
mod machine;
mod memory;
mod nic;
mod privileges;
mod report;
mod server;
mod sessions;
mod setup;
mod signals;
mod stats_socket;
mod threads;
mod topic_policy;
mod topics;
mod upkeep;
mod watch;
mod xdp;
mod xdp_settings;

use std::process::ExitCode;

use anyhow::Result;
use penstock_process::{Program, logging, usage};

pub use crate::cli::Cli;

/// How the program presents itself.
pub const PROGRAM: Program = Program {
    name: "penstock-broker",
    log_variable: "RUST_LOG",
    log_level: "info",
    log_target: true,
    // The server starts the log thread once it has dropped its privileges.
    log_thread: false,
};

/// Does what the command line asks for: serves until a signal arrives, unless it names another task.
///
/// # Errors
/// If the settings are wrong, the broker cannot start, or a part of it fails.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match (cli.restore(), cli.keygen()) {
        (Some((interface, when_gone)), _) => {
            logging::start_thread()?;
            nic::restore(interface, when_gone)?;
        }
        (None, Some(file)) => keys::make(file)?,
        (None, None) => server::run(&cli.check().map_err(usage)?)?,
    }
    Ok(ExitCode::SUCCESS)
}
