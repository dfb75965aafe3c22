//! What a soak found, for programs and for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use super::ledger::Audit;
use crate::outputs::Publisher;
use crate::vitals::{Course, Vitals, grew};

/// Kind of the report.
pub const SOAK: &str = "soak";

/// The report; `report.json` has this shape.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub kind: String,
    /// Repeats the script of the run.
    pub seed: u64,
    pub seconds: f64,
    #[serde(flatten)]
    pub counts: Counts,
    /// How often the faults of the links were changed.
    pub weather_changes: u64,
    /// Packets by what became of them, all links both ways.
    pub faults: BTreeMap<String, u64>,
    pub brokers: Vec<BrokerReport>,
    /// Empty when all is well.
    pub problems: Vec<String>,
}

/// Who came, and what became of them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    pub publishers: u64,
    pub publishers_stopped: u64,
    pub publishers_killed: u64,
    /// Streams that ended with all messages acked, by the path that they had at the end.
    pub streams: BTreeMap<String, u64>,
    /// Times that a stream went on over another connection.
    pub moves: u64,
    pub readers: u64,
    pub readers_stopped: u64,
    pub readers_killed: u64,
    /// By readers that left as they should.
    pub messages_read: u64,
}

/// One broker.
#[derive(Debug, Serialize, Deserialize)]
pub struct BrokerReport {
    /// Of publishers that ended by themselves.
    pub messages_acked: u64,
    pub messages_in_log: u64,
    /// Of publishers that were killed: the beginnings of what they sent.
    pub messages_of_killed: u64,
    /// Resident memory, bytes.
    pub rss_bytes: Course,
    pub descriptors: Course,
    /// Descriptors before the first publisher came, and after the last had gone.
    pub idle_descriptors: [u64; 2],
}

impl Counts {
    pub fn publisher_finished(&mut self, report: &Publisher) {
        for stream in report.brokers.iter().flat_map(|session| &session.streams) {
            *self.streams.entry(stream.path.clone()).or_default() += 1;
            self.moves += stream.moves;
        }
    }

    /// For the progress bar.
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
    pub fn add_broker(&mut self, audit: Audit, vitals: &Vitals, idle: [u64; 2]) {
        let number = self.brokers.len();
        let of_broker = |problem: String| format!("broker {number}: {problem}");
        self.problems
            .extend(audit.problems.into_iter().map(of_broker));
        let memory = vitals.memory();
        if grew(&memory) {
            self.problems.push(of_broker(format!(
                "memory grew from {} to {}",
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
            descriptors: vitals.descriptors(),
            idle_descriptors: idle,
        });
    }

    /// For people: a list, in Markdown.
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
            "streams acked whole: {}; {} moves; weather changed {} times",
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
