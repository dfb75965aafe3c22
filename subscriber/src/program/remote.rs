//! Reads a topic from its brokers.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use tracing::warn;

use super::cli::Cli;
use super::sink::Sink;
use super::{output, position_file, unless_reader_is_gone, watch_signals};
use crate::{Error, RemoteEvent, RemoteSubscriber};

/// How often the position is saved, since each time waits for the disk.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// Reads from the brokers that the command line names.
///
/// # Errors
/// If a broker cannot be read, or the output not written.
pub fn run(cli: &Cli) -> Result<ExitCode> {
    let stop = watch_signals()?;
    let subscriber = RemoteSubscriber::connect(cli.remote_config()?)?;
    let run = Run {
        cli,
        subscriber,
        sink: Sink::new(cli),
        stop,
        next_save: Instant::now() + SAVE_INTERVAL,
        has_unsaved: true,
    };
    run.finish()
}

/// One reading of a topic.
struct Run<'a> {
    cli: &'a Cli,
    subscriber: RemoteSubscriber,
    sink: Sink<'a>,
    stop: Arc<AtomicBool>,
    next_save: Instant,
    has_unsaved: bool,
}

/// What the caller does about an event.
enum Next {
    Continue,
    /// The brokers have nothing more.
    Rest,
    /// Nothing came for a moment.
    Idle,
}

impl Run<'_> {
    fn finish(mut self) -> Result<ExitCode> {
        let read = self.read();
        // What was printed is not printed again, even after an error of a broker.
        let saved = self.save();
        unless_reader_is_gone(read.and(saved))?;
        if self.cli.stat {
            let source = output::Source::Brokers {
                topic: self.cli.topic.as_deref().unwrap_or_default(),
                report: self.subscriber.report(),
            };
            output::print_stat(self.cli, &source, &self.sink.tally)?;
        }
        Ok(self.sink.exit_code())
    }

    fn read(&mut self) -> Result<()> {
        let mut idle_since = None;
        while !self.stop.load(Ordering::Relaxed) && !self.sink.is_full() {
            match self.take_next()? {
                Next::Continue => {
                    idle_since = None;
                    self.save_if_due()?;
                }
                Next::Rest if !self.cli.follow => break,
                Next::Rest | Next::Idle => {
                    self.sink.printer.flush()?;
                    self.save_if_due()?;
                    let idle = idle_since.get_or_insert_with(Instant::now).elapsed();
                    if self.cli.until_idle.is_some_and(|longest| idle >= longest) {
                        self.name_unreachable();
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    fn take_next(&mut self) -> Result<Next, anyhow::Error> {
        let event = match self.subscriber.next() {
            Ok(event) => event,
            // The signal came while a broker was waited for.
            Err(Error::Unreachable { .. }) if self.stop.load(Ordering::Relaxed) => {
                return Ok(Next::Idle);
            }
            Err(error) => return Err(error.into()),
        };
        self.has_unsaved |= !matches!(event, RemoteEvent::CaughtUp | RemoteEvent::Idle);
        match event {
            RemoteEvent::Batch(batch) => self.sink.take_verified(&batch)?,
            RemoteEvent::Lost {
                broker,
                batches,
                messages,
            } => {
                warn!(
                    broker,
                    batches, messages, "overwritten before they were read"
                );
                self.sink.tally.add_lost(batches, messages);
            }
            RemoteEvent::Missing {
                session,
                stream,
                first,
                batches,
            } => {
                warn!(
                    "no broker has {batches} batches of session {session:016x}, stream {stream}, from sequence {first}"
                );
                self.sink.note_missing();
            }
            RemoteEvent::Damaged { broker, index } => self.sink.complain(&format!(
                "broker {broker}: the index entry of batch {index} is damaged; the batch is skipped"
            )),
            RemoteEvent::Corrupt { broker, mismatch } => self
                .sink
                .complain(&format!("broker {broker}: {mismatch}; it is not shown")),
            RemoteEvent::Evicted { broker } => {
                warn!(
                    broker,
                    "the broker no longer waits for this reader, which read nothing for too long"
                );
            }
            RemoteEvent::NewLog { broker } => {
                warn!(
                    broker,
                    "the broker has made its log anew; it is read from its beginning"
                );
            }
            RemoteEvent::CaughtUp => return Ok(Next::Rest),
            RemoteEvent::Idle => return Ok(Next::Idle),
        }
        Ok(Next::Continue)
    }

    fn save_if_due(&mut self) -> Result<()> {
        match self.cli.position_file.is_some() && Instant::now() >= self.next_save {
            true => self.save(),
            false => Ok(()),
        }
    }

    /// Flushes the output, then saves the position behind it.
    fn save(&mut self) -> Result<()> {
        self.sink.printer.flush()?;
        let Some(path) = &self.cli.position_file else {
            return Ok(());
        };
        if !std::mem::take(&mut self.has_unsaved) {
            return Ok(());
        }
        self.next_save = Instant::now() + SAVE_INTERVAL;
        let topic = self.cli.topic.as_deref().unwrap_or_default();
        position_file::save(Path::new(path), topic, self.subscriber.position())
    }

    /// What a broker holds that is not reachable now was not read.
    fn name_unreachable(&mut self) {
        let brokers = self.subscriber.report().brokers.iter();
        for broker in brokers.filter(|broker| !broker.is_connected) {
            let text = format!(
                "broker {} is not reachable; what else it has was not read",
                broker.broker
            );
            self.sink.complain(&text);
        }
    }
}
