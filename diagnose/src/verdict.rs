//! Applies the decision table to a sample.

use serde::Serialize;

use super::broker_stats::Broker;
use super::clue::{Cause, Clue, Is};
use super::facts::{Facts, Serving, Unit};
use super::interfaces::Interface;
use super::rules::{CAUSES, WHOLE_CORE};
use super::sample::{Connection, End, Sample, Unavailable};
use super::settings::Settings;
use penstock_flags::quoted;

/// Why a cause holds, and what to do next if that differs from the cause's general advice.
#[derive(Debug, Clone, PartialEq)]
struct Reason {
    text: String,
    next: Option<String>,
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self { text, next: None }
    }
}

impl Reason {
    fn with(text: String, next: &str) -> Self {
        Self {
            text,
            next: Some(next.to_owned()),
        }
    }
}

/// Verdicts below this confidence are left out.
const MIN_CONFIDENCE: f64 = 0.15;

/// One cause, and how well the sample supports it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Identifies the cause.
    pub cause: &'static str,
    /// The cause in words.
    pub title: &'static str,
    /// 0 to 1.
    pub confidence: f64,
    /// Why it is so, where the figures tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Figures that speak for it.
    pub evidence_for: Vec<String>,
    /// Figures that speak against it.
    pub evidence_against: Vec<String>,
    /// The command that shows more.
    pub next_command: String,
}

/// A diagnosis as it is printed; field names are stable.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    /// Best first.
    pub verdicts: Vec<Verdict>,
    /// What could not be observed.
    pub unavailable: Vec<Unavailable>,
    /// What was observed.
    pub sample: Sample,
}

impl Diagnosis {
    /// The diagnosis of a sample.
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
        let reason = reason(verdict.cause, sample);
        if let Some(next) = reason.as_ref().and_then(|reason| reason.next.as_ref()) {
            verdict.next_command.clone_from(next);
        }
        verdict.next_command = fill_in(&verdict.next_command, sample);
        verdict.reason = reason.map(|reason| reason.text);
    }
    verdicts
}

/// Why a cause holds, if the figures show it.
fn reason(cause: &str, sample: &Sample) -> Option<Reason> {
    let sender = || sample.connections.first()?.sender();
    match cause {
        "receive-window-limited" => {
            let bound = listener_clamp(sample);
            receiver_of(sample).map(|end| window_reason(end, &sample.settings, bound))
        }
        "nic-drops" => drops_reason(sample).map(Reason::from),
        "cpu-taken-by-others" => Some(others_reason(sample).into()),
        "accept-queue-full" => accept_reason(sample).map(Reason::from),
        "receiver-cpu" => cpu_reason(sample, receiver_of(sample)?.pid?),
        "sender-cpu" => cpu_reason(sample, sender()?.pid?),
        "receiver-application-limited" => {
            // Without accepted connections, no process has one; and a stopped server accepts none.
            let pid = receiver_of(sample)?.pid.or(sample.pid);
            stopped_reason(sample, pid)
        }
        "congestion-limited" => sender()?.route_cwnd.map(cwnd_reason),
        "sender-application-limited" | "idle-or-offered-slower-than-capacity" => {
            stopped_reason(sample, sender().and_then(|end| end.pid))
        }
        _ => None,
    }
}

/// Every cause that the facts support, the likeliest first.
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
    (confidence >= MIN_CONFIDENCE).then(|| Verdict {
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

/// A clue that would support the cause, but was observed not to hold.
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
        Unit::PerSecond if value < 10.0 => format!("{value:.1}/s"),
        Unit::PerSecond => format!("{value:.0}/s"),
        Unit::PerAck => format!("{value:.2} times per ACK"),
        Unit::Milliseconds => format!("{value:.1} ms"),
        Unit::Times => format!("{value:.1} times its minimum"),
    }
}

/// A share, 0 to 1.
pub fn percent(share: f64) -> String {
    match share {
        share if share > 0.0 && share < 0.01 => format!("{:.2} %", share * 100.0),
        share => format!("{:.0} %", share * 100.0),
    }
}

/// A count with its noun.
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

/// Inserts the receiving process, the port and the sending process into a command. The process that
/// listens may not be the one that has the connections.
fn fill_in(command: &str, sample: &Sample) -> String {
    let or = |value: Option<u32>, name: &str| value.map_or(name.to_owned(), |v| v.to_string());
    let receives = |connection: &Connection| connection.receives;
    let receiver = receiver_of(sample).and_then(|end| end.pid);
    let mut senders = sample.connections.iter().filter_map(|c| c.sender()?.pid);
    let (receiver, sender) = match sample.connections.first().is_none_or(receives) {
        true => (receiver.or(sample.pid), senders.next()),
        false => (receiver, senders.next().or(sample.pid)),
    };
    let port = sample.ports.first().map(|port| u32::from(*port));
    let lossy = sample
        .interfaces
        .iter()
        .max_by_key(|i| i.rx_dropped + i.rx_fifo);
    // Any user may name an interface, and the user may paste this into a shell.
    let interface = lossy.map_or("IFACE".to_owned(), |i| quoted(&i.name));
    // In this order: no name is part of an earlier one's value.
    command
        .replace("PEER", &or(sender, "PEER"))
        .replace("PORT", &or(port, "PORT"))
        .replace("PID", &or(receiver, "PID"))
        .replace("IFACE", &interface)
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
        let what = format!("dropped at the AF_XDP socket ({reason}): use a larger --xdp-ring");
        (what, count)
    });
    let elsewhere = [
        (
            "dropped at the full queue of a core: raise net.core.netdev_max_backlog",
            sample.cores.iter().map(|core| core.backlog_dropped).sum(),
        ),
        (
            "dropped at the interface's full ring: enlarge it (ethtool -G), or use more queues",
            sum(|i| i.rx_fifo),
        ),
        (
            "received damaged: check the cable and the transceiver (ethtool -S)",
            sum(|i| i.rx_errors),
        ),
    ];
    let elsewhere = elsewhere.map(|(what, count)| (what.to_owned(), count));
    let (what, count) = at_socket.chain(elsewhere).max_by_key(|(_, count)| *count)?;
    (count > 0).then(|| format!("{} {what}", counted(count as usize, "packet")))
}

/// Who used the cores.
fn others_reason(sample: &Sample) -> String {
    let named = sample.others.busiest.iter().map(|other| {
        let who = match other.processes {
            1 => format!("{} ({})", other.name, other.pid),
            count => format!("{count} × {}", other.name),
        };
        format!("{who} {:.2}", other.cores)
    });
    let mut parts = vec![format!(
        "other processes used {:.2} of {}",
        sample.others.cores,
        counted(sample.cores.len(), "core")
    )];
    parts.extend(named.take(3));
    let stolen: f64 = sample.cores.iter().map(|core| core.steal).sum();
    if stolen / sample.cores.len().max(1) as f64 >= 0.01 {
        parts.push(format!("the hypervisor took {stolen:.2} (steal)"));
    }
    parts.join(", ")
}

/// Which queue is full, and the consequences.
fn accept_reason(sample: &Sample) -> Option<String> {
    let listener = sample.listeners.first()?;
    let event = |name| sample.tcp_events.get(name).copied().unwrap_or(0);
    let mut text = format!(
        "on {}, {:.0} connections are waiting, with room for {} (the smaller of listen()'s backlog and net.core.somaxconn)",
        listener.local, listener.waiting, listener.backlog,
    );
    let (overflows, drops) = (event("ListenOverflows"), event("ListenDrops"));
    if overflows + drops > 0 {
        text += &format!(
            "; during the observation {overflows} found it full (ListenOverflows) and {drops} were dropped (ListenDrops), over all listeners of that namespace"
        );
    }
    Some(text)
}

/// Why an end is short of CPU: its quota, or one connection's work that more threads cannot share.
fn cpu_reason(sample: &Sample, pid: u32) -> Option<Reason> {
    let process = sample.processes.iter().find(|p| p.pid == pid)?;
    let throttled = process.throttled.unwrap_or(0.0);
    if throttled >= 0.1 {
        return Some(Reason::with(
            format!(
                "its control group was out of CPU quota {} of the time",
                percent(throttled)
            ),
            &format!("cat /proc/{pid}/cgroup  # raise cpu.max (CPUQuota=, --cpus) of that group"),
        ));
    }
    let ends = sample
        .connections
        .iter()
        .flat_map(|c| [c.sender(), c.receiver()]);
    let most = sample.connections.first()?.bytes() / 10;
    let bulk = sample
        .connections
        .iter()
        .filter(|c| c.bytes() >= most)
        .count();
    let is_an_end = ends.flatten().any(|end| end.pid == Some(pid));
    let serving = Serving::of(process, bulk).filter(|_| is_an_end)?;
    serving.moves(WHOLE_CORE).then(|| {
        format!(
            "the work of {} moves between {}: together they used {} of a core, the busiest {}",
            counted(bulk, "connection"),
            counted(process.threads.len(), "thread"),
            percent(process.run),
            percent(serving.busiest),
        )
        .into()
    })
}

/// Detects an end that cannot run at all.
fn stopped_reason(sample: &Sample, pid: Option<u32>) -> Option<Reason> {
    let process = sample.processes.iter().find(|p| Some(p.pid) == pid)?;
    let pid = process.pid;
    process.stopped.then(|| {
        Reason::with(
            format!("process {pid} is stopped, by a signal (SIGSTOP, Ctrl-Z) or a debugger"),
            &format!("kill -CONT {pid}  # or end the debugger: grep TracerPid /proc/{pid}/status"),
        )
    })
}

fn cwnd_reason(packets: u32) -> Reason {
    Reason::with(
        format!("the sender's route locks the congestion window at {packets} packets"),
        "ip route show table all | grep cwnd  # repeat that route with ip route change, without `cwnd lock`",
    )
}

/// Why a window is small, from the receiver's socket and the kernel's limits.
///
/// An accepted socket inherits its listener's SO_RCVBUF, and the window scale is fixed by the
/// listener's buffer when the SYN is answered: a buffer set after accept raises neither the scale nor
/// the first window. The kernel caps SO_RCVBUF at rmem_max, then doubles it; setting it at all
/// switches autotuning off. Before all that, both ends must scale windows at all (RFC 7323), and the
/// application or the route may bound what is offered.
fn window_reason(end: &End, settings: &Settings, listener_clamp: Option<u32>) -> Reason {
    window_bound(end, settings, listener_clamp)
        .unwrap_or_else(|| buffer_reason(end, settings).into())
}

/// A window that something other than the buffer limits.
fn window_bound(end: &End, settings: &Settings, listener_clamp: Option<u32>) -> Option<Reason> {
    if end.window_scaling == Some(false) {
        let why = match settings.tcp_window_scaling {
            Some(0) => "net.ipv4.tcp_window_scaling is 0 here",
            _ => {
                "the other end has net.ipv4.tcp_window_scaling=0, or a middlebox removes the option from the SYN"
            }
        };
        return Some(Reason::with(
            format!(
                "the ends did not agree on window scaling, so no window exceeds 65535 bytes, whatever the buffer: {why}"
            ),
            "sysctl net.ipv4.tcp_window_scaling  # must be 1 at both ends; then reconnect. If it is 1: sudo tcpdump -ni any -vc 4 'port PORT and tcp[13] & 2 != 0'  # wscale in both SYNs",
        ));
    }
    if let Some(window) = end.route_window {
        return Some(Reason::with(
            format!("the receiver's route to the sender bounds the window at {window} bytes"),
            "ip route show table all | grep window  # at the receiver; repeat that route with ip route change, without `window`",
        ));
    }
    let own = end.window_clamp.filter(|_| end.has_clamp());
    let (whose, clamp) = match (listener_clamp, own) {
        (Some(clamp), _) => ("its listener's connections", clamp),
        // A small listener buffer leaves the same limit on a connection whose buffer is set later.
        (None, Some(clamp)) if end.receive_buffer_set == Some(true) => {
            return Some(Reason::from(format!(
                "the buffer was set too late: the handshake used the listener's buffer and fixed the maximum window at {clamp} bytes and the window scale at {}, but the buffer now has {} bytes; set it on the listener (unless the application also sets TCP_WINDOW_CLAMP)",
                end.rcv_wscale, end.receive_buffer
            )));
        }
        (None, Some(clamp)) => ("this connection", clamp),
        (None, None) => return None,
    };
    Some(Reason::with(
        format!(
            "the application bounds the window of {whose} at {clamp} bytes (TCP_WINDOW_CLAMP), which also fixes the window scale; the buffer has {} bytes",
            end.receive_buffer
        ),
        "sudo strace -f -e trace=setsockopt -p PID  # TCP_WINDOW_CLAMP, when it starts or accepts; remove the call",
    ))
}

/// The application's window limit on the socket that accepted the busiest connection.
fn listener_clamp(sample: &Sample) -> Option<u32> {
    let connection = sample.connections.first().filter(|c| c.receives)?;
    let port = connection.local.port();
    let mut listeners = sample.listeners.iter();
    listeners
        .find(|listener| listener.local.port() == port)?
        .window_clamp
}

/// Which property of the buffer limits the window.
fn buffer_reason(end: &End, settings: &Settings) -> String {
    let buffer = u64::from(end.receive_buffer);
    let reach = 65_535_u64 << end.rcv_wscale;
    let set = end.receive_buffer_set == Some(true);
    if reach < buffer / 2 {
        return format!(
            "the buffer was set too late: the listener's buffer fixed the window scale at {} in the handshake, so no window exceeds {reach} bytes, but the buffer has {buffer} bytes; set it on the listener",
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
