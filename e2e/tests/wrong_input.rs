//! Wrong input: a clear message or a drop that is counted; no crash, no leaked space, others go on.

#[path = "wrong_input/logs.rs"]
mod logs;
#[path = "wrong_input/peers.rs"]
mod peers;
#[path = "wrong_input/terminals.rs"]
mod terminals;
#[path = "wrong_input/usage.rs"]
mod usage;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(terminals::cases());
    all.extend(usage::cases());
    all.extend(logs::cases());
    all.extend(peers::cases());
    penstock_e2e::run(all)
}
