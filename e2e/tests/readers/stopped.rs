//! Registered readers that stop or die, and logs that are deleted, over both paths: whether the broker waits,
//! how long, and who learns of it.

use std::fs;

use anyhow::{Context, Result};
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::commands::{Background, assert_says};
use penstock_e2e::lab::count;
use penstock_e2e::wait::becomes;
use penstock_e2e::{Broker, Case, cases, eventually};
use serde_json::Value;

/// A ring that a publisher soon fills.
const SMALL: [&str; 8] = [
    "--topic",
    "penstock",
    "--ring-size",
    "4MiB",
    "--segment-size",
    "256KiB",
    "--reader-timeout",
    "200ms",
];
const MESSAGES: u64 = 32 * 1024;
const EVICT: [&str; 2] = ["--reader-timeout-action", "evict"];

pub fn cases() -> impl IntoIterator<Item = Case> {
    let all = cases![
        tcp_does_not_wait_for_a_dead_reader,
        xdp_does_not_wait_for_a_dead_reader,
        tcp_evicts_a_stopped_reader_if_configured,
        xdp_evicts_a_stopped_reader_if_configured,
        tcp_publisher_that_waits_for_a_reader_can_be_ended,
        xdp_publisher_that_waits_for_a_reader_can_be_ended,
        tcp_streams_of_a_deleted_log_end,
        xdp_streams_of_a_deleted_log_end,
    ];
    all.map(Case::long)
}

/// One path, with a broker that has a small ring.
#[derive(Clone, Copy)]
struct Path<'a> {
    bed: &'a Bed,
    mode: &'a str,
}

fn tcp(bed: &Bed) -> Path<'_> {
    Path { bed, mode: "tcp" }
}

fn xdp(bed: &Bed) -> Path<'_> {
    Path { bed, mode: "xdp" }
}

impl Path<'_> {
    fn start_broker(self, further: &[&str]) -> Result<Broker> {
        let path: &[&str] = match self.mode {
            "tcp" => &[],
            _ => &["--mode", "xdp", "--iface", "eth0"],
        };
        self.bed.start_broker(&[path, &SMALL, further].concat())
    }

    /// A reader that is registered, and then stopped.
    fn stopped_reader(self, broker: &Broker) -> Result<Background> {
        let mut command = self
            .bed
            .subscriber(&["--register", "--follow", "--output", "none"]);
        let log = self.bed.log_of("penstock");
        let reader = self
            .bed
            .background("reader", command.arg("--path").arg(log))?;
        becomes("registered readers", Some(1), || readers(broker));
        reader.signal(libc::SIGSTOP);
        Ok(reader)
    }

    fn publisher(self, arguments: &[&str]) -> std::process::Command {
        let first = ["--brokers", BROKER, "--mode", self.mode, "--format", "json"];
        self.bed.publisher(&[&first, arguments].concat())
    }

    fn publish(self) -> Result<Background> {
        let mut publisher = self.publisher(&["--total-size", "32MiB"]);
        self.bed.background("publisher", &mut publisher)
    }

    /// A broker whose log a stopped reader blocks, and a publisher that waits for it; the broker has
    /// reported the reader.
    fn blocked(self, further: &[&str]) -> Result<(Broker, Background, Background)> {
        let broker = self.start_broker(further)?;
        let reader = self.stopped_reader(&broker)?;
        let publisher = self.publish()?;
        eventually("the broker reports the reader", || {
            broker.has_said("is alive but has read nothing")
        });
        Ok((broker, reader, publisher))
    }
}

/// A figure of the running broker.
fn live(broker: &Broker, pointer: &str) -> Option<Value> {
    broker.figures().ok()?.pointer(pointer).cloned()
}

fn readers(broker: &Broker) -> Option<u64> {
    live(broker, "/topics/0/readers")?.as_u64()
}

fn assert_all_sent(publisher: Background) -> Result<()> {
    let report = publisher
        .wait()?
        .success()
        .context("the publisher did not go on")?;
    assert_eq!(report.json()?["messages_acked"], MESSAGES);
    Ok(())
}

fn tcp_does_not_wait_for_a_dead_reader(bed: &Bed) -> Result<()> {
    reader_dies(tcp(bed))
}

fn xdp_does_not_wait_for_a_dead_reader(bed: &Bed) -> Result<()> {
    reader_dies(xdp(bed))
}

/// A reader dies while the broker waits for it; another one together with the broker.
fn reader_dies(path: Path) -> Result<()> {
    let (broker, reader, publisher) = path.blocked(&[])?;
    let registered = live(&broker, "/topics/0/registered/0").context("no reader")?;
    assert_eq!(registered["process"], reader.pid());
    assert_eq!(registered["holds_up"], true);
    reader.signal(libc::SIGKILL);
    reader.wait()?;
    assert_all_sent(publisher)?;
    assert_eq!(live(&broker, "/counters/readers_lost"), Some(1.into()));
    let reader = path.stopped_reader(&broker)?;
    broker.end(libc::SIGKILL)?;
    reader.signal(libc::SIGKILL);
    reader.wait()?;
    let broker = path.start_broker(&[])?;
    assert_eq!(readers(&broker), Some(0));
    assert_all_sent(path.publish()?)?;
    broker.stop()?;
    Ok(())
}

fn tcp_evicts_a_stopped_reader_if_configured(bed: &Bed) -> Result<()> {
    reader_is_evicted(tcp(bed))
}

fn xdp_evicts_a_stopped_reader_if_configured(bed: &Bed) -> Result<()> {
    reader_is_evicted(xdp(bed))
}

/// And learns of it once it goes on.
fn reader_is_evicted(path: Path) -> Result<()> {
    let (broker, reader, publisher) = path.blocked(&EVICT)?;
    assert_all_sent(publisher)?;
    reader.signal(libc::SIGCONT);
    eventually("the reader learns of it", || {
        reader.stderr().contains("the broker evicted this reader")
    });
    let stopped = broker.stop()?;
    reader.wait()?;
    assert_eq!(stopped.count("/counters/readers_evicted"), 1);
    Ok(())
}

fn tcp_publisher_that_waits_for_a_reader_can_be_ended(bed: &Bed) -> Result<()> {
    publisher_is_ended(tcp(bed))
}

fn xdp_publisher_that_waits_for_a_reader_can_be_ended(bed: &Bed) -> Result<()> {
    publisher_is_ended(xdp(bed))
}

/// By a signal, and by its timeout.
fn publisher_is_ended(path: Path) -> Result<()> {
    let (broker, reader, publisher) = path.blocked(&[])?;
    publisher.signal(libc::SIGTERM);
    let ended = publisher.wait()?;
    assert_eq!(ended.status.code(), Some(130), "{}", ended.said());
    let report = ended.json()?;
    let acked = count(&report, "/messages_acked");
    assert!(
        acked > 0 && acked < count(&report, "/messages_sent"),
        "{report}"
    );
    let mut limited = path.publisher(&["--total-size", "32MiB", "--timeout", "1"]);
    path.bed.refuses("registered reader blocks", &mut limited);
    drop(reader);
    broker.stop()?;
    Ok(())
}

fn tcp_streams_of_a_deleted_log_end(bed: &Bed) -> Result<()> {
    log_is_deleted(tcp(bed))
}

fn xdp_streams_of_a_deleted_log_end(bed: &Bed) -> Result<()> {
    log_is_deleted(xdp(bed))
}

/// And there is a new one for the next publisher.
fn log_is_deleted(path: Path) -> Result<()> {
    let broker = path.start_broker(&[])?;
    // Without end, and slowly.
    let mut publisher = path.publisher(&["--total-size", "1GiB", "--rate", "1MB"]);
    let publisher = path.bed.background("publisher", &mut publisher)?;
    path.bed.until_messages("penstock", 1);
    fs::remove_file(path.bed.log_of("penstock"))?;
    let ended = publisher.wait()?;
    assert!(!ended.status.success(), "{}", ended.said());
    assert_says(&ended.stderr, "was deleted");
    broker.assert_said("ERROR.*was deleted");
    assert_all_sent(path.publish()?)?;
    assert_eq!(live(&broker, "/topics/0/messages"), Some(MESSAGES.into()));
    broker.stop()?;
    Ok(())
}
