//! `penstock-lab throughput`: one publisher against brokers in namespaces of their own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use jiff::Timestamp;

use crate::cli::{self, Format};
use crate::cluster::{self, Brokers, Cluster};
use crate::environment::Environment;
use crate::interrupt::Interrupt;
use crate::limits::{self, Effort, Link};
use crate::netns::Net;
use crate::outputs;
use crate::progress::Progress;
use crate::report::{Broker, Limit, Publisher, Throughput, limit_of};
use crate::testbed::{Binaries, BufferDir};
use crate::verify::{self, StreamCheck};
use crate::workload::{Publish, Source};
use crate::{render, results};

/// Room in the ring beyond an even share: brokers do not get exactly the same, and segments end
/// with a gap.
const VERIFY_HEADROOM: u64 = 2;
/// Smallest ring that is chosen for verification.
const VERIFY_RING_MIN: u64 = 256 << 20;
/// Below the average line of nearly every file, bytes; should one be shorter still, verification
/// says that the ring was too small.
const SHORT_LINE: u64 = 8;
/// Framing of a message in a batch, bytes.
const MESSAGE_OVERHEAD: u64 = penstock_dataplane::wire::message::OVERHEAD as u64;

/// With `--limits`.
const LIMITS: Effort = Effort {
    runs: 3,
    seconds: 1,
};

/// What a run brought, before it is a report.
struct Outcome {
    publisher: outputs::Publisher,
    publisher_succeeded: bool,
    brokers: Vec<outputs::Broker>,
    limits: Option<Vec<Limit>>,
    verification: Option<Vec<StreamCheck>>,
    problems: Vec<String>,
}

/// Runs it; true when every message was acked and is in the logs.
pub fn run(options: &cli::Throughput, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    let source = source_of(options)?;
    let workload = with_ring_for_verification(options, &source)?;
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = results::create_folder(&options.output.results, started)?;
    let outcome = run_in(
        &folder, options, &workload, &source, &binaries, started, interrupt,
    );
    let printed = outcome.and_then(|report| {
        let markdown = render::throughput(&report);
        results::write(&folder, &report, &markdown)?;
        match options.output.format {
            Format::Text => println!("{}", render::throughput_summary(&report)),
            Format::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        }
        Ok(report.problems.is_empty())
    });
    println!("{}", folder.display());
    printed
}

fn source_of(options: &cli::Throughput) -> Result<Source> {
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

/// Verification needs everything to be in the rings still at the end.
fn with_ring_for_verification(options: &cli::Throughput, source: &Source) -> Result<cli::Workload> {
    let mut workload = options.workload.clone();
    let Some(payload) = source.expected_bytes().filter(|_| options.verify) else {
        return Ok(workload);
    };
    let typical_message = match source {
        Source::Synthetic(_) => workload.message_size.as_u64().max(1),
        Source::Lines(_) => SHORT_LINE,
    };
    let framed = payload + payload.div_ceil(typical_message) * MESSAGE_OVERHEAD;
    let share = framed.div_ceil(u64::from(options.brokers));
    match workload.ring_size {
        Some(ring) => ensure!(
            ring.as_u64() >= share,
            "--verify reads everything back, so the ring must hold it: about {} per broker, but \
             --ring-size is {ring}; raise it or lower --total-size",
            ByteSize(share)
        ),
        None => {
            let wanted = (share * VERIFY_HEADROOM).max(VERIFY_RING_MIN);
            workload.ring_size = Some(ByteSize(wanted.next_multiple_of(VERIFY_RING_MIN)));
        }
    }
    Ok(workload)
}

fn run_in(
    folder: &Path,
    options: &cli::Throughput,
    workload: &cli::Workload,
    source: &Source,
    binaries: &Binaries,
    started: Timestamp,
    interrupt: &Interrupt,
) -> Result<Throughput> {
    let count = options.brokers as usize;
    let net = Net::create(count, options.profile, options.mtu)?;
    let buffers = BufferDir::create()?;
    let environment = Environment::read(Some(net.publisher()), started)?;
    interrupt.check()?;
    let link = Link {
        net: &net,
        profile: options.profile,
        mtu: options.mtu,
    };
    let limits = options
        .limits
        .then(|| limits::of_link(link, LIMITS, folder, interrupt))
        .transpose()?;
    let brokers = Brokers {
        count,
        net: &net,
        buffers: &buffers,
        binaries,
        route: &options.route,
        workload,
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
        workload,
        source,
        rate: None,
        digest: options.verify,
        folder,
    };
    let mut outcome = measure(cluster, &publish, &net, binaries, options.verify, interrupt)?;
    outcome.limits = limits;
    Ok(report(options, workload, outcome, environment))
}

fn measure(
    mut cluster: Cluster,
    publish: &Publish<'_>,
    net: &Net,
    binaries: &Binaries,
    verify: bool,
    interrupt: &Interrupt,
) -> Result<Outcome> {
    let mut progress = Progress::over(&cluster.log_paths(), publish.source.expected_bytes());
    let watch = || {
        progress.update();
        cluster.check()
    };
    let (publisher, publisher_succeeded) = publish.run(watch, interrupt)?;
    progress.finish();
    let logs: Vec<PathBuf> = cluster
        .log_paths()
        .into_iter()
        .map(Path::to_owned)
        .collect();
    let brokers = cluster.stop()?;
    let mut outcome = Outcome {
        publisher,
        publisher_succeeded,
        brokers,
        limits: None,
        verification: None,
        problems: Vec::new(),
    };
    if verify {
        let mut read = Vec::with_capacity(logs.len());
        for (index, path) in logs.iter().enumerate() {
            let log = publish.folder.join(format!("subscriber-{index}.log"));
            read.push(verify::read_back(
                &binaries.subscriber,
                net.broker(index),
                path,
                &log,
                interrupt,
            )?);
        }
        let checks = verify::compare(&outcome.publisher, &read);
        outcome.problems = verify::problems(&checks, &read);
        outcome.verification = Some(checks);
    }
    Ok(outcome)
}

fn report(
    options: &cli::Throughput,
    workload: &cli::Workload,
    outcome: Outcome,
    environment: Environment,
) -> Throughput {
    let synthetic = options.input.is_none();
    let publisher = outcome.publisher;
    let mode = outcome.brokers.first().and_then(outputs::Broker::xdp_mode);
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
    use crate::render::tests::example;
    use clap::Parser;

    fn options(arguments: &[&str]) -> cli::Throughput {
        let line = ["penstock-lab", "throughput"].iter().chain(arguments);
        match cli::Cli::parse_from(line).command {
            cli::Command::Throughput(options) => options,
            _ => unreachable!("throughput was asked for"),
        }
    }

    fn ring_for(arguments: &[&str]) -> Result<Option<u64>> {
        let options = options(arguments);
        let source = source_of(&options)?;
        let workload = with_ring_for_verification(&options, &source)?;
        Ok(workload.ring_size.map(|size| size.as_u64()))
    }

    #[test]
    fn verification_gets_a_ring_that_holds_everything() {
        let ring = ring_for(&["--verify", "--total-size", "4GiB", "--brokers", "2"]).unwrap();
        assert!(ring.unwrap() > 4 << 30);
        assert_eq!(ring_for(&["--total-size", "4GiB"]).unwrap(), None);
    }

    #[test]
    fn a_ring_too_small_to_verify_is_refused() {
        let small = ["--verify", "--total-size", "4GiB", "--ring-size", "256MiB"];
        let error = ring_for(&small).unwrap_err().to_string();
        assert!(error.contains("--ring-size"), "{error}");
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
