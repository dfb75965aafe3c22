//! `penstock-lab soak`: publishers and readers come and go over impaired links, some are stopped or killed,
//! and brokers must lose no message and leak no resource.

mod fault_rotation;
pub mod flags;
mod ledger;
mod report;
mod script;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use bytesize::ByteSize;
use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use penstock_process::progress;

use crate::measure::resource_usage::{ResourceUsage, UsageHistory};
use crate::report::result_folder;
use fault_rotation::FaultRotation;
use ledger::Ledger;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::{Brokers, Cluster};
use penstock_testbed::lines::Lines;
use penstock_testbed::netns::Net;
use penstock_testbed::processes::{Outcome, ProcessFault, Publishing, ReaderRun, RunContext};
use penstock_testbed::program_reports::Subscriber;
use penstock_testbed::programs::Binaries;
use penstock_testbed::random::seconds_between;
use penstock_testbed::settings::{self, Mode};
use penstock_testbed::verify::{ReaderOutput, Reading};
use report::Counts;
pub use report::{Report, SOAK};

/// Brokers, each on a link of its own.
const BROKERS: usize = 2;
const MTU: u32 = 1500;
const TOPIC: &str = "soak";
/// Bytes sent by each publisher.
const LINES: usize = 8 << 20;
/// Ring of each broker, bytes: small, so that lagging readers matter.
const RING: u64 = 32 << 20;
/// Maximum number at any time.
const PUBLISHERS: usize = 4;
const READERS: usize = 3;
/// Interval between samples of resource usage.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Time limit for descriptors to be closed after the last connection has ended.
const CLOSE_LIMIT: Duration = Duration::from_secs(15);

/// Runs the command; true when it found no problem.
pub fn run(options: &flags::Soak, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    let seed = options.seed.unwrap_or(started.as_nanosecond() as u64);
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = result_folder::create_folder(&options.output.results, started)?;
    let outcome = soak(options, seed, &binaries, &folder, interrupt);
    let printed = outcome.and_then(|report| {
        result_folder::write(&folder, &report, &report.markdown())?;
        result_folder::print(options.output.format, &report, || report.summary())?;
        Ok(report.problems.is_empty())
    });
    result_folder::print_path(&folder, printed)
}

fn soak(
    options: &flags::Soak,
    seed: u64,
    binaries: &Binaries,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<Report> {
    let mut rng = Rng::with_seed(seed);
    let lines = Lines::write(folder.join("lines"), "line", LINES, &mut rng)?;
    let net = Net::create_with_emulation(BROKERS, MTU, &fault_rotation::link_emulation())?;
    let mut fault_rotation = FaultRotation::new();
    fault_rotation.change(&net, BROKERS, &mut rng)?;
    let buffers = BufferDir::create()?;
    let (route, workload) = settings::for_faulty_links(Mode::Xdp, TOPIC, ByteSize(RING));
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
    let context = RunContext {
        net: &net,
        binaries,
        topic: TOPIC,
        folder,
    };
    let mut soak = Soak::new(context, &lines, cluster, fault_rotation, rng, interrupt)?;
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    soak.run_for(length)?;
    soak.drain()?;
    soak.evaluate(seed, length)
}

/// A run in progress.
struct Soak<'a> {
    context: RunContext<'a>,
    lines: &'a Lines,
    cluster: Cluster,
    fault_rotation: FaultRotation,
    rng: Rng,
    interrupt: &'a Interrupt,
    logs: Vec<PathBuf>,
    /// One reader per broker that reads its log from beginning to end.
    readings: Vec<Reading>,
    publishers: Vec<Publishing>,
    readers: Vec<ReaderRun>,
    ledgers: Vec<Ledger>,
    usage: Vec<UsageHistory>,
    /// Descriptors of each broker before the first publisher and after the last.
    idle: Vec<[u64; 2]>,
    counts: Counts,
    problems: Vec<String>,
}

impl<'a> Soak<'a> {
    fn new(
        context: RunContext<'a>,
        lines: &'a Lines,
        cluster: Cluster,
        fault_rotation: FaultRotation,
        rng: Rng,
        interrupt: &'a Interrupt,
    ) -> Result<Self> {
        let paths = cluster.log_paths().into_iter().map(Path::to_owned);
        let logs: Vec<PathBuf> = paths.collect();
        let program = &context.binaries.subscriber;
        let readings = logs.iter().enumerate().map(|(broker, path)| {
            let log = context.folder.join(format!("verifier-{broker}.log"));
            let namespace = context.net.broker(broker);
            Reading::follow(
                program,
                namespace,
                path,
                &log,
                ReaderOutput::Sums,
                interrupt,
            )
        });
        let readings = readings.collect::<Result<Vec<_>>>()?;
        let idle = descriptors(&cluster)?;
        Ok(Self {
            context,
            lines,
            cluster,
            fault_rotation,
            rng,
            interrupt,
            logs,
            readings,
            publishers: Vec::new(),
            readers: Vec::new(),
            ledgers: (0..BROKERS).map(|_| Ledger::default()).collect(),
            usage: (0..BROKERS).map(|_| UsageHistory::default()).collect(),
            idle: idle.into_iter().map(|count| [count, count]).collect(),
            counts: Counts::default(),
            problems: Vec::new(),
        })
    }

    fn run_for(&mut self, length: Duration) -> Result<()> {
        let bar = bar_over(length);
        let start = Instant::now();
        let mut next_start = start;
        let mut next_sample = start;
        let mut next_rotation = start + seconds_between(&mut self.rng, 5.0, 15.0);
        while start.elapsed() < length {
            let now = Instant::now();
            if now >= next_start {
                self.start_processes()?;
                next_start = now + seconds_between(&mut self.rng, 0.1, 1.0);
            }
            if now >= next_rotation {
                self.fault_rotation
                    .change(self.context.net, BROKERS, &mut self.rng)?;
                next_rotation = now + seconds_between(&mut self.rng, 5.0, 15.0);
            }
            if now >= next_sample {
                self.sample_usage()?;
                next_sample = now + SAMPLE_INTERVAL;
                bar.set_position(start.elapsed().as_secs());
                bar.set_message(self.counts.line());
            }
            self.step()?;
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn start_processes(&mut self) -> Result<()> {
        if self.publishers.len() < PUBLISHERS {
            let script = script::publisher(&mut self.rng, BROKERS);
            self.counts.publishers += 1;
            let number = self.counts.publishers;
            let publishing = Publishing::start(number, script, self.lines, self.context)?;
            self.publishers.push(publishing);
        }
        if self.readers.len() < READERS {
            let script = script::reader(&mut self.rng, BROKERS);
            self.counts.readers += 1;
            let log = &self.logs[script.broker];
            let reader = ReaderRun::start(self.counts.readers, script, log, self.context)?;
            self.readers.push(reader);
        }
        Ok(())
    }

    /// One iteration: applies faults that are due, and handles processes that exited.
    fn step(&mut self) -> Result<()> {
        self.cluster.check()?;
        for fault_applied in self
            .publishers
            .iter_mut()
            .filter_map(Publishing::apply_due_fault)
        {
            self.counts.count_publisher_fault(fault_applied);
        }
        for fault_applied in self
            .readers
            .iter_mut()
            .filter_map(ReaderRun::apply_due_fault)
        {
            self.counts.count_reader_fault(fault_applied);
        }
        let mut at = 0;
        while at < self.publishers.len() {
            match self.publishers[at].is_finished()? {
                true => self.publisher_ended(at)?,
                false => at += 1,
            }
        }
        let mut at = 0;
        while at < self.readers.len() {
            match self.readers[at].is_finished()? {
                true => self.reader_ended(at)?,
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
            Outcome::Success(report) => {
                self.counts.publisher_finished(&report);
                ledger.finished(report);
            }
            Outcome::Killed => ledger.killed(),
            Outcome::Failed(why) => {
                ledger.killed();
                self.problems.push(format!("{script:?}: {why}"));
            }
        }
        Ok(())
    }

    fn reader_ended(&mut self, at: usize) -> Result<()> {
        match self.readers.swap_remove(at).end(self.interrupt)? {
            Outcome::Success(read) => self.counts.messages_read += read.messages,
            Outcome::Killed => {}
            Outcome::Failed(why) => self.problems.push(why),
        }
        Ok(())
    }

    fn sample_usage(&mut self) -> Result<()> {
        for (pid, usage) in self.cluster.pids().into_iter().zip(&mut self.usage) {
            usage.add(ResourceUsage::at(pid)?);
        }
        Ok(())
    }

    /// Starts no further process, and waits until the running ones have ended.
    fn drain(&mut self) -> Result<()> {
        self.publishers
            .iter_mut()
            .for_each(Publishing::stop_injecting);
        while !(self.publishers.is_empty() && self.readers.is_empty()) {
            self.step()?;
        }
        let start = Instant::now();
        loop {
            self.sample_usage()?;
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
    fn evaluate(mut self, seed: u64, length: Duration) -> Result<Report> {
        self.fault_rotation.end()?;
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
            weather_changes: self.fault_rotation.changes(),
            faults: self.fault_rotation.counts().clone(),
            brokers: Vec::new(),
            problems: self.problems,
        };
        for ((audit, usage), idle) in audits.zip(&self.usage).zip(self.idle) {
            report.add_broker(audit, usage, idle);
        }
        Ok(report)
    }
}

fn descriptors(cluster: &Cluster) -> Result<Vec<u64>> {
    let samples = cluster.pids().into_iter().map(ResourceUsage::at);
    samples.map(|sample| Ok(sample?.descriptors)).collect()
}

fn bar_over(length: Duration) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {elapsed} of {len}s, {msg}");
    let target = progress::target();
    ProgressBar::with_draw_target(Some(length.as_secs()), target)
        .with_style(style.expect("the template is valid"))
}

impl Counts {
    fn count_publisher_fault(&mut self, fault: ProcessFault) {
        match fault {
            ProcessFault::Killed(_) => self.publishers_killed += 1,
            _ => self.publishers_stopped += 1,
        }
    }

    fn count_reader_fault(&mut self, fault: ProcessFault) {
        match fault {
            ProcessFault::Killed(_) => self.readers_killed += 1,
            _ => self.readers_stopped += 1,
        }
    }
}
