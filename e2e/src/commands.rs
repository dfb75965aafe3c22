//! Programs that end by themselves, or that run until the test ends.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use penstock_testbed::running::{Running, inside};
use regex::bytes::RegexBuilder;
use serde_json::Value;

use crate::bed::{Bed, program};

/// Time limit of a program that is to end by itself.
pub const LIMIT: Duration = Duration::from_secs(300);
/// Time limit of one that must refuse what it is asked.
const REFUSAL_LIMIT: Duration = Duration::from_secs(30);

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it logged.
    pub stderr: String,
}

impl Ended {
    /// What it printed, as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not JSON: {}", self.stdout))
    }

    /// Fails if the program did.
    pub fn success(self) -> Result<Self> {
        ensure!(
            self.status.success(),
            "failed ({}): {}{}",
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// Both outputs.
    pub fn said(&self) -> String {
        format!("{}{}", self.stderr, self.stdout)
    }
}

/// A program that runs, with what it prints in a file.
#[derive(Debug)]
pub struct Background {
    running: Running,
    stdout: std::path::PathBuf,
}

impl Background {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.running.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        self.running.signal(signal);
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.running.ended(), Ok(None))
    }

    /// What it logged so far.
    pub fn stderr(&self) -> String {
        text(self.running.log())
    }

    /// What it printed so far.
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Result<Ended> {
        self.wait_for(LIMIT)
    }

    /// Waits for its end, for at most `limit`.
    pub fn wait_for(&mut self, limit: Duration) -> Result<Ended> {
        Ok(Ended {
            status: self.running.wait(limit)?,
            stdout: text(&self.stdout),
            stderr: self.stderr(),
        })
    }
}

/// The text of a file; empty if it is not there.
pub fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// A file that holds JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&text(path)).with_context(|| format!("{} is not JSON", path.display()))
}

/// Fails if a program crashed, by what it printed.
#[track_caller]
pub fn assert_no_crash(said: &str) {
    let crashed = ["panicked", "SIGSEGV", "SIGABRT"]
        .iter()
        .any(|word| said.contains(word));
    assert!(!crashed, "a crash: {said}");
}

/// Whether a text matches a regular expression, in either case.
pub fn matches(text: &str, regex: &str) -> bool {
    let mut builder = RegexBuilder::new(regex);
    let regex = builder.unicode(false).case_insensitive(true).build();
    regex
        .expect("a regular expression")
        .is_match(text.as_bytes())
}

/// Fails unless a text matches a regular expression.
#[track_caller]
pub fn assert_says(text: &str, regex: &str) {
    assert!(matches(text, regex), "nothing like '{regex}' in: {text}");
}

/// A command that runs `program` with arguments.
pub fn command(program: impl AsRef<OsStr>, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// The text that is no longer broken into lines.
pub fn unwrapped(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Bed {
    /// Starts a program that is killed at the latest with the value that is returned.
    pub fn background(&self, name: &str, command: &mut Command) -> Result<Background> {
        self.background_with(name, command, Stdio::null())
    }

    /// As [`Self::background`], with an input.
    pub fn background_with(
        &self,
        name: &str,
        command: &mut Command,
        stdin: Stdio,
    ) -> Result<Background> {
        let stdout = self.new_file(name, "out");
        let file = File::create(&stdout).context("cannot create a file")?;
        let log = stdout.with_extension("log");
        let running = Running::start(name, command.stdin(stdin), Some(file), &log)?;
        Ok(Background { running, stdout })
    }

    /// Runs a program to its end.
    pub fn run(&self, name: &str, command: &mut Command) -> Result<Ended> {
        self.background(name, command)?.wait()
    }

    /// Runs a program that must fail within 30 seconds, not by a crash, and say something like `regex`.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn refuses(&self, regex: &str, command: &mut Command) -> String {
        let said = self.fails(command);
        assert_says(&said, regex);
        said
    }

    #[track_caller]
    fn fails(&self, command: &mut Command) -> String {
        let mut running = self
            .background("refused", command)
            .expect("it can be started");
        let ended = running.wait_for(REFUSAL_LIMIT).expect("it ends soon");
        let said = ended.said();
        assert_no_crash(&said);
        assert_eq!(ended.status.signal(), None, "{command:?}: {said}");
        assert!(!ended.status.success(), "succeeded: {command:?}: {said}");
        said
    }

    /// A program inside the broker's namespace.
    pub fn in_broker_ns(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Command {
        let mut command = inside(self.broker_ns(), program.as_ref());
        command.args(arguments);
        command
    }

    /// A program inside the publisher's namespace.
    pub fn in_publisher_ns(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Command {
        let mut command = inside(self.publisher_ns(), program.as_ref());
        command.args(arguments);
        command
    }

    /// Runs a shell script in the broker's namespace, with that namespace's /sys, and returns what it
    /// printed.
    pub fn broker_shell(&self, script: &str) -> Result<String> {
        let ended = self.run("shell", &mut self.in_broker_ns("sh", &["-ec", script]))?;
        Ok(ended.success()?.stdout.trim().to_owned())
    }

    /// A publisher's command.
    pub fn publisher(&self, arguments: &[&str]) -> Command {
        self.in_publisher_ns(program("publisher"), arguments)
    }

    /// Publishes with success and returns the report.
    pub fn publish(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.publisher(arguments);
        let ended = self.run("publisher", command.args(["--format", "json"]))?;
        ended.success().context("the publisher")?.json()
    }

    /// A subscriber's command.
    pub fn subscriber(&self, arguments: &[&str]) -> Command {
        command(program("subscriber"), arguments)
    }

    /// The lab's command.
    pub fn lab(&self, arguments: &[&str]) -> Command {
        command(program("lab"), arguments)
    }

    /// Number of messages ever committed to a topic; `None` if it cannot be read.
    pub fn messages_in(&self, topic: &str) -> Option<u64> {
        self.messages_at(&self.log_of(topic))
    }

    /// Number of messages ever committed to a log; `None` if it cannot be read.
    pub fn messages_at(&self, log: &Path) -> Option<u64> {
        let mut command = self.subscriber(&["--from", "end", "--stat", "--format", "json"]);
        command.arg("--path").arg(log);
        // Without files: it is called again and again.
        let output = command.output().ok()?;
        let report: Value = serde_json::from_slice(&output.stdout).ok()?;
        report["log"]["messages"].as_u64()
    }

    /// The lines in a topic's log are those of the file, in order.
    #[track_caller]
    pub fn assert_log_has_lines_of(&self, topic: &str, input: &Path) {
        let arguments = ["--from", "start", "--verify", "--output", "lines"];
        let mut command = self.subscriber(&arguments);
        command.arg("--path").arg(self.log_of(topic));
        let read = self.run("subscriber", &mut command).expect("a subscriber");
        let read = read.success().expect("a subscriber").stdout;
        assert!(
            read == text(input),
            "lines are lost, doubled or out of order"
        );
    }
}

/// The path that all streams of a publisher took, by its report, or several.
pub fn paths(report: &Value) -> String {
    let brokers = report["brokers"].as_array().into_iter().flatten();
    let streams = brokers.flat_map(|broker| broker["streams"].as_array().into_iter().flatten());
    let paths = streams.filter_map(|stream| stream["path"].as_str());
    let mut paths: Vec<_> = paths.collect();
    paths.sort_unstable();
    paths.dedup();
    paths.join(" ")
}
