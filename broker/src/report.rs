//! The broker's report: what it carried, where the time went, what its sockets got.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_ingest::session::{ConnectionReport, Counters, Shared, WorkerStats};
use penstock_log::{FileState, Log};
use penstock_process::logging;
use penstock_runtime::profile::{ProcessUsage, StageReport};
use penstock_serve::ServeStats;
use serde::Serialize;

use crate::xdp::XdpReport;

/// The report as `--report` writes it; field names are stable.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    kind: &'static str,
    mode: &'static str,
    listen: SocketAddr,
    workers: usize,
    uptime_seconds: f64,
    /// First frame to last commit, summed over workers: what percentages refer to.
    active_seconds: f64,
    #[serde(flatten)]
    usage: ProcessUsage,
    topics: Vec<TopicReport>,
    stages: Vec<StageReport>,
    batches: u64,
    recv_calls: u64,
    recv_bytes: u64,
    recv_calls_per_batch: f64,
    bytes_per_recv: f64,
    eagain: u64,
    connections: Vec<ConnectionReport>,
    /// Remote subscribers, if they were served.
    #[serde(skip_serializing_if = "Option::is_none")]
    subscribers: Option<ServeStats>,
    counters: &'a Counters,
    /// Log lines that were dropped because stderr did not accept them.
    log_lines_dropped: u64,
    /// What ended the broker: a signal, a thread that ended, or an error of its own.
    ended_by: String,
    /// Failures; empty after an orderly end.
    failures: Vec<String>,
    /// The xdp path, if it was open.
    #[serde(skip_serializing_if = "Option::is_none")]
    xdp: Option<XdpReport>,
}

#[derive(Debug, Serialize)]
pub struct TopicReport {
    topic: String,
    path: String,
    ring_bytes: u64,
    /// Registered readers that it waits for.
    readers: usize,
    /// What the slowest of them has not read yet.
    unread_bytes: u64,
    /// Each of them.
    registered: Vec<RegisteredReader>,
    messages: u64,
    batches: u64,
    payload_bytes: u64,
}

/// A reader that the broker waits for.
#[derive(Debug, Serialize)]
pub struct RegisteredReader {
    /// As the reader reports it: a number in its own PID namespace.
    process: u64,
    unread_batches: u64,
    unread_bytes: u64,
    /// It leaves writers no room, or will soon.
    holds_up: bool,
}

impl<'a> Report<'a> {
    /// Builds the report. The last two arguments are what ended the broker and what failed.
    #[allow(clippy::too_many_arguments, reason = "each is a part of the report")]
    pub fn new(
        listen: SocketAddr,
        workers: usize,
        uptime: Duration,
        stats: &WorkerStats,
        subscribers: Option<ServeStats>,
        xdp: Option<XdpReport>,
        topics: Vec<(String, Arc<Log>)>,
        shared: &'a Shared,
        (ended_by, failures): (String, Vec<String>),
    ) -> Result<Self> {
        let ratio = |a: u64, b: u64| a as f64 / b.max(1) as f64;
        Ok(Self {
            kind: "broker",
            mode: if xdp.is_some() { "xdp" } else { "tcp" },
            listen,
            workers,
            uptime_seconds: uptime.as_secs_f64(),
            active_seconds: stats.active_ns as f64 * 1e-9,
            usage: ProcessUsage::now().context("cannot read this process's usage")?,
            topics: readable(topics).map(TopicReport::new).collect(),
            stages: stages_and_wait(stats),
            batches: stats.batches,
            recv_calls: stats.recv_calls,
            recv_bytes: stats.recv_bytes,
            recv_calls_per_batch: ratio(stats.recv_calls, stats.batches),
            bytes_per_recv: ratio(stats.recv_bytes, stats.recv_calls),
            eagain: stats.eagain,
            connections: shared.connections(),
            subscribers,
            counters: &shared.counters,
            log_lines_dropped: logging::dropped_lines(),
            ended_by,
            failures,
            xdp,
        })
    }

    /// Writes the report as JSON.
    pub fn write(&self, to: &mut Target) -> Result<()> {
        let json =
            serde_json::to_vec_pretty(self).context("cannot serialise the report as JSON")?;
        let file = &mut to.file;
        let written = file.set_len(0).and_then(|()| file.write_all(&json));
        written.with_context(|| format!("cannot write the report to {}", to.path.display()))
    }
}

/// The file that the report goes to.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    file: File,
}

impl Target {
    /// Opens the file at the start, while the broker still has its user's privileges. The old contents
    /// stay until there is something to write.
    pub fn open(path: &Path) -> Result<Self> {
        let file = penstock_files::open_to_write(path, 0o644)
            .with_context(|| format!("cannot write a report to {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }
}

impl TopicReport {
    pub fn new((topic, log): (String, Arc<Log>)) -> Self {
        let info = log.info();
        let (readers, unread_bytes) = log.backlog();
        // The upkeep thread reports a registry that it cannot read.
        let registered = log.readers().unwrap_or_default().into_iter();
        let registered = registered.map(|reader| RegisteredReader {
            process: reader.process,
            unread_batches: reader.unread_batches,
            unread_bytes: reader.unread_bytes,
            holds_up: reader.holds_up,
        });
        Self {
            registered: registered.collect(),
            topic,
            path: log.path().display().to_string(),
            ring_bytes: info.ring_bytes,
            readers,
            unread_bytes,
            messages: info.messages,
            batches: info.batches,
            payload_bytes: info.payload_bytes,
        }
    }
}

/// The logs that can be read: accessing the missing part of a shortened log raises SIGBUS.
pub fn readable(topics: Vec<(String, Arc<Log>)>) -> impl Iterator<Item = (String, Arc<Log>)> {
    let is_readable = |log: &Log| !matches!(log.check_file(), Ok(FileState::Resized { .. }));
    topics.into_iter().filter(move |(_, log)| is_readable(log))
}

/// The stages, and the rest of the workers' time: waiting for sockets, with the loop around it.
pub fn stages_and_wait(stats: &WorkerStats) -> Vec<StageReport> {
    let mut stages = stats.stages.report(stats.active_ns, stats.batches);
    let staged: u64 = stages.iter().map(|stage| stage.total_ns).sum();
    let wait = stats.active_ns.saturating_sub(staged);
    stages.push(StageReport {
        name: "WaitForData".to_owned(),
        percent: 100.0 * wait as f64 / stats.active_ns.max(1) as f64,
        ns_per_batch: wait as f64 / stats.batches.max(1) as f64,
        calls: stats.polls,
        total_ns: wait,
    });
    stages
}
