//! What a network interface is like, what AF_XDP asks of it, and changes that are undone.
//!
//! [`Facts::read`] asks the kernel, [`plan`] compares with what is wanted and answers with
//! [`Step`]s, each of which is a command that a person could type. [`Undo`] remembers, in a file,
//! what takes applied steps back, however the process that applied them ends.
//!
//! ```
//! use penstock_nic::{Facts, Link};
//!
//! let facts = Facts::read("lo")?;
//! assert_eq!(facts.interface, "lo");
//! assert_ne!(facts.link, Link::Gone);
//! # Ok::<(), penstock_nic::Error>(())
//! ```

mod change;
mod counters;
mod error;
mod ethtool;
mod facts;
mod fitness;
mod netlink;
mod plan;
mod sysfs;
#[cfg(test)]
mod tests;
mod undo;
mod watch;

pub use change::{Attribute, Change};
pub use counters::{offloads, packets_by_queue};
pub use error::{Error, Unfit};
pub use ethtool::Rule;
pub use facts::{Channels, Facts, Feature, Master, Ring, link, name_of, rx_queues};
pub use fitness::{Choice, Fitness, choose, fitness};
pub use netlink::{Address, Interface, Link, addresses, interfaces};
pub use penstock_ebpf::quote;
pub use plan::{Kind, ONE_BUFFER, Plan, Reverse, Step, Wanted, plan};
pub use sysfs::Sysfs;
#[cfg(fuzzing)]
pub use undo::fuzz as fuzz_undo;
pub use undo::{DIRECTORY, Taken, Undo};
pub use watch::{Seen, Watch};
