//! What the lab and the scripts leave behind when they are done, interrupted or killed: nothing that runs,
//! nothing that stays.

#[path = "lifecycle/ends.rs"]
mod ends;
#[path = "lifecycle/scripts.rs"]
mod scripts;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(ends::cases());
    all.extend(scripts::cases());
    penstock_e2e::run(all)
}
