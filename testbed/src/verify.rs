//! Reads the brokers' logs, during a run or after it, and compares every stream with what was sent.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::program_reports::{self, Publisher, ReadStream, SentStream, Subscriber};
use crate::running::{Reporting, inside};
use penstock_process::interrupt::Interrupt;

/// What a subscriber logs once brokers wait for it.
const REGISTERED: &str = "registered with the log";
/// Time for a subscriber to open a log and register on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// The comparison of one stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamCheck {
    /// Number of the broker.
    pub broker: usize,
    /// Session of the publisher.
    pub session: String,
    /// Number of the stream.
    pub stream: u32,
    /// Messages sent.
    pub messages: u64,
    /// SHA-256 of what was sent.
    pub sha256: Option<String>,
    /// What differs; empty when the log holds exactly what was sent.
    pub differences: Vec<String>,
}

/// What a verifying subscriber prints.
#[derive(Debug, Clone, Copy)]
pub enum ReaderOutput {
    /// Counts and SHA-256 of each stream.
    Sums,
    /// Every message, of the streams of this number.
    Lines(u32),
}

/// A verifying subscriber on one broker's log.
#[derive(Debug)]
pub struct Reading(Reporting);

impl Reading {
    /// Reads what is in the log at `path`, inside the broker's namespace.
    pub fn start_after(
        program: &Path,
        namespace: &str,
        path: &Path,
        log: &Path,
        prints: ReaderOutput,
    ) -> Result<Self> {
        Self::start(program, namespace, path, log, prints, &[])
    }

    /// Follows the log while it is written, until its broker ends; the broker waits for it. Returns
    /// once that is so.
    pub fn follow(
        program: &Path,
        namespace: &str,
        path: &Path,
        log: &Path,
        prints: ReaderOutput,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let options = ["--follow", "--register"];
        let mut reading = Self::start(program, namespace, path, log, prints, &options)?;
        let running = reading.0.running();
        running.wait_for_line(REGISTERED, READY_TIMEOUT, interrupt)?;
        Ok(reading)
    }

    fn start(
        program: &Path,
        namespace: &str,
        path: &Path,
        log: &Path,
        prints: ReaderOutput,
        options: &[&str],
    ) -> Result<Self> {
        let mut command = inside(namespace, program);
        command.env("RUST_LOG", "info").arg("--path").arg(path);
        command.arg("--verify").args(options);
        match prints {
            ReaderOutput::Sums => command.args(["--stat", "--output", "none", "--format", "json"]),
            ReaderOutput::Lines(stream) => {
                command.args(["--output", "lines", "--stream", &stream.to_string()])
            }
        };
        Reporting::start("subscriber", &mut command, log).map(Self)
    }

    /// Waits for its end; returns the sums.
    pub fn finish(self, interrupt: &Interrupt) -> Result<Subscriber> {
        program_reports::parse("penstock-subscriber", &self.text(interrupt)?)
    }

    /// Waits for its end; returns what it printed. Fails if a batch was damaged or missed.
    pub fn text(self, interrupt: &Interrupt) -> Result<String> {
        self.0.output(interrupt)
    }
}

/// Compares what was sent with what the brokers' logs hold, broker by broker in the same order.
pub fn compare(sent: &Publisher, read: &[Subscriber]) -> Vec<StreamCheck> {
    let mut checks = Vec::new();
    for (broker, (session, log)) in sent.brokers.iter().zip(read).enumerate() {
        for stream in &session.streams {
            let found = log
                .streams
                .iter()
                .find(|s| s.session == session.session && s.stream == stream.stream);
            checks.push(StreamCheck {
                broker,
                session: session.session.clone(),
                stream: stream.stream,
                messages: stream.messages,
                sha256: stream.sha256.clone(),
                differences: differences(stream, found),
            });
        }
    }
    checks
}

fn differences(sent: &SentStream, read: Option<&ReadStream>) -> Vec<String> {
    let Some(read) = read else {
        // A stream that never sent a batch leaves no trace in the log.
        let missing = format!("absent from the log, {} messages were sent", sent.messages);
        return if sent.messages == 0 {
            Vec::new()
        } else {
            vec![missing]
        };
    };
    let mut found = Vec::new();
    let counts = [
        ("messages", sent.messages, read.messages),
        ("batches", sent.batches, read.batches),
        ("payload bytes", sent.payload_bytes, read.payload_bytes),
    ];
    for (what, sent, read) in counts {
        if sent != read {
            found.push(format!("{sent} {what} sent, {read} in the log"));
        }
    }
    match &sent.sha256 {
        Some(sha256) if *sha256 == read.sha256 => {}
        Some(_) => found.push("SHA-256 differs".to_owned()),
        None => found.push("the publisher computed no SHA-256".to_owned()),
    }
    found
}

/// Problems in words, for the report; empty when everything agrees.
pub fn problems(checks: &[StreamCheck], read: &[Subscriber]) -> Vec<String> {
    let lapped = read.iter().enumerate().filter(|(_, log)| log.lost_batches > 0).map(|(i, log)| {
        format!(
            "broker {i}: {} batches ({} messages) were overwritten before they could be verified; \
             the ring is too small to hold the run: raise --ring-size or lower --total-size",
            log.lost_batches, log.lost_messages
        )
    });
    let wrong = checks
        .iter()
        .filter(|check| !check.differences.is_empty())
        .map(|check| {
            let what = check.differences.join("; ");
            format!("broker {} stream {}: {what}", check.broker, check.stream)
        });
    lapped.chain(wrong).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(sha256: &str) -> SentStream {
        SentStream {
            stream: 0,
            messages: 3,
            messages_acked: 3,
            batches: 1,
            payload_bytes: 30,
            sha256: Some(sha256.to_owned()),
            path: "tcp".to_owned(),
            tx: None,
            moves: 0,
            transport: None,
        }
    }

    fn read(sha256: &str) -> ReadStream {
        ReadStream {
            session: "00".to_owned(),
            stream: 0,
            messages: 3,
            batches: 1,
            payload_bytes: 30,
            sha256: sha256.to_owned(),
        }
    }

    #[test]
    fn equal_streams_have_no_differences() {
        assert!(differences(&sent("ab"), Some(&read("ab"))).is_empty());
    }

    #[test]
    fn every_kind_of_difference_is_named() {
        assert_eq!(
            differences(&sent("ab"), Some(&read("cd"))),
            ["SHA-256 differs"]
        );
        let fewer = ReadStream {
            messages: 2,
            ..read("ab")
        };
        assert_eq!(
            differences(&sent("ab"), Some(&fewer)),
            ["3 messages sent, 2 in the log"]
        );
        assert_eq!(
            differences(&sent("ab"), None),
            ["absent from the log, 3 messages were sent"]
        );
        let undigested = SentStream {
            sha256: None,
            ..sent("")
        };
        assert_eq!(differences(&undigested, Some(&read("ab"))).len(), 1);
    }

    #[test]
    fn a_stream_that_sent_nothing_may_be_absent() {
        let idle = SentStream {
            messages: 0,
            ..sent("")
        };
        assert!(differences(&idle, None).is_empty());
    }
}
