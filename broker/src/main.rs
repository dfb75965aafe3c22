//! `penstock-broker`: takes batches from publishers into shared buffers.

#![cfg_attr(fuzzing, no_main)]

mod cli;
mod earlier;
mod following;
#[cfg(any(test, fuzzing))]
mod fuzzing;
mod keys;
mod live;
mod liveness;
mod machine;
mod memory;
mod nic;
mod privileges;
mod report;
mod server;
mod sessions;
mod signals;
mod threads;
mod topic_policy;
mod topics;
mod upkeep;
mod xdp;
mod xdp_settings;

use std::process::ExitCode;

use penstock_process::{Program, logging, usage};

const PROGRAM: Program = Program {
    name: "penstock-broker",
    log_variable: "RUST_LOG",
    log_level: "info",
    log_target: true,
    // The server starts the log thread once it has dropped its privileges.
    log_thread: false,
};

fn main() -> ExitCode {
    penstock_process::run(PROGRAM, |cli: cli::Cli| {
        match (cli.restore(), cli.keygen()) {
            (Some((interface, when_gone)), _) => {
                logging::start_thread()?;
                nic::restore(interface, when_gone)?;
            }
            (None, Some(file)) => keys::make(file)?,
            (None, None) => server::run(&cli.check().map_err(usage)?)?,
        }
        Ok(ExitCode::SUCCESS)
    })
}
