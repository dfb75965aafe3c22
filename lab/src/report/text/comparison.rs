//! Reports of `compare` and `limits`.

use bytesize::ByteSize;

use super::markdown::{environment, reproduce, table};
use crate::measure::host_load;
use crate::measure::stats::Spread;
use crate::report::model::{Compare, Limit, Limits, Row};

/// What the picture shows: title, unit, and the rows of each panel.
pub fn panels(report: &Compare) -> Vec<(&'static str, &'static str, Vec<&Row>)> {
    let of = |metric: &str, at_low_rate: Option<bool>| -> Vec<_> {
        let wanted = |row: &&Row| {
            row.metric == metric && row.rate.map(|rate| rate == report.low_rate) == at_low_rate
        };
        report.rows.iter().filter(wanted).collect()
    };
    #[rustfmt::skip]
    let panels = [
        ("Payload at full speed: more is better", "MB/s", of("payload_mb_per_s", None)),
        ("CPU time of the whole host: less is better", "s/GB", of("host_cpu_s_per_gb", None)),
        ("Ack latency p99, low rate: less is better", "µs (logarithmic)", of("ack_latency_us_p99", Some(true))),
        ("Ack latency p99, high rate: less is better", "µs (logarithmic)", of("ack_latency_us_p99", Some(false))),
    ];
    let shown = panels.into_iter().filter(|(_, _, rows)| !rows.is_empty());
    shown.collect()
}

/// `report.md` of a comparison.
pub fn compare(report: &Compare) -> String {
    [
        "# The xdp path beside the tcp path".to_owned(),
        method(report),
        host_load::part(&report.warnings).unwrap_or_default(),
        "![Medians and ranges](compare.svg)".to_owned(),
        compare_table(&report.rows),
        by_mode(&report.rows).unwrap_or_default(),
        limits_part(&report.limits),
        environment(&report.environment),
        reproduce(&report.environment),
    ]
    .into_iter()
    .filter(|part| !part.is_empty())
    .collect::<Vec<_>>()
    .join("\n\n")
        + "\n"
}

/// What is printed on the terminal after a comparison.
pub fn compare_summary(report: &Compare) -> String {
    let tables = report
        .rows
        .chunk_by(|a, b| (&a.profile, a.mtu, a.rate) == (&b.profile, b.mtu, b.rate));
    let mut parts: Vec<String> = tables.map(short_table).collect();
    parts.extend(host_load::part(&report.warnings));
    parts.push(
        "Medians, with the range of the runs; the ratio is that of the medians, in brackets the median over \
         neighbouring runs."
            .to_owned(),
    );
    if !report.limits.is_empty() {
        parts.push(format!(
            "## Limits of this host\n\n{}",
            limits_table(&report.limits)
        ));
    }
    parts.join("\n\n")
}

/// Rows of one link at one rate, in few columns.
fn short_table(rows: &[Row]) -> String {
    let row = &rows[0];
    let load = row.rate.map_or_else(
        || "full speed".to_owned(),
        |rate| format!("{rate}/s of {} B", row.batch_bytes.unwrap_or(0)),
    );
    let line = |row: &Row| {
        [
            metric(&row.metric),
            spread(&row.xdp),
            spread(&row.tcp),
            ratio(row),
            row.xdp_mode.map_or("", |mode| mode.name()).to_owned(),
        ]
    };
    let lines: Vec<_> = rows.iter().map(line).collect();
    let title = format!("## {}, MTU {}, {load}", row.profile, row.mtu);
    let table = table(["what", "xdp", "tcp", "xdp / tcp", "xdp mode"], &lines);
    let limits = rows.iter().filter(|row| row.percent_of_limit.is_some());
    let limits: Vec<_> = limits
        .map(|row| {
            format!(
                "{}, % of this link's limit: xdp, tcp {}.",
                metric(&row.metric),
                of_limit(row)
            )
        })
        .collect();
    [vec![title, table], limits].concat().join("\n\n")
}

/// The readable name of a row's metric.
fn metric(name: &str) -> String {
    match name {
        "payload_mb_per_s" => "payload, MB/s".to_owned(),
        "host_cpu_s_per_gb" => "host CPU, s/GB".to_owned(),
        "sending_host_cpu_s_per_gb" => "sending host CPU, s/GB".to_owned(),
        "receiving_host_cpu_s_per_gb" => "receiving host CPU, s/GB".to_owned(),
        "receiving_host_without_conversion_cpu_s_per_gb" => {
            "the same without skb conversion, s/GB".to_owned()
        }
        "broker_cpu_s_per_gb" => "broker CPU, s/GB".to_owned(),
        "publisher_cpu_s_per_gb" => "publisher CPU, s/GB".to_owned(),
        other => match other.strip_prefix("ack_latency_us_") {
            Some(quantile) => format!("ack {quantile}, µs"),
            None => other.to_owned(),
        },
    }
}

fn method(report: &Compare) -> String {
    let where_from = match &report.remote {
        Some(address) => format!(
            "Brokers at {address}; CPU time, drops and retransmits are of the publisher's host alone"
        ),
        None => format!(
            "{} broker(s) in namespaces of this host; CPU time of the whole host is all but idle, \
             iowait and steal in /proc/stat, while the publisher runs",
            report.brokers
        ),
    };
    format!(
        "Both paths alternate on the same work: at full speed {} in messages of {} bytes, {} \
         stream(s) to each broker; at a rate one message a batch for {} s, each sent when it is due. \
         {where_from}. Figures are medians, with the range of the runs; the ratio is that of the \
         medians, in brackets the median over neighbouring runs. Of native and generic mode the one \
         is shown that moves more, at a rate the one whose p99 is lower. 1 MB is 10^6 bytes of \
         messages. Latency runs from a batch being sealed to its ack.",
        ByteSize(report.size_bytes),
        report.message_size,
        report.threads_per_broker,
        report.latency_seconds,
    )
}

fn compare_table(rows: &[Row]) -> String {
    let line = |row: &Row| {
        let rate = row.rate.map_or_else(
            || "full speed".to_owned(),
            |rate| format!("{rate}/s of {} B", row.batch_bytes.unwrap_or(0)),
        );
        let mode = row.xdp_mode.map_or("", |mode| mode.name());
        let poll = row.poll.as_deref().unwrap_or("");
        [
            row.profile.clone(),
            row.mtu.to_string(),
            row.metric.clone(),
            rate,
            spread(&row.xdp),
            spread(&row.tcp),
            ratio(row),
            format!("{mode} {poll}").trim().to_owned(),
            of_limit(row),
        ]
    };
    let lines: Vec<_> = rows.iter().map(line).collect();
    #[rustfmt::skip]
    let head = ["profile", "MTU", "metric", "rate", "xdp", "tcp", "xdp / tcp", "mode, poll",
        "% of limit xdp, tcp"];
    table(head, &lines)
}

fn ratio(row: &Row) -> String {
    match (row.ratio, row.ratio_of_pairs) {
        (Some(ratio), Some(pairs)) => format!("**{ratio:.2}** ({pairs:.2})"),
        (Some(ratio), None) => format!("**{ratio:.2}**"),
        _ => String::new(),
    }
}

fn of_limit(row: &Row) -> String {
    let percent =
        |value: Option<f64>| value.map_or_else(|| "not measured".to_owned(), |v| format!("{v:.0}"));
    row.percent_of_limit.map_or_else(String::new, |limit| {
        format!("{}, {}", percent(limit.xdp), percent(limit.tcp))
    })
}

/// Every mode, where there are several.
fn by_mode(rows: &[Row]) -> Option<String> {
    let rows: Vec<_> = rows
        .iter()
        .filter(|row| row.xdp_by_mode.len() > 1)
        .collect();
    let lines: Vec<_> = rows
        .iter()
        .map(|row| {
            let mode = |name: &str| row.xdp_by_mode.get(name).map_or_else(String::new, spread);
            let rate = row
                .rate
                .map_or_else(|| "full speed".to_owned(), |rate| rate.to_string());
            [
                row.profile.clone(),
                row.mtu.to_string(),
                row.metric.clone(),
                rate,
                mode("native"),
                mode("generic"),
            ]
        })
        .collect();
    let head = [
        "profile",
        "MTU",
        "metric",
        "rate",
        "xdp native",
        "xdp generic",
    ];
    (!lines.is_empty()).then(|| {
        format!(
            "## Both modes of the XDP program\n\n{}",
            table(head, &lines)
        )
    })
}

/// `report.md` of the limits.
pub fn limits(report: &Limits) -> String {
    [
        "# Limits of this host".to_owned(),
        limits_part(&report.limits),
        environment(&report.environment),
        reproduce(&report.environment),
    ]
    .join("\n\n")
        + "\n"
}

/// The limits as a part of a report.
pub fn limits_part(limits: &[Limit]) -> String {
    if limits.is_empty() {
        return String::new();
    }
    format!(
        "## Limits of this host\n\n\
         `raw_af_xdp`: one AF_XDP socket that copies each payload once and does nothing else, fed by \
         an ordinary UDP socket with `UDP_SEGMENT`. `iperf3`: the given number of connections. `memory_copy`: one \
         thread, 256 MiB to 256 MiB.\n\n{}",
        limits_table(limits)
    )
}

/// The table of limits.
pub fn limits_table(limits: &[Limit]) -> String {
    let line = |limit: &Limit| {
        let figures = Spread {
            median: limit.mb_per_s,
            min: limit.min,
            max: limit.max,
            runs: Vec::new(),
        };
        [
            limit.name.clone(),
            limit
                .profile
                .map_or("", |profile| profile.name())
                .to_owned(),
            limit.mtu.map_or_else(String::new, |mtu| mtu.to_string()),
            spread(&figures),
            limit
                .datagram
                .map_or_else(String::new, |bytes| bytes.to_string()),
            limit
                .lost_percent
                .map_or_else(String::new, |lost| format!("{lost:.2}")),
        ]
    };
    let lines: Vec<_> = limits.iter().map(line).collect();
    table(
        [
            "limit",
            "profile",
            "MTU",
            "MB/s",
            "payload per packet",
            "% lost",
        ],
        &lines,
    )
}

/// Three digits, or all before the point.
pub(super) fn spread(spread: &Spread) -> String {
    let digits = match spread.median.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let Spread {
        median, min, max, ..
    } = spread;
    format!("{median:.digits$} ({min:.digits$}..{max:.digits$})")
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::report::model::PercentOfLimit;
    use crate::report::terminal::{self, Screen};
    use crate::report::text::tests::example_environment;
    use penstock_testbed::settings::{Profile, XdpMode};
    use textwrap::core::display_width;

    fn row(metric: &str, rate: Option<u32>) -> Row {
        let xdp = Spread::of(vec![120.0, 140.0, 100.0]);
        let tcp = Spread::of(vec![80.0, 90.0, 70.0]);
        let full_speed = rate.is_none();
        Row {
            profile: "wire".to_owned(),
            mtu: 9000,
            metric: metric.to_owned(),
            rate,
            batch_bytes: rate.map(|_| 1024),
            poll: Some("busy".to_owned()),
            xdp_mode: Some(XdpMode::Generic),
            xdp_by_mode: [
                ("native".to_owned(), Spread::of(vec![33.0])),
                ("generic".to_owned(), xdp.clone()),
            ]
            .into(),
            xdp,
            tcp,
            ratio: Some(1.5),
            ratio_of_pairs: Some(1.43),
            percent_of_limit: full_speed.then_some(PercentOfLimit {
                xdp: Some(87.4),
                tcp: None,
            }),
        }
    }

    pub fn example() -> Compare {
        let mut raw = Limit::of_link(
            "raw_af_xdp_generic",
            Profile::Wire,
            9000,
            Spread::of(vec![137.3]),
        );
        (raw.mode, raw.datagram, raw.lost_percent) =
            (Some(XdpMode::Generic), Some(3790), Some(0.5));
        Compare {
            kind: "compare".to_owned(),
            brokers: 1,
            threads_per_broker: 1,
            message_size: 1024,
            size_bytes: 1 << 30,
            latency_seconds: 3.0,
            low_rate: 1000,
            remote: None,
            rows: vec![
                row("payload_mb_per_s", None),
                row("host_cpu_s_per_gb", None),
                row("ack_latency_us_p99", Some(1000)),
                row("ack_latency_us_p99", Some(4321)),
            ],
            limits: vec![raw, Limit::of_host("memory_copy", Spread::of(vec![9876.0]))],
            host_times_unavailable: None,
            host_load: None,
            warnings: vec!["Other programs kept 1.5 of 2 cores busy".to_owned()],
            environment: example_environment(),
        }
    }

    #[test]
    fn the_report_shows_what_a_reader_looks_for() {
        let text = compare(&example());
        for wanted in [
            "compare.svg",
            "120 (100..140)",
            "80.0 (70.0..90.0)",
            "**1.50** (1.43)",
            "generic busy",
            "87, not measured",
            "4321/s of 1024 B",
            "33.0 (33.0..33.0)",
            "raw_af_xdp_generic",
            "3790",
            "9876",
            "1.0 GiB",
            "1.5 of 2 cores busy",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing from:\n{text}");
        }
    }

    #[test]
    fn a_comparison_with_remote_brokers_has_no_limits_and_says_whose_cpu_it_is() {
        let mut report = example();
        report.remote = Some("10.0.0.2:1214".to_owned());
        report.limits.clear();
        let text = compare(&report);
        assert!(text.contains("10.0.0.2:1214") && text.contains("publisher's host alone"));
        assert!(!text.contains("Limits of this host"), "{text}");
    }

    #[test]
    fn the_terminal_shows_it_in_80_columns_with_what_the_figures_are_worth() {
        let text = terminal::markdown(&compare_summary(&example()), Screen::PLAIN);
        for line in text.lines() {
            assert!(display_width(line) <= 80, "{line}");
        }
        for wanted in [
            "wire, MTU 9000",
            "1.50 (1.43)",
            "87, not",
            "1.5 of 2 cores busy",
            "p99, µs",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing from:\n{text}");
        }
        assert!(!text.contains("**") && !text.contains('?'), "{text}");
    }

    #[test]
    fn each_panel_has_its_rows_and_no_panel_is_empty() {
        let mut report = example();
        let counts = |report: &Compare| -> Vec<_> {
            panels(report)
                .iter()
                .map(|(_, _, rows)| rows.len())
                .collect()
        };
        assert_eq!(counts(&report), [1, 1, 1, 1]);
        assert_eq!(panels(&report)[3].2[0].rate, Some(4321));
        report.rows.truncate(1);
        assert_eq!(counts(&report), [1]);
    }

    #[test]
    fn json_has_the_names_that_others_rely_on() {
        let json = serde_json::to_value(example()).unwrap();
        for name in [
            "/kind",
            "/rows/0/profile",
            "/rows/0/mtu",
            "/rows/0/metric",
            "/rows/2/rate",
            "/rows/0/xdp/median",
            "/rows/0/xdp/min",
            "/rows/0/xdp/max",
            "/rows/0/xdp/runs/2",
            "/rows/0/tcp/median",
            "/rows/0/ratio",
            "/rows/0/percent_of_limit/xdp",
            "/limits/0/name",
            "/limits/0/mtu",
            "/limits/0/mb_per_s",
            "/limits/1/mb_per_s",
        ] {
            assert!(json.pointer(name).is_some_and(|v| !v.is_null()), "{name}");
        }
        assert_eq!(json["rows"][0]["xdp_mode"], "generic");
        assert_eq!(json["limits"][0]["profile"], "wire");
    }

    #[test]
    fn small_figures_keep_three_digits() {
        assert_eq!(spread(&Spread::of(vec![0.8765])), "0.876 (0.876..0.876)");
        assert_eq!(spread(&Spread::of(vec![0.0])), "0 (0..0)");
    }
}
