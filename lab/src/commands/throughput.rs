//! `penstock-lab throughput`: one publisher against brokers in namespaces of their own.

mod fixes;
pub mod flags;
mod observation;
mod outcome;
mod progress;
mod setup;
mod timeline;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use tracing::{info, warn};

use crate::commands::limits::{self, Effort, Link};
use crate::measure::environment::Environment;
use crate::measure::host_load::HostWatch;
use crate::report::html;
use crate::report::model::{Diagnosed, Rerun, Throughput, Timeline};
use crate::report::result_folder;
use crate::report::text;
use fixes::Fix;
use observation::{Observation, Observed};
use outcome::Outcome;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::{Brokers, Cluster};
use penstock_testbed::faults::FaultPlan;
use penstock_testbed::link_emulation::{Forwarders, Plan};
use penstock_testbed::netns::Net;
use penstock_testbed::program_reports;
use penstock_testbed::programs::Binaries;
use penstock_testbed::publish::{Publish, Source};
use penstock_testbed::running::Running;
use penstock_testbed::settings::Workload;
use penstock_testbed::verify::{self, ReaderOutput, Reading};
use progress::Progress;
use setup::Verification;
use timeline::Sampler;

/// The second run's folder, inside that of the first.
const AFTER_FIX: &str = "after-fix";

/// With `--limits`.
const LIMITS: Effort = Effort {
    runs: 3,
    seconds: 1,
};

/// Everything that a run needs to know.
struct Run<'a> {
    options: &'a flags::Throughput,
    workload: &'a Workload,
    verification: Verification,
    source: &'a Source,
    binaries: &'a Binaries,
    folder: &'a Path,
    interrupt: &'a Interrupt,
}

/// What the time of publishing brought.
struct Published {
    report: program_reports::Publisher,
    succeeded: bool,
    timeline: Timeline,
    diagnosis: Option<Diagnosed>,
    not_diagnosed: Option<String>,
}

/// Runs it; true when every message was acked and is in the logs.
pub fn run(options: &flags::Throughput, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    let source = setup::source_of(options)?;
    let (verification, workload) = setup::verification_of(options, &source)?;
    setup::check_faults(options)?;
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = result_folder::create_folder(&options.output.results, started)?;
    let run = Run {
        options,
        workload: &workload,
        verification,
        source: &source,
        binaries: &binaries,
        folder: &folder,
        interrupt,
    };
    let host = HostWatch::start()?;
    let outcome = run.report(started).and_then(|report| match options.fix {
        true => run.again_without_the_cause(report, started),
        false => Ok(report),
    });
    let printed = outcome.and_then(|mut report| {
        let load = host.finish()?;
        report.warnings = load.warnings();
        report.host_load = Some(load);
        write(&folder, &report)?;
        result_folder::print(options.output.format, &report, || {
            text::throughput_summary(&report)
        })?;
        Ok(report.problems.is_empty())
    });
    result_folder::print_path(&folder, printed)
}

/// Everything that people and programs read of a run.
fn write(folder: &Path, report: &Throughput) -> Result<()> {
    result_folder::write(folder, report, &text::throughput(report))?;
    result_folder::write_file(
        &folder.join(result_folder::PAGE),
        &html::throughput(report)?,
    )
}

impl Run<'_> {
    /// Runs once more with the cause removed that a diagnosis named first.
    fn again_without_the_cause(
        &self,
        mut report: Throughput,
        started: Timestamp,
    ) -> Result<Throughput> {
        let Some(cause) = report.diagnosis.as_ref().and_then(Diagnosed::cause) else {
            return Ok(report);
        };
        let rerun = match self.fix_of(cause) {
            Fix::None { why } => Rerun::not_made(cause, why),
            Fix::Change { what, workload } => {
                info!("once more, with {what}");
                let folder = self.folder.join(AFTER_FIX);
                fs::create_dir(&folder)
                    .with_context(|| format!("cannot create {}", folder.display()))?;
                let run = Run {
                    workload: &workload,
                    folder: &folder,
                    ..*self
                };
                let after = run.report(started)?;
                write(&folder, &after)?;
                Rerun::made(cause, what, AFTER_FIX, &report, &after)
            }
        };
        report.rerun = Some(rerun);
        Ok(report)
    }

    fn fix_of(&self, cause: &str) -> Fix {
        match self.source {
            Source::Lines(path) if path.as_os_str() == "-" => Fix::None {
                why: "standard input cannot be read a second time",
            },
            _ => fixes::of(cause, self.workload),
        }
    }

    fn report(&self, started: Timestamp) -> Result<Throughput> {
        let count = self.options.brokers as usize;
        let plan = self.plan(started);
        let (net, forwarders) = match plan.link_emulation(self.options.profile) {
            None => (
                Net::create(count, self.options.profile, self.options.mtu)?,
                None,
            ),
            Some(emulation) => {
                let net = Net::create_with_emulation(count, self.options.mtu, &emulation)?;
                let forwarders = Forwarders::start(&net, count, plan)?;
                (net, Some(forwarders))
            }
        };
        let environment = Environment::read(Some(net.publisher()), started)?;
        let outcome = self.measure(&net)?;
        let carried = forwarders.map(Forwarders::finish).transpose()?;
        let mut report = outcome::report(self.options, self.workload, outcome, environment);
        (report.faults, report.delay) = carried.unwrap_or_default();
        Ok(report)
    }

    fn plan(&self, started: Timestamp) -> Plan {
        let faults = self.options.faults.clone();
        let given = faults.as_ref().and_then(FaultPlan::seed);
        Plan {
            faults,
            delay: self.options.delay,
            seed: given.unwrap_or(started.as_nanosecond() as u64),
        }
    }

    fn measure(&self, net: &Net) -> Result<Outcome> {
        let options = self.options;
        self.interrupt.check()?;
        let link = Link {
            net,
            profile: options.profile,
            mtu: options.mtu,
        };
        let limits = options
            .limits
            .then(|| limits::of_link(link, LIMITS, self.folder, self.interrupt))
            .transpose()?;
        let brokers = Brokers {
            count: options.brokers as usize,
            net,
            buffers: &BufferDir::create()?,
            binaries: self.binaries,
            route: &setup::route_of(options),
            workload: self.workload,
            cpus: None,
            folder: self.folder,
        };
        let mut cluster = brokers.start(self.interrupt)?;
        let paths = cluster.log_paths().into_iter().map(Path::to_owned);
        let logs: Vec<PathBuf> = paths.collect();
        let mut readings = Vec::new();
        if self.verification == Verification::Along {
            readings = self.readings(net, &logs)?;
        }
        let published = self.publish(net, &mut cluster)?;
        let mut outcome = Outcome {
            publisher: published.report,
            publisher_succeeded: published.succeeded,
            timeline: published.timeline,
            diagnosis: published.diagnosis,
            not_diagnosed: published.not_diagnosed,
            brokers: cluster.stop()?,
            limits,
            verification: None,
            problems: Vec::new(),
        };
        if self.verification == Verification::Behind {
            readings = self.readings(net, &logs)?;
        }
        if self.verification != Verification::No {
            let read = readings.into_iter().map(|r| r.finish(self.interrupt));
            let read = read.collect::<Result<Vec<_>>>()?;
            let checks = verify::compare(&outcome.publisher, &read);
            outcome.problems = verify::problems(&checks, &read);
            outcome.verification = Some(checks);
        }
        Ok(outcome)
    }

    fn publish(&self, net: &Net, cluster: &mut Cluster) -> Result<Published> {
        let publish = Publish {
            program: &self.binaries.publisher,
            namespace: Some(net.publisher()),
            cpus: None,
            brokers: cluster.addresses(),
            mode: self.options.route.mode,
            tx: self.options.route.tx.as_deref(),
            workload: self.workload,
            source: self.source,
            rate: None,
            digest: self.verification != Verification::No,
            folder: self.folder,
        };
        let expected = self.source.expected_bytes();
        let mut progress = Progress::over(&cluster.log_paths(), expected);
        let mut sampler = Sampler::start(net, cluster, &cluster.log_paths())?;
        let wanted = Duration::from_secs_f64(self.options.diagnose_seconds);
        let mut observation = (self.options.diagnose)
            .then(|| Observation::of(cluster.pids()[0], wanted, expected, self.interrupt));
        let watch = |publisher: &Running| {
            progress.update();
            sampler.sample(publisher, cluster)?;
            if let Some(observation) = &mut observation {
                observation.update(sampler.committed());
            }
            cluster.check()
        };
        let (report, succeeded) = publish.run(watch, self.interrupt)?;
        progress.finish();
        let mut published = Published {
            report,
            succeeded,
            timeline: sampler.finish(),
            diagnosis: None,
            not_diagnosed: None,
        };
        if let Some(observation) = observation {
            match observation.finish() {
                Ok(Observed { diagnosed, text }) => {
                    result_folder::write_file(&self.folder.join("diagnosis.txt"), &text)?;
                    published.diagnosis = Some(diagnosed);
                }
                Err(why) => {
                    warn!("not diagnosed: {why:#}");
                    published.not_diagnosed = Some(format!("{why:#}"));
                }
            }
        }
        Ok(published)
    }

    /// A subscriber on each log.
    fn readings(&self, net: &Net, logs: &[PathBuf]) -> Result<Vec<Reading>> {
        let reading = |(index, path): (usize, &PathBuf)| {
            let log = self.folder.join(format!("subscriber-{index}.log"));
            let (program, namespace) = (&self.binaries.subscriber, net.broker(index));
            match self.verification {
                Verification::Along => Reading::follow(
                    program,
                    namespace,
                    path,
                    &log,
                    ReaderOutput::Sums,
                    self.interrupt,
                ),
                _ => Reading::start_after(program, namespace, path, &log, ReaderOutput::Sums),
            }
        };
        logs.iter().enumerate().map(reading).collect()
    }
}
