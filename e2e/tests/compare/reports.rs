//! Reports of comparisons and of limits.

use anyhow::Result;
use penstock_e2e::bed::{Bed, root};
use penstock_e2e::commands::{assert_says, command};
use penstock_e2e::{Case, cases};
use serde_json::{Value, json};

use crate::lab_report::{LabReport, SMALL, streams};

const METRICS: [&str; 9] = [
    "payload_mb_per_s",
    "host_cpu_s_per_gb",
    "broker_cpu_s_per_gb",
    "publisher_cpu_s_per_gb",
    "drops",
    "retransmits",
    "ack_latency_us_p50",
    "ack_latency_us_p99",
    "ack_latency_us_p999",
];

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        wire_profile_with_both_mtus_and_modes,
        offload_profile_with_two_brokers,
        limits_and_throughput_in_percent_of_them,
        wrong_usage,
    ]
}

fn compare(bed: &Bed, arguments: &[&str]) -> Result<LabReport> {
    let mut command = bed.lab(&[&["compare"], &SMALL[..], arguments].concat());
    LabReport::of(bed, &mut command)
}

fn text<'a>(row: &'a Value, field: &str) -> &'a str {
    row[field].as_str().unwrap_or_default()
}

/// The work of each host is measured in one mode, where the kernel allows the samples.
fn is_by_mode(row: &Value) -> bool {
    let metric = text(row, "metric");
    !metric.starts_with("sending_host") && !metric.starts_with("receiving_host")
}

fn has_both_modes(row: &Value) -> bool {
    let modes = row["xdp_by_mode"].as_object();
    modes.is_some_and(|modes| {
        modes.len() == 2 && modes.contains_key("generic") && modes.contains_key("native")
    })
}

/// One run, whose figure is the median.
fn is_of_one_run(figures: &Value) -> bool {
    let median = &figures["median"];
    figures["runs"] == json!([median]) && figures["min"] == *median && figures["max"] == *median
}

fn wire_profile_with_both_mtus_and_modes(bed: &Bed) -> Result<()> {
    let report = compare(bed, &["--profile", "wire"])?;
    assert_eq!(report.json["kind"], "compare");
    for mtu in [1500, 9000] {
        for metric in METRICS {
            let wanted = if metric.starts_with("ack_") { 2 } else { 1 };
            let is_it = |row: &Value| {
                row["profile"] == "wire" && row["mtu"] == mtu && row["metric"] == metric
            };
            assert_eq!(report.count(is_it), wanted, "rows of {metric}, MTU {mtu}");
        }
    }
    assert_eq!(
        report.count(|row| row["rate"] == 1000 || row["rate"] == 1000.0),
        6
    );
    for row in report.rows() {
        assert!(
            is_of_one_run(&row["xdp"]) && is_of_one_run(&row["tcp"]),
            "{row}"
        );
        let median = |path: &str| row[path]["median"].as_f64().expect("a median");
        if median("tcp") > 0.0 {
            let ratio = row["ratio"].as_f64().expect("a ratio");
            assert!(
                (ratio - median("xdp") / median("tcp")).abs() < 1e-9,
                "{row}"
            );
        }
        assert_eq!(has_both_modes(row), is_by_mode(row), "{row}");
        if is_by_mode(row) {
            let better = &row["xdp_by_mode"][text(row, "xdp_mode")];
            assert_eq!(row["xdp"], *better, "the better mode: {row}");
        }
        let poll = if row["rate"].is_null() {
            "adaptive"
        } else {
            "busy"
        };
        assert_eq!(row["poll"], poll, "{row}");
    }
    if report.json["host_times_unavailable"]
        .as_str()
        .is_none_or(str::is_empty)
    {
        assert_eq!(
            report.count(|row| !is_by_mode(row)),
            6,
            "rows of one host's work"
        );
    }
    let is_above = |figure: &Value| figure.as_f64().is_some_and(|percent| percent > 0.0);
    let of_limit = |row: &Value| {
        let percent = &row["percent_of_limit"];
        is_above(&percent["xdp"]) && is_above(&percent["tcp"])
    };
    assert_eq!(report.count(of_limit), 2, "% of limit");
    assert_eq!(
        limits(&report),
        [
            "raw_af_xdp_native 1500",
            "raw_af_xdp_generic 1500",
            "iperf3_1 1500",
            "iperf3_4 1500",
            "raw_af_xdp_native 9000",
            "raw_af_xdp_generic 9000",
            "iperf3_1 9000",
            "iperf3_4 9000",
            "memory_copy ",
        ]
    );
    report.assert_every_run()?;
    report.assert_picture()?;
    let runs = report
        .stderr
        .lines()
        .filter(|line| line.contains(" run 1/1: "));
    assert_eq!(runs.count(), 18, "{}", report.stderr);
    Ok(())
}

/// Those that were measured, with their MTU.
fn limits(report: &LabReport) -> Vec<String> {
    let limits = report.json["limits"].as_array().into_iter().flatten();
    let measured = limits.filter(|limit| limit["mb_per_s"].as_f64() > Some(0.0));
    let mtu = |limit: &Value| {
        limit["mtu"]
            .as_u64()
            .map_or_else(String::new, |mtu| mtu.to_string())
    };
    measured
        .map(|limit| format!("{} {}", text(limit, "name"), mtu(limit)))
        .collect()
}

/// And two streams to each.
fn offload_profile_with_two_brokers(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let report = compare(bed, &[
        "--profile", "offload", "--mtu", "1500", "--brokers", "2", "--threads-per-broker", "2"])?;
    assert_eq!(report.count(has_both_modes), 12);
    report.assert_every_run()?;
    for publisher in report.publishers()? {
        assert_eq!(streams(&publisher).count(), 4);
    }
    Ok(())
}

fn limits_and_throughput_in_percent_of_them(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let mut command = bed.lab(&[
        "limits", "--runs", "2", "--seconds", "1", "--profile", "wire", "--mtu", "9000"]);
    let report = LabReport::of(bed, &mut command)?;
    assert_eq!(report.json["kind"], "limits");
    let limits = report.json["limits"].as_array().expect("limits");
    let has_two_runs = |limit: &&Value| {
        limit["runs"].as_array().map(Vec::len) == Some(2) && limit["mb_per_s"].as_f64() > Some(0.0)
    };
    assert_eq!(limits.iter().filter(has_two_runs).count(), 5);
    let is_described = |limit: &&Value| {
        let is_sent = limit["datagram"].as_f64() > Some(0.0);
        !limit["mode"].is_null() && is_sent && !limit["lost_percent"].is_null()
    };
    assert_eq!(limits.iter().filter(is_described).count(), 2, "raw limits");
    #[rustfmt::skip]
    let mut command = bed.lab(&[
        "throughput", "--mode", "xdp", "--brokers", "1", "--total-size", "64MiB", "--limits"]);
    let report = LabReport::of(bed, &mut command)?;
    assert!(report.json["percent_of_limit"].as_f64() > Some(0.0));
    assert_eq!(report.json["limits"].as_array().map(Vec::len), Some(4));
    Ok(())
}

fn wrong_usage(bed: &Bed) -> Result<()> {
    let wrong: [(&str, &[&str]); 8] = [
        ("--runs", &["--runs", "0"]),
        ("576", &["--mtu", "100"]),
        ("native", &["--xdp-mode", "fast"]),
        ("wire", &["--profile", "best"]),
        ("--brokers", &["--brokers", "0"]),
        ("--mode", &["--mode", "xdp"]),
        ("--size", &["--size", "many"]),
        ("--remote", &["--remote", "10.0.0.1:1", "--mtu", "1500"]),
    ];
    for (words, arguments) in wrong {
        let mut command = bed.lab(&["compare"]);
        let ended = bed.run("lab", command.args(arguments))?;
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}");
        assert!(
            ended.said().contains(words),
            "{arguments:?}: {}",
            ended.said()
        );
    }
    let refuses = |regex: &str, arguments: &[&str]| {
        bed.refuses(regex, bed.lab(&["compare"]).args(arguments));
    };
    refuses("leave it out", &["--ack", "0"]);
    refuses("less than one message", &["--size", "10"]);
    refuses("HOST:PORT", &["--remote", "nowhere"]);
    refuses(
        "penstock-broker where it runs",
        &["--remote", "127.0.0.1:1", "--workers", "2"],
    );
    let script = root().join("scripts/compare.sh");
    let help = bed
        .run("help", &mut command(script, &["--help"]))?
        .success()?;
    assert_says(&help.stdout, "--quick");
    Ok(())
}
