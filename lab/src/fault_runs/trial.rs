//! One fault run: publishers with numbered lines, a broker, readers, and the faults of a schedule that
//! befall them; at the end the logs are compared with what publishers were told.

mod blows;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;

use super::checker::{Checker, Sent, Told};
use super::kinds::Room;
use super::links::Links;
use super::report::RunReport;
use super::schedule::{self, Schedule, Strike};
use super::seat::Seat;
use crate::actors::{self, End, Fate, Guest, Publishing, Stage};
use crate::cli::Mode;
use crate::interrupt::Interrupt;
use crate::lines::Lines;
use crate::outputs;
use crate::testbed::BufferDir;
use crate::verify::{Prints, Reading};

/// Streams of a session at most.
const STREAMS: u32 = 3;
/// How long readers stay: longer than any run.
const READERS_STAY: Duration = Duration::from_secs(600);
/// Parts of a publisher's error when it failed after it had connected, and when a broker refused it.
const HAD_CONNECTED: &str = "were acknowledged before that";
const REFUSES: &str = "refused the stream";
const CONNECT_ANEW: &str = "connect anew";
/// Publishers that come again in one run, at most: more than there is time for while faults last.
const MANY: u64 = 200;

/// How a publisher may fare that asks for a new topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// It is served, at once or a little later.
    Accepted,
    /// Or it is refused with these words.
    MayBeRefused(&'static str),
}

/// A publisher at work.
struct Player {
    publishing: Publishing,
    /// In `sent`.
    index: usize,
    topic: String,
    plan: schedule::Publisher,
    /// Only asks for a topic.
    probe: Option<Probe>,
    /// It has been short of memory.
    may_die: bool,
}

/// A fault run in progress.
pub struct Trial<'a> {
    pub links: Links<'a>,
    pub broker: Seat<'a>,
    pub rng: Rng,
    pub interrupt: &'a Interrupt,
    /// Seconds since the host was started, which no clock goes behind.
    pub uptime: i64,
    stage: Stage<'a>,
    schedule: &'a Schedule,
    players: Vec<Player>,
    /// What everybody sent, by topic.
    sent: BTreeMap<String, Vec<Sent>>,
    publishers: u64,
    readers: u64,
    /// A registered reader, and one that is not.
    guests: [Option<Guest>; 2],
    along: Option<Reading>,
    /// Where readers print lines.
    printed: Vec<PathBuf>,
    /// The broker has been short of memory.
    broker_may_die: bool,
    /// There should be a broker, whose clock is so many seconds ahead, but it did not start.
    broker_due: Option<i64>,
    counts: BTreeMap<String, u64>,
    report: RunReport,
}

impl<'a> Trial<'a> {
    /// Everything that the schedule needs, with nothing sent yet.
    pub fn prepare(
        stage: Stage<'a>,
        buffers: &'a BufferDir,
        schedule: &'a Schedule,
        interrupt: &'a Interrupt,
    ) -> Result<Self> {
        let mut rng = Rng::with_seed(schedule.seed);
        let links = Links::open(stage.net, rng.u64(..u64::MAX / 2))?;
        let room = schedule.kind.room;
        let broker = Seat::take(stage, buffers, schedule.path, room, interrupt)?;
        let mut trial = Self {
            links,
            broker,
            rng,
            interrupt,
            uptime: uptime()?,
            stage,
            schedule,
            players: Vec::new(),
            sent: BTreeMap::new(),
            publishers: 0,
            readers: 0,
            guests: [None, None],
            along: None,
            printed: Vec::new(),
            broker_may_die: false,
            broker_due: None,
            counts: BTreeMap::new(),
            report: RunReport::of(schedule),
        };
        if room == Room::Small {
            let log = trial.broker.log(stage.topic);
            let (program, said) = (&stage.binaries.subscriber, stage.folder.join("along.log"));
            let namespace = stage.net.broker(0);
            let along =
                Reading::along(program, namespace, &log, &said, Prints::Lines(0), interrupt);
            trial.along = Some(along?);
            trial.printed.push(said.with_extension("json"));
            for registered in [true, false] {
                trial.reader_comes(registered)?;
            }
        }
        Ok(trial)
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Result<RunReport> {
        let started = Instant::now();
        let silence = self.schedule.silence;
        if silence.is_some_and(|[from, _]| from == Duration::ZERO) {
            self.links.silence(true)?;
        }
        for plan in &self.schedule.publishers {
            self.publisher_comes(self.stage.topic, *plan, None)?;
        }
        let mut to_do = self.events();
        while !(to_do.is_empty() && self.players.is_empty() && self.broker_due.is_none()) {
            while let Some((_, event)) = to_do.first().filter(|(at, _)| started.elapsed() >= *at) {
                match *event {
                    Event::Begin(strike) => (strike.kind.begin)(&mut self, strike.lasts)?,
                    Event::End(strike) => (strike.kind.end)(&mut self)?,
                    Event::Silence(silent) => self.links.silence(silent)?,
                }
                to_do.remove(0);
            }
            self.turn()?;
        }
        self.report.seconds = started.elapsed().as_secs_f64();
        self.wind_up()
    }

    fn events(&self) -> Vec<(Duration, Event)> {
        let strikes = self.schedule.strikes.iter().flat_map(|strike| {
            let end = strike.at + strike.lasts;
            [
                (strike.at, Event::Begin(*strike)),
                (end, Event::End(*strike)),
            ]
        });
        let silence = self
            .schedule
            .silence
            .into_iter()
            .flat_map(|[from, to]| [(from, Event::Silence(true)), (to, Event::Silence(false))]);
        let mut events: Vec<_> = strikes.chain(silence).collect();
        events.sort_by_key(|(at, _)| *at);
        events
    }

    /// One turn of the loop: sees who is to wake up, and who has ended.
    fn turn(&mut self) -> Result<()> {
        if let Some(why) = self.broker.bury()? {
            self.count("brokers_died");
            if !self.broker_may_die {
                self.problem(format!("the broker died: {why}"));
            }
            self.broker_due = Some(0);
        }
        if let Some(ahead) = self.broker_due {
            self.broker_comes(ahead)?;
        }
        for guest in self.guests.iter_mut().flatten() {
            guest.strike();
        }
        let mut at = 0;
        while at < self.players.len() {
            self.players[at].publishing.strike();
            match self.players[at].publishing.is_over()? {
                true => self.publisher_ends(at)?,
                false => at += 1,
            }
        }
        Ok(self.interrupt.pause()?)
    }

    fn publisher_comes(
        &mut self,
        topic: &str,
        plan: schedule::Publisher,
        probe: Option<Probe>,
    ) -> Result<()> {
        self.publishers += 1;
        let name = format!("p{}", self.publishers);
        let path = self.stage.folder.join(&name);
        let lines = Lines::write(path, &name, plan.bytes as usize, &mut self.rng)?;
        let script = actors::Publisher {
            broker: 0,
            mode: self.schedule.mode(),
            streams: plan.streams,
            rate: plan.rate,
            batch: plan.batch,
            fate: Fate::Ends,
        };
        let stage = Stage {
            topic,
            ..self.stage
        };
        let publishing = Publishing::start(self.publishers, script, &lines, stage)?;
        let of_topic = self.sent.entry(topic.to_owned()).or_default();
        self.players.push(Player {
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
            told: Told::Nothing,
            streams: plan.streams,
        });
        Ok(())
    }

    fn publisher_ends(&mut self, at: usize) -> Result<()> {
        let player = self.players.swap_remove(at);
        let (plan, topic) = (player.plan, player.topic);
        let sent = &mut self.sent.get_mut(&topic).expect("it has sent to it")[player.index];
        match player.publishing.end(self.interrupt)? {
            End::Well(report) => {
                sent.told = Told::Acked(report.messages_acked as usize);
                if report.messages_acked != sent.lines.count() as u64 {
                    let (acked, lines) = (report.messages_acked, sent.lines.count());
                    self.problem(format!(
                        "a publisher ended well with {acked} of {lines} acked"
                    ));
                }
                self.publisher_ended_well(&report, player.probe.is_some());
                Ok(())
            }
            End::Killed => {
                self.count("publishers_killed");
                let bytes = plan.bytes / 2;
                self.publisher_comes(&topic, schedule::Publisher { bytes, ..plan }, player.probe)
            }
            End::Badly(why) => match player.probe {
                Some(Probe::MayBeRefused(words)) if why.contains(words) => {
                    self.count("topics_refused");
                    Ok(())
                }
                probe if self.is_turned_away(&why) => {
                    self.count("turned_away");
                    self.publisher_comes(&topic, plan, probe)
                }
                _ if player.may_die => {
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

    /// Whether a publisher failed before it had begun, for the broker was not there, or not for long
    /// enough: it has to come again. What a broker refuses is another matter, unless it is to go on
    /// with what an earlier broker began.
    fn is_turned_away(&self, why: &str) -> bool {
        let often = self
            .counts
            .get("turned_away")
            .is_some_and(|times| *times >= MANY);
        let refused = why.contains(REFUSES) && !why.contains(CONNECT_ANEW);
        !often && !why.contains(HAD_CONNECTED) && !refused
    }

    fn publisher_ended_well(&mut self, report: &outputs::Publisher, probe: bool) {
        self.report.lines_acked += report.messages_acked;
        for stream in report.brokers.iter().flat_map(|session| &session.streams) {
            *self.report.streams.entry(stream.path.clone()).or_default() += 1;
            self.report.moves += stream.moves;
            if self.schedule.mode() == Mode::Auto && stream.path == "tcp" && !probe {
                self.count("fell_back");
            }
        }
    }

    fn reader_comes(&mut self, registered: bool) -> Result<()> {
        self.readers += 1;
        let script = actors::Reader {
            broker: 0,
            registered,
            from_start: false,
            stays: READERS_STAY,
            fate: Fate::Ends,
        };
        let log = self.broker.log(self.stage.topic);
        let guest = Guest::start(self.readers, script, &log, self.stage)?;
        self.guests[usize::from(!registered)] = Some(guest);
        Ok(())
    }

    fn reader_leaves(&mut self, guest: Guest) -> Result<()> {
        match guest.end(self.interrupt)? {
            End::Well(read) => self.add("batches_overrun", read.lost_batches),
            End::Killed => self.count("readers_killed"),
            End::Badly(why) => self.problem(why),
        }
        Ok(())
    }

    /// Everybody has ended: the logs are compared.
    fn wind_up(mut self) -> Result<RunReport> {
        for guest in std::mem::take(&mut self.guests).into_iter().flatten() {
            self.reader_leaves(guest)?;
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
        let untold = sent.iter().all(|sent| sent.told == Told::Nothing);
        if untold && !log.exists() {
            return Ok(());
        }
        let mut checker = Checker::new(sent);
        match self.along.take() {
            Some(along) => self.read(&mut checker, 0, along)?,
            None => {
                for number in 0..STREAMS {
                    let said = self.stage.folder.join(format!("read-{topic}-{number}.log"));
                    let program = &self.stage.binaries.subscriber;
                    let namespace = self.stage.net.broker(0);
                    let prints = Prints::Lines(number);
                    self.printed.push(said.with_extension("json"));
                    let reading = Reading::of(program, namespace, &log, &said, prints)?;
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
        // Seldom worth the room; with a seed they can be had again.
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

/// What happens at a moment.
#[derive(Debug, Clone, Copy)]
enum Event {
    Begin(Strike),
    End(Strike),
    Silence(bool),
}

fn uptime() -> Result<i64> {
    let text = fs::read_to_string("/proc/uptime").context("cannot read /proc/uptime")?;
    let seconds = text.split('.').next().and_then(|text| text.parse().ok());
    seconds.context("/proc/uptime is not what it should be")
}
