//! Causes over the xdp path.

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::{Case, cases};

use crate::bench::{LabLink, Quota, names, publish, settle};
use crate::causes::blocked_by_reader;

const XDP: [&str; 4] = ["--mode", "xdp", "--iface", "eth0"];

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        xdp_throttled,
        xdp_credit,
        xdp_small_fill_ring,
        xdp_starved_worker,
        xdp_starved_publisher,
        xdp_blocked_reader,
        xdp_losses,
    ]
}

/// A publisher with these options to a broker with those; the diagnosis of the broker names this cause.
fn published(bed: &Bed, broker: &[&str], publisher: &[&str], cause: &str) -> Result<()> {
    let broker = bed.start_broker(&[&XDP, broker].concat())?;
    let _publisher = publish(bed, &[&["--mode", "xdp"], publisher].concat())?;
    settle();
    names(bed, cause, &["--pid", &broker.pid_text()]);
    Ok(())
}

fn xdp_throttled(bed: &Bed) -> Result<()> {
    published(bed, &[], &["--rate", "50MB"], "sender-application-limited")
}

/// So small a ring gives credit for one burst at a time.
fn xdp_credit(bed: &Bed) -> Result<()> {
    published(bed, &["--xdp-ring", "64"], &[], "credit-limited")
}

/// Each of 32 streams has at least 64 KiB of credit, and the fill ring holds that of one.
fn xdp_small_fill_ring(bed: &Bed) -> Result<()> {
    let streams = ["--threads-per-broker", "32"];
    published(bed, &["--xdp-ring", "64"], &streams, "nic-drops")
}

fn xdp_starved_worker(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&XDP)?;
    let _publisher = publish(bed, &["--mode", "xdp"])?;
    settle();
    let _quota = Quota::set(bed, 5, broker.pid())?;
    settle();
    names(bed, "receiver-cpu", &["--pid", &broker.pid_text()]);
    Ok(())
}

fn xdp_starved_publisher(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&XDP)?;
    let publisher = publish(bed, &["--mode", "xdp"])?;
    settle();
    let _quota = Quota::set(bed, 5, publisher.pid())?;
    settle();
    names(bed, "sender-cpu", &["--pid", &broker.pid_text()]);
    Ok(())
}

fn xdp_blocked_reader(bed: &Bed) -> Result<()> {
    blocked_by_reader(bed, &XDP, &["--mode", "xdp"])
}

/// A network that loses 5 % of the packets.
fn xdp_losses(bed: &Bed) -> Result<()> {
    let link = LabLink::start(bed, &["--mode", "xdp", "--faults", "loss=5%"])?;
    settle();
    names(bed, "congestion-limited", &["--pid", &link.broker()?]);
    Ok(())
}
