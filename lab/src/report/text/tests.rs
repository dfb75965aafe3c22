//! Tests of the reports, and the example report that other tests share.

use penstock_runtime::profile::StageReport;

use super::markdown::table;
use super::throughput::verification;
use super::*;
use crate::measure::environment::Environment;
use crate::report::model::{Baseline, BaselineRow, Broker, Throughput};
use crate::report::model::{ConnectionPoint, Diagnosed, Point, Publisher, Rerun, Timeline};
use penstock_testbed::delay::{DelayLineCount, DelayReport};
use penstock_testbed::faults::Direction;
use penstock_testbed::faults::{FaultReport, LinkFaults};
use penstock_testbed::program_reports::{AckLatency, Connection};
use penstock_testbed::settings::Profile;
use penstock_testbed::verify::StreamCheck;

fn stage(name: &str) -> StageReport {
    StageReport {
        name: name.to_owned(),
        percent: 12.345,
        ns_per_batch: 678.9,
        calls: 4,
        total_ns: 2716,
    }
}

pub fn example_environment() -> Environment {
    Environment {
        date: "2026-01-02T03:04:05Z".to_owned(),
        command_line: "penstock-lab throughput --brokers 1".to_owned(),
        version: "0.1.0".to_owned(),
        kernel: "6.18".to_owned(),
        cpu_model: "some CPU".to_owned(),
        cpus: 2,
        rmem_max: "4194304".to_owned(),
        wmem_max: "4194304".to_owned(),
        tcp_rmem: "4096 131072 33554432".to_owned(),
        tcp_wmem: "4096 16384 4194304".to_owned(),
        congestion_control: "cubic".to_owned(),
    }
}

fn example_connection() -> Connection {
    Connection {
        peer: "10.214.0.1:40000".to_owned(),
        path: "tcp".to_owned(),
        topic: "penstock".to_owned(),
        session: "0123456789abcdef".to_owned(),
        stream: 0,
        rcvbuf_requested: Some(33_554_432),
        rcvbuf_effective: 8_388_608,
        rcvbuf_capped: true,
        sndbuf_requested: None,
        sndbuf_effective: 87_040,
        window_scale: Some(10),
        rcv_ssthresh_first: Some(65_483),
        rcv_space_first: Some(65_483),
        batches: 4,
        payload_bytes: 4096,
        ended: "end of stream".to_owned(),
    }
}

fn example_broker() -> Broker {
    Broker {
        index: 0,
        address: "10.214.0.2:1214".to_owned(),
        messages_in_log: 4,
        payload_bytes: 4096,
        batches: 4,
        ring_bytes: 256 << 20,
        peak_rss_bytes: 260 << 20,
        active_seconds: 0.5,
        cpu_seconds: 0.25,
        cpu_seconds_per_gb: 0.75,
        recv_calls: 10,
        recv_calls_per_batch: 2.5,
        bytes_per_recv: 409.6,
        eagain: 3,
        stages: vec![stage("DrainHeader")],
        connections: vec![example_connection()],
        counters: [("refused".to_owned(), 7), ("timed out".to_owned(), 0)].into(),
        xdp: Some(
            [
                ("acks".to_owned(), 17.into()),
                ("refused".to_owned(), 0.into()),
            ]
            .into(),
        ),
    }
}

/// A successful run of one broker.
pub fn example() -> Throughput {
    Throughput {
        kind: "throughput".to_owned(),
        mode: "tcp".to_owned(),
        profile: Profile::Wire,
        mtu: 1500,
        num_brokers: 1,
        message_size: Some(1024),
        ack: 1,
        order: 0,
        threads_per_broker: 1,
        input: None,
        messages_sent: 4,
        messages_acked: 4,
        messages_in_logs: 4,
        payload_bytes: 4096,
        seconds: 0.5,
        bandwidth_mb_per_s: 884.53,
        limits: None,
        percent_of_limit: Some(86.4),
        problems: Vec::new(),
        publisher: Publisher {
            batches: 4,
            cpu_seconds: 0.25,
            cpu_seconds_per_gb: 0.5,
            peak_rss_bytes: 10 << 20,
            ack_latency_us: Some(AckLatency {
                p50: 51.0,
                p99: 99.0,
                p999: 999.0,
                max: 1234.0,
                count: 4,
            }),
            stages: vec![stage("SendPayload")],
            sessions: Vec::new(),
        },
        brokers: vec![example_broker()],
        verification: None,
        faults: None,
        delay: None,
        timeline: None,
        diagnosis: None,
        not_diagnosed: None,
        rerun: None,
        host_load: None,
        warnings: Vec::new(),
        environment: example_environment(),
    }
}

/// The same, with a diagnosis, a second run, and figures over time.
pub fn diagnosed() -> Throughput {
    let end = serde_json::json!({
        "recv_q": 668.0, "receive_buffer": 131_072, "rcv_space": 43_690, "rcv_ssthresh": 80_495,
        "rcv_wscale": 10, "busy": 1.0, "rwnd_limited": 0.33, "sndbuf_limited": 0.0,
        "app_limited": 0.0, "cwnd_full": 0.0, "rtt_us": 10_274.0, "retransmits": 2,
    });
    let found = serde_json::json!({
        "verdicts": [{
            "cause": "receive-window-limited", "title": "The window is too small",
            "confidence": 0.8, "reason": "rmem_max caps the buffer",
            "evidence_for": ["the sender waited"], "evidence_against": ["a little"],
            "next_command": "scripts/tune_kernel_buffers.sh show",
        }],
        "unavailable": [{ "what": "system calls by name", "why": "no root", "how": "sudo" }],
        "sample": {
            "seconds": 5.0,
            "connections": [{
                "local": "10.214.0.2:1214", "remote": "10.214.0.1:40000", "receives": true,
                "end": end, "peer": end,
            }],
            "processes": [{
                "name": "penstock-broker",
                "threads": [{ "name": "worker-0", "run": 0.25, "wait": 0.05 }],
            }],
            "cores": [{ "idle": 0.96, "softirq": 0.01 }],
            "syscalls": null,
        },
    });
    let point = |seconds: f64, rate: f64| Point {
        seconds,
        mb_per_s: vec![rate],
        connections: vec![ConnectionPoint {
            peer: "10.214.0.1:40000".to_owned(),
            bytes_received: 5 << 20,
            rcv_wnd: 65_536,
            ..ConnectionPoint::default()
        }],
        ..Point::default()
    };
    let mut report = example();
    report.timeline = Some(Timeline {
        interval_ms: 200,
        points: vec![point(0.2, 100.0), point(0.4, 800.0), point(0.6, 400.0)],
    });
    report.diagnosis = Some(Diagnosed {
        broker: 0,
        after_seconds: 0.5,
        found,
    });
    let mut after = example();
    after.bandwidth_mb_per_s = 1769.06;
    let fix = "brokers with --rcvbuf-force".to_owned();
    let cause = "receive-window-limited";
    report.rerun = Some(Rerun::made(cause, fix, "after-fix", &report, &after));
    report
}

#[test]
fn a_diagnosed_run_is_told_in_the_order_in_which_one_looks() {
    let text = throughput(&diagnosed());
    let wanted = [
        "## Phase 1-2: what was measured",
        "rcv_space 43690",
        "rwnd_limited 33 %",
        "not observed: no root",
        "96.0 % idle",
        "## Phase 3: interpretation",
        "+ the sender waited",
        "− a little",
        "Not observed: system calls by name (no root; sudo).",
        "## Root cause",
        "rmem_max caps the buffer.",
        "## Re-run after the fix",
        "brokers with --rcvbuf-force: 1769.06 MB/s instead of 884.53 MB/s (+100.0 %)",
        "## Next steps",
        "tune_kernel_buffers.sh show",
        "after-fix/report.md",
        "# The run in full",
        "## Publisher: where the time went",
    ];
    let mut rest = text.as_str();
    for part in wanted {
        let at = rest.find(part);
        let at = at.unwrap_or_else(|| panic!("{part:?} is missing, or not in its place:\n{text}"));
        rest = &rest[at..];
    }
    let terminal = throughput_summary(&diagnosed());
    assert!(
        terminal.contains("- 0.80 receive-window-limited"),
        "{terminal}"
    );
    assert!(terminal.contains("▂█▅"), "{terminal}");
}

#[test]
fn where_nothing_can_be_fixed_the_reason_is_told() {
    let mut report = diagnosed();
    report.rerun = Some(Rerun::not_made("sender-cpu", "no core is left"));
    let text = throughput(&report);
    assert!(
        text.contains("None: the lab has no fix for sender-cpu: no core is left."),
        "{text}"
    );
    report.rerun = None;
    assert!(throughput(&report).contains("Not requested (--fix)."));
    (report.diagnosis, report.not_diagnosed) = (None, Some("too short".to_owned()));
    assert!(throughput(&report).contains("Not diagnosed: too short"));
}

/// Over xdp the sockets only control.
#[test]
fn packets_over_xdp_are_told_from_the_sockets_beside_them() {
    let mut report = diagnosed();
    assert!(throughput(&report).contains("payload socket"));
    let xdp = serde_json::json!({"packets": 70, "bytes": 9000, "dropped": {"fill ring empty": 3}, "missing": 4,
        "hit_rate": 0.5, "full_looks": 0.25, "idle": 0.1, "credit": 0.2, "congestion": 0.3, "window": 65536});
    report.diagnosis.as_mut().unwrap().found["sample"]["broker"] =
        serde_json::json!({"workers": [{"thread": "worker-0"}, {"thread": "xdp-0", "xdp": xdp}]});
    let text = throughput(&report);
    for wanted in [
        "xdp-0: 70 with 9000 bytes; dropped: 3 fill ring empty; 4 never arrived",
        "no credit 0.20",
        "control socket",
    ] {
        assert!(text.contains(wanted), "{wanted} is missing from:\n{text}");
    }
    assert!(!text.contains("payload socket"), "{text}");
}

#[test]
fn what_a_report_holds_is_read_back_as_it_was() {
    let report = diagnosed();
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(
        json["diagnosis"]["verdicts"][0]["cause"],
        "receive-window-limited"
    );
    let back: Throughput = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(serde_json::to_value(&back).unwrap(), json);
}

#[test]
fn the_report_shows_what_a_reader_looks_for() {
    let text = throughput(&example());
    for wanted in [
        "884.5 MB/s",
        "86 %",
        "51 / 99 / 999",
        "SendPayload",
        "DrainHeader",
        "12.35",
        "33554432",
        "8388608",
        "by rmem_max",
        "not set",
        "256.0 MiB",
        "4.0 MiB",
        "refused",
        "penstock-lab throughput --brokers 1",
    ] {
        assert!(text.contains(wanted), "{wanted} is missing from:\n{text}");
    }
    assert!(
        !text.contains("timed out"),
        "counters at zero are noise:\n{text}"
    );
}

#[test]
fn problems_stand_at_the_top() {
    let mut report = example();
    report.problems.push("4 messages sent, 3 acked".to_owned());
    let text = throughput(&report);
    let head = text.split("| what").next().unwrap();
    assert!(
        head.contains("Not a success") && head.contains("3 acked"),
        "{head}"
    );
}

#[test]
fn differences_of_a_stream_are_shown() {
    let mut report = example();
    let check = |differences: Vec<String>| StreamCheck {
        broker: 0,
        session: "00".to_owned(),
        stream: 1,
        messages: 4,
        sha256: Some("abcd".to_owned()),
        differences,
    };
    report.verification = Some(vec![
        check(Vec::new()),
        check(vec!["SHA-256 differs".to_owned()]),
    ]);
    let text = verification(&report);
    assert!(
        text.contains("equal") && text.contains("SHA-256 differs"),
        "{text}"
    );
}

#[test]
fn faults_are_shown_as_far_as_they_happened() {
    let mut report = example();
    report.faults = Some(FaultReport {
        asked: "loss=1%".to_owned(),
        seed: 7,
        links: vec![LinkFaults {
            broker: 0,
            direction: Direction::ToBroker,
            counts: [
                ("packets".to_owned(), 1234),
                ("lost".to_owned(), 12),
                ("held".to_owned(), 0),
            ]
            .into(),
        }],
    });
    let text = throughput(&report);
    for wanted in ["`loss=1%`, seed 7", "to broker", "packets 1234", "lost 12"] {
        assert!(text.contains(wanted), "{wanted} is missing from:\n{text}");
    }
    assert!(!text.contains("held"), "{text}");
    let json = serde_json::to_value(report).unwrap();
    let link = json.pointer("/faults/links/0").unwrap();
    assert_eq!(
        (&link["direction"], &link["lost"]),
        (&"to_broker".into(), &12.into())
    );
}

#[test]
fn a_delay_is_shown_with_what_the_lines_carried() {
    let mut report = example();
    report.delay = Some(DelayReport {
        delay_us: 10_000,
        links: vec![DelayLineCount {
            broker: 0,
            packets: 4321,
            dropped: 17,
        }],
    });
    let text = throughput(&report);
    for wanted in ["waited 10000 µs", "4321", "17"] {
        assert!(text.contains(wanted), "{wanted} is missing from:\n{text}");
    }
}

#[test]
fn json_has_the_names_that_others_rely_on() {
    let json = serde_json::to_value(example()).unwrap();
    for name in [
        "/kind",
        "/mode",
        "/profile",
        "/mtu",
        "/num_brokers",
        "/message_size",
        "/messages_sent",
        "/messages_acked",
        "/messages_in_logs",
        "/payload_bytes",
        "/seconds",
        "/bandwidth_mb_per_s",
        "/percent_of_limit",
        "/publisher/ack_latency_us/p999",
        "/publisher/stages/0/name",
        "/publisher/stages/0/percent",
        "/publisher/stages/0/ns_per_batch",
        "/brokers/0/stages/0/percent",
        "/brokers/0/recv_calls_per_batch",
        "/brokers/0/bytes_per_recv",
        "/brokers/0/cpu_seconds",
        "/brokers/0/cpu_seconds_per_gb",
        "/brokers/0/peak_rss_bytes",
        "/brokers/0/connections/0/peer",
        "/brokers/0/connections/0/rcvbuf_requested",
        "/brokers/0/connections/0/rcvbuf_effective",
        "/brokers/0/connections/0/window_scale",
    ] {
        assert!(json.pointer(name).is_some_and(|v| !v.is_null()), "{name}");
    }
    assert_eq!(json["profile"], "wire");
}

#[test]
fn tables_line_up() {
    let rows = [
        ["a".to_owned(), "1".to_owned()],
        ["much longer".to_owned(), "22".to_owned()],
    ];
    let text = table(["x", "yy"], &rows);
    let widths: Vec<_> = text.lines().map(|line| line.chars().count()).collect();
    assert_eq!(widths, [widths[0]; 4], "{text}");
}

#[test]
fn the_baseline_table_shows_medians_spread_and_both_ratios() {
    let report = Baseline {
        kind: "baseline".to_owned(),
        mode: "tcp".to_owned(),
        message_size: 1024,
        size_bytes: 2 << 30,
        iperf3_version: "iperf 3.12".to_owned(),
        rows: vec![BaselineRow::of(
            Profile::Offload,
            1500,
            4,
            &[(900.0, 1000.0), (800.0, 1000.0)],
        )],
        host_load: None,
        warnings: Vec::new(),
        environment: example_environment(),
    };
    let text = baseline(&report);
    for wanted in [
        "offload",
        "850 (800..900)",
        "1000 (1000..1000)",
        "**0.850** (0.800..0.900)",
    ] {
        assert!(text.contains(wanted), "{wanted} is missing from:\n{text}");
    }
}
