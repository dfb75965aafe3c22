//! The xdp path: the workload verified, real files, fallback to tcp, death and restart of a
//! broker, addresses.

#[path = "xdp/addresses.rs"]
mod addresses;
#[path = "xdp/outages.rs"]
mod outages;
#[path = "xdp/paths.rs"]
mod paths;
#[path = "xdp/workloads.rs"]
mod workloads;

use std::process::ExitCode;

/// Options of a broker.
const XDP: [&str; 4] = ["--mode", "xdp", "--iface", "eth0"];

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(workloads::cases());
    all.extend(paths::cases());
    all.extend(outages::cases());
    all.extend(addresses::cases());
    penstock_e2e::run(all)
}
