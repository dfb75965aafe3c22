//! Reports of `bench`: tables narrow enough for a README, and a sentence for each row that is lost.

use std::collections::BTreeMap;

use super::comparison::spread;
use super::markdown::{environment, reproduce, table};
use crate::measure::environment::Environment;
use crate::measure::host_load;
use crate::report::model::bench_figures::{
    PAYLOAD, PROBE_OVERHEAD, RECEIVING_HOST, SENDING_HOST, WITHOUT_CONVERSION, best,
};
use crate::report::model::{
    Bench, BenchCase, BenchContender, BenchRow, Side, Target, Verdict, ratio,
};

/// `report.md`.
pub fn bench(report: &Bench) -> String {
    let parts = [
        Some("# Benchmark".to_owned()),
        (!report.complete).then(|| "**Not complete**: it was written before the end.".to_owned()),
        Some(bench_tables(report)),
        host_load::part(&report.warnings),
        Some(peers(&report.peers)).filter(|text| !text.is_empty()),
        Some(method(report)),
        cases(&report.cases),
        Some(environment(&report.environment)),
        Some(reproduce(&report.environment)),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    parts.join("\n\n") + "\n"
}

/// The tables alone.
pub fn bench_tables(report: &Bench) -> String {
    let parts = [
        Some(heading(report)),
        full_speed(&report.cases),
        by_host(&report.cases),
        (!report.rows.is_empty()).then(|| targets(&report.rows)),
        sentences("Lost", Verdict::Lost, &report.rows),
        sentences("Not measured", Verdict::NotMeasured, &report.rows),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    parts.join("\n\n")
}

/// Where, when and how it was measured.
fn heading(report: &Bench) -> String {
    let Environment {
        cpus,
        cpu_model,
        kernel,
        date,
        ..
    } = &report.environment;
    let date = date.split('T').next().unwrap_or(date);
    let rounds = match report.runs {
        1 => "one round".to_owned(),
        runs => format!("{runs} alternating rounds"),
    };
    format!(
        "`penstock-lab bench`: {cpus} × {cpu_model}, Linux {kernel}, {date}; medians (and range) of {rounds}, about {} s a run:",
        report.seconds
    )
}

/// Both paths and both limits at full speed, a line for each link.
fn full_speed(cases: &[BenchCase]) -> Option<String> {
    let cases = cases.iter().filter(|case| case.group == "throughput");
    let line = |case: &BenchCase| {
        let [xdp, tcp, raw, iperf3] =
            ["xdp", "tcp", "raw_af_xdp", "iperf3"].map(|kind| best(case, kind));
        let cell = |contender: Option<&BenchContender>| {
            let figure = contender.and_then(|contender| contender.figure(PAYLOAD));
            figure.map_or_else(|| "–".to_owned(), spread)
        };
        let quotient = |below: Option<&BenchContender>| {
            let quotient = xdp?.median(PAYLOAD).zip(below?.median(PAYLOAD));
            quotient.and_then(|(a, b)| ratio(a, b))
        };
        let ratio = |below| quotient(below).map_or_else(|| "–".to_owned(), |r| format!("{r:.2}"));
        [
            case.mtu.to_string(),
            cell(xdp),
            cell(tcp),
            cell(raw),
            cell(iperf3),
            ratio(tcp),
            ratio(raw),
        ]
    };
    let lines: Vec<_> = cases.map(line).collect();
    let head = [
        "MTU",
        "xdp MB/s",
        "tcp MB/s",
        "raw AF_XDP",
        "iperf3",
        "xdp / tcp",
        "xdp / raw",
    ];
    (!lines.is_empty()).then(|| table(head, &lines))
}

/// CPU time of each host, a line for each path and link.
fn by_host(cases: &[BenchCase]) -> Option<String> {
    let cases = cases.iter().filter(|case| case.group == "cpu");
    let line = |case: &BenchCase, contender: &BenchContender| {
        let cell = |name| {
            contender
                .figure(name)
                .map_or_else(|| "–".to_owned(), spread)
        };
        [
            case.mtu.to_string(),
            contender.name(),
            cell(SENDING_HOST),
            cell(RECEIVING_HOST),
            cell(WITHOUT_CONVERSION),
            contender
                .median(PROBE_OVERHEAD)
                .map_or_else(|| "–".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
        ]
    };
    let lines: Vec<_> = cases
        .flat_map(|case| case.contenders.iter().map(move |of| line(case, of)))
        .collect();
    let head = [
        "MTU",
        "CPU s/GB",
        "sending host",
        "receiving host",
        "without conversion",
        "probes cost",
    ];
    (!lines.is_empty()).then(|| table(head, &lines))
}

/// Every row with its target.
fn targets(rows: &[BenchRow]) -> String {
    let line = |row: &BenchRow| {
        let value = match (&row.ours, row.value) {
            (Some(ours), Some(value)) => measured(row, ours, value),
            _ => "–".to_owned(),
        };
        [
            row.what.clone(),
            value,
            bound(row.target),
            row.verdict.name().to_owned(),
        ]
    };
    let lines: Vec<_> = rows.iter().map(line).collect();
    table(["what must hold", "measured", "target", ""], &lines)
}

/// A ratio with both medians, or a figure with its range.
fn measured(row: &BenchRow, ours: &Side, value: f64) -> String {
    match &row.theirs {
        Some(theirs) => format!(
            "{value:.2} ({} : {})",
            digits(ours.spread.median),
            digits(theirs.spread.median)
        ),
        None => spread(&ours.spread),
    }
}

/// Three digits, or all before the point.
fn digits(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

fn bound(target: Target) -> String {
    match target {
        Target::AtLeast(bound) => format!("≥ {bound}"),
        Target::AtMost(bound) => format!("≤ {bound}"),
    }
}

/// A sentence for each row with this verdict.
fn sentences(title: &str, verdict: Verdict, rows: &[BenchRow]) -> Option<String> {
    let with_verdict = rows.iter().filter(|row| row.verdict == verdict);
    let lines: Vec<_> = with_verdict
        .map(|row| {
            let sentence = row.sentence.as_deref().unwrap_or("No figure says why.");
            format!("- {}: {sentence}", row.what)
        })
        .collect();
    (!lines.is_empty()).then(|| format!("{title}:\n\n{}", lines.join("\n")))
}

fn peers(peers: &BTreeMap<String, String>) -> String {
    let lines: Vec<_> = peers
        .iter()
        .map(|(name, text)| format!("- {name}: {text}"))
        .collect();
    match lines.is_empty() {
        true => String::new(),
        false => format!("## Peers\n\n{}", lines.join("\n")),
    }
}

fn method(report: &Bench) -> String {
    format!(
        "## Method\n\n\
         Every contender of a case runs once per round on the same links, in alternating order \
         (A B B A). Before the first round, a short run of each, which does not count, determines how \
         much a run must move to take about {} s. Ratios are ratios of medians. The faster of native and \
         generic mode counts, separately for Penstock and for the bare socket. Full speed: \
         `--poll adaptive`, no process pinned. Fixed rate: one message per batch, the xdp worker \
         busy-polls on the last core and the publisher runs on the others, tcp is not pinned. 1 MB is \
         10^6 bytes of messages. CPU time of both hosts is all time of this host except idle, iowait and \
         steal. Latency is measured from sealing a batch to its ack; bytes in flight are payload rate \
         times median ack latency. nats-server has no subscriber, and its load generator sends the same \
         bytes repeatedly; Aeron's publisher counts what it was allowed to send. Memory of an idle \
         stream is the broker's private memory, without the kernel's sockets. {} rounds took {:.0} \
         minutes.",
        report.seconds,
        report.runs,
        (report.took_seconds / 60.0).ceil()
    )
}

/// All figures.
fn cases(cases: &[BenchCase]) -> Option<String> {
    let parts: Vec<_> = cases.iter().map(case).collect();
    (!parts.is_empty()).then(|| format!("## Figures\n\n{}", parts.join("\n\n")))
}

fn case(case: &BenchCase) -> String {
    let load = match case.rate {
        Some(rate) => format!("{rate} batches/s of {} bytes", case.message_size),
        None if case.group == "cpu" => "full speed".to_owned(),
        None if case.payload_bytes == 0 => "nothing is sent".to_owned(),
        None => format!(
            "{:.0} MB in messages of {} bytes",
            case.payload_bytes as f64 / 1e6,
            case.message_size
        ),
    };
    let line = |contender: &BenchContender| {
        let figures = contender
            .figures
            .iter()
            .map(|(name, figure)| [contender.name(), name.clone(), spread(figure)]);
        let none = contender.figures.is_empty();
        let why = contender.absent.iter().chain(&contender.failures);
        let failed = why.map(|why| {
            let what = if none {
                "no figure"
            } else {
                "a run that failed"
            };
            [contender.name(), what.to_owned(), why.clone()]
        });
        figures.chain(failed).collect::<Vec<_>>()
    };
    let lines: Vec<_> = case.contenders.iter().flat_map(line).collect();
    format!(
        "### {}: {}, MTU {}, {load}\n\n{}",
        case.id,
        case.profile.name(),
        case.mtu,
        table(["who", "figure", "median (range)"], &lines)
    )
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::commands::bench::rows::{rows, tests::full_speed as example_case};
    use crate::report::text::tests::example_environment;

    pub fn example() -> Bench {
        let cases = vec![example_case()];
        Bench {
            kind: "bench".to_owned(),
            runs: 3,
            seconds: 2.0,
            rows: rows(&cases),
            cases,
            peers: [("aeron".to_owned(), "absent: build it".to_owned())].into(),
            took_seconds: 61.0,
            complete: true,
            host_load: None,
            warnings: vec!["2 cores are too few".to_owned()],
            environment: example_environment(),
        }
    }

    #[test]
    fn the_tables_name_the_machine_and_are_narrow() {
        let text = bench_tables(&example());
        let first = text.lines().next().unwrap();
        assert!(
            first.starts_with("`penstock-lab bench`: ") && first.contains("Linux"),
            "{first}"
        );
        assert!(text.contains("| MTU  | xdp MB/s"), "{text}");
        assert!(text.contains("0.89      | 0.66"), "{text}");
        assert!(text.contains("≥ 0.85"), "{text}");
        assert!(
            text.contains("\nLost:\n\n- xdp / raw AF_XDP, MTU 1500: "),
            "{text}"
        );
        let rows = text.lines().filter(|line| line.starts_with('|'));
        let widest = rows.map(|line| line.chars().count()).max();
        assert!(widest.unwrap() <= 120, "{widest:?}\n{text}");
    }

    #[test]
    fn the_report_has_every_figure_and_survives_json() {
        let report = example();
        let text = bench(&report);
        for words in [
            "## Peers",
            "absent: build it",
            "host_busy",
            "2 cores are too few",
            "## Method",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
        let json = serde_json::to_string(&report).unwrap();
        let again: Bench = serde_json::from_str(&json).unwrap();
        assert_eq!(bench(&again), text);
        let partial = Bench {
            complete: false,
            ..again
        };
        assert!(bench(&partial).contains("**Not complete**"));
    }
}
