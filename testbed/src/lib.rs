//! What the lab and end-to-end tests share: network namespaces, links with faults and delay, and the
//! processes of a run.
//!
//! [`netns::Net`] makes namespaces and links and removes them when it is dropped; [`link_emulation`]
//! forwards packets between them with faults and delay. [`cluster::Brokers`] starts brokers,
//! [`publish::Publish`] a publisher, [`verify::Reading`] a subscriber that checks what a log holds.
//!
//! ```no_run
//! use penstock_testbed::netns::Net;
//! use penstock_testbed::settings::Profile;
//!
//! # fn main() -> anyhow::Result<()> {
//! // Needs root: a publisher's namespace, and two of brokers, each with a link to it.
//! let net = Net::create(2, Profile::Wire, 1500)?;
//! println!("{} and {}", net.publisher(), net.broker(0));
//! // Dropping it removes them.
//! # Ok(())
//! # }
//! ```

pub mod buffers;
pub mod cluster;
pub mod command;
pub mod delay;
pub mod faults;
pub mod lines;
pub mod link_emulation;
pub mod merged_logs;
pub mod netns;
pub mod processes;
pub mod program_reports;
pub mod programs;
pub mod publish;
pub mod random;
pub mod running;
pub mod settings;
pub mod verify;
