//! Diagnosis against the truth: each cause is made on purpose, and must be named first. Ends with the
//! confusion matrix. `PENSTOCK_REPEAT=N` runs every case N times; one must then be right in nine of ten.

#[path = "diagnose/bench.rs"]
mod bench;
#[path = "diagnose/causes.rs"]
mod causes;
#[path = "diagnose/interface.rs"]
mod interface;
#[path = "diagnose/windows.rs"]
mod windows;
#[path = "diagnose/xdp.rs"]
mod xdp;

use std::process::ExitCode;

use penstock_e2e::{Case, run};

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(causes::cases());
    all.extend(windows::cases());
    all.extend(xdp::cases());
    all.extend(interface::cases());
    let code = run(all
        .into_iter()
        .map(Case::alone)
        .map(Case::long)
        .map(Case::two_of_three));
    bench::print_matrix();
    code
}
