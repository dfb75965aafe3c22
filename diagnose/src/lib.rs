//! Observes a running TCP server for some seconds and says what limits it, with the evidence.
//!
//! [`observe()`] samples sockets, threads, system calls, interfaces and the figures of a Penstock broker, and returns a
//! [`sample::Sample`]. `facts` condenses it to a few numbers, and the table in `rules` turns these into verdicts
//! ([`verdict`]).
//!
//! ```
//! use std::net::TcpListener;
//! use std::time::Duration;
//! use penstock_diagnose::{Diagnosis, Target, observe};
//! use penstock_process::interrupt::Interrupt;
//!
//! // A server that nobody uses.
//! let listener = TcpListener::bind("127.0.0.1:0")?;
//! let port = listener.local_addr()?.port();
//!
//! let mut unavailable = Vec::new();
//! let target = Target::of_process(std::process::id(), Some(port), &mut unavailable)?;
//! let (half_a_second, no_tracing) = (Duration::from_millis(500), Duration::ZERO);
//! let interrupt = Interrupt::install()?;
//! let sample = observe(&target, half_a_second, no_tracing, &interrupt, &mut unavailable)?;
//! assert_eq!(sample.ports, [port]);
//! for verdict in Diagnosis::of(sample, unavailable).verdicts {
//!     println!("{} ({:.2}): {}", verdict.cause, verdict.confidence, verdict.title);
//! }
//! # Ok::<(), anyhow::Error>(())
//! ```

pub mod broker_stats;
mod clue;
pub mod cpu;
mod facts;
#[cfg(test)]
mod golden;
pub mod interfaces;
pub mod namespaces;
mod observe;
pub mod other_processes;
mod processes;
mod routes;
mod rules;
pub mod sample;
pub mod settings;
pub mod sockets;
mod syscalls;
mod target;
pub mod verdict;

pub use observe::observe;
pub use target::Target;
pub use verdict::Diagnosis;

/// Every cause that a verdict can name, by its identifier, with its title.
pub fn causes() -> impl Iterator<Item = (&'static str, &'static str)> {
    rules::CAUSES.iter().map(|cause| (cause.id, cause.title))
}
