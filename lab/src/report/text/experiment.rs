//! Reports of experiments.

use bytesize::ByteSize;

use super::markdown::{environment, reproduce, spread, table};
use crate::report::model::{Claim, ObserverExperiment, ObserverPair, RcvbufExperiment, RcvbufRow};

/// `report.md` of `experiment rcvbuf`.
pub fn rcvbuf(report: &RcvbufExperiment) -> String {
    let parts = [
        "# Where SO_RCVBUF is set, and its effect".to_owned(),
        method(report),
        rcvbuf_table(&report.rows),
        NOTES.to_owned(),
        format!("## Claims and measurements\n\n{}", claims(&report.claims)),
        environment(&report.environment),
        reproduce(&report.environment),
    ];
    parts.join("\n\n") + "\n"
}

/// What is printed on the terminal.
pub fn rcvbuf_summary(report: &RcvbufExperiment) -> String {
    [rcvbuf_table(&report.rows), claims(&report.claims)].join("\n\n")
}

/// `report.md` of `experiment diagnose`.
pub fn observer(report: &ObserverExperiment) -> String {
    let parts = [
        "# The cost of a diagnosis for a broker".to_owned(),
        format!(
            "One publisher over {} sends continuously ({} profile, MTU {}). Intervals with and without a \
             diagnosis alternate, and so does which of them comes first in a pair.",
            report.mode,
            report.profile.name(),
            report.mtu,
        ),
        observer_summary(report),
        environment(&report.environment),
        reproduce(&report.environment),
    ];
    parts.join("\n\n") + "\n"
}

/// What is printed on the terminal.
pub fn observer_summary(report: &ObserverExperiment) -> String {
    let row = |(number, pair): (usize, &ObserverPair)| {
        [
            (number + 1).to_string(),
            format!("{:.0}", pair.alone_mb_per_s),
            format!("{:.0}", pair.observed_mb_per_s),
            format!("{:.3}", pair.observed_mb_per_s / pair.alone_mb_per_s),
            format!("{:.3}", pair.observer_cores),
        ]
    };
    let rows: Vec<_> = report.pairs.iter().enumerate().map(row).collect();
    let ratio = &report.ratio;
    let confidence = match (report.ratio_low, report.ratio_high) {
        (Some(low), Some(high)) => format!("95 % confidence {low:.3} to {high:.3}"),
        _ => "too few pairs for a confidence interval".to_owned(),
    };
    format!(
        "{}\n\nThroughput observed / alone: median {:.3}, {confidence}; pairs {:.3} to {:.3}.\n\
         The observer kept {:.3} cores busy ({:.3} to {:.3}).",
        table(
            [
                "pair",
                "alone MB/s",
                "observed MB/s",
                "ratio",
                "observer's cores"
            ],
            &rows
        ),
        ratio.median,
        ratio.min,
        ratio.max,
        report.observer_cores.median,
        report.observer_cores.min,
        report.observer_cores.max,
    )
}

const NOTES: &str = "\
Sizes in bytes. Effective is what the socket has right after accept, twice what was granted; the first \
`rcv_ssthresh` (largest window that may be offered) and `rcv_space` are read at the same time, the final \
ones at the end of the run. `rwnd_limited` and `sndbuf_limited` are shares of the run's time, from the \
sender's TCP_INFO. Medians, with the range of the runs.";

fn method(report: &RcvbufExperiment) -> String {
    format!(
        "One connection, {} s a run, all cases in turn; SO_RCVBUF is {} where it is set. Round trips take \
         {} ms longer; {} profile, MTU {}; autotuning up to {} (`tcp_rmem`). The sender's buffer and its \
         batches in flight are large enough for the window to be the first limit.",
        report.seconds,
        ByteSize(report.rcvbuf_requested),
        report.delay_us as f64 / 1e3,
        report.profile.name(),
        report.mtu,
        ByteSize(report.tcp_rmem_max),
    )
}

fn rcvbuf_table(rows: &[RcvbufRow]) -> String {
    let of_row = |row: &RcvbufRow| {
        let percent = |value: f64| format!("{value:.0}");
        [
            row.case.clone(),
            row.rmem_max.to_string(),
            row.rcvbuf_effective.to_string(),
            row.rcvbuf_final.to_string(),
            row.window_scale.to_string(),
            row.rcv_ssthresh_first.to_string(),
            row.rcv_ssthresh_final.to_string(),
            row.rcv_space_first.to_string(),
            row.rcv_space_final.to_string(),
            spread(&row.mb_per_s),
            percent(row.rwnd_limited_percent.median),
            percent(row.sndbuf_limited_percent.median),
            format!("{:.1}", row.rtt_ms.median),
        ]
    };
    let rows: Vec<_> = rows.iter().map(of_row).collect();
    #[rustfmt::skip]
    let head = ["set on", "rmem_max", "effective", "at the end", "window scale", "first rcv_ssthresh",
        "final", "first rcv_space", "final", "MB/s", "rwnd_limited %", "sndbuf_limited %", "RTT ms"];
    table(head, &rows)
}

fn claims(claims: &[Claim]) -> String {
    let line = |claim: &Claim| {
        let verdict = match claim.holds {
            Some(true) => "holds",
            Some(false) => "does not hold",
            None => "not shown here",
        };
        let Claim {
            claim,
            of,
            evidence,
            ..
        } = claim;
        format!("- **{verdict}** ({of}): {claim}.\n  {evidence}.")
    };
    let lines: Vec<_> = claims.iter().map(line).collect();
    lines.join("\n")
}
