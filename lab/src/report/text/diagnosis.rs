//! What limited a run, in the order in which one looks for it: figures, what they mean, the cause, a run
//! without it, what to do next.

use super::markdown::table;
use crate::report::model::Throughput;
use crate::report::model::diagnosis::{Connection, Findings, Verdict, Xdp};

/// Lines of each kind; the JSON has all.
const MOST: usize = 5;

/// The parts of `report.md`; none without a diagnosis.
pub fn parts(report: &Throughput) -> Vec<String> {
    if let Some(why) = &report.not_diagnosed {
        return vec![format!("## Diagnosis\n\nNot diagnosed: {why}")];
    }
    let Some(findings) = report.diagnosis.as_ref().map(|d| d.findings()) else {
        return Vec::new();
    };
    match findings {
        Err(error) => vec![format!("## Diagnosis\n\n{error:#}")],
        Ok(findings) => vec![
            metrics(report, &findings),
            interpretation(&findings),
            root_cause(&findings),
            format!("## Re-run after the fix\n\n{}", rerun(report)),
            next_steps(report, &findings),
        ],
    }
}

/// The verdicts for a terminal.
pub fn summary(report: &Throughput) -> Option<String> {
    if let Some(why) = &report.not_diagnosed {
        return Some(format!("Not diagnosed: {why}"));
    }
    let findings = report.diagnosis.as_ref()?.findings().ok()?;
    let lines = findings.verdicts.iter().map(|verdict| {
        let Verdict {
            cause,
            confidence,
            title,
            ..
        } = verdict;
        format!("- {confidence:.2} {cause}: {title}")
    });
    let mut lines: Vec<String> = lines.collect();
    if lines.is_empty() {
        lines.push("No cause fits the observations.".to_owned());
    }
    if report.rerun.is_some() {
        lines.push(format!("\n{}", rerun(report)));
    }
    Some(format!("## What limits it\n\n{}", lines.join("\n")))
}

fn metrics(report: &Throughput, findings: &Findings) -> String {
    let rows: Vec<[String; 2]> = figures(report, findings)
        .into_iter()
        .map(|(what, value)| [what.to_owned(), value])
        .collect();
    let broker = report.diagnosis.as_ref().map_or(0, |d| d.broker);
    format!(
        "## Phase 1-2: what was measured\n\nBroker {broker} was watched for {:.1} s while the run lasted; \
         `diagnosis.txt` has every figure.\n\n{}",
        findings.sample.seconds,
        table(["observation", "value"], &rows)
    )
}

/// What was seen, most telling first.
pub fn figures(report: &Throughput, findings: &Findings) -> Vec<(&'static str, String)> {
    let sample = &findings.sample;
    let broker = report.brokers.first();
    let stages = |stages: &[penstock_runtime::profile::StageReport]| {
        let shares = stages
            .iter()
            .map(|s| format!("{} {:.2} %", s.name, s.percent));
        shares.collect::<Vec<_>>().join(", ")
    };
    let mut rows = vec![
        (
            "bandwidth",
            format!("{:.2} MB/s", report.bandwidth_mb_per_s),
        ),
        ("publisher pipeline", stages(&report.publisher.stages)),
    ];
    if let Some(broker) = broker {
        rows.push(("broker pipeline", stages(&broker.stages)));
        let calls = format!(
            "{:.1}, of {:.0} bytes each",
            broker.recv_calls_per_batch, broker.bytes_per_recv
        );
        rows.push(("recv calls per batch", calls));
    }
    let workers = sample.broker.iter().flat_map(|broker| &broker.workers);
    let packets = workers.filter_map(|worker| Some((worker, worker.xdp.as_ref()?)));
    let packets = packets.filter(|(_, xdp)| xdp.packets > 0);
    let before = rows.len();
    rows.extend(packets.map(|(worker, xdp)| ("xdp packets", xdp_packets(&worker.thread, xdp))));
    let of_connection = match rows.len() == before {
        true => "payload socket",
        false => "control socket",
    };
    for connection in sample.connections.iter().take(MOST) {
        rows.push((of_connection, socket(connection)));
    }
    rows.push(("system calls", syscalls(findings)));
    rows.push(("CPU", cpu(findings)));
    rows
}

fn xdp_packets(thread: &str, xdp: &Xdp) -> String {
    let dropped = xdp.dropped.iter();
    let mut dropped: Vec<_> = dropped
        .map(|(why, count)| format!("{count} {why}"))
        .collect();
    if dropped.is_empty() {
        dropped.push("none".to_owned());
    }
    format!(
        "{thread}: {} with {} bytes; dropped: {}; {} never arrived; polls that found packets {:.0} %, of these \
         a whole burst {:.0} %; publishers paused per ACK: idle {:.2}, no credit {:.2}, congestion {:.2}; window {} bytes",
        xdp.packets,
        xdp.bytes,
        dropped.join(", "),
        xdp.missing,
        100.0 * xdp.hit_rate,
        100.0 * xdp.full_looks,
        xdp.idle,
        xdp.credit,
        xdp.congestion,
        xdp.window
    )
}

fn socket(connection: &Connection) -> String {
    let mut text = format!("{} from {}", connection.local, connection.remote);
    if let Some(end) = connection.receiver() {
        text += &format!(
            ": rb {}, rcv_ssthresh {}, rcv_space {}, window scale {}, Recv-Q {:.0}",
            end.receive_buffer, end.rcv_ssthresh, end.rcv_space, end.rcv_wscale, end.recv_q
        );
    }
    if let Some(end) = connection.sender() {
        text += &format!(
            "; sender busy {:.0} %, rwnd_limited {:.0} %, sndbuf_limited {:.0} %, app_limited {:.0} %, \
             cwnd full {:.0} %, RTT {:.0} µs, {} retransmits",
            100.0 * end.busy,
            100.0 * end.rwnd_limited,
            100.0 * end.sndbuf_limited,
            100.0 * end.app_limited,
            100.0 * end.cwnd_full,
            end.rtt_us,
            end.retransmits
        );
    }
    text
}

fn syscalls(findings: &Findings) -> String {
    let Some(calls) = &findings.sample.syscalls else {
        let unseen = findings.unavailable.iter();
        let mut unseen = unseen.filter(|missing| missing.what.starts_with("system calls"));
        let why = unseen.next().map(|missing| missing.why.clone());
        return format!(
            "not observed: {}",
            why.unwrap_or_else(|| "not asked for".to_owned())
        );
    };
    let calls = calls.iter().take(MOST).map(|call| {
        format!(
            "{} {:.0}/s ({:.1} µs each, {:.0} % of {})",
            call.name,
            call.per_second,
            call.mean_us,
            100.0 * call.time,
            call.thread
        )
    });
    calls.collect::<Vec<_>>().join(", ")
}

fn cpu(findings: &Findings) -> String {
    let cores = &findings.sample.cores;
    let count = cores.len().max(1) as f64;
    let share = |sum: f64| 100.0 * sum / count;
    let mut text = format!(
        "{:.1} % idle, {:.1} % softirq over {} cores",
        share(cores.iter().map(|core| core.idle).sum()),
        share(cores.iter().map(|core| core.softirq).sum()),
        cores.len()
    );
    for process in &findings.sample.processes {
        if let Some(thread) = process.threads.first() {
            text += &format!(
                "; busiest thread of {}: {} runs {:.0} %, waits for a core {:.0} %",
                process.name,
                thread.name,
                100.0 * thread.run,
                100.0 * thread.wait
            );
        }
    }
    text
}

fn interpretation(findings: &Findings) -> String {
    let mut text = "## Phase 3: interpretation".to_owned();
    if findings.verdicts.is_empty() {
        text += "\n\nNo cause fits the observations.";
    }
    for (rank, verdict) in (1..).zip(&findings.verdicts) {
        text += &format!(
            "\n\n{rank}. **{}** (confidence {:.2}): {}\n",
            verdict.cause, verdict.confidence, verdict.title
        );
        let for_it = verdict.evidence_for.iter().map(|line| ('+', line));
        let against = verdict.evidence_against.iter().map(|line| ('−', line));
        for (sign, line) in for_it.chain(against) {
            text += &format!("\n   - {sign} {line}");
        }
    }
    for missing in &findings.unavailable {
        text += &format!(
            "\n\nNot observed: {} ({}; {}).",
            missing.what, missing.why, missing.how
        );
    }
    text
}

fn root_cause(findings: &Findings) -> String {
    let cause = findings.verdicts.first().map_or_else(
        || "No single cause was found.".to_owned(),
        |verdict| match &verdict.reason {
            Some(reason) => format!("**{}**: {reason}.", verdict.cause),
            None => format!("**{}**: {}.", verdict.cause, verdict.title),
        },
    );
    format!("## Root cause\n\n{cause}")
}

/// The effect of removing the cause, in a sentence or two.
pub fn rerun(report: &Throughput) -> String {
    let Some(rerun) = &report.rerun else {
        return "Not requested (--fix).".to_owned();
    };
    let (Some(fix), Some(rate), Some(ratio)) = (&rerun.fix, rerun.bandwidth_mb_per_s, rerun.ratio)
    else {
        let why = rerun.why_not.as_deref().unwrap_or("not made");
        return format!("None: the lab has no fix for {}: {why}.", rerun.cause);
    };
    let mut text = format!(
        "Once more, with {fix}: {rate:.2} MB/s instead of {:.2} MB/s ({:+.1} %). One run each: \
         differences of a few percent are noise.",
        report.bandwidth_mb_per_s,
        100.0 * (ratio - 1.0)
    );
    match &rerun.cause_after {
        Some(after) if *after == rerun.cause => {
            text += &format!(" The limit is still {after}.");
        }
        Some(after) => text += &format!(" The limit is now {after}."),
        None => {}
    }
    if !rerun.problems.is_empty() {
        text += &format!(" That run failed: {}.", rerun.problems.join("; "));
    }
    text
}

fn next_steps(report: &Throughput, findings: &Findings) -> String {
    let mut steps: Vec<String> = Vec::new();
    if let Some(why) = report.rerun.as_ref().and_then(|r| r.why_not.as_ref()) {
        steps.push(format!("{why}."));
    }
    for verdict in &findings.verdicts {
        steps.push(format!("{}: `{}`", verdict.cause, verdict.next_command));
    }
    if let Some(folder) = report.rerun.as_ref().and_then(|r| r.folder.as_ref()) {
        steps.push(format!("The second run's report is `{folder}/report.md`."));
    }
    steps.push("docs/DIAGNOSTIC_RUNBOOK_RECV.md explains each figure.".to_owned());
    let steps: Vec<String> = steps.iter().map(|step| format!("- {step}")).collect();
    format!("## Next steps\n\n{}", steps.join("\n"))
}
