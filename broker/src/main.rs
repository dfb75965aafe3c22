//! `penstock-broker`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    penstock_process::run(penstock_broker::PROGRAM, penstock_broker::run)
}
