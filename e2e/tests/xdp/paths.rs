//! Which path a stream takes, and how the interface runs the program.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::commands::paths;
use penstock_e2e::{Case, cases};
use serde_json::Value;

use crate::XDP;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        the_mode_suits_driver_and_mtu,
        a_broker_without_xdp_refuses_or_takes_tcp,
        packets_that_are_not_answered_fail_or_go_over_tcp,
        a_path_that_dies_at_once_falls_back_to_tcp,
        tcp_and_xdp_publishers_write_one_log,
        without_free_descriptors_the_interface_is_not_taken_for_gone,
        a_second_broker_on_the_interface_is_refused,
    ]
}

/// `--xdp-mode auto`, with the reason in the log.
fn the_mode_suits_driver_and_mtu(bed: &Bed) -> Result<()> {
    let native = r"eth0 runs the program in native mode: the driver \(veth\) supports it";
    let generic =
        "eth0 runs the program in generic mode: packets of MTU 9000 do not fit into one buffer";
    for (mtu, mode, reason) in [("1500", "native", native), ("9000", "generic", generic)] {
        bed.broker_ip(&["link", "set", "eth0", "mtu", mtu])?;
        let broker = bed.start_broker(&XDP)?;
        broker.assert_said(reason);
        let arguments = ["--mode", "xdp", "--brokers", BROKER, "--total-size", "1MiB"];
        assert_eq!(
            bed.publish(&arguments)?["messages_acked"],
            1024,
            "at MTU {mtu}"
        );
        assert_eq!(
            broker.stop()?.report["xdp"]["xdp_mode"],
            mode,
            "at MTU {mtu}"
        );
    }
    Ok(())
}

fn a_broker_without_xdp_refuses_or_takes_tcp(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let mut only_xdp =
        bed.publisher(&["--mode", "xdp", "--brokers", BROKER, "--total-size", "1MiB"]);
    bed.refuses("tcp only", &mut only_xdp);
    #[rustfmt::skip]
    let mut any = bed.publisher(&[
        "--mode", "auto", "--brokers", BROKER, "--total-size", "8MiB", "--format", "json"]);
    let ended = bed.run("publisher", &mut any)?.success()?;
    assert_eq!(paths(&ended.json()?), "tcp");
    assert!(
        ended.stderr.contains("tcp only"),
        "the log does not say why: {}",
        ended.stderr
    );
    broker.stop()?;
    Ok(())
}

/// Publishes 8 MiB with `--mode auto`; all of it is acknowledged, over tcp.
fn published_over_tcp(bed: &Bed) -> Result<Value> {
    #[rustfmt::skip]
    let report = bed.publish(&["--mode", "auto", "--brokers", BROKER, "--total-size", "8MiB"])?;
    assert_eq!(paths(&report), "tcp");
    assert_eq!(report["messages_acked"], 8192);
    Ok(report)
}

/// The packets come in on another interface than the broker looks at.
fn packets_that_are_not_answered_fail_or_go_over_tcp(bed: &Bed) -> Result<()> {
    let broker =
        bed.start_broker(&["--mode", "xdp", "--iface", "lo", "--listen", "0.0.0.0:1214"])?;
    #[rustfmt::skip]
    let mut only_xdp = bed.publisher(&[
        "--mode", "xdp", "--brokers", BROKER, "--total-size", "1MiB", "--timeout", "5"]);
    bed.refuses("xdp path fails", &mut only_xdp);
    published_over_tcp(bed)?;
    broker.stop()?;
    Ok(())
}

/// The end that receives takes no packet as large as payload needs: pings come through.
fn a_path_that_dies_at_once_falls_back_to_tcp(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&XDP)?;
    bed.broker_ip(&["link", "set", "eth0", "mtu", "1000"])?;
    let report = published_over_tcp(bed)?;
    assert_eq!(report["brokers"][0]["streams"][0]["moves"], 1);
    broker.stop()?;
    Ok(())
}

fn tcp_and_xdp_publishers_write_one_log(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[&XDP[..], &["--ring-size", "1GiB"]].concat())?;
    let arguments = |mode| {
        [
            "--mode",
            mode,
            "--brokers",
            BROKER,
            "--total-size",
            "128MiB",
        ]
    };
    let tcp = bed.background("tcp", &mut bed.publisher(&arguments("tcp")))?;
    let xdp = bed.background("xdp", &mut bed.publisher(&arguments("xdp")))?;
    tcp.wait()?.success()?;
    xdp.wait()?.success()?;
    let stopped = broker.stop()?;
    assert_eq!(stopped.report["topics"][0]["messages"], 262_144);
    let connections = stopped.report["connections"]
        .as_array()
        .expect("connections");
    let mut paths: Vec<_> = connections
        .iter()
        .filter_map(|each| each["path"].as_str())
        .collect();
    paths.sort_unstable();
    assert_eq!(paths, ["tcp", "xdp"]);
    #[rustfmt::skip]
    let mut read = bed.subscriber(&[
        "--from", "start", "--verify", "--output", "none", "--stat", "--format", "json"]);
    let read = bed.run("subscriber", read.arg("--path").arg(bed.log_of("penstock")))?;
    assert_eq!(read.success()?.json()?["messages"], 262_144);
    Ok(())
}

/// The kernel reports an interface through a socket: a broker that has no descriptor for one knows nothing,
/// and not that the interface is gone.
fn without_free_descriptors_the_interface_is_not_taken_for_gone(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[&XDP[..], &["--topic", "penstock"]].concat())?;
    let used = std::fs::read_dir(format!("/proc/{}/fd", broker.pid()))?.count();
    broker.limit(libc::RLIMIT_NOFILE, Some(used as u64))?;
    // It looks twice a second.
    thread::sleep(Duration::from_millis(1500));
    broker.limit(libc::RLIMIT_NOFILE, Some(1024))?;
    let report = bed.publish(&["--brokers", BROKER, "--mode", "xdp", "--total-size", "4MiB"])?;
    assert_eq!(paths(&report), "xdp");
    let log = broker.stop()?.log;
    assert!(!log.contains("is gone"), "{log}");
    Ok(())
}

fn a_second_broker_on_the_interface_is_refused(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&XDP)?;
    bed.broker(&XDP)
        .with(&["--listen", "0.0.0.0:1300"])
        .buffer_dir(bed.buffers().join("other"))
        .refuses("another penstock-broker serves eth0");
    assert_eq!(bed.programs_attached()?, 1);
    broker.stop()?;
    assert_eq!(bed.programs_attached()?, 0);
    Ok(())
}
