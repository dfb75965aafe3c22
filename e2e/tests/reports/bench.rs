//! The benchmark that measures every target.

use std::fs;

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::assert_says;
use penstock_e2e::lab::{LabRun, left_by, rows};
use penstock_e2e::{Case, cases};
use serde_json::Value;

/// Targets that are measured with both MTUs.
const TARGETS: [&str; 7] = [
    "xdp_raw",
    "xdp_tcp",
    "xdp_tcp_of_limits",
    "tcp_iperf3_wire_1",
    "ack_p50_full",
    "ack_p99_full",
    "cpu_both_hosts",
];

pub fn cases() -> impl IntoIterator<Item = Case> {
    let runs = cases![
        bench_reports_figures_targets_and_sentences,
        bench_reports_peers_and_absent_ones,
        an_interrupted_bench_leaves_nothing,
    ];
    let usage = cases![wrong_usage_of_bench_is_refused];
    let runs = runs.map(Case::long).map(Case::alone);
    runs.into_iter().chain(usage)
}

fn bench(bed: &Bed, arguments: &[&str]) -> Result<LabRun> {
    let first = ["bench", "--runs", "1", "--seconds", "0.1"];
    LabRun::of(bed, &mut bed.lab(&[&first, arguments].concat()))
}

fn bench_reports_figures_targets_and_sentences(bed: &Bed) -> Result<()> {
    let lab = bench(bed, &["--rows", "throughput,memory", "--format", "json"])?;
    let report = &lab.report;
    let printed: Value = serde_json::from_str(lab.printed())?;
    assert!(printed == *report, "what is printed is not report.json");
    assert_eq!(report["kind"], "bench");
    assert_eq!(report["complete"], true);
    let rows_ = rows(report, "/rows");
    for row in rows_ {
        assert_ne!(row["verdict"], "not_measured", "{row}");
        let has_sentence = row["sentence"]
            .as_str()
            .is_some_and(|text| !text.is_empty());
        assert!(row["verdict"] != "lost" || has_sentence, "{row}");
    }
    let ids = rows_.iter().filter_map(|row| row["id"].as_str());
    let ids: Vec<_> = ids.collect();
    for target in TARGETS {
        for mtu in ["1500", "9000"] {
            let id = format!("{target}_{mtu}");
            let count = ids.iter().filter(|its| **its == id).count();
            assert_eq!(count, 1, "rows of {id}");
        }
    }
    let idle = ids.iter().filter(|id| id.starts_with("idle_stream_"));
    assert_eq!(idle.count(), 2);
    let cases = rows(report, "/cases").iter();
    let contenders: Vec<_> = cases.flat_map(|case| rows(case, "/contenders")).collect();
    assert!(!contenders.is_empty());
    let mut failures = 0;
    for contender in contenders {
        failures += rows(contender, "/failures").len();
        // Of one that failed there may be none.
        for figure in contender["figures"].as_object().into_iter().flatten() {
            assert_eq!(rows(figure.1, "/runs").len(), 1, "{contender}");
        }
    }
    let entries = fs::read_dir(&lab.folder)?.flatten();
    let folders = entries.filter(|entry| entry.path().is_dir());
    assert_eq!(folders.count(), failures, "folders of runs that failed");
    assert_says(&lab.text("report.md")?, r"(?m)^\| what must hold");
    Ok(())
}

fn bench_reports_peers_and_absent_ones(bed: &Bed) -> Result<()> {
    let lab = bench(bed, &["--rows", "peers", "--format", "markdown"])?;
    // The machine is named.
    assert_says(&lab.stdout, "(?m)^.penstock-lab bench.: ");
    assert_says(&lab.stdout, r"(?m)^\| xdp / Aeron C, 1 KiB, MTU 1500 ");
    // How to get it.
    assert_says(&lab.stdout, "--aeron");
    let shown = bed.lab_report(&lab.folder, &[])?;
    assert_says(&shown, "xdp / nats-server");
    Ok(())
}

fn an_interrupted_bench_leaves_nothing(bed: &Bed) -> Result<()> {
    let arguments = [
        "bench",
        "--runs",
        "100",
        "--seconds",
        "0.1",
        "--rows",
        "throughput",
    ];
    let mut lab = bed.start_lab(&arguments)?;
    lab.until("the first round", |lab| lab.stderr().contains("round 1"));
    let pid = lab.pid();
    assert!(!left_by(pid).is_empty());
    let ended = lab.end(libc::SIGINT)?;
    assert_eq!(ended.status.code(), Some(130), "{}", ended.said());
    assert_eq!(left_by(pid), Vec::<String>::new());
    Ok(())
}

fn wrong_usage_of_bench_is_refused(bed: &Bed) -> Result<()> {
    let wrong = [
        ("throughput, brokers, latency", ["--rows", "kafka"]),
        ("1..=1000", ["--runs", "0"]),
        ("such as|nearest", ["--seconds", "0"]),
    ];
    for (message, arguments) in wrong {
        bed.refuses(message, bed.lab(&["bench"]).args(arguments));
    }
    Ok(())
}
