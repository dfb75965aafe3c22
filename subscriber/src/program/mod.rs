//! The program `penstock-subscriber`: prints, counts and checks what is in a topic's log.

mod cli;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod output;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use penstock_log::{ReadError, report_shortened_logs};
use penstock_process::{Program, exit};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing::{info, warn};

pub use self::cli::Cli;
use self::output::Printer;
use crate::{Event, OpenError, Received, Start, Subscriber, Tally, Trouble};

/// Exit code when batches were overwritten before they were read.
const LOST: u8 = 3;
/// Damaged batches that are logged one by one; others are only counted.
const TOLD: u64 = 10;
/// Time without a batch after which the subscriber checks whether the broker is still alive.
const GONE_CHECK: Duration = Duration::from_millis(100);
/// Pause between attempts to open a log that does not exist yet.
const OPEN_RETRY: Duration = Duration::from_millis(50);
/// Time for a broker to set mode, group and registry of a log that it has just created.
const SETTLING: Duration = Duration::from_secs(2);

/// How the program presents itself.
pub const PROGRAM: Program = Program {
    name: "penstock-subscriber",
    log_variable: "RUST_LOG",
    log_level: "warn",
    log_target: true,
    log_thread: true,
};

/// Reads the log that the command line names.
///
/// # Errors
/// If the log cannot be read, or the output not written.
#[allow(clippy::needless_pass_by_value, reason = "the program ends with it")]
pub fn run(cli: Cli) -> Result<ExitCode> {
    let run = Run::start(&cli)?;
    run.map_or(Ok(ExitCode::SUCCESS), Run::finish)
}

/// One reading of a log.
struct Run<'a> {
    cli: &'a Cli,
    subscriber: Subscriber,
    sink: Sink<'a>,
    stop: Arc<AtomicBool>,
}

/// Opens the log, and registers with it if requested.
fn open(cli: &Cli, start: Start) -> Result<Subscriber, OpenError> {
    let mut subscriber = Subscriber::open(&cli.path, start)?;
    if cli.register {
        subscriber.register()?;
        info!("registered with the log");
    }
    Ok(subscriber)
}

/// Opens the log once a broker has created it; `None` if a signal ends the wait.
fn open_patiently(
    cli: &Cli,
    longest: Duration,
    stop: &AtomicBool,
) -> Result<Option<Subscriber>, OpenError> {
    let begun = Instant::now();
    let mut start = cli.start();
    let mut was_missing = false;
    let mut appeared = None;
    while !stop.load(Ordering::Relaxed) {
        let error = match open(cli, start) {
            Ok(subscriber) => return Ok(Some(subscriber)),
            Err(error) => error,
        };
        let gives_up = if matches!(error, OpenError::Missing(_)) {
            if !was_missing {
                warn!(
                    "{}: no such log yet; waiting for a broker to create it",
                    cli.path.display()
                );
                was_missing = true;
                // Everything in a log that does not exist yet is new.
                start = Start::Oldest;
            }
            begun.elapsed() >= longest
        } else {
            !was_missing || appeared.get_or_insert_with(Instant::now).elapsed() >= SETTLING
        };
        if gives_up {
            return Err(error);
        }
        thread::sleep(OPEN_RETRY);
    }
    Ok(None)
}

/// Where batches go; apart from the subscriber, which lends them.
struct Sink<'a> {
    cli: &'a Cli,
    tally: Tally,
    printer: Printer,
    /// Messages shown, or counted where none are shown.
    taken: u64,
    troubles: u64,
}

impl<'a> Run<'a> {
    /// `None` if a signal arrived while waiting for the log.
    fn start(cli: &'a Cli) -> Result<Option<Self>> {
        report_shortened_logs("penstock-subscriber")
            .context("cannot install the SIGBUS handler")?;
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // The first ends the reading, the second the process.
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&stop))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
                .context("cannot watch signals")?;
        }
        let subscriber = match cli.longest_wait() {
            None => Some(open(cli, cli.start())?),
            Some(longest) => open_patiently(cli, longest, &stop)?,
        };
        let Some(subscriber) = subscriber else {
            return Ok(None);
        };
        let sink = Sink {
            cli,
            tally: Tally::new(cli.stat),
            printer: Printer::new(cli.output()),
            taken: 0,
            troubles: 0,
        };
        Ok(Some(Self {
            cli,
            subscriber,
            sink,
            stop,
        }))
    }

    fn finish(mut self) -> Result<ExitCode> {
        let read = self.read().and_then(|()| Ok(self.sink.printer.flush()?));
        match read {
            Ok(()) => {}
            // The reader of the output has closed it, as in `… | head`: the result counts what was read
            // so far.
            Err(error) if is_reader_gone(&error) => {}
            Err(error) => return Err(error),
        }
        if self.cli.stat {
            let (info, gone) = (self.subscriber.info(), self.subscriber.overwritten());
            output::print_stat(self.cli, &info, &gone, &self.sink.tally)?;
        }
        if self.sink.troubles > TOLD {
            warn!(
                "{} more batches have something wrong",
                self.sink.troubles - TOLD
            );
        }
        Ok(match (self.sink.troubles, self.sink.tally.lost_batches()) {
            (0, 0) => ExitCode::SUCCESS,
            (0, _) if self.cli.allow_loss => ExitCode::SUCCESS,
            (0, _) => ExitCode::from(LOST),
            _ => ExitCode::from(exit::FAILURE),
        })
    }

    fn read(&mut self) -> Result<()> {
        let mut idle_since = None;
        let mut abandoned = false;
        while !self.stop.load(Ordering::Relaxed) && !self.sink.is_full() {
            match self.subscriber.next() {
                Event::Batch(batch) => {
                    idle_since = None;
                    self.sink.take(&batch)?;
                }
                Event::Lost { batches, messages } => {
                    warn!(batches, messages, "overwritten before they were read");
                    self.sink.tally.add_lost(batches, messages);
                }
                Event::Evicted => warn!("{}", ReadError::Evicted),
                Event::Damaged { index } => self.sink.complain(&format!(
                    "the index entry of batch {index} is damaged; the batch is skipped"
                )),
                Event::Idle => {
                    let idle = idle_since.get_or_insert_with(Instant::now).elapsed();
                    if abandoned || self.is_over(idle) {
                        break;
                    }
                    self.sink.printer.flush()?;
                    // Looks once more then: the broker may have written until it ended.
                    abandoned = idle > GONE_CHECK && !self.subscriber.writer_is_alive();
                    self.subscriber.rest();
                }
            }
        }
        Ok(())
    }

    /// Whether nothing more is to be waited for.
    fn is_over(&self, idle: Duration) -> bool {
        !self.cli.follow || self.cli.until_idle.is_some_and(|longest| idle >= longest)
    }
}

impl Sink<'_> {
    fn is_full(&self) -> bool {
        self.cli.count.is_some_and(|count| self.taken >= count)
    }

    fn take(&mut self, batch: &Received<'_>) -> Result<()> {
        if !self.cli.selects(batch.session, batch.stream) {
            return Ok(());
        }
        let wanted = self.cli.count.map_or(u64::MAX, |count| count - self.taken);
        match self.tally.add_first(batch, wanted) {
            Ok(()) => {}
            // Nobody is shown other bytes than those that were published.
            Err(Trouble::Checksum(mismatch)) => {
                self.complain(&format!("{mismatch}; it is not shown"));
                return Ok(());
            }
            // Without --verify only what cannot be printed counts.
            Err(trouble) if self.cli.verify || matches!(trouble, Trouble::Malformed { .. }) => {
                self.complain(&trouble.to_string());
            }
            Err(_) => {}
        }
        let whole = batch.messages().map_while(Result::ok);
        for message in whole.take(usize::try_from(wanted).unwrap_or(usize::MAX)) {
            self.printer.print(message)?;
            self.taken += 1;
        }
        Ok(())
    }

    fn complain(&mut self, what: &str) {
        self.troubles += 1;
        if self.troubles <= TOLD {
            warn!("{what}");
        }
    }
}

fn is_reader_gone(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(penstock_process::output::is_reader_gone)
}
