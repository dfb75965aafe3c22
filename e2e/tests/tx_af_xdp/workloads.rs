//! Contents arrive byte for byte, over every kind of route.

use anyhow::{Context, Result};
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::lab::{assert_path, assert_verified, stream_values};
use penstock_e2e::{Case, cases};
use serde_json::Value;

use crate::{TX, XDP, assert_sent_over};

/// Lines of the real file.
const LINES: u64 = 400_000;

pub fn cases() -> impl IntoIterator<Item = Case> {
    // The lab's runs use all cores.
    let labs = cases![
        one_broker,
        one_broker_with_jumbo_packets,
        four_brokers,
        four_brokers_with_jumbo_packets,
    ];
    let others = cases![a_real_file, over_ipv6, through_a_router];
    labs.map(Case::alone).into_iter().chain(others)
}

/// The workload to this number of brokers, verified; every stream's packets left through AF_XDP.
fn workload(bed: &Bed, brokers: &str, arguments: &[&str]) -> Result<Value> {
    let size = [
        "--brokers",
        brokers,
        "--total-size",
        "512MiB",
        "--profile",
        "wire",
    ];
    let report = bed.lab_throughput(&[&TX[..], &size, arguments].concat())?;
    assert_verified(&report, brokers.parse()?);
    assert_path(&report, "xdp");
    assert!(
        stream_values(&report, "/tx")
            .iter()
            .all(|tx| tx == "af_xdp")
    );
    assert!(
        stream_values(&report, "/moves")
            .iter()
            .all(|moves| *moves == 0)
    );
    Ok(report)
}

#[track_caller]
fn assert_payload_of_a_packet(report: &Value, bytes: f64) {
    let datagrams = stream_values(report, "/transport/datagram");
    assert!(
        datagrams
            .iter()
            .all(|datagram| datagram.as_f64() == Some(bytes)),
        "{datagrams:?}"
    );
}

fn one_broker(bed: &Bed) -> Result<()> {
    let report = workload(bed, "1", &[])?;
    assert_payload_of_a_packet(&report, 1416.0);
    let sum = |name: &str| -> f64 {
        let values = stream_values(&report, &format!("/transport/{name}"));
        values.iter().filter_map(Value::as_f64).sum()
    };
    let (packets, calls) = (sum("packets"), sum("send_calls"));
    assert!(packets > 2.0 * calls, "{calls} calls for {packets} packets");
    Ok(())
}

fn one_broker_with_jumbo_packets(bed: &Bed) -> Result<()> {
    assert_payload_of_a_packet(&workload(bed, "1", &["--mtu", "9000"])?, 8916.0);
    Ok(())
}

fn four_brokers(bed: &Bed) -> Result<()> {
    workload(bed, "4", &[]).map(drop)
}

fn four_brokers_with_jumbo_packets(bed: &Bed) -> Result<()> {
    workload(bed, "4", &["--mtu", "9000"]).map(drop)
}

fn a_real_file(bed: &Bed) -> Result<()> {
    let path = bed.file_of_lines(LINES)?;
    let broker = bed.start_broker(&XDP)?;
    let input = path.to_str().context("a plain path")?;
    let report = bed.publish(&[&TX[..], &["--brokers", BROKER, "--input", input]].concat())?;
    assert_sent_over(&report, "af_xdp", LINES);
    broker.stop()?;
    bed.assert_log_has_lines_of("penstock", &path);
    Ok(())
}

/// 8 MiB reach a broker at this address through AF_XDP; returns how many packets the program steered.
fn reaches(bed: &Bed, address: &str, broker: &[&str]) -> Result<u64> {
    let broker = bed.start_broker(&[&XDP[..], broker].concat())?;
    let arguments = ["--brokers", address, "--total-size", "8MiB"];
    assert_sent_over(
        &bed.publish(&[&TX[..], &arguments].concat())?,
        "af_xdp",
        8192,
    );
    Ok(broker.stop()?.count("/xdp/outcomes/steered"))
}

fn over_ipv6(bed: &Bed) -> Result<()> {
    bed.publisher_ip(&["addr", "add", "fd00:214::1/64", "dev", "b0", "nodad"])?;
    bed.broker_ip(&["addr", "add", "fd00:214::2/64", "dev", "eth0", "nodad"])?;
    let steered = reaches(bed, "[fd00:214::2]:1214", &["--listen", "[::]:1214"])?;
    assert!(
        steered > 1000,
        "the packets did not come as IPv6: {steered}"
    );
    Ok(())
}

/// The broker's address is behind its host's.
fn through_a_router(bed: &Bed) -> Result<()> {
    bed.broker_ip(&["addr", "add", "10.215.0.1/32", "dev", "eth0"])?;
    bed.publisher_ip(&["route", "add", "10.215.0.1/32", "via", "10.214.0.2"])?;
    reaches(bed, "10.215.0.1:1214", &[])?;
    Ok(())
}
