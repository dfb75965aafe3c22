//! tcp streams go on after their connection or their broker died: nothing lost, doubled or out of order.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::commands::{assert_says, paths};
use penstock_e2e::numbered::Numbered;
use penstock_e2e::{Broker, Case, cases, run, skip};
use penstock_testbed::command;

fn main() -> ExitCode {
    let disturbed = cases![
        a_broker_that_is_killed_and_restarted,
        a_broker_that_is_stopped_and_restarted,
        three_restarts_in_a_row,
        a_broker_that_vanishes_and_comes_back,
        a_connection_that_is_reset,
        a_publisher_that_sleeps_longer_than_the_broker_waits,
        a_broker_that_is_gone_for_good_is_named,
    ];
    // It needs the memory for itself, and all cores.
    let at_full_speed = cases![kill_9_at_full_speed_with_four_streams].map(Case::alone);
    run(disturbed.into_iter().chain(at_full_speed))
}

fn start(bed: &Bed) -> Result<Broker> {
    bed.start_broker(&["--topic", "penstock", "--stall-timeout", "2"])
}

/// A publisher of numbered lines gets everything through after `disturb`, which returns the broker that
/// runs from then on; its stream moved as often as `moves` has it.
fn goes_on(
    bed: &Bed,
    moves: &[u64],
    disturb: impl FnOnce(Broker, &Numbered) -> Result<Broker>,
) -> Result<()> {
    let broker = start(bed)?;
    let arguments = ["--brokers", BROKER, "--rate", "1MB", "--batch-size", "2KiB"];
    let publisher = bed.start_numbered(&arguments)?;
    bed.until_messages("penstock", 1000);
    let broker = disturb(broker, &publisher)?;
    bed.until_it_goes_further("penstock");
    let input = publisher.input().to_owned();
    let (report, _) = publisher.finish()?;
    assert_eq!(paths(&report), "tcp");
    let moved = report["brokers"][0]["streams"][0]["moves"]
        .as_u64()
        .expect("a count");
    assert!(
        moves.contains(&moved),
        "the stream moved {moved} times, wanted {moves:?}"
    );
    broker.stop()?;
    bed.assert_log_has_lines_of("penstock", &input);
    Ok(())
}

/// Ends the broker by a signal and starts another on its log.
fn restart(bed: &Bed, broker: Broker, signal: i32) -> Result<Broker> {
    broker.end(signal)?;
    start(bed)
}

fn a_broker_that_is_killed_and_restarted(bed: &Bed) -> Result<()> {
    goes_on(bed, &[1], |broker, _| restart(bed, broker, libc::SIGKILL))
}

fn a_broker_that_is_stopped_and_restarted(bed: &Bed) -> Result<()> {
    goes_on(bed, &[1], |broker, _| restart(bed, broker, libc::SIGTERM))
}

fn three_restarts_in_a_row(bed: &Bed) -> Result<()> {
    goes_on(bed, &[3], |mut broker, _| {
        for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGKILL] {
            broker = restart(bed, broker, signal)?;
            // Each time over a connection to the broker that runs now.
            bed.until_it_goes_further("penstock");
        }
        Ok(broker)
    })
}

fn a_broker_that_vanishes_and_comes_back(bed: &Bed) -> Result<()> {
    goes_on(bed, &[1], |broker, _| {
        broker.vanish(bed, Duration::ZERO)?;
        start(bed)
    })
}

/// The kernel ends the connection under both.
fn a_connection_that_is_reset(bed: &Bed) -> Result<()> {
    goes_on(bed, &[1], |broker, _| {
        let filter = [
            "-HtnK",
            "-N",
            bed.publisher_ns(),
            "state",
            "established",
            "dport = :1214",
        ];
        let killed = command::run(&[&["ss"], &filter[..]].concat()).unwrap_or_default();
        if killed.is_empty() {
            let reason = "this kernel does not let ss close sockets (INET_DIAG_DESTROY)";
            return Err(skip(reason));
        }
        Ok(broker)
    })
}

/// Asleep between batches it is not missed; inside of one the broker ends it, and it goes on. Which of
/// them is chance.
fn a_publisher_that_sleeps_longer_than_the_broker_waits(bed: &Bed) -> Result<()> {
    goes_on(bed, &[0, 1], |broker, publisher| {
        publisher.publisher().signal(libc::SIGSTOP);
        // Longer than the broker's stall timeout.
        thread::sleep(Duration::from_secs(4));
        publisher.publisher().signal(libc::SIGCONT);
        Ok(broker)
    })
}

/// With the line full most of the time is spent inside of a batch.
fn kill_9_at_full_speed_with_four_streams(bed: &Bed) -> Result<()> {
    let options = ["--topic", "penstock", "--ring-size", "4GiB"];
    let broker = bed.start_broker(&options)?;
    #[rustfmt::skip]
    let mut publisher = bed.publisher(&[
        "--brokers", BROKER, "--threads-per-broker", "4", "--total-size", "3GiB", "--format", "json"]);
    let publisher = bed.background("publisher", &mut publisher)?;
    bed.until_messages("penstock", 1);
    broker.end(libc::SIGKILL)?;
    let broker = bed.start_broker(&options)?;
    let report = publisher.wait()?.success()?.json()?;
    let streams = report["brokers"][0]["streams"].as_array().expect("streams");
    assert_eq!(
        streams.iter().filter(|stream| stream["moves"] == 1).count(),
        4
    );
    broker.stop()?;
    #[rustfmt::skip]
    let mut read = bed.subscriber(&[
        "--from", "start", "--verify", "--output", "none", "--stat", "--format", "json"]);
    let read = bed.run("subscriber", read.arg("--path").arg(bed.log_of("penstock")))?;
    assert_eq!(read.success()?.json()?["messages"], 3 * 1024 * 1024);
    assert_eq!(report["messages_acked"], 3 * 1024 * 1024);
    Ok(())
}

fn a_broker_that_is_gone_for_good_is_named(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&["--topic", "penstock"])?;
    let arguments = [
        "--brokers",
        BROKER,
        "--total-size",
        "64MiB",
        "--rate",
        "4MB",
        "--timeout",
        "2",
    ];
    let publisher = bed.background("publisher", &mut bed.publisher(&arguments))?;
    bed.until_messages("penstock", 1);
    broker.stop()?;
    let ended = publisher.wait()?;
    assert!(
        !ended.status.success(),
        "the publisher ended well without its broker"
    );
    assert_says(&ended.stderr, "could not continue");
    Ok(())
}
