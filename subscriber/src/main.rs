//! `penstock-subscriber`: see [`penstock_subscriber::program`].

use std::process::ExitCode;

use penstock_subscriber::program;

fn main() -> ExitCode {
    penstock_process::run(program::PROGRAM, program::run)
}
