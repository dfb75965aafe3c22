//! What a network interface is like, what AF_XDP asks of it, and changes that are undone.
//!
//! [`Facts::read`] asks the kernel, [`plan`] compares with what is wanted and answers with
//! [`Step`]s, each of which is a command that a person could type. [`Undo`] remembers, in a file,
//! what takes applied steps back, however the process that applied them ends.

mod change;
mod counters;
mod error;
mod ethtool;
mod facts;
mod plan;
#[cfg(test)]
mod tests;
mod undo;

pub use change::{Attribute, Change};
pub use counters::{offloads, packets_by_queue};
pub use error::{Error, Unfit};
pub use ethtool::Rule;
pub use facts::{Channels, Facts, Feature, Link, Ring, link};
pub use plan::{Kind, ONE_BUFFER, Plan, Reverse, Step, Wanted, plan};
#[cfg(fuzzing)]
pub use undo::fuzz as fuzz_undo;
pub use undo::{DIRECTORY, Taken, Undo};
