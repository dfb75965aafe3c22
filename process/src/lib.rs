//! What every Penstock program does as a process: output that survives a closed or blocked stdout
//! and stderr, escaped text of others, exit codes, threads whose end is noticed, readiness, and the
//! memory that it may take.
//!
//! A program's `main` is one call of [`run`]. It prints with [`output`] and never with `println!`,
//! which panics when the reader has closed the pipe.
//!
//! ```
//! use std::process::ExitCode;
//! use clap::Parser;
//! use penstock_process::{Program, output, run};
//!
//! #[derive(Parser)]
//! struct Cli {
//!     /// Who to greet.
//!     #[arg(long, default_value = "world")]
//!     name: String,
//! }
//!
//! fn main() -> ExitCode {
//!     let program = Program {
//!         name: "greet",
//!         log_variable: "GREET_LOG",
//!         log_level: "info",
//!         log_target: false,
//!         log_thread: true,
//!     };
//!     run(program, |cli: Cli| {
//!         output::print_line(format_args!("hello, {}", cli.name))?;
//!         Ok(ExitCode::SUCCESS)
//!     })
//! }
//! ```

pub mod child;
pub mod colours;
pub mod exit;
pub mod foreign_json;
pub mod interrupt;
pub mod logging;
pub mod memory;
pub mod notify;
pub mod output;
pub mod progress;
mod run;
mod stderr;
pub mod supervisor;
pub mod text;

pub use exit::{usage, wrong_usage};
pub use run::{Program, end, run, say};
