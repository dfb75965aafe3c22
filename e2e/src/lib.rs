//! Harness of the end-to-end tests: each runs the programs of this workspace in network namespaces of its
//! own, as root.
//!
//! A test is a function that takes a [`Bed`] and is listed in its file's `main`, which calls [`run`].
//! Namespaces, processes, mounts and folders belong to the bed and go with it, also when the test panics
//! or a signal ends the run; [`cleanup`] removes what a killed run left behind.

pub mod attacker;
pub mod bed;
pub mod broker;
pub mod cleanup;
pub mod commands;
pub mod lab;
pub mod loads;
pub mod numbered;
pub mod runner;
pub mod second_link;
pub mod wait;

pub use bed::Bed;
pub use broker::{Broker, BrokerSetup};
pub use runner::{Case, run, skip};
pub use wait::eventually;

/// Prints a line beside the verdicts.
pub fn say(text: &str) {
    penstock_process::say("end to end", text);
}
