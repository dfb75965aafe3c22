//! A publisher of numbered lines is disturbed once and gets everything through, in order.

use std::time::Duration;

use anyhow::Result;
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::commands::paths;
use penstock_e2e::numbered::Numbered;
use penstock_e2e::{Broker, Case, cases, eventually};
use serde_json::Value;

use crate::XDP;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        a_broker_that_is_killed_and_restarted,
        a_broker_that_is_stopped_and_restarted,
        a_broker_that_vanishes_and_comes_back,
        a_publisher_that_sleeps_longer_than_the_broker_waits,
        an_mtu_that_becomes_too_small_for_datagrams,
    ]
}

fn start(bed: &Bed) -> Result<Broker> {
    bed.start_broker(&[&XDP[..], &["--topic", "penstock", "--stall-timeout", "2"]].concat())
}

/// The publisher goes on after `disturb`, which returns the broker that runs from then on. Returns the
/// publisher's report.
fn goes_on(bed: &Bed, disturb: impl FnOnce(Broker, &Numbered) -> Result<Broker>) -> Result<Value> {
    let broker = start(bed)?;
    #[rustfmt::skip]
    let publisher = bed.start_numbered(&[
        "--mode", "auto", "--brokers", BROKER, "--rate", "1MB", "--batch-size", "2KiB"])?;
    bed.until_messages("penstock", 1000);
    let broker = disturb(broker, &publisher)?;
    bed.until_it_goes_further("penstock");
    let input = publisher.input().to_owned();
    let (report, _) = publisher.finish()?;
    assert_eq!(report["brokers"][0]["streams"][0]["moves"], 1);
    broker.stop()?;
    bed.assert_log_has_lines_of("penstock", &input);
    Ok(report)
}

/// Ends the broker by a signal and starts another on its log.
fn restarted(bed: &Bed, signal: i32) -> Result<()> {
    goes_on(bed, |broker, _| {
        broker.end(signal)?;
        assert_eq!(bed.programs_attached()?, 0);
        start(bed)
    })?;
    Ok(())
}

fn a_broker_that_is_killed_and_restarted(bed: &Bed) -> Result<()> {
    restarted(bed, libc::SIGKILL)
}

fn a_broker_that_is_stopped_and_restarted(bed: &Bed) -> Result<()> {
    restarted(bed, libc::SIGTERM)
}

/// Long enough for the publisher to abandon the path before the machine is there again; it must find the
/// path again.
fn a_broker_that_vanishes_and_comes_back(bed: &Bed) -> Result<()> {
    let report = goes_on(bed, |broker, _| {
        broker.vanish(bed, Duration::from_secs(4))?;
        start(bed)
    })?;
    assert_eq!(paths(&report), "xdp");
    Ok(())
}

/// Until the broker has received nothing for its whole timeout.
fn a_publisher_that_sleeps_longer_than_the_broker_waits(bed: &Bed) -> Result<()> {
    goes_on(bed, |broker, publisher| {
        publisher.publisher().signal(libc::SIGSTOP);
        eventually("the timeout", || {
            broker.log().contains("no packet came for 2 s")
        });
        publisher.publisher().signal(libc::SIGCONT);
        Ok(broker)
    })?;
    Ok(())
}

/// Less than the smallest datagrams take; nothing tells the broker.
fn an_mtu_that_becomes_too_small_for_datagrams(bed: &Bed) -> Result<()> {
    let report = goes_on(bed, |broker, _| {
        bed.publisher_ip(&["link", "set", "b0", "mtu", "1000"])?;
        Ok(broker)
    })?;
    assert_eq!(paths(&report), "tcp");
    Ok(())
}
