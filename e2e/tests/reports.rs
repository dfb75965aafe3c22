//! Reports of the lab: of a diagnosed run, of the benchmark, of experiments. Their shape and what must hold
//! in them, never how fast anything is.

#[path = "reports/bench.rs"]
mod bench;
#[path = "reports/diagnosed.rs"]
mod diagnosed;
#[path = "reports/experiments.rs"]
mod experiments;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(diagnosed::cases());
    all.extend(bench::cases());
    all.extend(experiments::cases());
    penstock_e2e::run(all)
}
