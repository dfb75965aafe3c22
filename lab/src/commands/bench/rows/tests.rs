//! Rows of the benchmark, from figures made up for them.

use super::*;
use crate::report::model::bench_figures::{
    BROKER_CORES, BROKER_CPU, HOST_BUSY, OTHER_CORES, PUBLISHER_CORES, PUBLISHER_CPU,
};
use penstock_testbed::settings::{Profile, XdpMode};

/// A contender whose runs had these figures.
pub fn contender(kind: &str, figures: &[(&str, &[f64])]) -> BenchContender {
    BenchContender {
        kind: kind.to_owned(),
        mode: None,
        streams: 1,
        brokers: 1,
        figures: figures
            .iter()
            .map(|(name, runs)| ((*name).to_owned(), Spread::of(runs.to_vec())))
            .collect(),
        failures: Vec::new(),
        absent: None,
    }
}

pub fn case(group: &str, id: &str, contenders: Vec<BenchContender>) -> BenchCase {
    BenchCase {
        id: id.to_owned(),
        group: group.to_owned(),
        profile: Profile::Wire,
        mtu: 1500,
        message_size: 1024,
        rate: None,
        payload_bytes: 1_000_000,
        contenders,
    }
}

fn ours(kind: &str, rate: f64, wait: f64, cpu: f64) -> BenchContender {
    let figures = [
        (PAYLOAD, rate),
        (P50, wait),
        (P99, 2.0 * wait),
        (HOST_CPU, cpu),
        (PUBLISHER_CPU, 0.5 * cpu),
        (BROKER_CPU, 0.3 * cpu),
        (HOST_BUSY, 0.99),
        (OTHER_CORES, 0.1),
        (PUBLISHER_CORES, 1.0),
        (BROKER_CORES, 0.8),
    ];
    let runs = figures.map(|(name, value)| (name, [value; 3]));
    let figures: Vec<(&str, &[f64])> = runs.iter().map(|(n, runs)| (*n, &runs[..])).collect();
    contender(kind, &figures)
}

pub fn full_speed() -> BenchCase {
    let mut native = ours("xdp", 562.0, 4135.0, 2.9);
    native.mode = Some(XdpMode::Native);
    let mut generic = ours("xdp", 500.0, 100.0, 1.0);
    generic.mode = Some(XdpMode::Generic);
    let mut raw = contender("raw_af_xdp", &[(PAYLOAD, &[853.0, 840.0, 860.0])]);
    raw.mode = Some(XdpMode::Native);
    let iperf3 = contender("iperf3", &[(PAYLOAD, &[690.0, 700.0, 680.0])]);
    let all = vec![
        native,
        generic,
        ours("tcp", 630.0, 1189.0, 4.1),
        raw,
        iperf3,
    ];
    case("throughput", "full-speed-1500", all)
}

fn row<'a>(rows: &'a [BenchRow], id: &str) -> &'a BenchRow {
    let found = rows.iter().find(|row| row.id == id);
    found.unwrap_or_else(|| panic!("{id}: {:?}", rows.iter().map(|r| &r.id).collect::<Vec<_>>()))
}

#[test]
fn rows_take_the_mode_that_moves_more_and_say_why_they_are_lost() {
    let rows = rows(&[full_speed()]);
    let raw = row(&rows, "xdp_raw_1500");
    assert_eq!(raw.verdict, Verdict::Lost);
    assert!((raw.value.unwrap() - 562.0 / 853.0).abs() < 1e-9);
    assert_eq!(raw.ours.as_ref().unwrap().name, "xdp native");
    assert_eq!(raw.of_rounds.as_ref().unwrap().runs.len(), 3);
    let why = raw.sentence.as_deref().unwrap();
    assert!(why.contains("562 MB/s, raw AF_XDP native 853"), "{why}");
    assert!(why.contains("no core was idle"), "{why}");
    let tcp = row(&rows, "xdp_tcp_1500");
    let why = tcp.sentence.as_deref().unwrap();
    assert!(
        why.contains("bare AF_XDP socket moved 853 MB/s") && !why.contains("out of reach"),
        "{why}"
    );
    let cpu = row(&rows, "cpu_both_hosts_1500");
    assert_eq!((cpu.verdict, &cpu.sentence), (Verdict::Met, &None));
    let p50 = row(&rows, "ack_p50_full_1500");
    let why = p50.sentence.as_deref().unwrap();
    assert!(
        why.contains("4135 µs") && why.contains("2324 kB in flight, against 749"),
        "{why}"
    );
    let limits = row(&rows, "xdp_tcp_of_limits_1500");
    let wanted = (562.0 / 630.0) / (853.0 / 690.0);
    assert!((limits.value.unwrap() - wanted).abs() < 1e-9);
    assert!(
        limits
            .sentence
            .as_deref()
            .unwrap()
            .contains("66 % of its limit")
    );
}

#[test]
fn a_target_beyond_the_bare_socket_is_called_out_of_reach() {
    let mut case = full_speed();
    case.contenders[3]
        .figures
        .insert(PAYLOAD.to_owned(), Spread::of(vec![600.0; 3]));
    let rows = rows(&[case]);
    let why = row(&rows, "xdp_tcp_1500").sentence.clone().unwrap();
    assert!(
        why.contains("0.95 of tcp: the target is out of reach"),
        "{why}"
    );
}

#[test]
fn large_frames_have_targets_of_their_own_and_stand_beside_small_ones() {
    let mut large = full_speed();
    large.mtu = 9000;
    let rows = rows(&[full_speed(), large]);
    assert_eq!(row(&rows, "xdp_tcp_9000").target, Target::AtLeast(1.2));
    assert_eq!(
        row(&rows, "cpu_both_hosts_9000").target,
        Target::AtMost(0.8)
    );
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).take(3).collect();
    assert_eq!(ids, ["xdp_raw_1500", "xdp_raw_9000", "xdp_tcp_1500"]);
}

#[test]
fn what_many_streams_cost_and_have_in_flight() {
    let of = |path: &str, streams, rate, wait, cpu| BenchContender {
        streams,
        ..ours(path, rate, wait, cpu)
    };
    let all = vec![
        of("xdp", 1, 560.0, 4000.0, 2.9),
        of("tcp", 1, 630.0, 1200.0, 4.1),
        of("xdp", 64, 346.0, 393_000.0, 5.6),
        of("tcp", 64, 676.0, 11_000.0, 2.9),
    ];
    let rows = rows(&[case("streams", "streams-64-1500", all)]);
    let cost = row(&rows, "cost_64_streams_xdp_1500");
    assert_eq!(cost.verdict, Verdict::Lost);
    let why = cost.sentence.as_deref().unwrap();
    assert!(
        why.contains("most of the difference is in the publisher's process (+1.35)"),
        "{why}"
    );
    assert_eq!(row(&rows, "cost_64_streams_tcp_1500").verdict, Verdict::Met);
    let flying = row(&rows, "in_flight_64_streams_xdp_1500");
    assert!((flying.value.unwrap() - 135.978).abs() < 1e-3);
    assert_eq!(
        (flying.unit.as_str(), flying.verdict),
        ("MB", Verdict::Lost)
    );
    assert!(
        flying
            .sentence
            .as_deref()
            .unwrap()
            .contains("136.0 MB in flight")
    );
    assert_eq!(row(&rows, "ack_p50_64_streams_tcp_1500").value, Some(11.0));
    assert_eq!(
        row(&rows, "ack_p50_64_streams_tcp_1500").verdict,
        Verdict::Met
    );
}

#[test]
fn peers_that_are_absent_or_failed_say_so() {
    let mut aeron = contender("aeron", &[]);
    aeron.absent = Some("absent: build it".to_owned());
    let mut nats = contender("nats", &[]);
    nats.failures = vec!["it refuses".to_owned()];
    let all = vec![
        ours("xdp", 560.0, 1.0, 1.0),
        ours("tcp", 1.0, 1.0, 1.0),
        nats,
        aeron,
    ];
    let rows = rows(&[case("peers", "peers-1500", all)]);
    let aeron = row(&rows, "xdp_aeron_1500");
    assert_eq!((aeron.verdict, aeron.value), (Verdict::NotMeasured, None));
    assert_eq!(aeron.sentence.as_deref(), Some("Aeron: absent: build it"));
    let nats = row(&rows, "xdp_nats_1500").sentence.clone().unwrap();
    assert_eq!(nats, "nats-server: it refuses");
}

#[test]
fn absolute_bounds_are_in_the_unit_of_the_target() {
    let messages = case(
        "messages",
        "messages-64-9000",
        vec![
            contender("xdp", &[(MESSAGES, &[16e6]), (PAYLOAD, &[1024.0])]),
            contender("tcp", &[(MESSAGES, &[9e6]), (PAYLOAD, &[576.0])]),
        ],
    );
    let idle = case(
        "memory",
        "idle-1500",
        vec![
            contender("xdp", &[(IDLE_STREAM, &[8192.0])]),
            contender("tcp", &[(IDLE_STREAM, &[65_536.0])]),
        ],
    );
    let rows = rows(&[messages, idle]);
    assert_eq!(
        row(&rows, "messages_64_bytes_xdp_1500").verdict,
        Verdict::Met
    );
    let tcp = row(&rows, "messages_64_bytes_tcp_1500");
    assert_eq!((tcp.value, tcp.verdict), (Some(9.0), Verdict::Lost));
    assert!(
        tcp.sentence
            .as_deref()
            .unwrap()
            .contains("9.0 M messages/s")
    );
    assert_eq!(row(&rows, "idle_stream_xdp_1500").value, Some(8.0));
    let tcp = row(&rows, "idle_stream_tcp_1500").sentence.clone().unwrap();
    assert!(tcp.contains("64.0 KiB for each idle stream"), "{tcp}");
}

#[test]
fn rounds_with_a_missing_run_are_not_paired() {
    let (three, two) = (Spread::of(vec![1.0; 3]), Spread::of(vec![1.0; 2]));
    assert_eq!(rounds(&three, &two), None);
    assert_eq!(rounds(&three, &three).unwrap().runs, [1.0; 3]);
    assert_eq!(rounds(&three, &Spread::of(vec![0.0; 3])), None);
}
