//! Settings of the interface: the broker prints or applies them, and reverts them however it ends. Links
//! that change.

#[path = "nic/bench.rs"]
mod bench;
#[path = "nic/devices.rs"]
mod devices;
#[path = "nic/link_changes.rs"]
mod link_changes;
#[path = "nic/settings.rs"]
mod settings;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(settings::cases());
    all.extend(devices::cases());
    all.extend(link_changes::cases());
    penstock_e2e::run(all)
}
