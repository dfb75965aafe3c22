//! Publishers and readers that come and go, and what is done to them meanwhile.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cli::Mode;
use crate::cluster;
use crate::interrupt::Interrupt;
use crate::lines::Lines;
use crate::netns::Net;
use crate::outputs;
use crate::process::{Reporting, Running, inside};
use crate::testbed::Binaries;

/// Longest that a publisher takes for its lines, at the lowest rate and in the worst weather; and a
/// reader, to end when it is asked to.
const PUBLISHER_LIMIT: Duration = Duration::from_secs(120);
const READER_LIMIT: Duration = Duration::from_secs(20);

/// What befalls a program.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fate {
    /// It ends by itself, or is asked to.
    Ends,
    /// SIGSTOP after the first time, SIGCONT after the second one more.
    Stopped(Duration, Duration),
    /// SIGKILL.
    Killed(Duration),
}

/// A publisher that joins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Publisher {
    pub broker: usize,
    pub mode: Mode,
    pub streams: u32,
    /// Message bytes per second.
    pub rate: u64,
    /// Bytes of a batch.
    pub batch: u64,
    pub fate: Fate,
}

/// A reader that joins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reader {
    pub broker: usize,
    /// The broker waits for it.
    pub registered: bool,
    /// From the oldest batch that is still there, not from the newest. Not if registered: the oldest
    /// may be overwritten before it is.
    pub from_start: bool,
    pub stays: Duration,
    pub fate: Fate,
}

/// Where actors act.
#[derive(Debug, Clone, Copy)]
pub struct Stage<'a> {
    pub net: &'a Net,
    pub binaries: &'a Binaries,
    pub topic: &'a str,
    /// Gets what they print and log.
    pub folder: &'a Path,
}

/// A program with its fate.
#[derive(Debug)]
struct Actor {
    reporting: Reporting,
    joined: Instant,
    fate: Fate,
    /// It has been stopped, or killed.
    struck: bool,
    resumes: Option<Instant>,
}

impl Actor {
    fn new(reporting: Reporting, fate: Fate) -> Self {
        Self {
            reporting,
            joined: Instant::now(),
            fate,
            struck: false,
            resumes: None,
        }
    }

    /// Something else befalls it than was meant to; times count from when it joined.
    fn meet(&mut self, fate: Fate) {
        (self.fate, self.struck) = (fate, false);
        self.strike();
    }

    /// Does to it what is due. Returns what has just happened.
    fn strike(&mut self) -> Option<Fate> {
        if self.resumes.is_some_and(|at| Instant::now() >= at) {
            self.resume();
        }
        let age = self.joined.elapsed();
        match self.fate {
            _ if self.struck => return None,
            Fate::Killed(after) if age >= after => self.reporting.running().signal(libc::SIGKILL),
            Fate::Stopped(after, length) if age >= after => {
                self.reporting.running().signal(libc::SIGSTOP);
                self.resumes = Some(Instant::now() + length);
            }
            _ => return None,
        }
        self.struck = true;
        Some(self.fate)
    }

    fn resume(&mut self) {
        if self.resumes.take().is_some() {
            self.reporting.running().signal(libc::SIGCONT);
        }
    }

    fn was_killed(&self) -> bool {
        self.struck && matches!(self.fate, Fate::Killed(_))
    }
}

/// How an actor ended.
#[derive(Debug)]
pub enum End<T> {
    /// By itself, with what it reported.
    Well(T),
    Killed,
    /// It failed, or took too long.
    Badly(String),
}

/// A publisher at work.
#[derive(Debug)]
pub struct Publishing {
    pub script: Publisher,
    actor: Actor,
}

impl Publishing {
    pub fn start(number: u64, script: Publisher, lines: &Lines, stage: Stage<'_>) -> Result<Self> {
        let mut command = inside(stage.net.publisher(), &stage.binaries.publisher);
        command.args(["--brokers", &cluster::address(script.broker)]);
        command.args(["--topic", stage.topic, "--mode", script.mode.name()]);
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
        let log = stage.folder.join(format!("publisher-{number}.log"));
        Ok(Self {
            script,
            actor: Actor::new(Reporting::start(&name, &mut command, &log)?, script.fate),
        })
    }

    pub fn strike(&mut self) -> Option<Fate> {
        self.actor.strike()
    }

    /// Something else befalls it than was meant to; times count from when it joined.
    pub fn meet(&mut self, fate: Fate) {
        self.actor.meet(fate);
    }

    pub fn process(&mut self) -> &mut Running {
        self.actor.reporting.running()
    }

    /// Nothing happens to it any more.
    pub fn spare(&mut self) {
        self.actor.resume();
        self.actor.struck |= !matches!(self.actor.fate, Fate::Killed(_));
    }

    /// Whether there is nothing more to wait for.
    pub fn is_over(&mut self) -> Result<bool> {
        let over = self.actor.joined.elapsed() > PUBLISHER_LIMIT;
        Ok(over || self.actor.reporting.running().ended()?.is_some())
    }

    pub fn end(mut self, interrupt: &Interrupt) -> Result<End<outputs::Publisher>> {
        let Some(status) = self.actor.reporting.running().ended()? else {
            let failure = self
                .actor
                .reporting
                .running()
                .failure("does not come to an end");
            return Ok(End::Badly(failure.to_string()));
        };
        // It may have ended before the signal came.
        if self.actor.was_killed() && !status.success() {
            return Ok(End::Killed);
        }
        let output = self.actor.reporting.output(interrupt);
        let parsed = output.and_then(|text| outputs::parse("penstock-publisher", &text));
        Ok(match parsed {
            Ok(report) => End::Well(report),
            Err(error) => End::Badly(format!("{error:#}")),
        })
    }
}

/// A reader that stays for a while.
#[derive(Debug)]
pub struct Guest {
    actor: Actor,
    leaves: Instant,
}

impl Guest {
    pub fn start(number: u64, script: Reader, log: &Path, stage: Stage<'_>) -> Result<Self> {
        let namespace = stage.net.broker(script.broker);
        let mut command = inside(namespace, &stage.binaries.subscriber);
        command.arg("--path").arg(log);
        command.args([
            "--follow", "--verify", "--stat", "--output", "none", "--format", "json",
        ]);
        command.args(["--from", if script.from_start { "start" } else { "end" }]);
        // Nobody waits for one that is not registered.
        command.arg(if script.registered {
            "--register"
        } else {
            "--allow-loss"
        });
        let name = format!("reader {number}");
        let log = stage.folder.join(format!("reader-{number}.log"));
        Ok(Self {
            actor: Actor::new(Reporting::start(&name, &mut command, &log)?, script.fate),
            leaves: Instant::now() + script.stays,
        })
    }

    pub fn strike(&mut self) -> Option<Fate> {
        self.actor.strike()
    }

    /// As [`Publishing::meet`].
    pub fn meet(&mut self, fate: Fate) {
        self.actor.meet(fate);
    }

    /// Whether its time has come, or its end.
    pub fn is_over(&mut self) -> Result<bool> {
        let ended = self.actor.reporting.running().ended()?.is_some();
        Ok(ended || (Instant::now() >= self.leaves && self.actor.resumes.is_none()))
    }

    /// Asks it to leave, and waits for that.
    pub fn end(mut self, interrupt: &Interrupt) -> Result<End<outputs::Subscriber>> {
        self.actor.resume();
        let running = self.actor.reporting.running();
        if self.actor.struck && matches!(self.actor.fate, Fate::Killed(_)) {
            return Ok(End::Killed);
        }
        if let Err(error) = running.stop(READER_LIMIT) {
            return Ok(End::Badly(format!("{error:#}")));
        }
        let output = self.actor.reporting.output(interrupt);
        let parsed = output.and_then(|text| outputs::parse("penstock-subscriber", &text));
        Ok(match parsed {
            Ok(report) => End::Well(report),
            Err(error) => End::Badly(format!("{error:#}")),
        })
    }
}
