//! Reads a log on this host, in place.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use penstock_log::{ReadError, report_shortened_logs};
use tracing::{info, warn};

use super::cli::Cli;
use super::sink::Sink;
use super::{output, unless_reader_is_gone, watch_signals};
use crate::{Event, OpenError, Start, Subscriber};

/// Time without a batch after which the subscriber checks whether the broker is still alive.
const GONE_CHECK: Duration = Duration::from_millis(100);
/// Pause between attempts to open a log that does not exist yet.
const OPEN_RETRY: Duration = Duration::from_millis(50);
/// Time for a broker to set mode, group and registry of a log that it has just created.
const SETTLING: Duration = Duration::from_secs(2);

/// Reads the log that the command line names.
///
/// # Errors
/// If the log cannot be read, or the output not written.
pub fn run(cli: &Cli) -> Result<ExitCode> {
    let run = Run::start(cli)?;
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
    let mut subscriber = Subscriber::open(&cli.log_path(), start)?;
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
                    cli.log_path().display()
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

impl<'a> Run<'a> {
    /// `None` if a signal arrived while waiting for the log.
    fn start(cli: &'a Cli) -> Result<Option<Self>> {
        report_shortened_logs("penstock-subscriber")
            .context("cannot install the SIGBUS handler")?;
        let stop = watch_signals()?;
        let subscriber = match cli.longest_wait() {
            None => Some(open(cli, cli.start())?),
            Some(longest) => open_patiently(cli, longest, &stop)?,
        };
        let Some(subscriber) = subscriber else {
            return Ok(None);
        };
        let sink = Sink::new(cli);
        Ok(Some(Self {
            cli,
            subscriber,
            sink,
            stop,
        }))
    }

    fn finish(mut self) -> Result<ExitCode> {
        let read = self.read().and_then(|()| Ok(self.sink.printer.flush()?));
        unless_reader_is_gone(read)?;
        if self.cli.stat {
            let (info, gone) = (self.subscriber.info(), self.subscriber.overwritten());
            let source = output::Source::Log {
                path: &self.cli.log_path(),
                info: &info,
                gone: &gone,
            };
            output::print_stat(self.cli, &source, &self.sink.tally)?;
        }
        Ok(self.sink.exit_code())
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
