//! `penstock-lab experiment`: measurements that settle a question about the kernel.

mod claims;
mod rcvbuf;
mod trial;

use anyhow::Result;

use crate::cli::Experiment;
use crate::interrupt::Interrupt;

/// Runs the one that is asked for.
pub fn run(experiment: &Experiment, interrupt: &Interrupt) -> Result<bool> {
    match experiment {
        Experiment::Rcvbuf(options) => rcvbuf::run(options, interrupt),
    }
}
