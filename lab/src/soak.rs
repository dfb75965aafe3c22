//! `penstock-lab soak`: publishers and readers come and go over bad links, some are stopped or killed,
//! and brokers must lose nothing and hold on to nothing.

mod ledger;
mod report;
mod script;
mod weather;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use bytesize::ByteSize;
use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use penstock_process::progress;

use crate::actors::{self, End, Fate, Guest, Publishing, Stage};
use crate::chance::seconds;
use crate::cli::{self, Mode};
use crate::cluster::{Brokers, Cluster};
use crate::interrupt::Interrupt;
use crate::lines::Lines;
use crate::netns::Net;
use crate::outputs::Subscriber;
use crate::results;
use crate::testbed::{Binaries, BufferDir};
use crate::verify::{Prints, Reading};
use crate::vitals::{Look, Vitals};
use ledger::Ledger;
use report::Counts;
pub use report::{Report, SOAK};
use weather::Weather;

/// Brokers, each on a link of its own.
const BROKERS: usize = 2;
const MTU: u32 = 1500;
const TOPIC: &str = "soak";
/// What every publisher sends, bytes.
const LINES: usize = 8 << 20;
/// Of each broker: small, so that readers matter.
const RING: u64 = 32 << 20;
/// At any time at most.
const PUBLISHERS: usize = 4;
const READERS: usize = 3;
/// How often processes are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// For descriptors to be closed after the last connection has ended.
const CLOSE_LIMIT: Duration = Duration::from_secs(15);

/// Runs it; true when nothing was wrong.
pub fn run(options: &cli::Soak, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    let seed = options.seed.unwrap_or(started.as_nanosecond() as u64);
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = results::create_folder(&options.output.results, started)?;
    let outcome = soak(options, seed, &binaries, &folder, interrupt);
    let printed = outcome.and_then(|report| {
        results::write(&folder, &report, &report.markdown())?;
        results::print(options.output.format, &report, || report.summary())?;
        Ok(report.problems.is_empty())
    });
    results::told(&folder, printed)
}

fn soak(
    options: &cli::Soak,
    seed: u64,
    binaries: &Binaries,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<Report> {
    let mut rng = Rng::with_seed(seed);
    let lines = Lines::write(folder.join("lines"), "line", LINES, &mut rng)?;
    let net = Net::create_with_middle(BROKERS, MTU, &weather::middle())?;
    let mut weather = Weather::new();
    weather.change(&net, BROKERS, &mut rng)?;
    let buffers = BufferDir::create()?;
    let (route, workload) = cli::of_brokers(Mode::Xdp, TOPIC, ByteSize(RING));
    let brokers = Brokers {
        count: BROKERS,
        net: &net,
        buffers: &buffers,
        binaries,
        route: &route,
        workload: &workload,
        cpus: None,
        folder,
    };
    let cluster = brokers.start(interrupt)?;
    let stage = Stage {
        net: &net,
        binaries,
        topic: TOPIC,
        folder,
    };
    let mut soak = Soak::new(stage, &lines, cluster, weather, rng, interrupt)?;
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    soak.go_on_for(length)?;
    soak.wind_down()?;
    soak.judge(seed, length)
}

/// A run in progress.
struct Soak<'a> {
    stage: Stage<'a>,
    lines: &'a Lines,
    cluster: Cluster,
    weather: Weather,
    rng: Rng,
    interrupt: &'a Interrupt,
    logs: Vec<PathBuf>,
    /// One for each broker, from its beginning to its end.
    readings: Vec<Reading>,
    publishers: Vec<Publishing>,
    guests: Vec<Guest>,
    ledgers: Vec<Ledger>,
    vitals: Vec<Vitals>,
    /// Descriptors of each broker before the first publisher and after the last.
    idle: Vec<[u64; 2]>,
    counts: Counts,
    problems: Vec<String>,
}

impl<'a> Soak<'a> {
    fn new(
        stage: Stage<'a>,
        lines: &'a Lines,
        cluster: Cluster,
        weather: Weather,
        rng: Rng,
        interrupt: &'a Interrupt,
    ) -> Result<Self> {
        let paths = cluster.log_paths().into_iter().map(Path::to_owned);
        let logs: Vec<PathBuf> = paths.collect();
        let program = &stage.binaries.subscriber;
        let readings = logs.iter().enumerate().map(|(broker, path)| {
            let log = stage.folder.join(format!("verifier-{broker}.log"));
            let namespace = stage.net.broker(broker);
            Reading::along(program, namespace, path, &log, Prints::Sums, interrupt)
        });
        let readings = readings.collect::<Result<Vec<_>>>()?;
        let idle = descriptors(&cluster)?;
        Ok(Self {
            stage,
            lines,
            cluster,
            weather,
            rng,
            interrupt,
            logs,
            readings,
            publishers: Vec::new(),
            guests: Vec::new(),
            ledgers: (0..BROKERS).map(|_| Ledger::default()).collect(),
            vitals: (0..BROKERS).map(|_| Vitals::default()).collect(),
            idle: idle.into_iter().map(|count| [count, count]).collect(),
            counts: Counts::default(),
            problems: Vec::new(),
        })
    }

    fn go_on_for(&mut self, length: Duration) -> Result<()> {
        let bar = bar_over(length);
        let start = Instant::now();
        let mut joins = start;
        let mut looks = start;
        let mut clears = start + seconds(&mut self.rng, 5.0, 15.0);
        while start.elapsed() < length {
            let now = Instant::now();
            if now >= joins {
                self.somebody_joins()?;
                joins = now + seconds(&mut self.rng, 0.1, 1.0);
            }
            if now >= clears {
                self.weather
                    .change(self.stage.net, BROKERS, &mut self.rng)?;
                clears = now + seconds(&mut self.rng, 5.0, 15.0);
            }
            if now >= looks {
                self.look()?;
                looks = now + LOOK_EVERY;
                bar.set_position(start.elapsed().as_secs());
                bar.set_message(self.counts.line());
            }
            self.turn()?;
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn somebody_joins(&mut self) -> Result<()> {
        if self.publishers.len() < PUBLISHERS {
            let script = actors::Publisher::draw(&mut self.rng, BROKERS);
            self.counts.publishers += 1;
            let number = self.counts.publishers;
            let publishing = Publishing::start(number, script, self.lines, self.stage)?;
            self.publishers.push(publishing);
        }
        if self.guests.len() < READERS {
            let script = actors::Reader::draw(&mut self.rng, BROKERS);
            self.counts.readers += 1;
            let log = &self.logs[script.broker];
            let guest = Guest::start(self.counts.readers, script, log, self.stage)?;
            self.guests.push(guest);
        }
        Ok(())
    }

    /// One turn of the loop: strikes, and sees who has ended.
    fn turn(&mut self) -> Result<()> {
        self.cluster.check()?;
        for struck in self.publishers.iter_mut().filter_map(Publishing::strike) {
            self.counts.publisher_struck(struck);
        }
        for struck in self.guests.iter_mut().filter_map(Guest::strike) {
            self.counts.reader_struck(struck);
        }
        let mut at = 0;
        while at < self.publishers.len() {
            match self.publishers[at].is_over()? {
                true => self.publisher_ended(at)?,
                false => at += 1,
            }
        }
        let mut at = 0;
        while at < self.guests.len() {
            match self.guests[at].is_over()? {
                true => self.guest_ended(at)?,
                false => at += 1,
            }
        }
        Ok(self.interrupt.pause()?)
    }

    fn publisher_ended(&mut self, at: usize) -> Result<()> {
        let publishing = self.publishers.swap_remove(at);
        let script = publishing.script;
        let ledger = &mut self.ledgers[script.broker];
        match publishing.end(self.interrupt)? {
            End::Well(report) => {
                self.counts.publisher_finished(&report);
                ledger.finished(report);
            }
            End::Killed => ledger.killed(),
            End::Badly(why) => {
                ledger.killed();
                self.problems.push(format!("{script:?}: {why}"));
            }
        }
        Ok(())
    }

    fn guest_ended(&mut self, at: usize) -> Result<()> {
        match self.guests.swap_remove(at).end(self.interrupt)? {
            End::Well(read) => self.counts.messages_read += read.messages,
            End::Killed => {}
            End::Badly(why) => self.problems.push(why),
        }
        Ok(())
    }

    fn look(&mut self) -> Result<()> {
        for (pid, vitals) in self.cluster.pids().into_iter().zip(&mut self.vitals) {
            vitals.add(Look::at(pid)?);
        }
        Ok(())
    }

    /// Nobody joins any more; those that are there come to their end.
    fn wind_down(&mut self) -> Result<()> {
        self.publishers.iter_mut().for_each(Publishing::spare);
        while !(self.publishers.is_empty() && self.guests.is_empty()) {
            self.turn()?;
        }
        let start = Instant::now();
        loop {
            self.look()?;
            for (idle, now) in self.idle.iter_mut().zip(descriptors(&self.cluster)?) {
                idle[1] = now;
            }
            let closed = self.idle.iter().all(|[before, after]| before == after);
            if closed || start.elapsed() > CLOSE_LIMIT {
                return Ok(());
            }
            self.interrupt.pause()?;
        }
    }

    /// Stops the brokers and compares everything.
    fn judge(mut self, seed: u64, length: Duration) -> Result<Report> {
        self.weather.end()?;
        let brokers = self.cluster.stop()?;
        let readings = self.readings.into_iter();
        let read: Vec<Subscriber> = readings
            .map(|reading| reading.finish(self.interrupt))
            .collect::<Result<_>>()?;
        let members = self.ledgers.iter().zip(&brokers).zip(&read);
        let audits = members.map(|((ledger, broker), read)| ledger.audit(read, broker, self.lines));
        let mut report = Report {
            kind: SOAK.to_owned(),
            seed,
            seconds: length.as_secs_f64(),
            counts: self.counts,
            weather_changes: self.weather.changes(),
            faults: self.weather.counts().clone(),
            brokers: Vec::new(),
            problems: self.problems,
        };
        for ((audit, vitals), idle) in audits.zip(&self.vitals).zip(self.idle) {
            report.add_broker(audit, vitals, idle);
        }
        Ok(report)
    }
}

fn descriptors(cluster: &Cluster) -> Result<Vec<u64>> {
    let looks = cluster.pids().into_iter().map(Look::at);
    looks.map(|look| Ok(look?.descriptors)).collect()
}

fn bar_over(length: Duration) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {elapsed} of {len}s, {msg}");
    let target = progress::target();
    ProgressBar::with_draw_target(Some(length.as_secs()), target)
        .with_style(style.expect("the template is valid"))
}

impl Counts {
    fn publisher_struck(&mut self, fate: Fate) {
        match fate {
            Fate::Killed(_) => self.publishers_killed += 1,
            _ => self.publishers_stopped += 1,
        }
    }

    fn reader_struck(&mut self, fate: Fate) {
        match fate {
            Fate::Killed(_) => self.readers_killed += 1,
            _ => self.readers_stopped += 1,
        }
    }
}
