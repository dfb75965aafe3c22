//! One publisher against running brokers.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result};
use bytesize::ByteSize;

use crate::program_reports;
use crate::running::{Running, on_cores};
use crate::settings::{Mode, Workload};
use penstock_process::interrupt::Interrupt;

/// What is published.
#[derive(Debug, Clone)]
pub enum Source {
    /// Synthetic messages of this size in all.
    Synthetic(ByteSize),
    /// The lines of a file, or of stdin when it is `-`.
    Lines(PathBuf),
}

impl Source {
    /// Bytes to expect, where that can be known before.
    pub fn expected_bytes(&self) -> Option<u64> {
        match self {
            Self::Synthetic(total) => Some(total.as_u64()),
            Self::Lines(path) => {
                let metadata = path.metadata().ok()?;
                metadata.is_file().then_some(metadata.len())
            }
        }
    }
}

/// Everything that a publisher run needs to know.
#[derive(Debug)]
pub struct Publish<'a> {
    /// The publisher.
    pub program: &'a Path,
    /// None runs it where the lab runs.
    pub namespace: Option<&'a str>,
    /// Cores that it is kept on, as taskset(1) has them.
    pub cpus: Option<&'a str>,
    /// Addresses, separated by commas.
    pub brokers: String,
    /// The path of the payload.
    pub mode: Mode,
    /// How datagrams leave, if it is not left to the publisher.
    pub tx: Option<&'a str>,
    /// Its settings.
    pub workload: &'a Workload,
    /// What it publishes.
    pub source: &'a Source,
    /// Message bytes per second; none is full speed.
    pub rate: Option<u64>,
    /// Whether it computes a SHA-256 of each stream.
    pub digest: bool,
    /// Gets its log and report.
    pub folder: &'a Path,
}

impl Publish<'_> {
    /// Publishes; writes `publisher.log` and `publisher.json` into the folder. Calls `watch` again
    /// and again meanwhile; should that fail, the publisher is stopped.
    ///
    /// Returns the publisher's report and whether it exited with success.
    pub fn run(
        &self,
        mut watch: impl FnMut(&Running) -> Result<()>,
        interrupt: &Interrupt,
    ) -> Result<(program_reports::Publisher, bool)> {
        let report = self.folder.join("publisher.json");
        let mut publisher = self.start(&report)?;
        let status = loop {
            if let Some(status) = publisher.ended()? {
                break status;
            }
            watch(&publisher)?;
            interrupt.pause()?;
        };
        program_reports::parse_file("publisher", &report)
            .map(|parsed| (parsed, status.success()))
            .map_err(|error| error.context(publisher.failure(&format!("ended ({status})"))))
    }

    /// A measured run is compared broker by broker, so no stream goes to another broker unless the options say
    /// so: if a broker dies, the run fails.
    fn on_broker_loss(&self) -> &[&str] {
        let options = &self.workload.publisher_option;
        let is_chosen = options.iter().any(|it| it.starts_with("--on-broker-loss"));
        match is_chosen || !self.brokers.contains(',') {
            true => &[],
            false => &["--on-broker-loss", "wait"],
        }
    }

    /// Starts it; what it prints at its end goes to `report`.
    pub fn start(&self, report: &Path) -> Result<Running> {
        let workload = self.workload;
        let mut command = on_cores(self.namespace, self.cpus, self.program);
        command.args(["--brokers", &self.brokers, "--topic", &workload.topic]);
        command.args(["--mode", self.mode.name(), "--format", "json"]);
        if let Some(tx) = self.tx {
            command.args(["--tx", tx]);
        }
        if let Some(rate) = self.rate {
            command.args(["--rate", &rate.to_string()]);
        }
        command.args(["--ack", &workload.ack.number().to_string()]);
        command.args(["--order", &workload.order.number().to_string()]);
        command.args([
            "--threads-per-broker",
            &workload.threads_per_broker.to_string(),
        ]);
        if let Some(size) = workload.batch_size {
            command.args(["--batch-size", &size.as_u64().to_string()]);
        }
        if let Some(batches) = workload.in_flight {
            command.args(["--in-flight", &batches.to_string()]);
        }
        command.args(&workload.publisher_option);
        command.args(self.on_broker_loss());
        if self.digest {
            command.arg("--digest");
        }
        match self.source {
            Source::Synthetic(total) => {
                command.args(["--total-size", &total.as_u64().to_string()]);
                command.args([
                    "--message-size",
                    &workload.message_size.as_u64().to_string(),
                ]);
                command.stdin(Stdio::null());
            }
            Source::Lines(path) => {
                command.arg("--input").arg(path).args(["--split", "lines"]);
                let from_stdin = path.as_os_str() == "-";
                command.stdin(if from_stdin {
                    Stdio::inherit()
                } else {
                    Stdio::null()
                });
            }
        }
        let stdout =
            File::create(report).with_context(|| format!("cannot create {}", report.display()))?;
        let log = self.folder.join("publisher.log");
        Running::start("publisher", &mut command, Some(stdout), &log)
    }
}
