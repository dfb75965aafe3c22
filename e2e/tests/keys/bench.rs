//! Keys of a test, and publishers with them.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::broker::Stopped;
use penstock_e2e::commands::{Ended, paths, text};

/// Options of a broker.
pub const XDP: [&str; 4] = ["--mode", "xdp", "--iface", "eth0"];
/// Lines of a publisher.
const LINES: u64 = 200_000;

/// The broker's file of keys, and a file for each: `eu` may publish to topics `penstock` and `trades.*`,
/// `us` to `audit`.
pub struct Keys<'a> {
    bed: &'a Bed,
    pub file: String,
    pub eu: String,
    pub us: String,
}

impl<'a> Keys<'a> {
    /// Makes them.
    pub fn make(bed: &'a Bed) -> Result<Self> {
        let (eu, us) = (make_key(bed, "eu")?, make_key(bed, "us")?);
        let file = bed.file("keys");
        let mut options = fs::OpenOptions::new();
        let mut out = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&file)?;
        for (key, topics) in [(&eu, "penstock trades.*"), (&us, "audit")] {
            for line in text(key.as_ref()).lines() {
                let line = line
                    .strip_suffix(" *")
                    .map(|line| format!("{line} {topics}"))
                    .unwrap_or(line.to_owned());
                writeln!(out, "{line}")?;
            }
        }
        Ok(Self {
            bed,
            file: plain(file)?,
            eu,
            us,
        })
    }

    /// Takes the key `eu` from the broker's file.
    pub fn remove_eu(&self) -> Result<()> {
        let kept = text(self.file.as_ref());
        let kept: Vec<_> = kept
            .lines()
            .filter(|line| !line.starts_with("eu"))
            .collect();
        fs::write(&self.file, kept.join("\n") + "\n").context("cannot write the keys")
    }

    /// With its key a publisher of numbered lines gets all of them into the log, over this path. Returns
    /// what it said.
    pub fn gets_through(&self, path: &str, arguments: &[&str]) -> Result<String> {
        let mut lines = String::new();
        for number in 1..=LINES {
            writeln!(lines, "{number}")?;
        }
        fs::write(self.input(), lines)?;
        let mut command = self
            .bed
            .publisher(&["--brokers", BROKER, "--auth-key", &self.eu]);
        command
            .args(["--format", "json", "--input"])
            .arg(self.input())
            .args(arguments);
        let ended = self.bed.run("publisher", &mut command)?.success()?;
        let report = ended.json()?;
        assert_eq!(report["messages_acked"], LINES);
        assert_eq!(paths(&report), path);
        Ok(ended.stderr)
    }

    /// The log has those lines.
    #[track_caller]
    pub fn assert_same_lines(&self) {
        self.bed.assert_log_has_lines_of("penstock", &self.input());
    }

    /// A publisher that must be refused with something like `regex`; returns what it said.
    #[track_caller]
    pub fn refuses(&self, regex: &str, arguments: &[&str]) -> String {
        self.bed.refuses(regex, &mut small(self.bed, arguments))
    }

    /// A publisher that gets a MiB through.
    pub fn publishes(&self, arguments: &[&str]) -> Result<Ended> {
        self.bed
            .run("publisher", &mut small(self.bed, arguments))?
            .success()
    }

    fn input(&self) -> PathBuf {
        self.bed.file("input")
    }
}

/// A publisher of a MiB.
fn small(bed: &Bed, arguments: &[&str]) -> std::process::Command {
    let mut command = bed.publisher(&["--brokers", BROKER, "--total-size", "1MiB"]);
    command.args(arguments);
    command
}

/// A new key's file.
pub fn make_key(bed: &Bed, name: &str) -> Result<String> {
    let file = plain(bed.file(&format!("{name}.key")))?;
    let mut command = bed.broker(&["--keygen", &file]).command_without_dir();
    bed.run("keygen", &mut command)?.success()?;
    Ok(file)
}

fn plain(path: PathBuf) -> Result<String> {
    Ok(path.to_str().context("a plain path")?.to_owned())
}

/// A counter of the broker's report.
pub fn counter(stopped: &Stopped, name: &str) -> u64 {
    stopped.count(&format!("/counters/{name}"))
}
