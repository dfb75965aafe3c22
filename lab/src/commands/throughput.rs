//! `penstock-lab throughput`: one publisher against brokers in namespaces of their own.

mod fixes;
pub mod flags;
mod observation;
mod progress;
mod timeline;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use jiff::Timestamp;
use tracing::{info, warn};

use crate::commands::limits::{self, Effort, Link};
use crate::measure::environment::Environment;
use crate::measure::host_load::HostWatch;
use crate::report::html;
use crate::report::model::{
    Broker, Diagnosed, Limit, Publisher, Rerun, Throughput, Timeline, limit_of,
};
use crate::report::result_folder;
use crate::report::text;
use fixes::Fix;
use observation::{Observation, Observed};
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::{self, Brokers, Cluster};
use penstock_testbed::faults::FaultPlan;
use penstock_testbed::link_emulation::{Forwarders, Plan};
use penstock_testbed::netns::Net;
use penstock_testbed::program_reports;
use penstock_testbed::programs::Binaries;
use penstock_testbed::publish::{Publish, Source};
use penstock_testbed::running::Running;
use penstock_testbed::settings::{Mode, Profile, Route, Workload};
use penstock_testbed::verify::{self, ReaderOutput, Reading, StreamCheck};
use progress::Progress;
use timeline::Sampler;

/// The second run's folder, inside that of the first.
const AFTER_FIX: &str = "after-fix";

/// Room in the ring beyond an even share: brokers do not get exactly the same, and segments end
/// with a gap.
const VERIFY_HEADROOM: u64 = 2;
/// Most memory that rings of all brokers take to hold a run for verification.
const VERIFY_MEMORY: u64 = 4 << 30;
/// Smallest ring that is chosen for verification.
const VERIFY_RING_MIN: u64 = 256 << 20;
/// Below the average line of nearly every file, bytes; should one be shorter still, verification
/// says that the ring was too small.
const SHORT_LINE: u64 = 8;
/// Largest MTU with `--faults`: an Ethernet frame of it fits in what the injector keeps of one.
const MAX_FAULTY_MTU: u32 = 9000;
/// Framing of a message in a batch, bytes.
const MESSAGE_OVERHEAD: u64 = penstock_wire::message::OVERHEAD as u64;

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

/// What a run brought, before it is a report.
struct Outcome {
    publisher: program_reports::Publisher,
    publisher_succeeded: bool,
    brokers: Vec<program_reports::Broker>,
    limits: Option<Vec<Limit>>,
    verification: Option<Vec<StreamCheck>>,
    timeline: Timeline,
    diagnosis: Option<Diagnosed>,
    not_diagnosed: Option<String>,
    problems: Vec<String>,
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
    let source = source_of(options)?;
    let (verification, workload) = verification_of(options, &source)?;
    check_faults(options)?;
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

fn source_of(options: &flags::Throughput) -> Result<Source> {
    let Some(path) = &options.input else {
        ensure!(
            options.total_size.as_u64() >= options.workload.message_size.as_u64(),
            "--total-size is smaller than one message"
        );
        return Ok(Source::Synthetic(options.total_size));
    };
    if path.as_os_str() != "-" {
        fs::File::open(path).with_context(|| format!("cannot read --input {}", path.display()))?;
    }
    Ok(Source::Lines(path.clone()))
}

/// How contents are verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verification {
    No,
    /// Subscribers read everything after the run: the rings hold it all.
    Behind,
    /// Subscribers follow during the run, and brokers wait for them.
    Along,
}

/// How the run is verified, and the workload with the rings that this needs.
fn verification_of(
    options: &flags::Throughput,
    source: &Source,
) -> Result<(Verification, Workload)> {
    let mut workload = options.workload.clone();
    if !options.verify {
        return Ok((Verification::No, workload));
    }
    let typical_message = match source {
        Source::Synthetic(_) => workload.message_size.as_u64().max(1),
        Source::Lines(_) => SHORT_LINE,
    };
    let brokers = u64::from(options.brokers);
    let share = source.expected_bytes().map(|payload| {
        let framed = payload + payload.div_ceil(typical_message) * MESSAGE_OVERHEAD;
        framed.div_ceil(brokers)
    });
    let ring = share.map(|share| {
        let wanted = (share * VERIFY_HEADROOM).max(VERIFY_RING_MIN);
        wanted.next_multiple_of(VERIFY_RING_MIN)
    });
    match (workload.ring_size, share, ring) {
        (Some(given), Some(share), _) if given.as_u64() >= share => {
            return Ok((Verification::Behind, workload));
        }
        (None, _, Some(ring)) if ring * brokers <= VERIFY_MEMORY => {
            workload.ring_size = Some(ByteSize(ring));
            return Ok((Verification::Behind, workload));
        }
        _ => {}
    }
    ensure!(
        workload.full.as_deref() != Some("overwrite"),
        "--verify cannot read everything back, because the rings do not hold it, and with --full \
         overwrite brokers do not wait for readers: raise --ring-size, lower --total-size or give \
         --full block"
    );
    workload.full = Some("block".to_owned());
    Ok((Verification::Along, workload))
}

fn check_faults(options: &flags::Throughput) -> Result<()> {
    let Some(plan) = &options.faults else {
        return Ok(());
    };
    ensure!(
        options.profile == Profile::Wire,
        "--faults needs --profile wire: with segmentation offloads a fault would not meet one packet \
         but up to 64 KiB of them"
    );
    ensure!(
        options.mtu <= MAX_FAULTY_MTU,
        "--faults takes an --mtu of at most {MAX_FAULTY_MTU}, the largest packet that can come late"
    );
    ensure!(
        options.route.xdp_mode.as_deref() != Some("generic"),
        "--faults does not go with --xdp-mode generic: the kernel keeps packets that another program \
         redirected away from a generic XDP program"
    );
    ensure!(
        options.route.mode != Mode::Tcp || plan.treats_tcp(),
        "--faults treats udp only, and --mode tcp sends none: add protocol=tcp to --faults"
    );
    Ok(())
}

/// How brokers receive: as asked, but in native mode rather than in what suits the MTU if there are
/// faults, see [`check_faults`].
fn route_of(options: &flags::Throughput) -> Route {
    let mut route = options.route.clone();
    if options.faults.is_some() && route.mode != Mode::Tcp {
        route.xdp_mode = Some("native".to_owned());
    }
    route
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
        let mut report = report(self.options, self.workload, outcome, environment);
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
            route: &route_of(options),
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

fn report(
    options: &flags::Throughput,
    workload: &Workload,
    outcome: Outcome,
    environment: Environment,
) -> Throughput {
    let synthetic = options.input.is_none();
    let publisher = outcome.publisher;
    let mode = outcome
        .brokers
        .first()
        .and_then(program_reports::Broker::xdp_mode);
    let best = outcome
        .limits
        .as_ref()
        .zip(publisher.path())
        .and_then(|(limits, path)| limit_of(limits, path, mode));
    let percent_of_limit = best.map(|best| 100.0 * publisher.bandwidth_mb_per_s / best);
    let in_order = outcome.brokers.into_iter().enumerate();
    let brokers: Vec<_> = in_order
        .map(|(i, output)| Broker::from_output(i, cluster::address(i), &workload.topic, output))
        .collect();
    let mut report = Throughput {
        kind: "throughput".to_owned(),
        mode: options.route.mode.name().to_owned(),
        profile: options.profile,
        mtu: options.mtu,
        num_brokers: options.brokers,
        message_size: synthetic.then_some(workload.message_size.as_u64()),
        ack: workload.ack.number(),
        order: workload.order.number(),
        threads_per_broker: workload.threads_per_broker,
        input: options
            .input
            .as_ref()
            .map(|path| path.display().to_string()),
        messages_sent: publisher.messages_sent,
        messages_acked: publisher.messages_acked,
        messages_in_logs: brokers.iter().map(|b| b.messages_in_log).sum(),
        payload_bytes: publisher.payload_bytes,
        seconds: publisher.seconds,
        bandwidth_mb_per_s: publisher.bandwidth_mb_per_s,
        limits: outcome.limits,
        percent_of_limit,
        problems: outcome.problems,
        publisher: Publisher::from_output(publisher),
        brokers,
        verification: outcome.verification,
        faults: None,
        delay: None,
        timeline: Some(outcome.timeline),
        diagnosis: outcome.diagnosis,
        not_diagnosed: outcome.not_diagnosed,
        rerun: None,
        host_load: None,
        warnings: Vec::new(),
        environment,
    };
    let counted = count_problems(&report, outcome.publisher_succeeded);
    report.problems.extend(counted);
    report
}

/// What keeps a run from being a success, apart from verification.
fn count_problems(report: &Throughput, publisher_succeeded: bool) -> Vec<String> {
    let mut problems = Vec::new();
    let (sent, acked, held) = (
        report.messages_sent,
        report.messages_acked,
        report.messages_in_logs,
    );
    if !publisher_succeeded {
        problems.push("the publisher reported a failure; see publisher.log".to_owned());
    }
    if sent == 0 && report.input.is_none() {
        problems.push("nothing was sent".to_owned());
    }
    if acked != sent {
        problems.push(format!("{sent} messages sent, {acked} acked"));
    }
    if held != sent {
        problems.push(format!("{sent} messages sent, {held} in the brokers' logs"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::text::tests::example;
    use clap::Parser;

    fn options(arguments: &[&str]) -> flags::Throughput {
        let line = ["penstock-lab", "throughput"].iter().chain(arguments);
        match crate::cli::Cli::parse_from(line).command {
            crate::cli::Command::Throughput(options) => options,
            _ => unreachable!("throughput was asked for"),
        }
    }

    fn verified(arguments: &[&str]) -> Result<(Verification, Option<u64>)> {
        let options = options(arguments);
        let source = source_of(&options)?;
        let (verification, workload) = verification_of(&options, &source)?;
        Ok((verification, workload.ring_size.map(|size| size.as_u64())))
    }

    #[test]
    fn what_the_rings_hold_is_verified_behind_and_else_along() {
        let given = ["--verify", "--total-size", "1GiB", "--brokers", "2"];
        let (verification, ring) = verified(&given).unwrap();
        assert_eq!(verification, Verification::Behind);
        assert!(ring.unwrap() > 512 << 20);
        let given = ["--verify", "--total-size", "4GiB", "--ring-size", "2GiB"];
        let wanted = (Verification::Behind, Some(2 << 30));
        assert_eq!(verified(&given).unwrap(), wanted);
        let given = ["--verify", "--total-size", "4GiB", "--ring-size", "256MiB"];
        let wanted = (Verification::Along, Some(256 << 20));
        assert_eq!(verified(&given).unwrap(), wanted);
        let wanted = (Verification::Along, None);
        assert_eq!(
            verified(&["--verify", "--total-size", "10GiB"]).unwrap(),
            wanted
        );
        assert_eq!(verified(&["--verify", "--input", "-"]).unwrap(), wanted);
        let wanted = (Verification::No, None);
        assert_eq!(verified(&["--total-size", "10GiB"]).unwrap(), wanted);
    }

    #[test]
    fn brokers_that_overwrite_cannot_be_verified_along() {
        let small = ["--verify", "--ring-size", "256MiB", "--full", "overwrite"];
        let error = verified(&small).unwrap_err().to_string();
        assert!(error.contains("--ring-size"), "{error}");
    }

    #[test]
    fn faults_meet_packets_that_are_there_and_are_single() {
        for (arguments, wanted) in [
            (
                &["--profile", "offload", "--mode", "xdp"][..],
                "--profile wire",
            ),
            (&["--mtu", "9001", "--mode", "xdp"][..], "9000"),
            (&["--mode", "tcp"][..], "protocol=tcp"),
            (&["--mode", "xdp", "--xdp-mode", "generic"][..], "generic"),
        ] {
            let arguments = [arguments, &["--faults", "loss=1%"]].concat();
            let error = check_faults(&options(&arguments)).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
        }
        let tcp = ["--mode", "tcp", "--faults", "loss=1%,protocol=both"];
        check_faults(&options(&tcp)).unwrap();
        let jumbo = ["--mode", "xdp", "--mtu", "9000", "--faults", "loss=1%"];
        let mode = |arguments: &[&str]| route_of(&options(arguments)).xdp_mode;
        assert_eq!(mode(&jumbo).as_deref(), Some("native"));
        assert_eq!(mode(&jumbo[..4]), None);
        assert_eq!(mode(&tcp), None);
    }

    #[test]
    fn a_complete_run_is_a_success_and_each_shortfall_is_not() {
        let complete = example();
        assert!(count_problems(&complete, true).is_empty());
        assert_eq!(count_problems(&complete, false).len(), 1);
        let mut lost = complete.clone();
        lost.messages_in_logs -= 1;
        assert_eq!(count_problems(&lost, true).len(), 1);
        let mut unacked = complete.clone();
        unacked.messages_acked -= 1;
        assert_eq!(count_problems(&unacked, true).len(), 1);
    }
}
