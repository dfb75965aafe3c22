//! `penstock-publisher`: see [`penstock_publisher::program`].

use std::process::ExitCode;

use penstock_publisher::program;

fn main() -> ExitCode {
    penstock_process::run(program::PROGRAM, program::run)
}
