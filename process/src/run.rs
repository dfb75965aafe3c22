//! What surrounds a program's main function: arguments, log, panics, exit code.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::process::ExitCode;
use std::thread;

use crate::text::{escape, escape_lines};
use anyhow::Result;
use clap::Parser;
use penstock_flags::{explain, usage_error};

use crate::{colours, exit, logging, output, stderr};

/// Properties in which the programs differ.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Name at the start of messages.
    pub name: &'static str,
    /// Environment variable that sets the levels of log lines.
    pub log_variable: &'static str,
    /// Levels if it is not set.
    pub log_level: &'static str,
    /// Whether lines contain the module that they come from.
    pub log_target: bool,
    /// Whether to start the log thread at once. A program that drops privileges calls
    /// [`logging::start_thread`] afterwards instead.
    pub log_thread: bool,
}

/// Runs a program from its command line to its exit code. Failures and panics are reported on stderr as
/// far as it accepts them, and never delay the end.
pub fn run<Cli: Parser>(program: Program, body: impl FnOnce(Cli) -> Result<ExitCode>) -> ExitCode {
    panic::set_hook(Box::new(move |panic| report_panic(program.name, panic)));
    logging::install(&program);
    let code = match Cli::try_parse() {
        Err(error) => answer(&error),
        Ok(cli) => {
            let started = match program.log_thread {
                true => logging::start_thread(),
                false => Ok(()),
            };
            // State that a panic leaves inconsistent is not used afterwards.
            let ran = panic::catch_unwind(AssertUnwindSafe(|| {
                started?;
                body(cli)
            }));
            match ran {
                Ok(Ok(code)) => code,
                Ok(Err(error)) if exit::is_usage(&error) => answer(&usage_error::<Cli>(&error)),
                Ok(Err(error)) => {
                    say(program.name, &explain(error.as_ref()));
                    ExitCode::from(exit::FAILURE)
                }
                Err(_) => ExitCode::from(exit::FAILURE),
            }
        }
    };
    logging::flush();
    code
}

/// Reports the end of program `name` on stderr; keeps the line breaks of `text`.
pub fn say(name: &str, text: &str) {
    stderr::say(format!("{name}: {}\n", escape_lines(text)).into_bytes());
}

/// Ends the process at once, from any thread, with a reason.
pub fn end(name: &str, why: &str, code: u8) -> ! {
    say(name, why);
    logging::flush();
    std::process::exit(code.into())
}

/// Prints `--help` or `--version`, or reports an invalid command line.
fn answer(error: &clap::Error) -> ExitCode {
    if error.use_stderr() {
        // Without colours, because escape sequences in an argument would look the same.
        let text = error.render().to_string();
        stderr::say(escape_lines(&text).into_owned().into_bytes());
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(exit::USAGE));
    }
    let text = error.render();
    let printed = match colours::are_wanted(&io::stdout()) {
        true => output::print(text.ansi()),
        false => output::print(text),
    };
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            stderr::say(format!("{error:#}\n").into_bytes());
            ExitCode::from(exit::FAILURE)
        }
    }
}

/// The panic hook: unlike the default one, it neither fails nor blocks if stderr cannot be written.
fn report_panic(name: &str, panic: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let place = panic.location().map(ToString::to_string);
    let mut text = format!(
        "{name}: thread {} panicked at {}: {}\n",
        thread.name().unwrap_or("without a name"),
        place.as_deref().unwrap_or("an unknown place"),
        escape(message(panic.payload()))
    );
    let trace = Backtrace::capture();
    match trace.status() {
        BacktraceStatus::Captured => text.push_str(&trace.to_string()),
        _ => text.push_str("This is a bug; RUST_BACKTRACE=1 shows where it comes from.\n"),
    }
    stderr::say(text.into_bytes());
}

/// The message of a panic.
pub(crate) fn message(payload: &(dyn std::any::Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}
