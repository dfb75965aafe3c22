//! A report of the lab and the publishers' reports beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::read_json;
use penstock_e2e::lab::LabRun;
use serde_json::Value;

/// A small comparison.
pub const SMALL: [&str; 6] = ["--runs", "1", "--size", "32MiB", "--latency-seconds", "0.2"];

pub struct LabReport {
    pub folder: PathBuf,
    pub json: Value,
    pub stderr: String,
}

impl LabReport {
    /// Runs a command of the lab to its end.
    pub fn of(bed: &Bed, command: &mut Command) -> Result<Self> {
        let lab = LabRun::of(bed, command)?;
        assert!(!lab.text("report.md")?.is_empty(), "report.md is empty");
        Ok(Self {
            folder: lab.folder,
            json: lab.report,
            stderr: lab.stderr,
        })
    }

    /// All rows.
    pub fn rows(&self) -> &[Value] {
        self.json["rows"].as_array().map_or(&[], Vec::as_slice)
    }

    /// Number of rows that are so.
    pub fn count(&self, is_so: impl Fn(&Value) -> bool) -> usize {
        self.rows().iter().filter(|row| is_so(row)).count()
    }

    /// The publishers' reports of all runs; one that the lab ended, having sampled it, leaves none.
    pub fn publishers(&self) -> Result<Vec<Value>> {
        let runs = fs::read_dir(&self.folder).context("cannot list the report's folder")?;
        let files = runs.flatten().map(|run| run.path().join("publisher.json"));
        let has_report = |file: &PathBuf| fs::metadata(file).is_ok_and(|file| file.len() > 0);
        files
            .filter(has_report)
            .map(|file| read_json(&file))
            .collect()
    }

    /// Each publisher had all its messages acknowledged, over both paths together, and never moved.
    pub fn assert_every_run(&self) -> Result<()> {
        let mut paths = Vec::new();
        let reports = self.publishers()?;
        assert!(
            !reports.is_empty(),
            "no publisher's report in {}",
            self.folder.display()
        );
        for report in &reports {
            assert_eq!(report["messages_acked"], report["messages_sent"]);
            assert_ne!(report["messages_sent"], 0);
            assert_eq!(report["ack_latency_us"]["count"], report["batches"]);
            for stream in streams(report) {
                if stream["moves"] == 0 {
                    paths.extend(stream["path"].as_str().map(str::to_owned));
                }
            }
        }
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths, ["tcp", "xdp"]);
        Ok(())
    }

    /// The report has its picture, with all panels.
    pub fn assert_picture(&self) -> Result<()> {
        let read = |name: &str| {
            let path: &Path = &self.folder.join(name);
            fs::read_to_string(path).with_context(|| format!("no {name}"))
        };
        let svg = read("compare.svg")?;
        assert!(svg.contains("</svg>"), "the picture is cut off");
        assert!(
            read("report.md")?.contains("compare.svg"),
            "report.md does not show the picture"
        );
        for title in ["Payload", "CPU time", "low rate", "high rate"] {
            assert!(svg.contains(title), "the picture has no panel '{title}'");
        }
        Ok(())
    }
}

/// All streams of a publisher's report.
pub fn streams(report: &Value) -> impl Iterator<Item = &Value> {
    let brokers = report["brokers"].as_array().into_iter().flatten();
    brokers.flat_map(|broker| broker["streams"].as_array().into_iter().flatten())
}
