//! Readers of logs: who may read and register, and what becomes of a log whose registered reader stops or
//! dies.

#[path = "readers/access.rs"]
mod access;
#[path = "readers/stopped.rs"]
mod stopped;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(access::cases());
    all.extend(stopped::cases());
    penstock_e2e::run(all)
}
