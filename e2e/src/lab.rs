//! Runs of the lab: to their end, with the report that they leave, or until a signal ends them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_testbed::command::run;
use penstock_testbed::netns::file_names;
use serde_json::Value;

use crate::bed::Bed;
use crate::cleanup;
use crate::commands::{Background, Ended, LIMIT, read_json};
use crate::wait::eventually;

/// Time for a lab to take everything down once its test has failed.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What a run of the lab left.
#[derive(Debug)]
pub struct LabRun {
    /// The folder of its results.
    pub folder: PathBuf,
    /// The report in there.
    pub report: Value,
    /// What it printed.
    pub stdout: String,
    /// What it logged.
    pub stderr: String,
}

impl LabRun {
    /// Runs a command of the lab to its end.
    pub fn of(bed: &Bed, command: &mut Command) -> Result<Self> {
        Self::within(LIMIT, bed, command)
    }

    /// As [`Self::of`], with another time limit.
    pub fn within(limit: Duration, bed: &Bed, command: &mut Command) -> Result<Self> {
        let command = command.arg("--results").arg(bed.file("results"));
        let ended = bed.background("lab", command)?.wait_for(limit)?.success()?;
        let folder = ended.stdout.lines().last();
        let folder = PathBuf::from(folder.context("the lab names no folder")?);
        Ok(Self {
            report: read_json(&folder.join("report.json"))?,
            folder,
            stdout: ended.stdout,
            stderr: ended.stderr,
        })
    }

    /// What it printed above the name of the folder.
    pub fn printed(&self) -> &str {
        let text = self.stdout.trim_end();
        text.rsplit_once('\n').map_or("", |(printed, _)| printed)
    }

    /// The text of a file of its results.
    pub fn text(&self, name: &str) -> Result<String> {
        let path = self.folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))
    }
}

/// A lab in the background, which takes down what it made when it is interrupted; so it is when dropped.
#[derive(Debug)]
pub struct RunningLab(Option<Background>);

impl RunningLab {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// Waits until `condition` holds.
    ///
    /// # Panics
    /// If it ends before that, or after 60 seconds.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut condition: impl FnMut(&Background) -> bool) {
        let lab = self.0.as_mut().expect("it ends once");
        eventually(what, || {
            let is_running = lab.is_running();
            assert!(is_running, "ended: {}{}", lab.stderr(), lab.stdout());
            condition(lab)
        });
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Result<Ended> {
        let lab = self.0.take().expect("it ends once");
        let pid = lab.pid();
        let ended = lab.wait();
        cleanup::forget_lab(pid);
        ended
    }

    /// Sends it a signal and waits for its end.
    pub fn end(self, signal: i32) -> Result<Ended> {
        self.process().signal(signal);
        self.wait()
    }

    fn process(&self) -> &Background {
        self.0.as_ref().expect("it ends once")
    }
}

impl Drop for RunningLab {
    fn drop(&mut self) {
        let Some(mut lab) = self.0.take() else { return };
        lab.signal(libc::SIGINT);
        // The test has failed already.
        let _ = lab.wait_for(END_LIMIT);
        cleanup::forget_lab(lab.pid());
    }
}

/// Namespaces of the lab with this pid.
pub fn namespaces_of(lab: u32) -> Vec<String> {
    names_in("/run/netns", &format!("penstock-{lab}-"))
}

/// Processes in its namespaces.
pub fn processes_of(lab: u32) -> Vec<u32> {
    let namespaces = namespaces_of(lab);
    let pids = namespaces
        .iter()
        .flat_map(|name| run(&["ip", "netns", "pids", name]));
    let pids: Vec<_> = pids.collect();
    let pids = pids.iter().flat_map(|pids| pids.lines());
    pids.filter_map(|pid| pid.trim().parse().ok()).collect()
}

/// Its directories for shared buffers.
pub fn buffers_of(lab: u32) -> Vec<PathBuf> {
    let names = names_in("/dev/shm", &format!("penstock-{lab}-shm"));
    let paths = names.iter().map(|name| Path::new("/dev/shm").join(name));
    paths.collect()
}

/// All that is left of it: namespaces, directories, mounts, and processes that have its name in their
/// arguments.
pub fn left_by(lab: u32) -> Vec<String> {
    let mut left = namespaces_of(lab);
    let buffers = buffers_of(lab);
    left.extend(buffers.iter().map(|path| path.display().to_string()));
    let name = format!("penstock-{lab}-");
    let mounts = fs::read_to_string("/proc/self/mounts").expect("the mounts");
    let mounts = mounts.lines().filter(|line| line.contains(&name));
    left.extend(mounts.map(str::to_owned));
    let processes = file_names("/proc".as_ref()).expect("the processes");
    for pid in processes {
        // Most names in there are of no process, and a process may have ended.
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        if arguments.contains(&name) {
            left.push(format!("process {pid}: {arguments}"));
        }
    }
    left
}

fn names_in(dir: &str, start: &str) -> Vec<String> {
    let names = file_names(dir.as_ref()).unwrap_or_default();
    let names = names.into_iter().filter(|name| name.starts_with(start));
    names.collect()
}

impl Bed {
    /// Starts the lab with these arguments.
    pub fn start_lab(&self, arguments: &[&str]) -> Result<RunningLab> {
        let mut command = self.lab(arguments);
        let command = command.arg("--results").arg(self.file("results"));
        let lab = self.background("lab", command)?;
        cleanup::note_lab(lab.pid());
        Ok(RunningLab(Some(lab)))
    }

    /// A run of `penstock-lab throughput --verify` with these options; returns its report.
    pub fn lab_throughput(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.lab(&["throughput", "--verify"]);
        Ok(LabRun::of(self, command.args(arguments))?.report)
    }

    /// `penstock-lab report` with these arguments; returns what it printed.
    pub fn lab_report(&self, of: &Path, arguments: &[&str]) -> Result<String> {
        let mut command = self.lab(&["report"]);
        let ended = self.run("report", command.arg(of).args(arguments))?;
        Ok(ended.success()?.stdout)
    }
}

/// All messages that were sent are in the logs, in this number of streams.
#[track_caller]
pub fn assert_verified(report: &Value, streams: usize) {
    assert_eq!(report["messages_in_logs"], report["messages_sent"]);
    let verified = report["verification"].as_array().expect("a verification");
    assert_eq!(verified.len(), streams, "streams");
    for stream in verified {
        let is_equal = stream["differences"].as_array().is_some_and(Vec::is_empty);
        assert!(is_equal, "{stream}");
    }
}

/// Every value of a field of the publisher's streams.
pub fn stream_values(report: &Value, pointer: &str) -> Vec<Value> {
    let sessions = report["publisher"]["sessions"]
        .as_array()
        .into_iter()
        .flatten();
    let streams = sessions.flat_map(|session| session["streams"].as_array().into_iter().flatten());
    let values = streams.map(|stream| stream.pointer(pointer).cloned().unwrap_or_default());
    values.collect()
}

/// Every stream took this path.
#[track_caller]
pub fn assert_path(report: &Value, path: &str) {
    let paths = stream_values(report, "/path");
    assert!(
        !paths.is_empty() && paths.iter().all(|its| its == path),
        "{paths:?}"
    );
}

/// The brokers' reports.
pub fn brokers(report: &Value) -> &[Value] {
    report["brokers"].as_array().map_or(&[], Vec::as_slice)
}

/// The rows of a table of a report, or of a list in it.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn rows<'a>(report: &'a Value, pointer: &str) -> &'a [Value] {
    let rows = report.pointer(pointer).and_then(Value::as_array);
    rows.unwrap_or_else(|| panic!("no rows at {pointer}: {report}"))
}

/// A count of a report, or of a row.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn count(report: &Value, pointer: &str) -> u64 {
    let count = report.pointer(pointer).and_then(Value::as_u64);
    count.unwrap_or_else(|| panic!("no count at {pointer}: {report}"))
}

/// A figure of a report, or of a row.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn figure(report: &Value, pointer: &str) -> f64 {
    let figure = report.pointer(pointer).and_then(Value::as_f64);
    figure.unwrap_or_else(|| panic!("no figure at {pointer}: {report}"))
}

/// A count of all rows together.
#[track_caller]
pub fn total(rows: &[Value], pointer: &str) -> u64 {
    let mut sum = 0;
    for row in rows {
        sum += count(row, pointer);
    }
    sum
}
