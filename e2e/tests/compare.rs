//! xdp beside tcp, and what the host can do at best: the shape of the reports, never their figures.

#[path = "compare/interrupted.rs"]
mod interrupted;
#[path = "compare/lab_report.rs"]
mod lab_report;
#[path = "compare/remote.rs"]
mod remote;
#[path = "compare/reports.rs"]
mod reports;

use std::process::ExitCode;

use penstock_e2e::Case;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(reports::cases());
    all.extend(remote::cases());
    all.extend(interrupted::cases());
    // They use all cores, and a path that gets no CPU time falls back to tcp.
    penstock_e2e::run(all.into_iter().map(Case::long).map(Case::alone))
}
