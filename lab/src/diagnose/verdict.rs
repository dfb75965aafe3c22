//! Applies the decision table to a sample.

use serde::Serialize;

use super::facts::{Facts, Unit};
use super::interfaces::Interface;
use super::penstock::Broker;
use super::rules::{CAUSES, Cause, Clue, Is};
use super::sample::{End, Sample, Unavailable};
use super::settings::Settings;

/// What is less likely is not worth a line.
const WORTH_SAYING: f64 = 0.15;

/// One cause, as far as this sample speaks for it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    pub cause: &'static str,
    pub title: &'static str,
    /// 0 to 1.
    pub confidence: f64,
    /// Why it is so, where the figures tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub evidence_for: Vec<String>,
    pub evidence_against: Vec<String>,
    pub next_command: String,
}

/// A diagnosis as it is printed; field names are stable.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    /// Best first.
    pub verdicts: Vec<Verdict>,
    pub unavailable: Vec<Unavailable>,
    pub sample: Sample,
}

impl Diagnosis {
    pub fn of(sample: Sample, unavailable: Vec<Unavailable>) -> Self {
        Self {
            verdicts: verdicts(&sample),
            unavailable,
            sample,
        }
    }
}

fn verdicts(sample: &Sample) -> Vec<Verdict> {
    let mut verdicts = judge(&Facts::of(sample));
    for verdict in &mut verdicts {
        verdict.next_command = fill_in(&verdict.next_command, sample);
        verdict.reason = match verdict.cause {
            "receive-window-limited" => {
                receiver_of(sample).map(|end| window_reason(end, &sample.settings))
            }
            "nic-drops" => drops_reason(sample),
            _ => None,
        };
    }
    verdicts
}

/// Every cause that the facts speak for, the likeliest first.
pub fn judge(facts: &Facts) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = CAUSES.iter().filter_map(|c| weigh(c, facts)).collect();
    // Stable: between equals the table's order decides.
    verdicts.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
    verdicts
}

fn weigh(cause: &Cause, facts: &Facts) -> Option<Verdict> {
    let seen = |clue: &Clue| facts.get(clue.figure).is_some();
    let holds = |clue: &Clue| facts.get(clue.figure).is_some_and(|v| clue.is.holds(v));
    let mut ways = cause.requires.iter();
    let basis = match ways.clone().any(|way| way.iter().all(seen)) {
        true => ways.find(|way| way.iter().all(holds))?,
        false => cause.unseen,
    };
    if basis.is_empty() || !basis.iter().all(holds) {
        return None;
    }
    let counted = |clue: &Clue| {
        basis
            .iter()
            .any(|b| (b.figure, b.is) == (clue.figure, clue.is))
    };
    let further = cause.supports.iter().filter(|clue| !counted(clue));
    let (supports, missed): (Vec<&Clue>, Vec<&Clue>) = further.partition(|clue| holds(clue));
    let contradicts: Vec<&Clue> = cause.contradicts.iter().filter(|c| holds(c)).collect();
    let mut confirmed: Vec<&Clue> = basis.iter().collect();
    confirmed.extend(supports);
    let sum = |clues: &[&Clue]| clues.iter().map(|clue| clue.weight).sum::<f64>();
    let confidence = (sum(&confirmed) - sum(&contradicts)).clamp(0.0, 1.0);
    let confidence = (confidence * 100.0).round() / 100.0;
    let missed = missed.into_iter().filter_map(|clue| missing(clue, facts));
    let against = contradicts.iter().filter_map(|clue| evidence(clue, facts));
    (confidence >= WORTH_SAYING).then(|| Verdict {
        cause: cause.id,
        title: cause.title,
        confidence,
        reason: None,
        evidence_for: confirmed
            .iter()
            .filter_map(|clue| evidence(clue, facts))
            .collect(),
        evidence_against: against.chain(missed).collect(),
        next_command: cause.next.to_owned(),
    })
}

/// A clue that holds, with its threshold and the reason for that.
fn evidence(clue: &Clue, facts: &Facts) -> Option<String> {
    let value = facts.get(clue.figure)?;
    Some(format!(
        "{} {} ({}: {})",
        clue.figure.label(),
        shown(clue.figure.unit(), value),
        threshold(clue),
        clue.why
    ))
}

/// What would have spoken for the cause, and was seen not to.
fn missing(clue: &Clue, facts: &Facts) -> Option<String> {
    let value = shown(clue.figure.unit(), facts.get(clue.figure)?);
    Some(format!(
        "{} {value}, not {}",
        clue.figure.label(),
        threshold(clue)
    ))
}

fn threshold(clue: &Clue) -> String {
    let unit = match clue.figure.unit() {
        Unit::Time => Unit::Share,
        unit => unit,
    };
    match clue.is {
        Is::AtLeast(threshold) => format!("at least {}", shown(unit, threshold)),
        Is::Below(threshold) => format!("below {}", shown(unit, threshold)),
    }
}

/// A figure for a person.
pub fn shown(unit: Unit, value: f64) -> String {
    match unit {
        Unit::Time => format!("{} of the time", percent(value)),
        Unit::Share => percent(value),
        Unit::Bytes => bytes(value),
        Unit::BytesPerSecond => format!("{}/s", bytes(value)),
        Unit::PerSecond => format!("{value:.0}/s"),
        Unit::PerAck => format!("{value:.2} times per ACK"),
        Unit::Milliseconds => format!("{value:.1} ms"),
        Unit::Times => format!("{value:.1} times as long"),
    }
}

/// A share, 0 to 1.
pub fn percent(share: f64) -> String {
    match share {
        share if share > 0.0 && share < 0.01 => format!("{:.2} %", share * 100.0),
        share => format!("{:.0} %", share * 100.0),
    }
}

/// So many of something.
pub fn counted(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    }
}

/// Decimal, as rates are given everywhere in this program.
pub fn bytes(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{:.2} GB", v / 1e9),
        v if v >= 1e6 => format!("{:.1} MB", v / 1e6),
        v if v >= 1e3 => format!("{:.1} kB", v / 1e3),
        v => format!("{v:.0} B"),
    }
}

/// Names the observed process, its port and a process at the other end in a command.
fn fill_in(command: &str, sample: &Sample) -> String {
    let or = |value: Option<u32>, name: &str| value.map_or(name.to_owned(), |v| v.to_string());
    let mut peers = sample
        .connections
        .iter()
        .filter_map(|c| c.peer.as_ref()?.pid);
    let port = sample.ports.first().map(|port| u32::from(*port));
    let lossy = sample
        .interfaces
        .iter()
        .max_by_key(|i| i.rx_dropped + i.rx_fifo);
    // In this order: no name is part of an earlier one's value.
    command
        .replace("PEER", &or(peers.next(), "PEER"))
        .replace("PORT", &or(port, "PORT"))
        .replace("IFACE", lossy.map_or("IFACE", |i| i.name.as_str()))
        .replace("PID", &or(sample.pid, "PID"))
}

/// The receiving end of the busiest connection.
fn receiver_of(sample: &Sample) -> Option<&End> {
    sample.connections.first()?.receiver()
}

/// Where most packets were dropped, if it can be told.
fn drops_reason(sample: &Sample) -> Option<String> {
    let sum = |of: fn(&Interface) -> u64| sample.interfaces.iter().map(of).sum::<u64>();
    let xdp = sample.broker.as_ref().and_then(Broker::xdp);
    let at_socket = xdp.into_iter().flat_map(|xdp| xdp.dropped);
    let at_socket = at_socket.map(|(reason, count)| {
        let what = format!("found the AF_XDP socket short ({reason}): a larger --xdp-ring");
        (what, count)
    });
    let elsewhere = [
        (
            "found the queue of a core full: raise net.core.netdev_max_backlog",
            sample.cores.iter().map(|core| core.backlog_dropped).sum(),
        ),
        (
            "found the interface's ring full: a larger one (ethtool -G), or more queues",
            sum(|i| i.rx_fifo),
        ),
        (
            "came damaged: look at cable and transceiver (ethtool -S)",
            sum(|i| i.rx_errors),
        ),
    ];
    let elsewhere = elsewhere.map(|(what, count)| (what.to_owned(), count));
    let (what, count) = at_socket.chain(elsewhere).max_by_key(|(_, count)| *count)?;
    (count > 0).then(|| format!("{} {what}", counted(count as usize, "packet")))
}

/// Why a window is small, from the receiver's socket and the kernel's limits.
///
/// An accepted socket inherits its listener's SO_RCVBUF, and the window scale is fixed by the
/// listener's buffer when the SYN is answered: a buffer set after accept raises neither the scale nor
/// the first window. The kernel caps SO_RCVBUF at rmem_max, then doubles it; setting it at all
/// switches autotuning off.
fn window_reason(end: &End, settings: &Settings) -> String {
    let buffer = u64::from(end.receive_buffer);
    let reach = 65_535_u64 << end.rcv_wscale;
    let set = end.receive_buffer_set == Some(true);
    if reach < buffer / 2 {
        return format!(
            "the buffer was set too late: window scale {}, which the listener's buffer fixed in the handshake, ends at {reach} bytes, and the buffer has {buffer}; set it on the listener",
            end.rcv_wscale
        );
    }
    if set && u64::from(end.rcv_ssthresh) < buffer / 4 {
        return format!(
            "the window still grows: rcv_ssthresh is {} in a buffer of {buffer} bytes; set on the listener, the buffer would have given a larger first window",
            end.rcv_ssthresh
        );
    }
    if set && settings.rmem_max.is_some_and(|max| buffer == 2 * max) {
        return format!(
            "rmem_max caps the buffer: its {buffer} bytes are twice net.core.rmem_max; raise that, or use SO_RCVBUFFORCE"
        );
    }
    if set {
        return format!(
            "the application fixed the buffer at {buffer} bytes (SO_RCVBUF), which switches autotuning off; ask for more, or leave it to the kernel"
        );
    }
    if settings.tcp_moderate_rcvbuf == Some(0) {
        return format!(
            "autotuning is off (net.ipv4.tcp_moderate_rcvbuf=0), so the buffer stays at {buffer} bytes"
        );
    }
    match settings.tcp_rmem {
        Some([_, _, largest]) if buffer >= largest => format!(
            "autotuning is at its limit: the buffer has {buffer} bytes, net.ipv4.tcp_rmem allows {largest}"
        ),
        _ => format!(
            "the buffer has {buffer} bytes (rcv_ssthresh {}) and autotuning may raise it yet",
            end.rcv_ssthresh
        ),
    }
}

#[cfg(test)]
mod tests;
