//! `penstock-lab experiment diagnose`: what a diagnosis costs a broker.
//!
//! One publisher sends all the time, and intervals with and without a diagnosis alternate within that one
//! run: two runs of a busy machine differ by more than the cost in question.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use tracing::info;

use super::flags::Observer;
use super::outcome::finish;
use super::trial::ENDLESS;
use crate::measure::environment::Environment;
use crate::report::model::{ObserverExperiment, ObserverPair};
use crate::report::result_folder;
use crate::report::text;
use penstock_diagnose::broker_stats::{self, BrokerSnapshot};
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::{Brokers, Cluster};
use penstock_testbed::netns::Net;
use penstock_testbed::programs::Binaries;
use penstock_testbed::publish::Publish;
use penstock_testbed::running::{Running, output_of};

/// Until payload flows; longer than any handshake on a busy machine.
const FLOW_LIMIT: Duration = Duration::from_secs(20);
/// Windows open and rings are touched before anything is measured.
const SETTLE: Duration = Duration::from_secs(1);

/// Runs it.
pub fn run(options: &Observer, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = result_folder::create_folder(&options.output.results, started)?;
    let measured = measure(options, &binaries, &folder, started, interrupt);
    finish(
        &options.output,
        &folder,
        measured,
        text::observer,
        text::observer_summary,
    )
}

fn measure(
    options: &Observer,
    binaries: &Binaries,
    folder: &Path,
    started: Timestamp,
    interrupt: &Interrupt,
) -> Result<ObserverExperiment> {
    let net = Net::create(1, options.profile, options.mtu)?;
    let environment = Environment::read(Some(net.broker(0)), started)?;
    let buffers = BufferDir::create()?;
    let brokers = Brokers {
        count: 1,
        net: &net,
        buffers: &buffers,
        binaries,
        route: &options.route,
        workload: &options.workload,
        cpus: None,
        folder,
    };
    let cluster = brokers.start(interrupt)?;
    let publish = Publish {
        program: &binaries.publisher,
        namespace: Some(net.publisher()),
        cpus: None,
        brokers: cluster.addresses(),
        mode: options.route.mode,
        tx: options.route.tx.as_deref(),
        workload: &options.workload,
        source: &ENDLESS,
        rate: None,
        digest: false,
        folder,
    };
    let publisher = publish.start(&folder.join("publisher.json"))?;
    let mut bench = Bench::new(options, cluster, publisher, folder, interrupt)?;
    let pairs = bench.pairs()?;
    drop(bench.publisher);
    bench.cluster.stop()?;
    Ok(ObserverExperiment::of(
        folder,
        options.route.mode,
        options.profile,
        options.mtu,
        pairs,
        environment,
    ))
}

/// A broker under load, and how far it is.
struct Bench<'a> {
    options: &'a Observer,
    cluster: Cluster,
    publisher: Running,
    pid: u32,
    figures: PathBuf,
    folder: &'a Path,
    interrupt: &'a Interrupt,
}

impl<'a> Bench<'a> {
    fn new(
        options: &'a Observer,
        cluster: Cluster,
        publisher: Running,
        folder: &'a Path,
        interrupt: &'a Interrupt,
    ) -> Result<Self> {
        let pid = cluster.pids()[0];
        let figures =
            broker_stats::socket_path(pid).context("the broker has no socket for figures")?;
        let mut bench = Self {
            options,
            cluster,
            publisher,
            pid,
            figures,
            folder,
            interrupt,
        };
        let deadline = Instant::now() + FLOW_LIMIT;
        while bench.payload()? == 0 {
            ensure!(
                Instant::now() < deadline,
                "no payload after {FLOW_LIMIT:?}; see publisher.log and broker-0.log in {}",
                folder.display()
            );
            bench.wait(Duration::ZERO)?;
        }
        bench.wait(SETTLE)?;
        Ok(bench)
    }

    /// Payload bytes committed so far.
    fn payload(&self) -> Result<u64> {
        Ok(BrokerSnapshot::query(&self.figures)?.payload_bytes())
    }

    fn wait(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            self.interrupt.pause()?;
            self.cluster.check()?;
            if let Some(status) = self.publisher.ended()? {
                return Err(self.publisher.failure(&format!("ended ({status})")));
            }
            if Instant::now() >= end {
                return Ok(());
            }
        }
    }

    /// First and second place take turns, so that neither has the better part of a drift.
    fn pairs(&mut self) -> Result<Vec<ObserverPair>> {
        let mut pairs = Vec::new();
        for number in 1..=self.options.pairs {
            let (mut alone, mut observed, mut observer) = (0.0, 0.0, 0.0);
            for with in [number % 2 == 0, number % 2 != 0] {
                if with {
                    (observed, observer) = self.observed(number)?;
                } else {
                    alone = self.alone()?;
                }
            }
            info!(
                "pair {number}/{}: {alone:.0} MB/s alone, {observed:.0} observed",
                self.options.pairs
            );
            pairs.push(ObserverPair {
                alone_mb_per_s: alone,
                observed_mb_per_s: observed,
                observer_cores: observer,
            });
        }
        Ok(pairs)
    }

    fn alone(&mut self) -> Result<f64> {
        let (began, before) = (Instant::now(), self.payload()?);
        self.wait(Duration::from_secs_f64(self.options.seconds))?;
        rate(before, self.payload()?, began.elapsed())
    }

    /// The rate while a diagnosis lasts, its start and its summing up included, and the cores that it used.
    fn observed(&mut self, number: u32) -> Result<(f64, f64)> {
        let program = std::env::current_exe().context("cannot tell where this program is")?;
        let mut command = Command::new(program);
        command.args([
            "diagnose",
            "--format",
            "json",
            "--pid",
            &self.pid.to_string(),
        ]);
        command.args(["--duration", &self.options.seconds.to_string()]);
        let log = self.folder.join(format!("diagnosis-{number}.log"));
        let (began, before, used) = (Instant::now(), self.payload()?, children_seconds()?);
        output_of("the diagnosis", &mut command, &log, self.interrupt)?;
        let (seconds, after) = (began.elapsed(), self.payload()?);
        let cores = (children_seconds()? - used) / seconds.as_secs_f64();
        Ok((rate(before, after, seconds)?, cores))
    }
}

/// CPU time of the children that have ended, seconds.
fn children_seconds() -> Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)
        .context("cannot read the CPU time of children")?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 * 1e-6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

fn rate(before: u64, after: u64, time: Duration) -> Result<f64> {
    ensure!(after > before, "nothing was committed for {time:?}");
    Ok((after - before) as f64 * 1e-6 / time.as_secs_f64())
}
