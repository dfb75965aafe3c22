//! Runs of the lab whose contents are verified.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bed::Bed;
use crate::commands::read_json;

impl Bed {
    /// A run of `penstock-lab throughput --verify` with these options; returns its report.
    pub fn lab_throughput(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.lab(&["throughput", "--verify"]);
        command
            .args(arguments)
            .arg("--results")
            .arg(self.file("results"));
        let printed = self.run("lab", &mut command)?.success()?.stdout;
        let folder = printed.lines().last().context("the lab names no folder")?;
        read_json(&std::path::Path::new(folder).join("report.json"))
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
