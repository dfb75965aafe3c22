//! Publisher and reader processes of a run, and the faults that the run injects into them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cluster;
use crate::lines::Lines;
use crate::netns::Net;
use crate::program_reports;
use crate::programs::Binaries;
use crate::running::{Reporting, Running, inside};
use crate::settings::Mode;
use penstock_process::interrupt::Interrupt;

/// Time limits: for a publisher to send its lines at the lowest rate under the worst faults, and for a
/// reader to exit after SIGTERM.
const PUBLISHER_TIMEOUT: Duration = Duration::from_secs(120);
const READER_TIMEOUT: Duration = Duration::from_secs(20);

/// A fault of a process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ProcessFault {
    /// No fault: it exits by itself, or on request.
    None,
    /// SIGSTOP after the first duration, SIGCONT after the second.
    Stopped(Duration, Duration),
    /// SIGKILL.
    Killed(Duration),
}

/// Parameters of a publisher.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Publisher {
    /// The broker that it publishes to.
    pub broker: usize,
    /// The path of the payload.
    pub mode: Mode,
    /// Number of streams.
    pub streams: u32,
    /// Message bytes per second.
    pub rate: u64,
    /// Bytes of a batch.
    pub batch: u64,
    /// What the run does to it.
    pub fault: ProcessFault,
}

/// Parameters of a reader.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reader {
    /// The broker whose log it reads.
    pub broker: usize,
    /// Whether it registers, so that the broker waits for it.
    pub registered: bool,
    /// Starts at the oldest batch instead of the newest. Not for registered readers: the oldest batch may
    /// be overwritten before they register.
    pub from_start: bool,
    /// When it ends, from its start.
    pub lifetime: Duration,
    /// What the run does to it.
    pub fault: ProcessFault,
}

/// What all processes of a run share.
#[derive(Debug, Clone, Copy)]
pub struct RunContext<'a> {
    /// The namespaces.
    pub net: &'a Net,
    /// The programs.
    pub binaries: &'a Binaries,
    /// The topic.
    pub topic: &'a str,
    /// Folder of their output and logs.
    pub folder: &'a Path,
}

/// A process with its planned fault.
#[derive(Debug)]
struct ScriptedProcess {
    reporting: Reporting,
    started: Instant,
    fault: ProcessFault,
    /// Whether the run has stopped or killed it.
    fault_applied: bool,
    resumes_at: Option<Instant>,
}

impl ScriptedProcess {
    fn new(reporting: Reporting, fault: ProcessFault) -> Self {
        Self {
            reporting,
            started: Instant::now(),
            fault,
            fault_applied: false,
            resumes_at: None,
        }
    }

    /// Replaces its planned fault; durations count from its start.
    fn inject(&mut self, fault: ProcessFault) {
        (self.fault, self.fault_applied) = (fault, false);
        self.apply_due_fault();
    }

    /// Applies its fault once it is due, and returns a fault that was just applied.
    fn apply_due_fault(&mut self) -> Option<ProcessFault> {
        if self.resumes_at.is_some_and(|at| Instant::now() >= at) {
            self.resume();
        }
        let age = self.started.elapsed();
        match self.fault {
            _ if self.fault_applied => return None,
            ProcessFault::Killed(after) if age >= after => {
                self.reporting.running().signal(libc::SIGKILL)
            }
            ProcessFault::Stopped(after, length) if age >= after => {
                self.reporting.running().signal(libc::SIGSTOP);
                self.resumes_at = Some(Instant::now() + length);
            }
            _ => return None,
        }
        self.fault_applied = true;
        Some(self.fault)
    }

    fn resume(&mut self) {
        if self.resumes_at.take().is_some() {
            self.reporting.running().signal(libc::SIGCONT);
        }
    }

    fn was_killed(&self) -> bool {
        self.fault_applied && matches!(self.fault, ProcessFault::Killed(_))
    }
}

/// How a process ended.
#[derive(Debug)]
pub enum Outcome<T> {
    /// It exited by itself, with this report.
    Success(T),
    /// The run killed it.
    Killed,
    /// It failed or exceeded its time limit.
    Failed(String),
}

/// A running publisher.
#[derive(Debug)]
pub struct Publishing {
    /// Its parameters.
    pub script: Publisher,
    process: ScriptedProcess,
}

impl Publishing {
    /// Starts it in the publisher's namespace.
    pub fn start(
        number: u64,
        script: Publisher,
        lines: &Lines,
        context: RunContext<'_>,
    ) -> Result<Self> {
        let mut command = inside(context.net.publisher(), &context.binaries.publisher);
        command.args(["--brokers", &cluster::address(script.broker)]);
        command.args(["--topic", context.topic, "--mode", script.mode.name()]);
        command.args(["--digest", "--format", "json", "--timeout", "60"]);
        for (option, value) in [
            ("--threads-per-broker", u64::from(script.streams)),
            ("--rate", script.rate),
            ("--batch-size", script.batch),
        ] {
            command.args([option, &value.to_string()]);
        }
        command.arg("--input").arg(lines.path());
        let name = format!("publisher {number}");
        let log = context.folder.join(format!("publisher-{number}.log"));
        Ok(Self {
            script,
            process: ScriptedProcess::new(
                Reporting::start(&name, &mut command, &log)?,
                script.fault,
            ),
        })
    }

    /// Applies its fault once it is due, and returns a fault that was just applied.
    pub fn apply_due_fault(&mut self) -> Option<ProcessFault> {
        self.process.apply_due_fault()
    }

    /// Replaces its planned fault; durations count from its start.
    pub fn inject(&mut self, fault: ProcessFault) {
        self.process.inject(fault);
    }

    /// The process.
    pub fn process(&mut self) -> &mut Running {
        self.process.reporting.running()
    }

    /// Injects no further fault.
    pub fn stop_injecting(&mut self) {
        self.process.resume();
        self.process.fault_applied |= !matches!(self.process.fault, ProcessFault::Killed(_));
    }

    /// Whether it has exited or exceeded its time limit.
    pub fn is_finished(&mut self) -> Result<bool> {
        let over = self.process.started.elapsed() > PUBLISHER_TIMEOUT;
        Ok(over || self.process.reporting.running().ended()?.is_some())
    }

    /// How it ended; to be called once it is over.
    pub fn end(mut self, interrupt: &Interrupt) -> Result<Outcome<program_reports::Publisher>> {
        let Some(status) = self.process.reporting.running().ended()? else {
            let failure = self
                .process
                .reporting
                .running()
                .failure("does not come to an end");
            return Ok(Outcome::Failed(failure.to_string()));
        };
        // It may have exited before the signal arrived.
        if self.process.was_killed() && !status.success() {
            return Ok(Outcome::Killed);
        }
        let output = self.process.reporting.output(interrupt);
        let parsed = output.and_then(|text| program_reports::parse("penstock-publisher", &text));
        Ok(match parsed {
            Ok(report) => Outcome::Success(report),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        })
    }
}

/// A running reader, with a planned end.
#[derive(Debug)]
pub struct ReaderRun {
    process: ScriptedProcess,
    ends_at: Instant,
}

impl ReaderRun {
    /// Starts it in the broker's namespace, on the log at `log`.
    pub fn start(number: u64, script: Reader, log: &Path, context: RunContext<'_>) -> Result<Self> {
        let namespace = context.net.broker(script.broker);
        let mut command = inside(namespace, &context.binaries.subscriber);
        command.arg("--path").arg(log);
        command.args([
            "--follow", "--verify", "--stat", "--output", "none", "--format", "json",
        ]);
        command.args(["--from", if script.from_start { "start" } else { "end" }]);
        // The broker does not wait for readers that are not registered.
        command.arg(if script.registered {
            "--register"
        } else {
            "--allow-loss"
        });
        let name = format!("reader {number}");
        let log = context.folder.join(format!("reader-{number}.log"));
        Ok(Self {
            process: ScriptedProcess::new(
                Reporting::start(&name, &mut command, &log)?,
                script.fault,
            ),
            ends_at: Instant::now() + script.lifetime,
        })
    }

    /// As [`Publishing::apply_due_fault`].
    pub fn apply_due_fault(&mut self) -> Option<ProcessFault> {
        self.process.apply_due_fault()
    }

    /// As [`Publishing::inject`].
    pub fn inject(&mut self, fault: ProcessFault) {
        self.process.inject(fault);
    }

    /// Whether it has exited or reached its planned end.
    pub fn is_finished(&mut self) -> Result<bool> {
        let ended = self.process.reporting.running().ended()?.is_some();
        Ok(ended || (Instant::now() >= self.ends_at && self.process.resumes_at.is_none()))
    }

    /// Sends SIGTERM and waits until it exits.
    pub fn end(mut self, interrupt: &Interrupt) -> Result<Outcome<program_reports::Subscriber>> {
        self.process.resume();
        let running = self.process.reporting.running();
        if self.process.fault_applied && matches!(self.process.fault, ProcessFault::Killed(_)) {
            return Ok(Outcome::Killed);
        }
        if let Err(error) = running.stop(READER_TIMEOUT) {
            return Ok(Outcome::Failed(format!("{error:#}")));
        }
        let output = self.process.reporting.output(interrupt);
        let parsed = output.and_then(|text| program_reports::parse("penstock-subscriber", &text));
        Ok(match parsed {
            Ok(report) => Outcome::Success(report),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        })
    }
}
