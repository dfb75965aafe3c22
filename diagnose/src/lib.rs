//! Observes a running TCP server for some seconds and says what limits it, with the evidence.
//!
//! [`watch()`] looks at sockets, threads, system calls, interfaces and, if it is one, at the broker's own
//! figures; the result is a [`sample::Sample`]. `facts` condenses it to a few numbers, and the table in
//! `rules` turns these into verdicts ([`verdict`]).

mod clue;
pub mod cpu;
mod facts;
pub mod interfaces;
pub mod namespaces;
pub mod others;
pub mod penstock;
mod processes;
mod routes;
mod rules;
pub mod sample;
pub mod settings;
pub mod sockets;
mod syscalls;
mod target;
pub mod tcp_info;
pub mod verdict;
mod watch;

pub use target::Target;
pub use verdict::Diagnosis;
pub use watch::watch;

/// Every cause that a verdict can name, by its identifier, with its title.
pub fn causes() -> impl Iterator<Item = (&'static str, &'static str)> {
    rules::CAUSES.iter().map(|cause| (cause.id, cause.title))
}
