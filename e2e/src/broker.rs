//! A broker of a test: started in its namespace, stopped with its report, or killed.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_process::interrupt::Interrupt;
use penstock_testbed::command::run;
use penstock_testbed::running::{Running, inside};
use serde_json::Value;

use crate::bed::{Bed, program};
use crate::commands::{assert_no_crash, assert_says, matches, read_json, text};
use crate::wait::eventually;

/// What a broker prints once it accepts connections.
const READY: &str = "penstock-broker ready on";
/// Time limit for a broker to become ready, or to end.
const LIMIT: Duration = Duration::from_secs(30);

/// How to start a broker.
#[derive(Debug, Clone)]
pub struct BrokerSetup<'a> {
    bed: &'a Bed,
    index: usize,
    starter: Vec<OsString>,
    program: PathBuf,
    buffer_dir: PathBuf,
    arguments: Vec<String>,
}

/// A broker that runs; killed when dropped.
#[derive(Debug)]
pub struct Broker {
    process: Running,
    report: PathBuf,
    buffer_dir: PathBuf,
}

impl Bed {
    /// A broker with these options, in the broker's namespace.
    pub fn broker(&self, arguments: &[&str]) -> BrokerSetup<'_> {
        self.broker_at(0, arguments)
    }

    /// Broker `index` with these options, in its namespace.
    pub fn broker_at(&self, index: usize, arguments: &[&str]) -> BrokerSetup<'_> {
        BrokerSetup {
            bed: self,
            index,
            starter: Vec::new(),
            program: program("broker"),
            buffer_dir: self.buffer_dir_of(index),
            arguments: arguments
                .iter()
                .map(|&argument| argument.to_owned())
                .collect(),
        }
    }

    /// Starts a broker with these options and waits until it is ready. Publishers of other namespaces
    /// may create topics.
    pub fn start_broker(&self, arguments: &[&str]) -> Result<Broker> {
        self.broker(arguments).start()
    }
}

impl BrokerSetup<'_> {
    /// Starts it through a program, such as setpriv, with arguments.
    #[must_use]
    pub fn through(mut self, starter: &[&str]) -> Self {
        self.starter = starter.iter().map(OsString::from).collect();
        self
    }

    /// Another copy of the program.
    #[must_use]
    pub fn program(mut self, program: PathBuf) -> Self {
        self.program = program;
        self
    }

    /// Another place for its logs.
    #[must_use]
    pub fn buffer_dir(mut self, dir: PathBuf) -> Self {
        self.buffer_dir = dir;
        self
    }

    /// Further options.
    #[must_use]
    pub fn with(mut self, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned());
        self.arguments.extend(arguments);
        self
    }

    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Result<Broker> {
        let mut broker = self.spawn()?;
        broker.wait_until_ready()?;
        Ok(broker)
    }

    /// Starts it without waiting.
    pub fn spawn(&self) -> Result<Broker> {
        let report = self.bed.file(&format!("broker-{}.json", self.index));
        let log = self.bed.new_file("broker", "log");
        let mut command = self.bare_command();
        command.arg("--buffer-dir").arg(&self.buffer_dir);
        command.arg("--report").arg(&report);
        command
            .args(["--create-topics", "any"])
            .args(&self.arguments);
        let process = Running::start("broker", command.stdin(Stdio::null()), None, &log)?;
        Ok(Broker {
            process,
            report,
            buffer_dir: self.buffer_dir.clone(),
        })
    }

    /// Starts it, and it must refuse with something like `regex`; returns what it said.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn refuses(&self, regex: &str) -> String {
        self.bed.refuses(regex, &mut self.command())
    }

    /// The command of a broker that does not have to become ready: with its folder, without a report.
    pub fn command(&self) -> Command {
        let mut command = self.bare_command();
        command.arg("--buffer-dir").arg(&self.buffer_dir);
        command.args(&self.arguments);
        command
    }

    /// The command with nothing but the options.
    pub fn command_without_dir(&self) -> Command {
        let mut command = self.bare_command();
        command.args(&self.arguments);
        command
    }

    fn bare_command(&self) -> Command {
        let namespace = self.bed.namespace_of(self.index);
        let Some((starter, arguments)) = self.starter.split_first() else {
            return inside(namespace, &self.program);
        };
        let mut command = inside(namespace, starter.as_ref());
        command.args(arguments).arg(&self.program);
        command
    }
}

impl Broker {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Its process, as an argument.
    pub fn pid_text(&self) -> String {
        self.pid().to_string()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        text(self.process.log())
    }

    /// Its log says something like `regex`.
    #[track_caller]
    pub fn assert_said(&self, regex: &str) {
        assert_says(&self.log(), regex);
    }

    /// Whether a line of its log says something like `regex`.
    pub fn has_said(&self, regex: &str) -> bool {
        matches(&self.log(), regex)
    }

    /// Whether it has accepted connections.
    pub fn is_ready(&self) -> bool {
        self.log().contains(READY)
    }

    /// Waits until it accepts connections.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        self.process
            .wait_for_line(READY, LIMIT, &Interrupt::default())
    }

    /// Its live figures, of a broker on the default port.
    pub fn figures(&self) -> Result<Value> {
        let path = self.buffer_dir.join("broker-1214.sock");
        let stream = UnixStream::connect(&path);
        let mut stream = stream.with_context(|| format!("cannot connect to {}", path.display()))?;
        let mut json = String::new();
        stream.read_to_string(&mut json)?;
        serde_json::from_str(&json).with_context(|| format!("not JSON: {json}"))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        self.process.signal(signal);
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.process.wait(LIMIT)
    }

    /// Sets how much of something it may have from now on.
    pub fn limit(&self, resource: libc::__rlimit_resource_t, soft: Option<u64>) -> Result<()> {
        self.process.limit(resource, soft)
    }

    /// Ends it by a signal; returns what it logged.
    pub fn end(mut self, signal: i32) -> Result<String> {
        self.signal(signal);
        self.wait()?;
        Ok(self.log())
    }

    /// Stops it with SIGTERM: it must exit with success and have written its report, which is returned
    /// with its log.
    pub fn stop(mut self) -> Result<Stopped> {
        self.process.stop(LIMIT)?;
        let log = self.log();
        assert_no_crash(&log);
        let report = read_json(&self.report).context("the broker's report")?;
        Ok(Stopped { report, log })
    }

    /// The machine of the broker loses its power for so long: everything has arrived there, nothing is on
    /// its way, and nothing tells the publisher that the connection is gone.
    pub fn vanish(self, bed: &Bed, duration: Duration) -> Result<()> {
        self.signal(libc::SIGSTOP);
        until_nothing_is_sent(bed);
        bed.broker_ip(&["link", "set", "eth0", "down"])?;
        self.end(libc::SIGKILL)?;
        thread::sleep(duration);
        bed.broker_ip(&["link", "set", "eth0", "up"])?;
        Ok(())
    }

    /// A field of its status in /proc, such as `VmRSS`, without the spaces around it.
    pub fn status_field(&self, name: &str) -> String {
        status_field(self.pid(), name)
    }
}

/// Waits until publishers wait for acks and everything that they sent has arrived.
fn until_nothing_is_sent(bed: &Bed) {
    let (mut before, mut same) = (None, 0);
    eventually("the publisher sends nothing more", || {
        // A full window shows as a byte count that does not rise.
        #[rustfmt::skip]
        let sockets = run(&["ss", "-HtniO", "-N", bed.publisher_ns(), "state", "established", "dport = :1214"]);
        let sockets = sockets.unwrap_or_default();
        let sent: Vec<_> = sockets
            .split_whitespace()
            .filter(|word| word.starts_with("bytes_sent:"))
            .collect();
        let sent = Some(sent.join(" "));
        same = if sent == before { same + 1 } else { 0 };
        before = sent;
        // As often as it takes for a fifth of a second.
        same >= 10
    });
}

/// A field of a process's status in /proc, without the spaces around it; empty if there is none.
pub fn status_field(pid: u32, name: &str) -> String {
    let status = text(format!("/proc/{pid}/status").as_ref());
    let mut fields = status.lines().filter_map(|line| line.split_once(':'));
    let field = fields.find(|(field, _)| *field == name);
    field.map_or_else(String::new, |(_, value)| value.trim().to_owned())
}

/// What a broker left.
#[derive(Debug)]
pub struct Stopped {
    /// Its report.
    pub report: Value,
    /// Its log.
    pub log: String,
}

impl Stopped {
    /// A figure of the report, by its JSON pointer.
    #[track_caller]
    pub fn count(&self, pointer: &str) -> u64 {
        let figure = self.report.pointer(pointer).and_then(Value::as_u64);
        figure.unwrap_or_else(|| panic!("no {pointer} in {}", self.report))
    }
}
