//! `penstock-lab`: runs workloads in network namespaces, measures and reports. The program is [`main`].

mod cli;
mod commands;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod measure;
mod report;
mod settings;

use std::process::ExitCode;

use nix::sys::stat::{Mode, umask};
use penstock_process::{Program, exit, say};

use crate::cli::{Cli, Command};
use penstock_process::interrupt::{Interrupt, Interrupted};

const PROGRAM: Program = Program {
    name: "penstock-lab",
    log_variable: "PENSTOCK_LOG",
    log_level: "info",
    log_target: false,
    log_thread: true,
};

/// What a signal leaves behind.
const INTERRUPTED: &str = "interrupted; processes, namespaces and buffers of this run are removed";

/// Whatever the umask is, no other user may write to what the lab creates.
const NOT_FOR_OTHERS: Mode = Mode::S_IWGRP.union(Mode::S_IWOTH);

/// The program.
pub fn main() -> ExitCode {
    penstock_process::run(PROGRAM, |cli: Cli| {
        let asked = umask(NOT_FOR_OTHERS);
        umask(asked | NOT_FOR_OTHERS);
        let interrupt = Interrupt::install()?;
        match run(&cli.command, &interrupt) {
            Ok(true) => Ok(ExitCode::SUCCESS),
            Ok(false) => Ok(ExitCode::from(exit::FAILURE)),
            Err(error) if error.is::<Interrupted>() => {
                say(PROGRAM.name, INTERRUPTED);
                Ok(ExitCode::from(exit::INTERRUPTED))
            }
            Err(error) => Err(error),
        }
    })
}

/// Runs a command; returns whether all was well.
fn run(command: &Command, interrupt: &Interrupt) -> anyhow::Result<bool> {
    match command {
        Command::Throughput(options) => commands::throughput::run(options, interrupt),
        Command::Baseline(options) => commands::baseline::run(options, interrupt),
        Command::Bench(options) => commands::bench::run(options, interrupt),
        Command::Compare(options) => commands::compare::run(options, interrupt),
        Command::Limits(options) => commands::limits::run(options, interrupt),
        Command::Report(options) => commands::report::run(options),
        Command::Experiment(experiment) => commands::experiment::run(experiment, interrupt),
        Command::Diagnose(options) => commands::diagnose::run(options, interrupt),
        Command::Doctor(options) => commands::doctor::run(options),
        Command::Soak(options) => commands::soak::run(options, interrupt),
        Command::Faults(options) => commands::chaos::run(options, interrupt),
    }
}
