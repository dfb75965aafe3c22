//! Links that lose, reorder, damage, double and delay packets: every byte arrives, once.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_e2e::bed::{Bed, program};
use penstock_e2e::lab::{
    LabRun, assert_path, assert_verified, brokers, count, figure, rows, stream_values, total,
};
use penstock_e2e::{Case, cases};
use serde_json::Value;

const BROKERS: usize = 4;
const FAULTS: &str = "loss=1%,reorder=1%,corrupt=0.1%,duplicate=1%";
/// Bytes of the real file.
const FILE_BYTES: usize = 100_000_000;
/// Packets that a link may still hold when a run is over.
const HELD: u64 = 8;
/// Time limit for 10 GiB over links that lose packets.
const LONG: Duration = Duration::from_secs(1200);
/// Directions of a link.
const DIRECTIONS: [&str; 2] = ["to_broker", "to_publisher"];

pub fn cases() -> impl IntoIterator<Item = Case> {
    // Each uses all cores, and a path that gets no CPU time falls back to tcp.
    let runs = cases![
        a_real_file_arrives_over_bad_links,
        synthetic_messages_arrive_over_bad_links,
        jumbo_packets_arrive_over_bad_links,
        everything_arrives_over_a_path_that_takes_less_than_its_mtu,
        everything_arrives_over_slow_links,
        everything_arrives_over_slow_bad_links,
        tcp_repairs_bad_links,
        ten_gib_arrive_at_subscribers_that_follow,
        ten_gib_arrive_over_bad_links_at_subscribers_that_follow,
    ];
    let refused = cases![faults_that_cannot_be_are_refused];
    let runs = runs.map(Case::long).map(Case::alone);
    runs.into_iter().chain(refused)
}

/// A verified run over xdp to four brokers.
fn run(bed: &Bed, arguments: &[&str]) -> Result<Value> {
    bed.lab_throughput(&[&["--mode", "xdp", "--brokers", "4"], arguments].concat())
}

/// With the usual faults.
fn with_faults(bed: &Bed, further: &str, arguments: &[&str]) -> Result<Value> {
    let faults = format!("{FAULTS},{further}");
    run(bed, &[arguments, &["--faults", &faults]].concat())
}

/// Every message is acknowledged and in the logs; every stream came over xdp and reads back as it was sent.
#[track_caller]
fn assert_all_there(report: &Value, messages: u64) {
    for name in ["messages_sent", "messages_acked", "messages_in_logs"] {
        assert_eq!(report[name], messages, "{name}");
    }
    assert_verified(report, BROKERS);
    assert_eq!(total(rows(report, "/verification"), "/messages"), messages);
    assert_path(report, "xdp");
}

/// Packets met this fault about as often as asked for, in each direction: within five standard deviations.
#[track_caller]
fn assert_happened(report: &Value, fault: &str, percent: f64) {
    for direction in DIRECTIONS {
        let links = rows(report, "/faults/links").iter();
        let links: Vec<_> = links
            .filter(|link| link["direction"] == direction)
            .collect();
        let sum = |field: &str| links.iter().map(|link| count(link, field)).sum::<u64>();
        let (packets, met) = (sum("/packets"), sum(&format!("/{fault}")));
        #[expect(clippy::cast_precision_loss, reason = "counts of packets are small")]
        let (mean, met_) = (packets as f64 * percent / 100.0, met as f64);
        assert!(
            packets > 0 && (met_ - mean).powi(2) <= 25.0 * (mean + 1.0),
            "{met} of {packets} packets {direction} {fault}, asked for {percent} %"
        );
    }
}

#[track_caller]
fn assert_all_faults_happened(report: &Value) {
    assert_happened(report, "lost", 1.0);
    assert_happened(report, "held", 1.0);
    assert_happened(report, "corrupted", 0.1);
    assert_happened(report, "duplicated", 1.0);
    for link in rows(report, "/faults/links") {
        // A packet that is held comes late, unless the run is over.
        let is_let_out = count(link, "/held") <= count(link, "/let_out") + HELD;
        assert!(is_let_out, "{link}");
    }
    // The programs saw what the links did.
    assert!(total(brokers(report), "/xdp/corrupt") > 0, "damaged");
    assert!(total(brokers(report), "/xdp/duplicates") > 0, "doubled");
    let sent_again = stream_values(report, "/transport/retransmits");
    assert!(sent_again.iter().any(|count| count.as_f64() > Some(0.0)));
}

/// The bytes of the programs as numbered lines, so that no two are alike.
fn make_file(bed: &Bed) -> Result<(PathBuf, u64)> {
    let mut bytes = Vec::new();
    for name in ["broker", "publisher", "subscriber", "lab"] {
        bytes.extend(fs::read(program(name))?);
    }
    let path = bed.file("input");
    let mut file = BufWriter::new(File::create(&path)?);
    let (mut lines, mut written) = (0, 0);
    for chunk in bytes.chunks(75).cycle() {
        if written >= FILE_BYTES {
            break;
        }
        lines += 1;
        let number = format!("{lines} ");
        // Any byte but the line's end.
        let chunk: Vec<u8> = chunk.iter().map(|byte| (*byte).max(b'\n' + 1)).collect();
        for part in [number.as_bytes(), &chunk, b"\n"] {
            file.write_all(part)?;
            written += part.len();
        }
    }
    file.flush()?;
    Ok((path, lines))
}

fn a_real_file_arrives_over_bad_links(bed: &Bed) -> Result<()> {
    let (path, lines) = make_file(bed)?;
    let path = path.to_str().context("a plain path")?;
    let report = with_faults(bed, "seed=1", &["--input", path])?;
    assert_all_there(&report, lines);
    assert_all_faults_happened(&report);
    Ok(())
}

fn synthetic_messages_arrive_over_bad_links(bed: &Bed) -> Result<()> {
    let report = with_faults(bed, "seed=2", &["--total-size", "512MiB"])?;
    assert_all_there(&report, 512 * 1024);
    assert_all_faults_happened(&report);
    Ok(())
}

/// Windows of few packets: there is little to tell reordering from loss by.
fn jumbo_packets_arrive_over_bad_links(bed: &Bed) -> Result<()> {
    let arguments = ["--total-size", "256MiB", "--mtu", "9000"];
    let report = with_faults(bed, "truncate=0.1%,seed=3", &arguments)?;
    assert_all_there(&report, 256 * 1024);
    assert_happened(&report, "lost", 1.0);
    Ok(())
}

/// A black hole for larger packets.
fn everything_arrives_over_a_path_that_takes_less_than_its_mtu(bed: &Bed) -> Result<()> {
    let faults = "largest=1300,seed=4";
    let report = run(bed, &["--total-size", "64MiB", "--faults", faults])?;
    assert_all_there(&report, 64 * 1024);
    assert!(total(rows(&report, "/faults/links"), "/swallowed") > 0);
    Ok(())
}

/// Every link carried packets and dropped none, and no round trip was shorter.
#[track_caller]
fn assert_slow(report: &Value, microseconds: f64) {
    let links = rows(report, "/delay/links");
    let carried = |link: &&Value| count(link, "/packets") > 0 && count(link, "/dropped") == 0;
    assert_eq!(links.iter().filter(carried).count(), BROKERS, "{links:?}");
    let round_trips = stream_values(report, "/transport/rtt_us");
    assert_eq!(round_trips.len(), BROKERS);
    for round_trip in round_trips {
        assert!(figure(&round_trip, "") >= microseconds, "{round_trip}");
    }
}

fn everything_arrives_over_slow_links(bed: &Bed) -> Result<()> {
    let report = run(bed, &["--total-size", "128MiB", "--delay", "5ms"])?;
    assert_all_there(&report, 128 * 1024);
    assert_slow(&report, 5000.0);
    Ok(())
}

fn everything_arrives_over_slow_bad_links(bed: &Bed) -> Result<()> {
    let arguments = ["--total-size", "16MiB", "--delay", "1ms"];
    let report = with_faults(bed, "seed=7", &arguments)?;
    assert_all_there(&report, 16 * 1024);
    assert_slow(&report, 1000.0);
    assert_happened(&report, "lost", 1.0);
    Ok(())
}

/// The kernel does; what its checksums do not notice, verification does.
fn tcp_repairs_bad_links(bed: &Bed) -> Result<()> {
    let faults = format!("{FAULTS},protocol=tcp,seed=5");
    #[rustfmt::skip]
    let report = bed.lab_throughput(&[
        "--mode", "tcp", "--brokers", "1", "--total-size", "64MiB", "--faults", &faults])?;
    assert_eq!(report["messages_in_logs"], 64 * 1024);
    assert_verified(&report, 1);
    let has_faults = |link: &Value| count(link, "/lost") > 0 && count(link, "/corrupted") > 0;
    let links = rows(&report, "/faults/links");
    assert!(links.iter().any(has_faults), "no faults: {links:?}");
    Ok(())
}

/// The large workload, through rings that do not hold it.
fn ten_gib(bed: &Bed, arguments: &[&str]) -> Result<Value> {
    let mut command = bed.lab(&["throughput", "--verify", "--mode", "xdp", "--brokers", "4"]);
    command.args(["--total-size", "10GiB"]).args(arguments);
    let report = LabRun::within(LONG, bed, &mut command)?.report;
    assert_all_there(&report, 10 * 1024 * 1024);
    Ok(report)
}

fn ten_gib_arrive_at_subscribers_that_follow(bed: &Bed) -> Result<()> {
    ten_gib(bed, &[]).map(drop)
}

fn ten_gib_arrive_over_bad_links_at_subscribers_that_follow(bed: &Bed) -> Result<()> {
    let faults = format!("{FAULTS},seed=6");
    let report = ten_gib(bed, &["--faults", &faults])?;
    assert_all_faults_happened(&report);
    Ok(())
}

fn faults_that_cannot_be_are_refused(bed: &Bed) -> Result<()> {
    let offload = [
        "--mode",
        "xdp",
        "--profile",
        "offload",
        "--faults",
        "loss=1%",
    ];
    let wrong: [(&str, &[&str]); 5] = [
        ("possible: loss", &["--faults", "noise=1%"]),
        ("0.1%", &["--faults", "loss=1"]),
        ("--profile wire", &offload),
        ("100us to 200 ms", &["--delay", "1s"]),
        ("protocol=tcp", &["--mode", "tcp", "--faults", "loss=1%"]),
    ];
    for (message, arguments) in wrong {
        bed.refuses(message, bed.lab(&["throughput"]).args(arguments));
    }
    Ok(())
}
