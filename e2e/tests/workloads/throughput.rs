//! The workload through the lab, with both profiles, contents verified; through the script with the
//! original's variables; the baseline.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use penstock_e2e::bed::{Bed, binaries, root};
use penstock_e2e::commands::command;
use penstock_e2e::lab::{LabRun, assert_path, assert_verified, brokers, count, figure, rows};
use penstock_e2e::{Case, cases};
use serde_json::Value;

const BROKERS: usize = 4;

pub fn cases() -> impl IntoIterator<Item = Case> {
    // Each uses all cores.
    let runs = cases![
        four_brokers_with_the_wire_profile,
        four_brokers_with_the_offload_profile,
        four_brokers_with_jumbo_packets,
        several_streams_and_workers_per_broker,
        without_acks,
        the_script_takes_the_variables_of_the_original,
        a_baseline_beside_iperf3,
    ];
    let usage = cases![the_script_refuses_wrong_variables];
    runs.map(Case::alone).into_iter().chain(usage)
}

/// A run of the lab that leaves both reports.
fn lab(bed: &Bed, command: &mut Command) -> Result<LabRun> {
    let lab = LabRun::of(bed, command)?;
    assert!(!lab.text("report.md")?.is_empty());
    Ok(lab)
}

/// A verified run with this number of streams.
fn verified(bed: &Bed, streams: usize, arguments: &[&str]) -> Result<LabRun> {
    let first = ["throughput", "--verify"];
    let lab = lab(bed, &mut bed.lab(&[&first, arguments].concat()))?;
    assert_verified(&lab.report, streams);
    Ok(lab)
}

fn workload(bed: &Bed, profile: &str, mtu: u64) -> Result<()> {
    const BYTES: u64 = 512 << 20;
    let words = mtu.to_string();
    #[rustfmt::skip]
    let lab = verified(bed, BROKERS, &[
        "--profile", profile, "--mtu", &words, "--brokers", "4", "--total-size", "512MiB"])?;
    let report = &lab.report;
    assert_eq!(report["kind"], "throughput");
    assert_eq!(report["profile"], profile);
    assert_eq!(report["mtu"], mtu);
    for name in ["messages_sent", "messages_acked", "messages_in_logs"] {
        assert_eq!(report[name], BYTES / 1024, "{name}");
    }
    assert_eq!(report["payload_bytes"], BYTES);
    assert_eq!(brokers(report).len(), BROKERS);
    let mut connections = 0;
    for broker in brokers(report) {
        assert!(count(broker, "/messages_in_log") > 0, "{broker}");
        for connection in rows(broker, "/connections") {
            assert!(count(connection, "/rcvbuf_requested") > 0, "{connection}");
            assert!(count(connection, "/rcvbuf_effective") > 0, "{connection}");
            assert!(!connection["window_scale"].is_null(), "{connection}");
            connections += 1;
        }
    }
    assert_eq!(connections, BROKERS, "connections with figures");
    let stages = names(rows(report, "/publisher/stages"));
    assert_eq!(stages, ["BufferWrite", "SendPayload", "WaitAck"]);
    let stages = names(rows(report, "/brokers/0/stages"));
    #[rustfmt::skip]
    assert_eq!(stages[..5], [
        "DrainHeader", "ReserveLogSpace", "DrainPayloadToBuffer", "Commit", "SendAck"]);
    let logs = (0..BROKERS).map(|index| format!("broker-{index}.log"));
    for log in logs.chain(["publisher.log".to_owned()]) {
        assert!(lab.folder.join(&log).exists(), "{log} is not there");
    }
    Ok(())
}

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter().filter_map(|row| row["name"].as_str()).collect()
}

fn four_brokers_with_the_wire_profile(bed: &Bed) -> Result<()> {
    workload(bed, "wire", 1500)
}

fn four_brokers_with_the_offload_profile(bed: &Bed) -> Result<()> {
    workload(bed, "offload", 1500)
}

fn four_brokers_with_jumbo_packets(bed: &Bed) -> Result<()> {
    workload(bed, "wire", 9000)
}

fn several_streams_and_workers_per_broker(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    verified(bed, 6, &[
        "--brokers", "2", "--threads-per-broker", "3", "--workers", "2", "--total-size", "256MiB"])?;
    Ok(())
}

fn without_acks(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let lab = verified(bed, 2, &[
        "--brokers", "2", "--ack", "0", "--total-size", "128MiB", "--message-size", "100"])?;
    assert!(count(&lab.report, "/messages_in_logs") > 1_000_000);
    Ok(())
}

/// A folder where the script finds the programs that are tested, and a cargo that need not build them.
fn make_target(bed: &Bed) -> Result<PathBuf> {
    let target = bed.file("target");
    fs::create_dir(&target)?;
    symlink(binaries()?, target.join("release"))?;
    for name in ["cargo", "rustc"] {
        let path = target.join(name);
        fs::write(
            &path,
            "#!/bin/sh\n[ \"$1\" != --version ] || echo cargo 99.0.0\n",
        )?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(target)
}

/// And options of the lab beside them.
fn the_script_takes_the_variables_of_the_original(bed: &Bed) -> Result<()> {
    let target = make_target(bed)?;
    let path = std::env::var("PATH").context("no PATH")?;
    let path = format!("{}:{path}", target.display());
    let variables = [
        ("ORDER", "0"),
        ("ACK", "1"),
        ("TEST_TYPE", "5"),
        ("TOTAL_MESSAGE_SIZE", "134217728"),
        ("MESSAGE_SIZE", "1024"),
        ("NUM_BROKERS", "2"),
    ];
    let of_path: [(&[(&str, &str)], &str); 2] =
        [(&[], "tcp"), (&[("MODE", "xdp"), ("MTU", "1500")], "xdp")];
    for (further, path_taken) in of_path {
        let mut script = command(root().join("scripts/run_throughput.sh"), &["--verify"]);
        script.env("CARGO_TARGET_DIR", &target).env("PATH", &path);
        script.envs(variables).envs(further.iter().copied());
        let lab = lab(bed, &mut script)?;
        assert_eq!(lab.report["messages_in_logs"], 131_072);
        assert_verified(&lab.report, 2);
        assert_path(&lab.report, path_taken);
    }
    Ok(())
}

fn the_script_refuses_wrong_variables(bed: &Bed) -> Result<()> {
    for (variable, value) in [
        ("TEST_TYPE", "1"),
        ("ORDER", "9"),
        ("ACK", "2"),
        ("MODE", "x"),
        ("PROFILE", "x"),
        ("MESSAGE_SIZE", "x"),
        ("NUM_BROKERS", "0"),
    ] {
        let mut command = command(root().join("scripts/run_throughput.sh"), &[]);
        let ended = bed.run("script", command.env(variable, value))?;
        assert_eq!(ended.status.code(), Some(2), "{variable}={value}");
        let said = ended.said();
        assert!(said.contains(variable), "{variable} is not named: {said}");
    }
    Ok(())
}

fn a_baseline_beside_iperf3(bed: &Bed) -> Result<()> {
    let mut command = bed.lab(&["baseline", "--runs", "1", "--size", "128MiB"]);
    let report = lab(bed, &mut command)?.report;
    assert_eq!(report["kind"], "baseline");
    let cases = rows(&report, "/rows").iter();
    let cases: Vec<_> = cases
        .map(|row| {
            assert!(figure(row, "/penstock/median") > 0.0, "{row}");
            assert!(figure(row, "/iperf3/median") > 0.0, "{row}");
            assert!(figure(row, "/ratio") > 0.0, "{row}");
            let profile = row["profile"].as_str().unwrap_or_default();
            format!("{profile}-{}", row["connections"])
        })
        .collect();
    assert_eq!(cases, ["wire-1", "wire-4", "offload-1", "offload-4"]);
    Ok(())
}
