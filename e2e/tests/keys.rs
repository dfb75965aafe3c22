//! Keys: who gets in, over tcp, xdp and when falling back; streams that go on after kill -9; files of keys.

#[path = "keys/access.rs"]
mod access;
#[path = "keys/bench.rs"]
mod bench;
#[path = "keys/resumed.rs"]
mod resumed;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(access::cases());
    all.extend(resumed::cases());
    penstock_e2e::run(all)
}
