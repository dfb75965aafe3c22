//! `penstock-broker`: takes batches from publishers into shared buffers.

#![cfg_attr(fuzzing, no_main)]

mod cli;
#[cfg(any(test, fuzzing))]
mod fuzzing;
mod keys;
mod live;
mod machine;
mod memory;
mod nic;
mod privileges;
mod report;
mod server;
mod sessions;
mod topic_policy;
mod topics;
mod xdp;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match (cli.restore(), cli.keygen()) {
        (Some((interface, when_gone)), _) => nic::restore(interface, when_gone),
        (None, Some(file)) => keys::make(file),
        (None, None) => cli.check().and_then(|config| server::run(&config)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}
