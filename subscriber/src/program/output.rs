//! What goes to the terminal or the next program: messages, and the sums.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::Path;

use crate::{RemoteReport, StreamTotals, Tally};
use anyhow::Result;
use penstock_log::{LogInfo, Overwritten};
use penstock_process::output::{Stdout, print_line, print_to_stderr};
use penstock_process::text::visible;
use serde::Serialize;

use super::cli::{Cli, Format, Output};

const BUFFER: usize = 256 << 10;

/// Prints messages to stdout.
pub struct Printer {
    output: Output,
    /// Whether lines go to a terminal, which must not interpret control characters from publishers.
    visibly: bool,
    stdout: BufWriter<Stdout>,
}

impl Printer {
    pub fn new(output: Output) -> Self {
        Self {
            output,
            visibly: output == Output::Lines && io::stdout().is_terminal(),
            stdout: BufWriter::with_capacity(BUFFER, Stdout::new()),
        }
    }

    pub fn print(&mut self, message: &[u8]) -> io::Result<()> {
        match self.output {
            Output::None => Ok(()),
            Output::Raw => self.stdout.write_all(message),
            Output::Lines => {
                match self.visibly {
                    true => self.stdout.write_all(visible(message).as_bytes())?,
                    false => self.stdout.write_all(message)?,
                }
                self.stdout.write_all(b"\n")
            }
            Output::LengthPrefixed => {
                // A batch, and so a message, is smaller than 4 GiB.
                self.stdout
                    .write_all(&(message.len() as u32).to_le_bytes())?;
                self.stdout.write_all(message)
            }
        }
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }
}

/// The sums as `--stat --format json` prints them; field names are stable.
#[derive(Debug, Serialize)]
struct Stat<'a> {
    kind: &'static str,
    /// The log on this host, or the topic that was read from its brokers.
    path: Option<&'a Path>,
    topic: Option<&'a str>,
    messages: u64,
    batches: u64,
    payload_bytes: u64,
    lost_batches: u64,
    lost_messages: u64,
    /// Batches that came again from another broker.
    duplicates: u64,
    /// Batches between those read that no broker has.
    missing: u64,
    reconnects: u64,
    log: Option<LogStat>,
    brokers: Vec<BrokerStat<'a>>,
    streams: Vec<StreamTotals>,
}

/// What came from one broker.
#[derive(Debug, Serialize)]
struct BrokerStat<'a> {
    broker: &'a str,
    batches: u64,
    lost_batches: u64,
    reconnects: u64,
    connected: bool,
}

/// Where the messages came from.
pub enum Source<'a> {
    Log {
        path: &'a Path,
        info: &'a LogInfo,
        gone: &'a Overwritten,
    },
    Brokers {
        topic: &'a str,
        report: &'a RemoteReport,
    },
}

/// What the log itself counts, from its beginning, whether it was read or not.
#[derive(Debug, Serialize)]
struct LogStat {
    epoch: u64,
    ring_bytes: u64,
    messages: u64,
    batches: u64,
    payload_bytes: u64,
    /// What the ring no longer held when this reader opened it.
    overwritten_messages: u64,
    overwritten_batches: u64,
    overwritten_payload_bytes: u64,
}

impl LogStat {
    fn new(info: &LogInfo, gone: &Overwritten) -> Self {
        Self {
            epoch: info.epoch,
            ring_bytes: info.ring_bytes,
            messages: info.messages,
            batches: info.batches,
            payload_bytes: info.payload_bytes,
            overwritten_messages: gone.messages,
            overwritten_batches: gone.batches,
            overwritten_payload_bytes: gone.payload_bytes,
        }
    }
}

impl<'a> Stat<'a> {
    fn new(source: &Source<'a>, tally: &Tally) -> Self {
        let streams = tally.streams();
        let sum = |of: fn(&StreamTotals) -> u64| streams.iter().map(of).sum();
        let mut stat = Self {
            kind: "subscriber",
            path: None,
            topic: None,
            messages: sum(|stream| stream.messages),
            batches: sum(|stream| stream.batches),
            payload_bytes: sum(|stream| stream.payload_bytes),
            lost_batches: tally.lost_batches(),
            lost_messages: tally.lost_messages(),
            duplicates: 0,
            missing: 0,
            reconnects: 0,
            log: None,
            brokers: Vec::new(),
            streams,
        };
        match *source {
            Source::Log { path, info, gone } => {
                stat.path = Some(path);
                stat.log = Some(LogStat::new(info, gone));
                stat.missing = stat.streams.iter().map(|s| s.missing_batches).sum();
            }
            Source::Brokers { topic, report } => {
                stat.topic = Some(topic);
                stat.duplicates = report.duplicates;
                stat.missing = report.missing;
                stat.reconnects = report.brokers.iter().map(|b| b.reconnects).sum();
                let brokers = report.brokers.iter();
                let brokers = brokers.map(|broker| BrokerStat {
                    broker: &broker.broker,
                    batches: broker.batches,
                    lost_batches: broker.lost_batches,
                    reconnects: broker.reconnects,
                    connected: broker.is_connected,
                });
                stat.brokers = brokers.collect();
            }
        }
        stat
    }
}

/// Prints the sums, where they do not mix with messages.
pub fn print_stat(cli: &Cli, source: &Source<'_>, tally: &Tally) -> Result<()> {
    let stat = Stat::new(source, tally);
    let text = match cli.format {
        Format::Json => serde_json::to_string_pretty(&stat)?,
        Format::Text => table(&stat),
    };
    match cli.output() {
        Output::None => print_line(text),
        _ => print_to_stderr(text),
    }
}

fn table(stat: &Stat<'_>) -> String {
    let mut lines = vec![format!(
        "read {} messages, {} batches, {} bytes; lost {} messages in {} batches",
        stat.messages, stat.batches, stat.payload_bytes, stat.lost_messages, stat.lost_batches
    )];
    if let Some(log) = &stat.log {
        lines.extend(log_lines(log));
    }
    if let Some(topic) = stat.topic {
        lines.push(format!(
            "topic {topic}: {} batches came twice and were dropped, {} are missing",
            stat.duplicates, stat.missing
        ));
    }
    lines.extend(stat.brokers.iter().map(|broker| {
        format!(
            "from {}: {} batches, {} lost, {} reconnects{}",
            broker.broker,
            broker.batches,
            broker.lost_batches,
            broker.reconnects,
            if broker.connected {
                ""
            } else {
                ", not connected"
            }
        )
    }));
    lines.push(format!(
        "{:<16} {:>6} {:>12} {:>10} {:>15} {:>8} {}",
        "session", "stream", "messages", "batches", "bytes", "missing", "sha256"
    ));
    lines.extend(stat.streams.iter().map(|stream| {
        format!(
            "{:<16} {:>6} {:>12} {:>10} {:>15} {:>8} {}",
            stream.session,
            stream.stream,
            stream.messages,
            stream.batches,
            stream.payload_bytes,
            stream.missing_batches,
            stream.sha256.as_deref().unwrap_or("-")
        )
    }));
    lines.join("\n")
}

fn log_lines(log: &LogStat) -> Vec<String> {
    let mut lines = vec![format!(
        "log  {} messages, {} batches, {} bytes since it was made; ring of {} bytes, epoch {}",
        log.messages, log.batches, log.payload_bytes, log.ring_bytes, log.epoch
    )];
    if log.overwritten_batches > 0 {
        lines.push(format!(
            "gone {} messages, {} batches, {} bytes ({:.1} % of the log) were overwritten before this \
             reader began",
            log.overwritten_messages,
            log.overwritten_batches,
            log.overwritten_payload_bytes,
            100.0 * log.overwritten_payload_bytes as f64 / log.payload_bytes.max(1) as f64,
        ));
    }
    lines
}
