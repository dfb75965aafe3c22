//! `penstock-lab`: runs workloads in network namespaces, measures and reports.

use std::process::ExitCode;

fn main() -> ExitCode {
    penstock_lab::main()
}
