//! One fault run: publishers with numbered lines, a broker, readers, and scheduled faults. At its end the
//! logs are compared with what publishers saw acknowledged.

mod fault_actions;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use procfs::{Current, Uptime};

use super::broker_slot::BrokerSlot;
use super::checker::{Checker, Reported, Sent};
use super::fault_catalog::LogCapacity;
use super::links::Links;
use super::report::RunReport;
use super::schedule::{self, Schedule, ScheduledFault};
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::lines::Lines;
use penstock_testbed::processes::{self, Outcome, ProcessFault, Publishing, ReaderRun, RunContext};
use penstock_testbed::program_reports;
use penstock_testbed::settings::Mode;
use penstock_testbed::verify::{ReaderOutput, Reading};

/// Maximum number of streams of a session.
const MAX_STREAMS: u32 = 3;
/// Lifetime of readers: longer than any run.
const READER_LIFETIME: Duration = Duration::from_secs(600);
/// Phrases in the error of a publisher that failed after it had connected, or that a broker refused.
const FAILED_AFTER_CONNECT: &str = "were acknowledged before that";
const REFUSED: &str = "refused the stream";
const REFUSED_TO_RESUME: &str = "connect anew";
/// Maximum number of restarts of publishers in one run: more than fit in the duration of its faults.
const MAX_RESTARTS: u64 = 200;

/// Permitted outcomes for a publisher that creates a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// It must succeed, at once or after retries.
    Accepted,
    /// The broker may refuse it with this phrase.
    MayBeRefused(&'static str),
}

/// A running publisher.
struct PublisherRun {
    publishing: Publishing,
    /// Index in `sent`.
    index: usize,
    topic: String,
    plan: schedule::Publisher,
    /// Set if it only creates a topic.
    probe: Option<Probe>,
    /// Whether a memory limit was in force, so that it may fail.
    may_die: bool,
}

/// A fault run in progress.
pub struct Trial<'a> {
    pub links: Links<'a>,
    pub broker: BrokerSlot<'a>,
    pub rng: Rng,
    pub interrupt: &'a Interrupt,
    /// Uptime of the host, seconds: no clock can be set further back.
    pub uptime: i64,
    context: RunContext<'a>,
    schedule: &'a Schedule,
    publishers: Vec<PublisherRun>,
    /// What all publishers sent, by topic.
    sent: BTreeMap<String, Vec<Sent>>,
    publisher_count: u64,
    reader_count: u64,
    /// The registered reader, and the other one.
    readers: [Option<ReaderRun>; 2],
    along: Option<Reading>,
    /// Output files of readers.
    printed: Vec<PathBuf>,
    /// Whether a memory limit was in force on the broker, so that it may fail.
    broker_may_die: bool,
    /// Set while a broker that did not start must be started again: seconds that its clock is ahead.
    broker_due: Option<i64>,
    counts: BTreeMap<String, u64>,
    report: RunReport,
}

impl<'a> Trial<'a> {
    /// Sets up everything that the schedule needs; nothing is sent yet.
    pub fn prepare(
        context: RunContext<'a>,
        buffers: &'a BufferDir,
        schedule: &'a Schedule,
        interrupt: &'a Interrupt,
    ) -> Result<Self> {
        let mut rng = Rng::with_seed(schedule.seed);
        let links = Links::open(context.net, rng.u64(..u64::MAX / 2))?;
        let capacity = schedule.kind.capacity;
        let broker = BrokerSlot::take(context, buffers, schedule.path, capacity, interrupt)?;
        let mut trial = Self {
            links,
            broker,
            rng,
            interrupt,
            uptime: uptime()?,
            context,
            schedule,
            publishers: Vec::new(),
            sent: BTreeMap::new(),
            publisher_count: 0,
            reader_count: 0,
            readers: [None, None],
            along: None,
            printed: Vec::new(),
            broker_may_die: false,
            broker_due: None,
            counts: BTreeMap::new(),
            report: RunReport::of(schedule),
        };
        if capacity == LogCapacity::Small {
            let log = trial.broker.log(context.topic);
            let (program, said) = (
                &context.binaries.subscriber,
                context.folder.join("along.log"),
            );
            let namespace = context.net.broker(0);
            let along = Reading::follow(
                program,
                namespace,
                &log,
                &said,
                ReaderOutput::Lines(0),
                interrupt,
            );
            trial.along = Some(along?);
            trial.printed.push(said.with_extension("json"));
            for registered in [true, false] {
                trial.start_reader(registered)?;
            }
        }
        Ok(trial)
    }

    /// Runs the schedule to its end.
    pub fn run(mut self) -> Result<RunReport> {
        let started = Instant::now();
        let silence = self.schedule.silence;
        if silence.is_some_and(|[from, _]| from == Duration::ZERO) {
            self.links.silence(true)?;
        }
        for plan in &self.schedule.publishers {
            self.start_publisher(self.context.topic, *plan, None)?;
        }
        let mut to_do = self.events();
        while !(to_do.is_empty() && self.publishers.is_empty() && self.broker_due.is_none()) {
            while let Some((_, event)) = to_do.first().filter(|(at, _)| started.elapsed() >= *at) {
                match *event {
                    Event::Begin(fault) => self.begin(fault.kind.fault, fault.lasts)?,
                    Event::End(fault) => self.end(fault.kind.fault)?,
                    Event::Silence(silent) => self.links.silence(silent)?,
                }
                to_do.remove(0);
            }
            self.step()?;
        }
        self.report.seconds = started.elapsed().as_secs_f64();
        self.finish()
    }

    fn events(&self) -> Vec<(Duration, Event)> {
        let faults = self.schedule.faults.iter().flat_map(|fault| {
            let end = fault.at + fault.lasts;
            [(fault.at, Event::Begin(*fault)), (end, Event::End(*fault))]
        });
        let silence = self
            .schedule
            .silence
            .into_iter()
            .flat_map(|[from, to]| [(from, Event::Silence(true)), (to, Event::Silence(false))]);
        let mut events: Vec<_> = faults.chain(silence).collect();
        events.sort_by_key(|(at, _)| *at);
        events
    }

    /// One iteration: applies faults of processes that are due, and handles processes that exited.
    fn step(&mut self) -> Result<()> {
        if let Some(why) = self.broker.reap()? {
            self.count("brokers_died");
            if !self.broker_may_die {
                self.problem(format!("the broker died: {why}"));
            }
            self.broker_due = Some(0);
        }
        if let Some(ahead) = self.broker_due {
            self.ensure_broker(ahead)?;
        }
        for reader in self.readers.iter_mut().flatten() {
            reader.apply_due_fault();
        }
        let mut at = 0;
        while at < self.publishers.len() {
            self.publishers[at].publishing.apply_due_fault();
            match self.publishers[at].publishing.is_finished()? {
                true => self.finish_publisher(at)?,
                false => at += 1,
            }
        }
        Ok(self.interrupt.pause()?)
    }

    fn start_publisher(
        &mut self,
        topic: &str,
        plan: schedule::Publisher,
        probe: Option<Probe>,
    ) -> Result<()> {
        self.publisher_count += 1;
        let name = format!("p{}", self.publisher_count);
        let path = self.context.folder.join(&name);
        let lines = Lines::write(path, &name, plan.bytes as usize, &mut self.rng)?;
        let script = processes::Publisher {
            broker: 0,
            mode: self.schedule.mode(),
            streams: plan.streams,
            rate: plan.rate,
            batch: plan.batch,
            fault: ProcessFault::None,
        };
        let context = RunContext {
            topic,
            ..self.context
        };
        let publishing = Publishing::start(self.publisher_count, script, &lines, context)?;
        let of_topic = self.sent.entry(topic.to_owned()).or_default();
        self.publishers.push(PublisherRun {
            publishing,
            index: of_topic.len(),
            topic: topic.to_owned(),
            plan,
            probe,
            may_die: false,
        });
        of_topic.push(Sent {
            name,
            lines,
            reported: Reported::Nothing,
            streams: plan.streams,
        });
        Ok(())
    }

    fn finish_publisher(&mut self, at: usize) -> Result<()> {
        let publisher = self.publishers.swap_remove(at);
        let (plan, topic) = (publisher.plan, publisher.topic);
        let sent = &mut self.sent.get_mut(&topic).expect("it has sent to it")[publisher.index];
        match publisher.publishing.end(self.interrupt)? {
            Outcome::Success(report) => {
                sent.reported = Reported::Acked(report.messages_acked as usize);
                if report.messages_acked != sent.lines.count() as u64 {
                    let (acked, lines) = (report.messages_acked, sent.lines.count());
                    self.problem(format!(
                        "a publisher ended well with {acked} of {lines} acked"
                    ));
                }
                self.publisher_ended_well(&report, publisher.probe.is_some());
                Ok(())
            }
            Outcome::Killed => {
                self.count("publishers_killed");
                let bytes = plan.bytes / 2;
                self.start_publisher(
                    &topic,
                    schedule::Publisher { bytes, ..plan },
                    publisher.probe,
                )
            }
            Outcome::Failed(why) => match publisher.probe {
                Some(Probe::MayBeRefused(words)) if why.contains(words) => {
                    self.count("topics_refused");
                    Ok(())
                }
                probe if self.should_restart(&why) => {
                    self.count("turned_away");
                    self.start_publisher(&topic, plan, probe)
                }
                _ if publisher.may_die => {
                    self.count("publishers_died");
                    Ok(())
                }
                _ => {
                    self.problem(why);
                    Ok(())
                }
            },
        }
    }

    /// Whether a publisher failed before its session was established because no broker was running long enough.
    /// Then it is started again. A refusal counts as an error, unless the refused stream continues one of an
    /// earlier broker.
    fn should_restart(&self, why: &str) -> bool {
        let often = self
            .counts
            .get("turned_away")
            .is_some_and(|times| *times >= MAX_RESTARTS);
        let refused = why.contains(REFUSED) && !why.contains(REFUSED_TO_RESUME);
        !often && !why.contains(FAILED_AFTER_CONNECT) && !refused
    }

    fn publisher_ended_well(&mut self, report: &program_reports::Publisher, probe: bool) {
        self.report.lines_acked += report.messages_acked;
        for stream in report.brokers.iter().flat_map(|session| &session.streams) {
            *self.report.streams.entry(stream.path.clone()).or_default() += 1;
            self.report.moves += stream.moves;
            if self.schedule.mode() == Mode::Auto && stream.path == "tcp" && !probe {
                self.count("fell_back");
            }
        }
    }

    fn start_reader(&mut self, registered: bool) -> Result<()> {
        self.reader_count += 1;
        let script = processes::Reader {
            broker: 0,
            registered,
            from_start: false,
            lifetime: READER_LIFETIME,
            fault: ProcessFault::None,
        };
        let log = self.broker.log(self.context.topic);
        let reader = ReaderRun::start(self.reader_count, script, &log, self.context)?;
        self.readers[usize::from(!registered)] = Some(reader);
        Ok(())
    }

    fn finish_reader(&mut self, reader: ReaderRun) -> Result<()> {
        match reader.end(self.interrupt)? {
            Outcome::Success(read) => self.add("batches_overrun", read.lost_batches),
            Outcome::Killed => self.count("readers_killed"),
            Outcome::Failed(why) => self.problem(why),
        }
        Ok(())
    }

    /// Compares the logs after all processes have ended.
    fn finish(mut self) -> Result<RunReport> {
        for reader in std::mem::take(&mut self.readers).into_iter().flatten() {
            self.finish_reader(reader)?;
        }
        self.broker
            .stop()
            .unwrap_or_else(|error| self.problem(format!("{error:#}")));
        for (topic, sent) in std::mem::take(&mut self.sent) {
            self.check(&topic, &sent)?;
        }
        let Self {
            links,
            mut report,
            counts,
            ..
        } = self;
        report.counts = links.end()?;
        report.counts.extend(counts);
        Ok(report)
    }

    fn check(&mut self, topic: &str, sent: &[Sent]) -> Result<()> {
        let log = self.broker.log(topic);
        let none_reported = sent.iter().all(|sent| sent.reported == Reported::Nothing);
        if none_reported && !log.exists() {
            return Ok(());
        }
        let mut checker = Checker::new(sent);
        match self.along.take() {
            Some(along) => self.read(&mut checker, 0, along)?,
            None => {
                for number in 0..MAX_STREAMS {
                    let said = self
                        .context
                        .folder
                        .join(format!("read-{topic}-{number}.log"));
                    let program = &self.context.binaries.subscriber;
                    let namespace = self.context.net.broker(0);
                    let prints = ReaderOutput::Lines(number);
                    self.printed.push(said.with_extension("json"));
                    let reading = Reading::start_after(program, namespace, &log, &said, prints)?;
                    self.read(&mut checker, number, reading)?;
                }
            }
        }
        let findings = checker.finish();
        self.report.lines_in_log += findings.in_log;
        self.report.lines_of_killed += findings.of_killed;
        self.report.wrong += findings.wrong;
        findings
            .examples
            .into_iter()
            .for_each(|example| self.problem(example));
        // Not worth the disk space: the seed reproduces them.
        if self.report.problems.is_empty() {
            let sent = sent.iter().map(|sent| sent.lines.path().to_owned());
            for path in sent.chain(self.printed.drain(..)) {
                fs::remove_file(&path)
                    .with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn read(&mut self, checker: &mut Checker<'_>, stream: u32, reading: Reading) -> Result<()> {
        match reading.text(self.interrupt) {
            Ok(text) => checker.add_streams(stream, text.as_bytes()),
            Err(error) => {
                self.interrupt.check()?;
                self.problem(format!("a reader of the log: {error:#}"));
            }
        }
        Ok(())
    }

    fn problem(&mut self, what: String) {
        self.report.problems.push(what);
    }

    fn add(&mut self, what: &str, count: u64) {
        *self.counts.entry(what.to_owned()).or_default() += count;
    }
}

/// An event of the schedule.
#[derive(Debug, Clone, Copy)]
enum Event {
    Begin(ScheduledFault),
    End(ScheduledFault),
    Silence(bool),
}

/// Whole seconds since the host booted.
fn uptime() -> Result<i64> {
    let uptime = Uptime::current().context("cannot read /proc/uptime")?;
    Ok(uptime.uptime as i64)
}
