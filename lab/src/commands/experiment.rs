//! `penstock-lab experiment`: measurements that settle a question about the kernel.

mod claims;
pub mod flags;
mod observer;
mod outcome;
mod rcvbuf;
mod trial;

use anyhow::Result;

use flags::Experiment;
use penstock_process::interrupt::Interrupt;

/// Runs the one that is asked for.
pub fn run(experiment: &Experiment, interrupt: &Interrupt) -> Result<bool> {
    match experiment {
        Experiment::Rcvbuf(options) => rcvbuf::run(options, interrupt),
        Experiment::Diagnose(options) => observer::run(options, interrupt),
    }
}
