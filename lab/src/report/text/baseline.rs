//! Reports of `baseline`.

use bytesize::ByteSize;

use super::markdown::{environment, reproduce, spread, table};
use crate::measure::host_load;
use crate::report::model::{Baseline, BaselineRow};

/// `report.md` of a baseline run.
pub fn baseline(report: &Baseline) -> String {
    let method = format!(
        "One broker; Penstock ({}, {} byte messages) and {} alternate in the same namespaces, {} of \
         payload per run, payload MB/s (10^6 bytes) at the receiver's side. The ratio is the median \
         over pairs of neighbouring runs.",
        report.mode,
        report.message_size,
        report.iperf3_version,
        ByteSize(report.size_bytes)
    );
    [
        "# Penstock against iperf3".to_owned(),
        method,
        host_load::part(&report.warnings).unwrap_or_default(),
        "![Medians and ranges](baseline.svg)".to_owned(),
        baseline_table(report),
        environment(&report.environment),
        reproduce(&report.environment),
    ]
    .into_iter()
    .filter(|part| !part.is_empty())
    .collect::<Vec<_>>()
    .join("\n\n")
        + "\n"
}

/// The summary printed on the terminal after a baseline run.
pub fn baseline_summary(report: &Baseline) -> String {
    let parts = [
        Some(baseline_table(report)),
        host_load::part(&report.warnings),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("\n\n")
}

/// The table of a baseline run.
fn baseline_table(report: &Baseline) -> String {
    let row = |r: &BaselineRow| {
        [
            r.profile.name().to_owned(),
            r.mtu.to_string(),
            r.connections.to_string(),
            spread(&r.penstock),
            spread(&r.iperf3),
            format!(
                "**{:.3}** ({:.3}..{:.3})",
                r.ratio, r.ratio_min, r.ratio_max
            ),
            format!("{:.3}", r.ratio_of_medians),
            r.penstock.runs.len().to_string(),
        ]
    };
    let rows: Vec<_> = report.rows.iter().map(row).collect();
    #[rustfmt::skip]
    let head = ["profile", "MTU", "connections", "penstock MB/s", "iperf3 MB/s",
        "ratio penstock/iperf3", "ratio of medians", "runs"];
    table(head, &rows)
}
