//! Links, addresses and interfaces that change while a broker serves: each change is reported, and nothing
//! is lost or doubled.

use std::fmt::Write;
use std::fs;

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::Background;
use penstock_e2e::second_link::SECOND_BROKER;
use penstock_e2e::{Broker, Case, cases, eventually};

use crate::bench::{publish, publish_to, says, xdp};

/// Lines of a publisher that a test disturbs.
const LINES: u64 = 300_000;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        addresses_that_come_and_go,
        a_link_that_goes_down_and_up,
        an_interface_that_is_deleted_under_adaptive_polling,
        an_interface_that_is_deleted_under_busy_polling,
    ]
}

/// A virtual address with a label appears and disappears, and an address of the loopback interface.
fn addresses_that_come_and_go(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    let broker = bed.start_broker(&xdp(&["--listen", "[::]:1214"]))?;
    publish(bed, "xdp", &[])?;
    bed.broker_ip(&[
        "addr",
        "add",
        "10.215.0.9/24",
        "dev",
        "eth1",
        "label",
        "eth1:1",
    ])?;
    bed.broker_ip(&["addr", "add", "fd15::9/64", "dev", "eth1", "nodad"])?;
    bed.broker_ip(&["addr", "add", "10.216.0.1/32", "dev", "lo"])?;
    bed.publisher_ip(&["addr", "add", "fd15::1/64", "dev", "m0", "nodad"])?;
    bed.publisher_ip(&["route", "add", "10.216.0.1/32", "via", "10.215.0.2"])?;
    says(&broker, r"added=.*10\.216\.0\.1");
    for to in ["10.215.0.9:1214", "[fd15::9]:1214", "10.216.0.1:1214"] {
        publish_to(bed, to, "xdp", &[])?;
    }
    bed.broker_ip(&["addr", "del", "10.215.0.9/24", "dev", "eth1"])?;
    says(&broker, r"removed=.*10\.215\.0\.9");
    publish(bed, "xdp", &[])?;
    assert_eq!(broker.stop()?.count("/xdp/outcomes/other_address"), 0);
    Ok(())
}

/// Numbered lines, so that what is lost or doubled shows, on their way for some seconds.
fn start_numbered(bed: &Bed, broker: &Broker) -> Result<Background> {
    let mut lines = String::new();
    for number in 1..=LINES {
        writeln!(lines, "{number}")?;
    }
    fs::write(bed.file("input"), lines)?;
    #[rustfmt::skip]
    let mut command = bed.publisher(&[
        "--mode", "auto", "--brokers", SECOND_BROKER, "--rate", "500kB", "--batch-size", "2KiB",
        "--format", "json"]);
    let publisher = bed.background("numbered", command.arg("--input").arg(bed.file("input")))?;
    eventually("a stream over xdp", || {
        broker.log().contains("path=\"xdp\"")
    });
    Ok(publisher)
}

/// The publisher goes on, and every line is in the log once. Returns the broker's report.
fn all_arrived(
    bed: &Bed,
    broker: Broker,
    publisher: Background,
) -> Result<penstock_e2e::broker::Stopped> {
    let report = publisher.wait()?.success()?.json()?;
    assert_eq!(report["messages_acked"], LINES);
    let stopped = broker.stop()?;
    bed.assert_log_has_lines_of("penstock", &bed.file("input"));
    Ok(stopped)
}

fn a_link_that_goes_down_and_up(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    let broker = bed.start_broker(&xdp(&["--busy-poll", "64"]))?;
    let publisher = start_numbered(bed, &broker)?;
    bed.broker_ip(&["link", "set", "eth1", "down"])?;
    says(&broker, "eth1 is down");
    bed.broker_ip(&["link", "set", "eth1", "up"])?;
    says(&broker, "eth1 is up");
    all_arrived(bed, broker, publisher)?;
    // Another stream takes the path again.
    let broker = bed.start_broker(&xdp(&[]))?;
    publish(bed, "xdp", &["--topic", "later"])?;
    broker.stop()?;
    Ok(())
}

fn an_interface_that_is_deleted_under_adaptive_polling(bed: &Bed) -> Result<()> {
    interface_goes(bed, "adaptive")
}

fn an_interface_that_is_deleted_under_busy_polling(bed: &Bed) -> Result<()> {
    interface_goes(bed, "busy")
}

fn interface_goes(bed: &Bed, polling: &str) -> Result<()> {
    bed.add_second_link()?;
    let broker = bed.start_broker(&xdp(&["--poll", polling, "--workers", "2"]))?;
    let publisher = start_numbered(bed, &broker)?;
    bed.remove_second_link()?;
    says(&broker, "eth1 is gone: the broker serves over tcp only");
    eventually("the threads of the path end", || !has_xdp_threads(&broker));
    // The address comes back, on another interface of the same name.
    bed.add_second_link()?;
    publish(bed, "tcp", &["--topic", "other"])?;
    let stopped = all_arrived(bed, broker, publisher)?;
    let refused = "stream refused: this broker takes payload over tcp only";
    assert!(stopped.log.contains(refused), "{}", stopped.log);
    assert_eq!(stopped.report["xdp"]["interface"], "eth1");
    Ok(())
}

fn has_xdp_threads(broker: &Broker) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", broker.pid())).expect("it runs");
    tasks.flatten().any(|task| {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        name.starts_with("xdp-")
    })
}
