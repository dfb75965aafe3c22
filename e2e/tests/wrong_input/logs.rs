//! Files that are no log, or not this broker's.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use anyhow::Result;
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::{BrokerSetup, Case, cases};

const RING: [&str; 4] = ["--ring-size", "64MiB", "--topic", "penstock"];

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        a_log_of_another_version,
        a_log_of_another_geometry,
        a_file_that_is_no_log,
        a_damaged_header,
    ]
}

/// An ordinary log, its broker stopped.
fn make_log(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&RING)?;
    bed.publish(&["--brokers", BROKER, "--total-size", "4MiB"])?;
    broker.stop()?;
    Ok(())
}

/// Overwrites bytes of the log.
fn poke(bed: &Bed, offset: u64, bytes: &[u8]) -> Result<()> {
    let log = OpenOptions::new()
        .write(true)
        .open(bed.log_of("penstock"))?;
    Ok(log.write_all_at(bytes, offset)?)
}

fn broker(bed: &Bed) -> BrokerSetup<'_> {
    bed.broker(&RING)
}

#[track_caller]
fn subscriber_refuses(bed: &Bed, regex: &str) {
    let mut command = bed.subscriber(&["--stat"]);
    bed.refuses(regex, command.arg("--path").arg(bed.log_of("penstock")));
}

fn a_log_of_another_version(bed: &Bed) -> Result<()> {
    make_log(bed)?;
    poke(bed, 8, b"\x63")?;
    broker(bed).refuses("version");
    subscriber_refuses(bed, "version");
    Ok(())
}

fn a_log_of_another_geometry(bed: &Bed) -> Result<()> {
    make_log(bed)?;
    bed.broker(&["--ring-size", "128MiB", "--topic", "penstock"])
        .refuses("ring|geometry|size");
    Ok(())
}

fn a_file_that_is_no_log(bed: &Bed) -> Result<()> {
    make_log(bed)?;
    poke(bed, 0, b"not a log at all")?;
    broker(bed).refuses("not a Penstock log");
    subscriber_refuses(bed, "not a Penstock log");
    let mut none = bed.subscriber(&["--stat"]);
    let none = none.arg("--path").arg(bed.file("none.log"));
    bed.refuses("no such|not found|missing|does not exist", none);
    Ok(())
}

fn a_damaged_header(bed: &Bed) -> Result<()> {
    make_log(bed)?;
    poke(bed, 20, b"\xff\xff")?;
    broker(bed).refuses("damaged|checksum");
    OpenOptions::new()
        .write(true)
        .open(bed.log_of("penstock"))?
        .set_len(100_000)?;
    subscriber_refuses(bed, "damaged|checksum|bytes");
    Ok(())
}
