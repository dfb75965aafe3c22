//! Reports of `throughput`.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytesize::ByteSize;
use penstock_runtime::profile::StageReport;
use serde_json::Value;

use super::markdown::{environment, reproduce, table};
use super::{comparison, diagnosis};
use crate::measure::host_load;
use crate::report::model::{Broker, Throughput};
use penstock_testbed::delay::{DelayLineCount, DelayReport};
use penstock_testbed::faults::{FaultReport, LinkFaults};
use penstock_testbed::program_reports::{Connection, SentStream, Session};

/// Heights of a row of blocks, and how many there are at most.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const COLUMNS: usize = 72;

/// `report.md` of a throughput run.
pub fn throughput(report: &Throughput) -> String {
    let mut diagnosed = diagnosis::parts(report);
    if report.diagnosis.is_some() {
        diagnosed.push("# The run in full".to_owned());
    }
    let parts = [
        Some("# Penstock throughput".to_owned()),
        Some(headline(report)),
        host_load::part(&report.warnings),
        (!diagnosed.is_empty()).then(|| diagnosed.join("\n\n")),
        Some(stages("Publisher", &report.publisher.stages)),
        transport(&report.publisher.sessions),
        report.limits.as_deref().map(comparison::limits_part),
        Some(brokers(&report.brokers)),
        Some(connections(&report.brokers)),
        Some(verification(report)),
        report.faults.as_ref().map(faults),
        report.delay.as_ref().map(delay),
        Some(environment(&report.environment)),
        Some(reproduce(&report.environment)),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    parts.join("\n\n") + "\n"
}

/// What is printed on the terminal after a throughput run.
pub fn throughput_summary(report: &Throughput) -> String {
    let parts = [
        headline(report),
        stages("Publisher", &report.publisher.stages),
        report
            .brokers
            .first()
            .map_or_else(String::new, |b| stages("Broker 0", &b.stages)),
        broker_table(&report.brokers),
    ];
    let parts = parts.into_iter().chain(over_time(report));
    let parts = parts.chain(host_load::part(&report.warnings));
    let parts: Vec<_> = parts.chain(diagnosis::summary(report)).collect();
    parts.join("\n\n")
}

/// Throughput as a row of blocks, each as high as its part of the time was fast.
fn over_time(report: &Throughput) -> Option<String> {
    let points = &report.timeline.as_ref()?.points;
    let rates: Vec<f64> = points.iter().map(|p| p.mb_per_s.iter().sum()).collect();
    let most = rates.iter().copied().fold(0.0, f64::max);
    if rates.len() < 2 || most == 0.0 {
        return None;
    }
    let block = |chunk: &[f64]| {
        let mean = chunk.iter().sum::<f64>() / chunk.len() as f64;
        BLOCKS[(mean / most * (BLOCKS.len() - 1) as f64).round() as usize]
    };
    let row: String = rates
        .chunks(rates.len().div_ceil(COLUMNS))
        .map(block)
        .collect();
    let seconds = points.last().map_or(0.0, |point| point.seconds);
    Some(format!(
        "Throughput over {seconds:.1} s, at most {most:.0} MB/s\n\n{row}"
    ))
}

fn headline(report: &Throughput) -> String {
    let verdict = if report.problems.is_empty() {
        "Every message was acked and is in the brokers' logs.".to_owned()
    } else {
        let lines: String = report.problems.iter().map(|p| format!("\n- {p}")).collect();
        format!("**Not a success:**\n{lines}")
    };
    let payload = ByteSize(report.payload_bytes);
    let message = report.message_size.map_or_else(
        || format!("lines of {}", report.input.as_deref().unwrap_or("a file")),
        |size| format!("{size} bytes"),
    );
    let of_limit = report.percent_of_limit.map_or_else(
        || "not measured (`--limits`)".to_owned(),
        |percent| format!("{percent:.0} %"),
    );
    let waited = report.publisher.ack_latency_us.map_or_else(
        || "no acks".to_owned(),
        |waited| format!("{:.0} / {:.0} / {:.0}", waited.p50, waited.p99, waited.p999),
    );
    let rows = [
        [
            "bandwidth".to_owned(),
            format!("**{:.1} MB/s**", report.bandwidth_mb_per_s),
        ],
        [
            "the same in MiB/s, the unit of the original's figures".to_owned(),
            format!(
                "{:.1}",
                report.bandwidth_mb_per_s * 1e6 / f64::from(1 << 20)
            ),
        ],
        ["of the path's limit on this host".to_owned(), of_limit],
        ["ack latency p50 / p99 / p99.9, µs".to_owned(), waited],
        [
            "payload".to_owned(),
            format!("{} bytes ({payload})", report.payload_bytes),
        ],
        ["seconds".to_owned(), format!("{:.3}", report.seconds)],
        [
            "messages sent / acked / in logs".to_owned(),
            format!(
                "{} / {} / {}",
                report.messages_sent, report.messages_acked, report.messages_in_logs
            ),
        ],
        ["messages".to_owned(), message],
        [
            "brokers, streams to each".to_owned(),
            format!("{}, {}", report.num_brokers, report.threads_per_broker),
        ],
        [
            "mode, profile, MTU".to_owned(),
            format!("{}, {}, {}", report.mode, report.profile.name(), report.mtu),
        ],
        [
            "ack, order".to_owned(),
            format!("{}, {}", report.ack, report.order),
        ],
        [
            "publisher CPU s/GB, peak RSS".to_owned(),
            format!(
                "{:.3}, {}",
                report.publisher.cpu_seconds_per_gb,
                ByteSize(report.publisher.peak_rss_bytes)
            ),
        ],
    ];
    format!("{verdict}\n\n{}", table(["what", "value"], &rows))
}

fn stages(whose: &str, stages: &[StageReport]) -> String {
    let rows: Vec<_> = stages
        .iter()
        .map(|s| {
            [
                s.name.clone(),
                format!("{:.2}", s.percent),
                format!("{:.0}", s.ns_per_batch),
            ]
        })
        .collect();
    let table = table(["stage", "% of thread time", "ns per batch"], &rows);
    format!("## {whose}: where the time went\n\n{table}")
}

fn brokers(brokers: &[Broker]) -> String {
    let mut text = format!("## Brokers\n\n{}", broker_table(brokers));
    for broker in brokers {
        let whose = format!("Broker {}", broker.index);
        let _ = write!(text, "\n\n{}", stages(&whose, &broker.stages));
        let counted = broker.counters.iter().filter(|(_, count)| **count > 0);
        let rows: Vec<_> = counted
            .map(|(name, count)| [name.clone(), count.to_string()])
            .collect();
        if !rows.is_empty() {
            let _ = write!(text, "\n\n{}", table(["counter", "count"], &rows));
        }
        if let Some(xdp) = &broker.xdp {
            let _ = write!(text, "\n\n{}", xdp_table(xdp));
        }
    }
    text
}

/// What the xdp path is, and what it counted; what did not happen is left out.
fn xdp_table(xdp: &BTreeMap<String, Value>) -> String {
    let mut rows = Vec::new();
    for (name, value) in xdp {
        match value {
            Value::Object(parts) => {
                for (part, value) in parts {
                    rows.push([format!("{name}: {part}"), value.to_string()]);
                }
            }
            Value::String(text) => rows.push([name.clone(), text.clone()]),
            other => rows.push([name.clone(), other.to_string()]),
        }
    }
    rows.retain(|[_, value]| value != "0");
    table(["xdp path", "value"], &rows)
}

/// What each stream's packets did, over xdp.
fn transport(sessions: &[Session]) -> Option<String> {
    let streams = sessions.iter().flat_map(|session| {
        session
            .streams
            .iter()
            .map(|stream| (&session.address, stream))
    });
    let rows: Vec<_> = streams
        .filter_map(|(address, stream)| {
            let transport = stream.transport.as_ref()?;
            let figure = |name| format!("{:.0}", transport.get(name).copied().unwrap_or(0.0));
            Some([
                address.clone(),
                stream.stream.to_string(),
                path_of(stream),
                stream.moves.to_string(),
                figure("packets"),
                figure("lost"),
                figure("retransmits"),
                figure("probe_timeouts"),
                figure("credit_stalls"),
                figure("rtt_us"),
                figure("datagram"),
            ])
        })
        .collect();
    #[rustfmt::skip]
    let head = ["broker", "stream", "path", "moves", "packets", "lost", "sent again",
        "probe timeouts", "credit stalls", "RTT µs", "payload per packet"];
    (!rows.is_empty()).then(|| format!("## Packets of each stream\n\n{}", table(head, &rows)))
}

/// The path that a stream took, and how its datagrams left.
fn path_of(stream: &SentStream) -> String {
    match &stream.tx {
        Some(tx) => format!("{}, {tx}", stream.path),
        None => stream.path.clone(),
    }
}

fn broker_table(brokers: &[Broker]) -> String {
    let rows: Vec<_> = brokers
        .iter()
        .map(|b| {
            [
                b.index.to_string(),
                b.messages_in_log.to_string(),
                format!("{:.3}", b.cpu_seconds_per_gb),
                format!("{:.1}", b.recv_calls_per_batch),
                format!("{:.0}", b.bytes_per_recv),
                b.eagain.to_string(),
                ByteSize(b.ring_bytes).to_string(),
                ByteSize(b.peak_rss_bytes).to_string(),
                beyond_ring(b),
            ]
        })
        .collect();
    #[rustfmt::skip]
    let head = ["broker", "messages in log", "CPU s/GB", "recv calls per batch", "bytes per recv",
        "EAGAIN", "ring", "peak RSS", "RSS beyond ring"];
    table(head, &rows)
}

/// Resident memory that is not the ring itself; the ring counts once touched.
fn beyond_ring(broker: &Broker) -> String {
    match broker.peak_rss_bytes.checked_sub(broker.ring_bytes) {
        Some(beyond) => ByteSize(beyond).to_string(),
        None => "below (ring not full)".to_owned(),
    }
}

fn connections(brokers: &[Broker]) -> String {
    let number = |n: Option<u64>| n.map_or_else(|| "not set".to_owned(), |n| n.to_string());
    let of_broker = |b: &Broker| {
        let index = b.index;
        let row = move |c: &Connection| {
            [
                index.to_string(),
                c.peer.clone(),
                c.stream.to_string(),
                c.path.clone(),
                number(c.rcvbuf_requested),
                c.rcvbuf_effective.to_string(),
                if c.rcvbuf_capped { "by rmem_max" } else { "no" }.to_owned(),
                number(c.sndbuf_requested),
                c.sndbuf_effective.to_string(),
                c.window_scale
                    .map_or_else(|| "off".to_owned(), |scale| scale.to_string()),
                c.ended.clone(),
            ]
        };
        b.connections.iter().map(row).collect::<Vec<_>>()
    };
    let rows: Vec<_> = brokers.iter().flat_map(of_broker).collect();
    #[rustfmt::skip]
    let head = ["broker", "peer", "stream", "path", "rcvbuf requested", "rcvbuf effective", "capped",
        "sndbuf requested", "sndbuf effective", "window scale", "ended"];
    format!(
        "## Socket buffers per connection\n\n\
         Effective is what the kernel reports: twice what it granted, its own bookkeeping included. \
         The window scale is fixed by the SYN exchange.\n\n{}",
        table(head, &rows)
    )
}

pub fn verification(report: &Throughput) -> String {
    let title = "## Verification of contents";
    let Some(checks) = &report.verification else {
        return format!(
            "{title}\n\nNot requested (`--verify`): messages were counted, not compared."
        );
    };
    let rows: Vec<_> = checks
        .iter()
        .map(|c| {
            let verdict = match c.differences.as_slice() {
                [] => "equal".to_owned(),
                differences => differences.join("; "),
            };
            let sha256 = c.sha256.clone().unwrap_or_default();
            let (broker, stream) = (c.broker.to_string(), c.stream.to_string());
            [broker, stream, c.messages.to_string(), sha256, verdict]
        })
        .collect();
    let table = table(
        ["broker", "stream", "messages", "SHA-256 as sent", "log"],
        &rows,
    );
    format!("{title}\n\nEvery checksum was computed again from the logs.\n\n{table}")
}

/// What the links did to packets; what did not happen is left out.
fn faults(report: &FaultReport) -> String {
    let row = |link: &LinkFaults| {
        let counted = link.counts.iter().filter(|(_, count)| **count > 0);
        let counts: Vec<_> = counted.map(|(what, n)| format!("{what} {n}")).collect();
        [
            link.broker.to_string(),
            link.direction.name().to_owned(),
            counts.join(", "),
        ]
    };
    let rows: Vec<_> = report.links.iter().map(row).collect();
    format!(
        "## Faults\n\nAsked for: `{}`, seed {}. Counted by the program on each link:\n\n{}",
        report.asked,
        report.seed,
        table(["broker", "way", "packets"], &rows)
    )
}

/// What the lines to the brokers carried.
fn delay(report: &DelayReport) -> String {
    let row = |link: &DelayLineCount| {
        let (broker, packets) = (link.broker.to_string(), link.packets.to_string());
        [broker, packets, link.dropped.to_string()]
    };
    let rows: Vec<_> = report.links.iter().map(row).collect();
    format!(
        "## Delay\n\nEvery packet to a broker waited {} µs.\n\n{}",
        report.delay_us,
        table(["broker", "packets", "dropped for lack of room"], &rows)
    )
}
