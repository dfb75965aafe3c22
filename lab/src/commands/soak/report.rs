//! Report of a soak run: JSON and Markdown.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use super::ledger::Audit;
use crate::measure::resource_usage::{Trend, UsageHistory, has_grown};
use penstock_testbed::program_reports::Publisher;

/// Kind of the report.
pub const SOAK: &str = "soak";

/// The report; `report.json` has this shape.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub kind: String,
    /// Seed that reproduces the script of the run.
    pub seed: u64,
    pub seconds: f64,
    #[serde(flatten)]
    pub counts: Counts,
    /// Number of times that the faults of the links changed.
    pub weather_changes: u64,
    /// Number of packets by outcome, over all links and both directions.
    pub faults: BTreeMap<String, u64>,
    pub brokers: Vec<BrokerReport>,
    /// Empty if the run found no problem.
    pub problems: Vec<String>,
}

/// Number of processes by outcome.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    pub publishers: u64,
    pub publishers_stopped: u64,
    pub publishers_killed: u64,
    /// Streams that ended with all messages acknowledged, by their last path.
    pub streams: BTreeMap<String, u64>,
    /// Number of times that a stream continued over another connection.
    pub moves: u64,
    pub readers: u64,
    pub readers_stopped: u64,
    pub readers_killed: u64,
    /// Messages read by readers that exited normally.
    pub messages_read: u64,
}

/// One broker.
#[derive(Debug, Serialize, Deserialize)]
pub struct BrokerReport {
    /// Messages of publishers that exited by themselves.
    pub messages_acked: u64,
    pub messages_in_log: u64,
    /// Messages of killed publishers.
    pub messages_of_killed: u64,
    /// Resident memory, bytes.
    pub rss_bytes: Trend,
    pub descriptors: Trend,
    /// Descriptors before the first publisher and after the last.
    pub idle_descriptors: [u64; 2],
}

impl Counts {
    pub fn publisher_finished(&mut self, report: &Publisher) {
        for stream in report.brokers.iter().flat_map(|session| &session.streams) {
            *self.streams.entry(stream.path.clone()).or_default() += 1;
            self.moves += stream.moves;
        }
    }

    /// Summary for the progress bar.
    pub fn line(&self) -> String {
        format!(
            "{} publishers ({} killed, {} stopped), {} readers ({} killed, {} stopped)",
            self.publishers,
            self.publishers_killed,
            self.publishers_stopped,
            self.readers,
            self.readers_killed,
            self.readers_stopped,
        )
    }
}

impl Report {
    pub fn add_broker(&mut self, audit: Audit, usage: &UsageHistory, idle: [u64; 2]) {
        let number = self.brokers.len();
        let of_broker = |problem: String| format!("broker {number}: {problem}");
        self.problems
            .extend(audit.problems.into_iter().map(of_broker));
        let memory = usage.memory();
        if has_grown(&memory) {
            self.problems.push(of_broker(format!(
                "memory has_grown from {} to {}",
                ByteSize(memory.early),
                ByteSize(memory.late)
            )));
        }
        let [before, after] = idle;
        if before != after {
            self.problems.push(of_broker(format!(
                "{after} descriptors are open without publishers, {before} were at the start"
            )));
        }
        self.brokers.push(BrokerReport {
            messages_acked: audit.messages_acked,
            messages_in_log: audit.messages_in_log,
            messages_of_killed: audit.messages_of_killed,
            rss_bytes: memory,
            descriptors: usage.descriptors(),
            idle_descriptors: idle,
        });
    }

    /// The report as a list in Markdown.
    pub fn summary(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| writeln!(out, "- {text}").expect("a string takes all");
        line(format!(
            "{:.0} s, seed {}: {}",
            self.seconds,
            self.seed,
            self.counts.line()
        ));
        let paths: Vec<_> = self
            .counts
            .streams
            .iter()
            .map(|(path, n)| format!("{n} over {path}"))
            .collect();
        line(format!(
            "streams acked whole: {}; {} moves; fault_rotation changed {} times",
            paths.join(", "),
            self.counts.moves,
            self.weather_changes
        ));
        for (number, broker) in self.brokers.iter().enumerate() {
            let (memory, open) = (broker.rss_bytes, broker.descriptors);
            line(format!(
                "broker {number}: {} messages acked, {} of killed publishers, {} in the log; memory {} to {}, at most {}; descriptors {} to {}, at most {}",
                broker.messages_acked,
                broker.messages_of_killed,
                broker.messages_in_log,
                ByteSize(memory.first),
                ByteSize(memory.last),
                ByteSize(memory.max),
                broker.idle_descriptors[0],
                broker.idle_descriptors[1],
                open.max
            ));
        }
        match self.problems.is_empty() {
            true => line("nothing lost, nothing duplicated, nothing leaked".to_owned()),
            false => self
                .problems
                .iter()
                .for_each(|problem| line(format!("PROBLEM {problem}"))),
        }
        out.pop();
        out
    }

    pub fn markdown(&self) -> String {
        let mut out = format!("# Soak\n\n{}\n", self.summary());
        out.push_str("\n| packets | number |\n|---|---:|\n");
        for (what, count) in &self.faults {
            writeln!(out, "| {what} | {count} |").expect("a string takes all");
        }
        out
    }
}
