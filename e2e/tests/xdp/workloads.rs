//! Runs of the lab over the xdp path, verified byte for byte.

use anyhow::{Context, Result};
use penstock_e2e::bed::Bed;
use penstock_e2e::lab::{assert_path, assert_verified, brokers};
use penstock_e2e::{Case, cases};
use serde_json::Value;

/// Lines of the real file.
const LINES: u64 = 400_000;

/// They use all cores, and a path that gets no CPU time falls back to tcp.
pub fn cases() -> impl IntoIterator<Item = Case> {
    let all = cases![
        wire_profile,
        jumbo_packets,
        offload_profile,
        generic_mode,
        many_packets_in_one_buffer,
        busy_polling,
        the_worker_drives_the_queue,
        several_streams_to_each_broker,
        several_workers_on_one_queue,
        small_messages_without_acks,
        a_real_file,
    ];
    all.map(Case::alone)
}

/// All streams are verified, and over xdp.
fn verified(bed: &Bed, arguments: &[&str], streams: usize) -> Result<Value> {
    let report = bed.lab_throughput(&[&["--mode", "xdp"], arguments].concat())?;
    assert_verified(&report, streams);
    assert_path(&report, "xdp");
    Ok(report)
}

/// Four brokers, each of which places packets.
fn workload(bed: &Bed, arguments: &[&str]) -> Result<Value> {
    let four = ["--brokers", "4", "--total-size", "512MiB"];
    let report = verified(bed, &[&four, arguments].concat(), 4)?;
    assert_eq!(brokers(&report).len(), 4);
    for broker in brokers(&report) {
        assert!(
            broker["xdp"]["placed"].as_u64() > Some(0),
            "{}",
            broker["xdp"]
        );
    }
    Ok(report)
}

fn wire_profile(bed: &Bed) -> Result<()> {
    workload(bed, &["--profile", "wire"]).map(drop)
}

/// Packets in several buffers; with --xdp-mode auto they would take generic mode.
fn jumbo_packets(bed: &Bed) -> Result<()> {
    workload(
        bed,
        &["--profile", "wire", "--mtu", "9000", "--xdp-mode", "native"],
    )
    .map(drop)
}

fn offload_profile(bed: &Bed) -> Result<()> {
    workload(bed, &["--profile", "offload"]).map(drop)
}

fn generic_mode(bed: &Bed) -> Result<()> {
    workload(bed, &["--profile", "wire", "--xdp-mode", "generic"]).map(drop)
}

/// A generic program gets what the sender's kernel left to the interface to cut apart.
fn many_packets_in_one_buffer(bed: &Bed) -> Result<()> {
    let report = workload(bed, &["--profile", "offload", "--xdp-mode", "generic"])?;
    for broker in brokers(&report) {
        let (datagrams, placed) = (
            broker["xdp"]["packets"].as_u64(),
            broker["xdp"]["placed"].as_u64(),
        );
        assert!(
            datagrams < placed,
            "{datagrams:?} datagrams of {placed:?} packets"
        );
    }
    Ok(())
}

fn busy_polling(bed: &Bed) -> Result<()> {
    workload(bed, &["--profile", "wire", "--poll", "busy"]).map(drop)
}

fn the_worker_drives_the_queue(bed: &Bed) -> Result<()> {
    workload(bed, &["--profile", "wire", "--busy-poll", "64"]).map(drop)
}

fn several_streams_to_each_broker(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    verified(bed, &["--brokers", "2", "--threads-per-broker", "3", "--total-size", "256MiB"], 6)?;
    Ok(())
}

/// More workers than receive queues, so that they share one.
fn several_workers_on_one_queue(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    verified(bed, &[
        "--brokers", "1", "--threads-per-broker", "8", "--workers", "3", "--total-size", "256MiB"], 8)?;
    Ok(())
}

fn small_messages_without_acks(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    verified(bed, &[
        "--brokers", "1", "--ack", "0", "--total-size", "32MiB", "--message-size", "10",
        "--batch-size", "1KiB"], 1)?;
    Ok(())
}

fn a_real_file(bed: &Bed) -> Result<()> {
    let path = bed.file_of_lines(LINES)?;
    let input = path.to_str().context("a plain path")?;
    let report = verified(bed, &["--brokers", "2", "--input", input], 2)?;
    assert_eq!(report["messages_in_logs"], LINES);
    Ok(())
}
