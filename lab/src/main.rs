//! `penstock-lab`: runs workloads in network namespaces, measures and reports.

#![cfg_attr(fuzzing, no_main)]

mod actors;
mod baseline;
mod chance;
mod chart;
mod cli;
mod cluster;
mod command;
mod compare;
mod delay;
mod diagnose;
mod doctor;
mod environment;
mod experiment;
mod fault_runs;
mod faults;
mod fixes;
#[cfg(any(test, fuzzing))]
mod fuzzing;
mod host;
mod interrupt;
mod iperf;
mod limits;
mod lines;
mod middle;
mod netns;
mod observation;
mod outputs;
mod page;
mod process;
mod progress;
mod raw;
mod render;
mod report;
mod results;
mod rmem;
mod show;
mod soak;
mod spread;
mod testbed;
mod throughput;
mod timeline;
mod trusted_path;
mod verify;
mod vitals;
mod workload;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use nix::sys::stat::{Mode, umask};
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command};
use crate::interrupt::{Interrupt, Interrupted};

/// Exit code of a program that a signal asked to stop, as shells report it for SIGINT.
const EXIT_INTERRUPTED: u8 = 130;

/// Whatever the umask, no other user may write to what the lab creates.
const NOT_FOR_OTHERS: Mode = Mode::S_IWGRP.union(Mode::S_IWOTH);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let asked = umask(NOT_FOR_OTHERS);
    umask(asked | NOT_FOR_OTHERS);
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("PENSTOCK_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    let outcome = Interrupt::install().and_then(|interrupt| match &cli.command {
        Command::Throughput(options) => throughput::run(options, &interrupt),
        Command::Baseline(options) => baseline::run(options, &interrupt),
        Command::Compare(options) => compare::run(options, &interrupt),
        Command::Limits(options) => limits::run(options, &interrupt),
        Command::Report(options) => show::run(options),
        Command::Experiment(experiment) => experiment::run(experiment, &interrupt),
        Command::Diagnose(options) => diagnose::run(options, &interrupt),
        Command::Doctor(options) => doctor::run(options),
        Command::Soak(options) => soak::run(options, &interrupt),
        Command::Faults(options) => fault_runs::run(options, &interrupt),
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("penstock-lab: {error}");
            ExitCode::from(EXIT_INTERRUPTED)
        }
        Err(error) => {
            eprintln!("penstock-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}
