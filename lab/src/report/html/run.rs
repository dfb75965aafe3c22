//! The page of a throughput run.

use anyhow::Result;
use bytesize::ByteSize;
use maud::{Markup, html};
use penstock_runtime::profile::StageReport;
use plotters::style::RGBColor;

use super::frame::{figure, page, table};
use crate::report::chart::{self, Bar, Curve, Lines};
use crate::report::model::diagnosis::{Findings, Verdict};
use crate::report::model::{ConnectionPoint, Point, Throughput, Timeline};
use crate::report::text;

/// More curves than this are hard to distinguish.
const MOST_CURVES: usize = 8;
/// A connection that received less carried no payload to speak of.
const BULK: u64 = 1 << 20;

/// The whole page.
pub fn throughput(report: &Throughput) -> Result<String> {
    let findings = report
        .diagnosis
        .as_ref()
        .map(|d| d.findings())
        .transpose()?;
    let body = html! {
        h1 { "Penstock throughput" }
        p.soft {
            (report.environment.date) ", " (report.environment.cpus) " × " (report.environment.cpu_model)
            ", Linux " (report.environment.kernel)
        }
        (outcome(report))
        (tiles(report))
        @if let Some(findings) = &findings { (diagnosis(report, findings)) }
        @if let Some(why) = &report.not_diagnosed {
            h2 { "What limits it" }
            p { "Not diagnosed: " (why) }
        }
        h2 { "Over time" }
        @match &report.timeline {
            Some(timeline) if timeline.points.len() > 1 => { (over_time(report, timeline)?) }
            _ => { p.soft { "Too short, or of an older lab: nothing was recorded over time." } }
        }
        h2 { "Where the time went" }
        div.figures {
            (stages("Publisher", [("publisher".to_owned(), &report.publisher.stages)].into_iter())?)
            (stages("Brokers", report.brokers.iter().map(|b| (format!("broker {}", b.index), &b.stages)))?)
        }
        h2 { "Brokers" }
        (brokers(report))
        h2 { "Socket buffers" }
        (sockets(report))
        h2 { "How to reproduce" }
        pre { (report.environment.command_line) }
    };
    Ok(page("Penstock throughput", &body))
}

fn outcome(report: &Throughput) -> Markup {
    html! {
        @if report.problems.is_empty() {
            p.good { "Every message was acked and is in the brokers' logs." }
        } @else {
            p.bad { "Not a success:" }
            ul { @for problem in &report.problems { li { (problem) } } }
        }
    }
}

fn tiles(report: &Throughput) -> Markup {
    let message = report.message_size.map_or_else(
        || report.input.clone().unwrap_or_default(),
        |size| ByteSize(size).to_string(),
    );
    let mut tiles = vec![
        (
            format!("{:.1} MB/s", report.bandwidth_mb_per_s),
            "bandwidth",
        ),
        (ByteSize(report.payload_bytes).to_string(), "payload"),
        (format!("{:.2} s", report.seconds), "time"),
        (message, "messages of"),
        (
            format!("{} × {}", report.num_brokers, report.threads_per_broker),
            "brokers × streams",
        ),
        (
            format!("{}, {}, {}", report.mode, report.profile.name(), report.mtu),
            "path, profile, MTU",
        ),
    ];
    if let Some(percent) = report.percent_of_limit {
        tiles.push((format!("{percent:.0} %"), "of the path's limit"));
    }
    if let Some(waited) = &report.publisher.ack_latency_us {
        let text = format!("{:.0} / {:.0} µs", waited.p50, waited.p99);
        tiles.push((text, "ack latency p50 / p99"));
    }
    html! {
        div.tiles { @for (value, what) in &tiles { div.tile { b { (value) } span { (what) } } } }
    }
}

fn diagnosis(report: &Throughput, findings: &Findings) -> Markup {
    let rows = text::diagnosis_figures(report, findings);
    let rows = rows
        .into_iter()
        .map(|(what, value)| vec![what.to_owned(), value]);
    html! {
        h2 { "What limits it" }
        @if findings.verdicts.is_empty() { p { "No cause fits the observations." } }
        @for (rank, verdict) in findings.verdicts.iter().enumerate() {
            (verdict_part(rank, verdict))
        }
        @for missing in &findings.unavailable {
            p.soft { "Not observed: " (missing.what) " (" (missing.why) "; " (missing.how) ")" }
        }
        h2 { "Re-run after the fix" }
        p { (text::rerun(report)) }
        h2 { "What was measured" }
        (table(&["observation", "value"], &rows.collect::<Vec<_>>()))
    }
}

fn verdict_part(rank: usize, verdict: &Verdict) -> Markup {
    html! {
        div.verdict.first[rank == 0] {
            strong { (verdict.cause) } " "
            span.note { "confidence " (format!("{:.2}", verdict.confidence)) }
            div { (verdict.title) }
            @if let Some(reason) = &verdict.reason { div { "because " (reason) } }
            ul {
                @for line in &verdict.evidence_for { li { span.good { "+ " } (line) } }
                @for line in &verdict.evidence_against { li { span.bad { "− " } (line) } }
            }
            div { span.note { "next: " } code { (verdict.next_command) } }
        }
    }
}

fn over_time(report: &Throughput, timeline: &Timeline) -> Result<Markup> {
    let points = &timeline.points;
    Ok(html! {
        div.figures {
            (rates(report, points)?)
            (processors(report, points)?)
            (windows("Receive windows", "offered by the broker, kB", points, |c| f64::from(c.rcv_wnd))?)
            (windows("Congestion windows", "of the publisher, kB", points, |c| c.cwnd_bytes as f64)?)
        }
    })
}

fn curve(name: &str, points: &[Point], of: impl Fn(&Point) -> f64) -> Curve {
    Curve {
        name: name.to_owned(),
        points: points
            .iter()
            .map(|point| (point.seconds, of(point)))
            .collect(),
    }
}

/// A picture of curves with its legend.
fn curves(title: &str, note: &str, unit: &str, curves: Vec<Curve>) -> Result<Markup> {
    let named = curves.iter().enumerate();
    let legend: Vec<_> = named
        .map(|(number, curve)| (curve.name.clone(), chart::colour(number)))
        .collect();
    figure(title, note, &legend, Lines { unit, curves }.svg())
}

fn rates(report: &Throughput, points: &[Point]) -> Result<Markup> {
    let brokers = report.brokers.len();
    let mut lines = vec![curve("all brokers", points, |p| p.mb_per_s.iter().sum())];
    if (2..MOST_CURVES).contains(&brokers) {
        for index in 0..brokers {
            let name = format!("broker {index}");
            let rate = |point: &Point| point.mb_per_s.get(index).copied().unwrap_or(0.0);
            lines.push(curve(&name, points, rate));
        }
    }
    curves("Throughput", "committed payload", "MB/s", lines)
}

fn processors(report: &Throughput, points: &[Point]) -> Result<Markup> {
    let note = format!("of {} cores", report.environment.cpus);
    let busy = |p: &Point| p.host.user + p.host.system + p.host.softirq + p.host.steal;
    let lines = vec![
        curve("publisher", points, |p| p.publisher_cores),
        curve("brokers", points, |p| p.broker_cores),
        curve("host: softirq", points, |p| p.host.softirq),
        curve("host: all", points, busy),
    ];
    curves("CPU", &note, "cores", lines)
}

/// A curve for each connection that carried payload; nothing if none did.
fn windows(
    title: &str,
    note: &str,
    points: &[Point],
    of: fn(&ConnectionPoint) -> f64,
) -> Result<Markup> {
    let last = points
        .iter()
        .rev()
        .find(|point| !point.connections.is_empty());
    let connections = last.map_or(&[][..], |point| &point.connections);
    let bulk = connections.iter().filter(|c| c.bytes_received >= BULK);
    let bulk: Vec<&ConnectionPoint> = bulk.take(MOST_CURVES).collect();
    if bulk.is_empty() {
        return Ok(html! {});
    }
    let lines = bulk.iter().map(|wanted| {
        let is_it = |c: &&ConnectionPoint| c.broker == wanted.broker && c.peer == wanted.peer;
        let at = |point: &Point| {
            let found = point.connections.iter().find(is_it)?;
            Some((point.seconds, of(found) / 1e3))
        };
        Curve {
            name: format!("{} to broker {}", wanted.peer, wanted.broker),
            points: points.iter().filter_map(at).collect(),
        }
    });
    curves(title, note, "kB", lines.collect())
}

fn stages<'a>(
    title: &str,
    threads: impl Iterator<Item = (String, &'a Vec<StageReport>)>,
) -> Result<Markup> {
    let threads: Vec<_> = threads.collect();
    let mut legend: Vec<(String, RGBColor)> = Vec::new();
    for stage in threads.iter().flat_map(|(_, stages)| *stages) {
        if !legend.iter().any(|(name, _)| *name == stage.name) {
            let colour = match stage.name.starts_with("Wait") {
                true => chart::WAITING,
                false => chart::colour(legend.len()),
            };
            legend.push((stage.name.clone(), colour));
        }
    }
    let share = |stages: &[StageReport], name: &str| {
        let found = stages.iter().find(|stage| stage.name == name);
        found.map_or(0.0, |stage| stage.percent)
    };
    let bars = threads.iter().map(|(name, stages)| Bar {
        name: name.clone(),
        parts: legend
            .iter()
            .map(|(part, colour)| (share(stages, part), *colour))
            .collect(),
    });
    let bars: Vec<Bar> = bars.collect();
    figure(title, "% of thread time", &legend, chart::shares(&bars))
}

fn brokers(report: &Throughput) -> Markup {
    let rows = report.brokers.iter().map(|b| {
        vec![
            b.index.to_string(),
            b.messages_in_log.to_string(),
            format!("{:.3}", b.cpu_seconds_per_gb),
            format!("{:.1}", b.recv_calls_per_batch),
            format!("{:.0}", b.bytes_per_recv),
            b.eagain.to_string(),
            ByteSize(b.peak_rss_bytes).to_string(),
        ]
    });
    #[rustfmt::skip]
    let head = ["broker", "messages in log", "CPU s/GB", "recv calls per batch", "bytes per recv",
        "EAGAIN", "peak RSS"];
    table(&head, &rows.collect::<Vec<_>>())
}

fn sockets(report: &Throughput) -> Markup {
    let number = |n: Option<u64>| n.map_or_else(|| "not set".to_owned(), |n| n.to_string());
    let connections = report.brokers.iter().flat_map(|b| {
        let index = b.index;
        b.connections.iter().map(move |c| (index, c))
    });
    let rows = connections.map(|(broker, c)| {
        vec![
            broker.to_string(),
            c.peer.clone(),
            c.path.clone(),
            number(c.rcvbuf_requested),
            c.rcvbuf_effective.to_string(),
            if c.rcvbuf_capped { "by rmem_max" } else { "no" }.to_owned(),
            c.window_scale
                .map_or_else(|| "off".to_owned(), |n| n.to_string()),
            c.rcv_ssthresh_first
                .map_or_else(String::new, |n| n.to_string()),
            c.ended.clone(),
        ]
    });
    #[rustfmt::skip]
    let head = ["broker", "peer", "path", "rcvbuf requested", "effective", "capped", "window scale",
        "first rcv_ssthresh", "ended"];
    table(&head, &rows.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::text::tests::{diagnosed, example};

    const HOSTILE: &str = "</style></title><script>alert('x')</script>\"'&";

    #[test]
    fn every_part_is_on_the_page() {
        let html = throughput(&diagnosed()).unwrap();
        for wanted in [
            "884.5 MB/s",
            "What limits it",
            "receive-window-limited",
            "Re-run after the fix",
            "instead of 884.53 MB/s",
            "Throughput",
            "CPU",
            "Receive windows",
            "Congestion windows",
            "10.214.0.1:40000 to broker 0",
            "SendPayload",
            "DrainHeader",
            "by rmem_max",
            "penstock-lab throughput --brokers 1",
        ] {
            assert!(html.contains(wanted), "{wanted} is missing");
        }
        assert_eq!(html.matches("<svg").count(), 6);
        assert!(
            !html.contains("<script") && !html.contains("src="),
            "{html}"
        );
    }

    #[test]
    fn what_a_report_says_is_never_markup() {
        let mut report = diagnosed();
        let hostile = || HOSTILE.to_owned();
        report.input = Some(hostile());
        report.message_size = None;
        report.mode = hostile();
        report.problems = vec![hostile()];
        report.publisher.stages[0].name = hostile();
        report.brokers[0].connections[0].peer = hostile();
        report.brokers[0].connections[0].ended = hostile();
        report.environment.command_line = hostile();
        report.environment.cpu_model = hostile();
        for point in &mut report.timeline.as_mut().unwrap().points {
            point.connections[0].peer = hostile();
        }
        let rerun = report.rerun.as_mut().unwrap();
        (rerun.fix, rerun.cause_after) = (Some(hostile()), Some(hostile()));
        let found = &mut report.diagnosis.as_mut().unwrap().found;
        for field in ["cause", "title", "reason", "next_command"] {
            found["verdicts"][0][field] = hostile().into();
        }
        found["verdicts"][0]["evidence_for"][0] = hostile().into();
        found["unavailable"] =
            serde_json::json!([{ "what": HOSTILE, "why": HOSTILE, "how": HOSTILE }]);
        let html = throughput(&report).unwrap();
        assert!(!html.contains("<script"), "{html}");
        assert_eq!(html.matches("</style>").count(), 1);
        assert_eq!(html.matches("</title>").count(), 1);
        assert!(html.matches("&lt;script&gt;").count() >= 15, "{html}");
    }

    #[test]
    fn a_report_with_less_in_it_is_a_page_too() {
        let mut report = example();
        let html = throughput(&report).unwrap();
        assert!(!html.contains("What limits it") && html.contains("nothing was recorded"));
        report.not_diagnosed = Some("too short".to_owned());
        let html = throughput(&report).unwrap();
        assert!(html.contains("Not diagnosed: too short"));
    }
}
