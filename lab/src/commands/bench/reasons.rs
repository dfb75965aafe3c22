//! Why a row misses its target: what was measured, and what limited it according to the figures.

use crate::report::model::bench_figures::{
    BROKER_CORES, BROKER_CPU, HOST_BUSY, HOST_CPU, IDLE_STREAM, MESSAGES, OTHER_CORES, P50, P99,
    PAYLOAD, PROBE_OVERHEAD, PUBLISHER_CORES, PUBLISHER_CPU, RECEIVING_HOST, SENDING_HOST,
    WITHOUT_CONVERSION, best,
};
use crate::report::model::{BenchCase, BenchContender, Target};

/// A host that is busier has no core to spare.
const FULL_HOST: f64 = 0.93;
/// Cores that others may use before they, and not Penstock, are named.
const MAX_OTHERS: f64 = 0.5;
/// A process that uses more of a core has a thread that does nothing but work, or nearly.
const FULL_CORE: f64 = 0.93;

/// Of a row that compares two contenders.
pub fn of_ratio(
    case: &BenchCase,
    ours: &BenchContender,
    theirs: &BenchContender,
    figure: &str,
    target: Target,
    value: f64,
) -> String {
    let sentences = match figure {
        PAYLOAD => vec![
            moved(ours, theirs),
            bound(case, ours, theirs, target),
            limit(ours),
        ],
        P50 | P99 => vec![
            waited(ours, theirs, figure),
            in_flight(ours, theirs),
            limit(ours),
        ],
        HOST_CPU => vec![spent(ours, theirs, value)],
        WITHOUT_CONVERSION => vec![by_host(ours), by_host(theirs)],
        _ => Vec::new(),
    };
    join(sentences)
}

/// Of a row that has a bound by itself.
pub fn of_absolute(case: &BenchCase, contender: &BenchContender, figure: &str) -> String {
    let name = contender.name();
    let sentences = match figure {
        PAYLOAD | P50 => {
            let both = contender.median(PAYLOAD).zip(contender.median(P50));
            let little = both.map(|(rate, wait)| {
                format!(
                    "{name} moved {rate:.0} MB/s with a median ack latency of {:.1} ms: {:.1} MB in flight.",
                    wait * 1e-3,
                    rate * wait * 1e-6
                )
            });
            vec![little, limit(contender)]
        }
        MESSAGES => {
            let rate = contender.median(MESSAGES).map(|rate| {
                format!(
                    "{name} moved {:.1} M messages/s, {:.0} MB/s of payload at MTU {}.",
                    rate * 1e-6,
                    contender.median(PAYLOAD).unwrap_or(0.0),
                    case.mtu
                )
            });
            vec![rate, limit(contender)]
        }
        IDLE_STREAM => vec![contender.median(IDLE_STREAM).map(|bytes| {
            format!(
                "The broker's private memory grew by {:.1} KiB for each idle stream over {name}.",
                bytes / 1024.0
            )
        })],
        _ => Vec::new(),
    };
    join(sentences)
}

fn join(sentences: Vec<Option<String>>) -> String {
    let sentences: Vec<String> = sentences.into_iter().flatten().collect();
    sentences.join(" ")
}

fn moved(ours: &BenchContender, theirs: &BenchContender) -> Option<String> {
    Some(format!(
        "{} moved {:.0} MB/s, {} {:.0}.",
        ours.name(),
        ours.median(PAYLOAD)?,
        theirs.name(),
        theirs.median(PAYLOAD)?
    ))
}

/// Whether a bare socket could have met the target.
fn bound(
    case: &BenchCase,
    ours: &BenchContender,
    theirs: &BenchContender,
    target: Target,
) -> Option<String> {
    let Target::AtLeast(least) = target else {
        return None;
    };
    if ours.kind != "xdp" || theirs.kind == "raw_af_xdp" {
        return None;
    }
    let raw = best(case, "raw_af_xdp")?.median(PAYLOAD)?;
    let reachable = raw / theirs.median(PAYLOAD)?;
    Some(match reachable < least {
        true => format!(
            "A bare AF_XDP socket moved {raw:.0} MB/s in the same rounds, {reachable:.2} of {}: the target is out of reach on this link.",
            theirs.name()
        ),
        false => format!(
            "A bare AF_XDP socket moved {raw:.0} MB/s in the same rounds, {reachable:.2} of {}.",
            theirs.name()
        ),
    })
}

/// Who was busy.
fn limit(of: &BenchContender) -> Option<String> {
    let host = of.median(HOST_BUSY)?;
    let (publisher, broker) = (of.median(PUBLISHER_CORES)?, of.median(BROKER_CORES)?);
    let name = of.name();
    let others = of.median(OTHER_CORES).unwrap_or(0.0);
    let who = format!(
        "{name} kept the host {:.0} % busy (publisher {publisher:.2} cores, brokers {broker:.2})",
        100.0 * host
    );
    let why = if host >= FULL_HOST && others >= MAX_OTHERS {
        return Some(format!(
            "{who}, but other programs or kernel threads used {others:.2} cores of that; repeat it on a quiet host."
        ));
    } else if host >= FULL_HOST {
        "no core was idle, so CPU time per byte is the limit"
    } else if publisher >= FULL_CORE * f64::from(of.streams.min(2)) {
        "the sending side, with the kernel's work for it, was saturated"
    } else if broker >= FULL_CORE * f64::from(of.brokers) {
        "the receiving side was saturated"
    } else {
        "neither side was saturated, so it waited (penstock-lab throughput --diagnose says for what)"
    };
    Some(format!("{who}: {why}."))
}

fn waited(ours: &BenchContender, theirs: &BenchContender, figure: &str) -> Option<String> {
    Some(format!(
        "An ack took {} {:.0} µs, {} {:.0}.",
        ours.name(),
        ours.median(figure)?,
        theirs.name(),
        theirs.median(figure)?
    ))
}

/// By Little's law.
fn in_flight(ours: &BenchContender, theirs: &BenchContender) -> Option<String> {
    let flying = |of: &BenchContender| Some(of.median(PAYLOAD)? * of.median(P50)? * 1e-3);
    Some(format!(
        "At its rate that is {:.0} kB in flight, against {:.0}.",
        flying(ours)?,
        flying(theirs)?
    ))
}

/// What each host spent.
fn by_host(of: &BenchContender) -> Option<String> {
    let (all, without) = (of.median(RECEIVING_HOST)?, of.median(WITHOUT_CONVERSION)?);
    Some(format!(
        "Over {} the receiving host spent {all:.2} s/GB, {:.2} of it on the conversion of skbs, and the sending host {:.2}; measuring this slowed it down by {:.0} %.",
        of.name(),
        all - without,
        of.median(SENDING_HOST)?,
        100.0 * of.median(PROBE_OVERHEAD)?
    ))
}

/// Where the CPU time went, and where most of the difference is.
fn spent(ours: &BenchContender, theirs: &BenchContender, value: f64) -> Option<String> {
    let parts = |of: &BenchContender| {
        let (publisher, broker) = (of.median(PUBLISHER_CPU)?, of.median(BROKER_CPU)?);
        let rest = of.median(HOST_CPU)? - publisher - broker;
        Some([publisher, broker, rest])
    };
    let (a, b) = (parts(ours)?, parts(theirs)?);
    let names = [
        "the publisher's process",
        "the brokers' processes",
        "the rest of the host",
    ];
    let most = (0..names.len()).max_by(|&i, &j| (a[i] - b[i]).total_cmp(&(a[j] - b[j])))?;
    let shown = |p: [f64; 3]| format!("{:.2} + {:.2} + {:.2}", p[0], p[1], p[2]);
    let difference = match value > 1.0 {
        true => format!(
            "; most of the difference is in {} ({:+.2})",
            names[most],
            a[most] - b[most]
        ),
        false => String::new(),
    };
    Some(format!(
        "CPU s/GB of publisher, brokers and the rest of the host: {} {}, {} {}{difference}.",
        ours.name(),
        shown(a),
        theirs.name(),
        shown(b)
    ))
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::contender;
    use super::*;

    fn busy(streams: u32, host: f64, publisher: f64, broker: f64) -> String {
        beside(0.0, streams, host, publisher, broker)
    }

    fn beside(others: f64, streams: u32, host: f64, publisher: f64, broker: f64) -> String {
        let mut of = contender(
            "xdp",
            &[
                (HOST_BUSY, &[host]),
                (PUBLISHER_CORES, &[publisher]),
                (BROKER_CORES, &[broker]),
                (OTHER_CORES, &[others]),
            ],
        );
        of.streams = streams;
        limit(&of).unwrap()
    }

    #[test]
    fn who_was_full_is_told_from_the_figures() {
        assert!(busy(1, 0.97, 1.0, 0.9).contains("no core was idle"));
        assert!(busy(1, 0.7, 0.98, 0.4).contains("the sending side"));
        assert!(busy(64, 0.7, 0.98, 0.99).contains("the receiving side"));
        assert!(busy(1, 0.4, 0.3, 0.4).contains("neither side was saturated"));
        assert!(beside(1.2, 1, 0.97, 0.4, 0.4).contains("repeat it on a quiet host"));
        assert_eq!(limit(&contender("iperf3", &[])), None);
    }
}
