//! Condenses a sample to the few numbers that rules use. A number that could not be observed is absent, never 0.

use std::collections::BTreeMap;

use super::broker_stats::Broker;
use super::cpu::Process;
use super::sample::{Connection, End, Sample};
use super::syscalls::Receives;

/// A connection with less of the work than this share of the busiest one's does not count.
const BULK: f64 = 0.1;

/// A number, by what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    Rate,
    Queued,
    SenderBusy,
    RwndLimited,
    SndbufLimited,
    PathLimited,
    AppLimited,
    CwndFull,
    Retransmitted,
    RttGrowth,
    SendQueue,
    ReceiveQueue,
    ReadDelay,
    WindowUse,
    WindowBounded,
    SenderCore,
    SenderThrottled,
    SenderDisplaced,
    ReceiverCore,
    ReceiverThrottled,
    ReceiverDisplaced,
    Stolen,
    AcceptQueueFull,
    AcceptQueueOverflows,
    ReceiveCalls,
    BytesPerReceive,
    Blocked,
    Unread,
    Dropped,
    Missing,
    FullLooks,
    IdlePauses,
    CreditPauses,
    CongestionPauses,
}

/// How a figure is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Of the time.
    Time,
    Share,
    Bytes,
    BytesPerSecond,
    PerSecond,
    PerAck,
    Milliseconds,
    Times,
}

impl Figure {
    /// What it says, as the beginning of a sentence.
    pub fn label(self) -> &'static str {
        match self {
            Self::Rate => "payload arrived at",
            Self::Queued => "bytes queued at both ends:",
            Self::SenderBusy => "the sender's socket had data queued or in flight (busy)",
            Self::RwndLimited => "the sender waited for the receiver's window (rwnd_limited)",
            Self::SndbufLimited => "the sender's buffer was too small (sndbuf_limited)",
            Self::PathLimited => "the sender was busy, limited by neither window nor buffer,",
            Self::AppLimited => "samples in which the sender's application did not fill the path:",
            Self::CwndFull => "samples with a full congestion window:",
            Self::Retransmitted => "bytes retransmitted:",
            Self::RttGrowth => "the round trip took",
            Self::SendQueue => "the send buffer was filled to",
            Self::ReceiveQueue => "unread data filled the receive buffer to",
            Self::ReadDelay => "data stayed in the receive buffer for",
            Self::WindowUse => "share of the offered window that a round trip used:",
            Self::WindowBounded => {
                "connections without window scaling, or whose window a route or the application limits:"
            }
            Self::SenderCore => "the sender's threads, per connection, ran or wanted to run",
            Self::SenderThrottled => "the sender's control group was out of CPU quota",
            Self::SenderDisplaced => {
                "the sender was ready to run while other processes had the core"
            }
            Self::ReceiverDisplaced => {
                "the receiver was ready to run while other processes had the core"
            }
            Self::Stolen => "the hypervisor gave this host's CPU to others (steal)",
            Self::AcceptQueueFull => "samples with a full accept queue:",
            Self::AcceptQueueOverflows => "connections dropped at a full accept queue:",
            Self::ReceiverCore => "the receiver's threads, per connection, ran or wanted to run",
            Self::ReceiverThrottled => "the receiver's control group was out of CPU quota",
            Self::ReceiveCalls => "receive calls:",
            Self::BytesPerReceive => "a receive call returned",
            Self::Blocked => "samples with connections that waited for room in the shared buffer:",
            Self::Unread => "share of the shared buffer that the slowest reader had not read:",
            Self::Dropped => "packets dropped before they reached a socket:",
            Self::Missing => "packets over xdp that never arrived:",
            Self::FullLooks => "polls of the xdp ring that found more than one burst:",
            Self::IdlePauses => "publishers over xdp had nothing to send",
            Self::CreditPauses => "publishers over xdp had no credit left",
            Self::CongestionPauses => "publishers over xdp had a full congestion window",
        }
    }

    pub fn unit(self) -> Unit {
        match self {
            Self::SenderBusy
            | Self::RwndLimited
            | Self::SndbufLimited
            | Self::PathLimited
            | Self::SenderCore
            | Self::SenderThrottled
            | Self::SenderDisplaced
            | Self::ReceiverDisplaced
            | Self::ReceiverCore
            | Self::ReceiverThrottled => Unit::Time,
            Self::Rate => Unit::BytesPerSecond,
            Self::Queued | Self::BytesPerReceive => Unit::Bytes,
            Self::ReceiveCalls | Self::AcceptQueueOverflows => Unit::PerSecond,
            Self::IdlePauses | Self::CreditPauses | Self::CongestionPauses => Unit::PerAck,
            Self::ReadDelay => Unit::Milliseconds,
            Self::RttGrowth => Unit::Times,
            _ => Unit::Share,
        }
    }
}

/// The figures that could be seen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts(BTreeMap<Figure, f64>);

type Weighted<'a, T> = Vec<(&'a T, f64)>;

impl Facts {
    pub fn get(&self, figure: Figure) -> Option<f64> {
        self.0.get(&figure).copied()
    }

    fn set(&mut self, figure: Figure, value: Option<f64>) {
        if let Some(value) = value.filter(|value| value.is_finite()) {
            self.0.insert(figure, value);
        }
    }

    /// Condenses a sample.
    pub fn of(sample: &Sample) -> Self {
        let bulk = bulk(sample);
        let senders = ends(&bulk, Connection::sender);
        let receivers = ends(&bulk, Connection::receiver);
        let mut facts = Self::default();
        facts.add_totals(sample);
        facts.add_senders(&senders);
        facts.add_receivers(&receivers, sample.seconds);
        facts.add_processes(sample, &senders, &receivers);
        facts.add_listeners(sample);
        facts.add_broker(sample);
        facts
    }

    fn add_totals(&mut self, sample: &Sample) {
        let tcp: u64 = sample.connections.iter().map(Connection::bytes).sum();
        let xdp = sample.broker.as_ref().and_then(|broker| broker.xdp());
        let bytes = tcp + xdp.as_ref().map_or(0, |xdp| xdp.bytes);
        let rate = bytes as f64 / sample.seconds;
        self.set(Figure::Rate, (!sample.broker_silent).then_some(rate));
        let queued = sample.connections.iter().map(Connection::queued).sum();
        self.set(Figure::Queued, Some(queued));
        let interfaces = || sample.interfaces.iter();
        let lost: u64 = interfaces()
            .map(|i| i.rx_dropped + i.rx_fifo + i.rx_errors)
            .sum();
        let came: u64 = interfaces().map(|i| i.rx_packets).sum();
        // Drivers differ in whether they count what an AF_XDP socket had no room for.
        let lost = lost.max(xdp.map_or(0, |xdp| xdp.dropped.values().sum()));
        if came + lost > 0 {
            self.set(Figure::Dropped, Some(lost as f64 / (came + lost) as f64));
        }
    }

    fn add_senders(&mut self, ends: &Weighted<'_, End>) {
        let path = |e: &End| (e.busy - e.rwnd_limited - e.sndbuf_limited).max(0.0);
        let mut mean = |figure, of: &dyn Fn(&End) -> f64| self.set(figure, weighted_mean(ends, of));
        mean(Figure::SenderBusy, &|e| e.busy);
        mean(Figure::RwndLimited, &|e| e.rwnd_limited);
        mean(Figure::SndbufLimited, &|e| e.sndbuf_limited);
        mean(Figure::PathLimited, &path);
        mean(Figure::AppLimited, &|e| e.app_limited);
        mean(Figure::CwndFull, &|e| e.cwnd_full);
        mean(Figure::RttGrowth, &|e| e.rtt_us / e.min_rtt_us.max(1.0));
        mean(Figure::SendQueue, &|e| {
            e.send_memory / f64::from(e.send_buffer.max(1))
        });
        let sent: u64 = ends.iter().map(|(end, _)| end.bytes_sent).sum();
        let again: u64 = ends.iter().map(|(end, _)| end.bytes_retransmitted).sum();
        if !ends.is_empty() {
            self.set(
                Figure::Retransmitted,
                Some(again as f64 / sent.max(1) as f64),
            );
        }
    }

    fn add_receivers(&mut self, ends: &Weighted<'_, End>, seconds: f64) {
        let filled = |e: &End| e.receive_memory / f64::from(e.receive_buffer.max(1));
        self.set(Figure::ReceiveQueue, weighted_mean(ends, &filled));
        // Little's law: what waits, by the rate at which it is taken.
        let waits: f64 = ends.iter().map(|(end, _)| end.recv_q).sum();
        let taken: u64 = ends.iter().map(|(end, _)| end.bytes_received).sum();
        if taken > 0 {
            let delay = waits / (taken as f64 / seconds) * 1e3;
            self.set(Figure::ReadDelay, Some(delay));
        }
        let mut timed = ends.clone();
        timed.retain(|(end, _)| end.rcv_rtt_us > 0.0 && end.rcv_wnd > 0);
        let used = |e: &End| {
            let per_trip = e.bytes_received as f64 / seconds * e.rcv_rtt_us * 1e-6;
            per_trip / f64::from(e.rcv_wnd)
        };
        self.set(Figure::WindowUse, weighted_mean(&timed, &used));
        let bounded = |e: &End| f64::from(u8::from(e.window_is_bounded()));
        self.set(Figure::WindowBounded, weighted_mean(ends, &bounded));
    }

    fn add_processes(
        &mut self,
        sample: &Sample,
        senders: &Weighted<'_, End>,
        receivers: &Weighted<'_, End>,
    ) {
        let pids = |ends: &Weighted<'_, End>| -> Vec<u32> {
            ends.iter().filter_map(|(end, _)| end.pid).collect()
        };
        let throttled = |pids: &[u32]| {
            let shares = of(sample, pids).filter_map(|process| process.throttled);
            shares.reduce(f64::max)
        };
        let (mut senders, mut receivers) = (pids(senders), pids(receivers));
        let core = |pids: &[u32]| {
            let processes = of(sample, pids);
            let core = |process| Some(Serving::of(process, connections(pids, process))?.core());
            processes.filter_map(core).reduce(f64::max)
        };
        let displaced = |pids: &[u32]| {
            let processes = of(sample, pids);
            let displaced = |process: &Process| {
                let serving = Serving::of(process, connections(pids, process))?;
                Some(serving.displaced(sample))
            };
            processes.filter_map(displaced).reduce(f64::max)
        };
        if senders.is_empty() && receivers.is_empty() {
            // The connections carry nothing, but over xdp those who have them send datagrams.
            let peers = sample.connections.iter().filter_map(|c| c.peer.as_ref());
            senders.extend(peers.filter_map(|peer| peer.pid));
            receivers.extend(sample.pid);
        }
        self.set(Figure::SenderCore, core(&senders));
        self.set(Figure::SenderThrottled, throttled(&senders));
        self.set(Figure::SenderDisplaced, displaced(&senders));
        let polling = sample.broker.as_ref().and_then(Broker::busy_polling);
        let receiver = polling.or_else(|| core(&receivers));
        self.set(Figure::ReceiverCore, receiver);
        self.set(Figure::ReceiverThrottled, throttled(&receivers));
        self.set(Figure::ReceiverDisplaced, displaced(&receivers));
        let stolen: f64 = sample.cores.iter().map(|core| core.steal).sum();
        let stolen = stolen / sample.cores.len() as f64;
        self.set(Figure::Stolen, Some(stolen));
        if sample
            .traced_pid
            .is_some_and(|pid| receivers.contains(&pid))
        {
            let receives = sample.syscalls.as_deref().and_then(Receives::of);
            self.set(Figure::ReceiveCalls, receives.map(|r| r.per_second));
            self.set(Figure::BytesPerReceive, receives.map(|r| r.bytes_per_call));
        }
    }

    fn add_listeners(&mut self, sample: &Sample) {
        let full = sample.listeners.iter().map(|listener| listener.full);
        self.set(Figure::AcceptQueueFull, full.reduce(f64::max));
        let overflows = sample.tcp_events.get("ListenOverflows");
        let overflows = overflows.copied().unwrap_or(0) as f64 / sample.seconds;
        self.set(Figure::AcceptQueueOverflows, Some(overflows));
    }

    fn add_broker(&mut self, sample: &Sample) {
        let Some(broker) = &sample.broker else {
            return;
        };
        self.set(Figure::Blocked, Some(broker.blocked));
        let read = broker.topics.iter().filter(|topic| topic.readers > 0);
        let unread = read.map(|topic| topic.unread).reduce(f64::max);
        self.set(Figure::Unread, unread);
        let Some(xdp) = broker.xdp().filter(|xdp| xdp.packets > 0) else {
            return;
        };
        let sent = xdp.packets + xdp.missing;
        self.set(Figure::Missing, Some(xdp.missing as f64 / sent as f64));
        self.set(Figure::FullLooks, Some(xdp.full_looks));
        self.set(Figure::IdlePauses, Some(xdp.idle));
        self.set(Figure::CreditPauses, Some(xdp.credit));
        self.set(Figure::CongestionPauses, Some(xdp.congestion));
    }
}

#[cfg(test)]
impl Facts {
    pub fn from(figures: &[(Figure, f64)]) -> Self {
        Self(figures.iter().copied().collect())
    }
}

/// Processes of a sample with these numbers, which may contain duplicates.
fn of<'a>(sample: &'a Sample, pids: &[u32]) -> impl Iterator<Item = &'a Process> {
    let processes = sample.processes.iter();
    processes.filter(|process| pids.contains(&process.pid))
}

/// Bulk connections of this process.
fn connections(pids: &[u32], process: &Process) -> usize {
    pids.iter().filter(|pid| **pid == process.pid).count()
}

/// The threads of a process that serve its connections.
///
/// Runtimes with a scheduler of their own (Go, tokio) move the work of one connection between threads,
/// none of which is busy for long, so threads of the same name count together. One thread at a time
/// serves a connection, so the threads have no time left when together they use a whole core for each
/// connection.
#[derive(Debug, Clone, Copy)]
pub struct Serving {
    /// Time on a core, and ready without one, per connection; shares of the interval.
    run: f64,
    wait: f64,
    /// The same for the busiest thread alone.
    pub busiest: f64,
    throttled: f64,
    process_run: f64,
}

impl Serving {
    /// The group of threads with least time left; `None` for a process without threads.
    pub fn of(process: &Process, connections: usize) -> Option<Self> {
        let busiest = process.threads.first()?;
        let alone = (busiest.run, busiest.wait);
        let mut kinds: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        for thread in &process.threads {
            let sum = kinds.entry(kind(&thread.name)).or_default();
            *sum = (sum.0 + thread.run, sum.1 + thread.wait);
        }
        let each = connections.max(1) as f64;
        let kinds = kinds
            .into_values()
            .map(|(run, wait)| (run / each, wait / each));
        let (run, wait) = kinds.fold(alone, |most, kind| {
            match kind.0 + kind.1 > most.0 + most.1 {
                true => kind,
                false => most,
            }
        });
        Some(Self {
            run,
            wait,
            busiest: alone.0 + alone.1,
            throttled: process.throttled.unwrap_or(0.0),
            process_run: process.run,
        })
    }

    /// Share of the interval in which they had a core, or were ready and had none.
    pub fn core(self) -> f64 {
        (self.run + self.wait.max(self.throttled)).min(1.0)
    }

    /// Share of the interval in which they were ready while a process that is not observed had the
    /// core. The kernel does not record who held the core, so the time is divided by what each process
    /// used.
    fn displaced(self, sample: &Sample) -> f64 {
        // A thread out of quota counts as ready as well.
        let waited = (self.wait - self.throttled).clamp(0.0, 1.0);
        let observed: f64 = sample.processes.iter().map(|process| process.run).sum();
        let rivals = (observed - self.run.min(self.process_run)).max(0.0);
        let others = sample.others.cores.max(0.0);
        match others + rivals > 0.0 {
            true => waited * others / (others + rivals),
            false => 0.0,
        }
    }

    /// The load that moves between threads, if none of them is busy alone.
    pub fn moves(self, whole: f64) -> bool {
        self.core() >= whole && self.busiest < whole
    }
}

/// A thread's name without its number.
fn kind(name: &str) -> &str {
    name.trim_end_matches(|c: char| c.is_ascii_digit() || "-_#:".contains(c))
}

/// Connections that do the work, with how much of it: what was carried, and what waits.
fn bulk(sample: &Sample) -> Weighted<'_, Connection> {
    let weight = |c: &Connection| c.bytes() as f64 + c.queued();
    let most = sample.connections.iter().map(weight).fold(0.0, f64::max);
    let weighted = sample.connections.iter().map(|c| (c, weight(c)));
    weighted
        .filter(|(_, weight)| *weight > 0.0 && *weight >= BULK * most)
        .collect()
}

fn ends<'a>(
    bulk: &Weighted<'a, Connection>,
    of: fn(&'a Connection) -> Option<&'a End>,
) -> Weighted<'a, End> {
    let ends = bulk
        .iter()
        .filter_map(|(c, weight)| Some((of(c)?, *weight)));
    ends.collect()
}

fn weighted_mean(ends: &Weighted<'_, End>, of: &dyn Fn(&End) -> f64) -> Option<f64> {
    let total: f64 = ends.iter().map(|(_, weight)| weight).sum();
    let sum: f64 = ends.iter().map(|(end, weight)| of(end) * weight).sum();
    (total > 0.0).then(|| sum / total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Core, Thread};
    use crate::other_processes::Others;

    fn connection(bytes: u64, sender: Option<End>) -> Connection {
        Connection {
            local: "10.0.0.2:1".parse().unwrap(),
            remote: "10.0.0.1:2".parse().unwrap(),
            receives: true,
            end: End {
                pid: Some(7),
                bytes_received: bytes,
                receive_memory: 500.0,
                receive_buffer: 1000,
                ..End::default()
            },
            peer: sender,
        }
    }

    #[test]
    fn connections_count_by_what_they_carry() {
        let sender = |rwnd_limited| {
            Some(End {
                busy: 1.0,
                rwnd_limited,
                bytes_sent: 1000,
                bytes_retransmitted: 10,
                ..End::default()
            })
        };
        let sample = Sample {
            seconds: 2.0,
            pid: Some(7),
            connections: vec![
                connection(3_000_000, sender(1.0)),
                connection(1_000_000, sender(0.0)),
                // Idle: it has no say.
                connection(100, sender(1.0)),
            ],
            processes: vec![Process {
                pid: 7,
                threads: vec![Thread {
                    run: 0.3,
                    wait: 0.2,
                    ..Thread::default()
                }],
                throttled: Some(0.6),
                ..Process::default()
            }],
            ..Sample::default()
        };
        let facts = Facts::of(&sample);
        let get = |figure| facts.get(figure).unwrap();
        assert_eq!(get(Figure::Rate), 2_000_050.0);
        assert_eq!(get(Figure::RwndLimited), 0.75);
        assert_eq!(get(Figure::PathLimited), 0.25);
        assert_eq!(get(Figure::Retransmitted), 0.01);
        assert_eq!(get(Figure::ReceiveQueue), 0.5);
        assert!((get(Figure::ReceiverCore) - 0.9).abs() < 1e-9);
    }

    fn thread(name: &str, run: f64, wait: f64) -> Thread {
        Thread {
            name: name.to_owned(),
            run,
            wait,
            ..Thread::default()
        }
    }

    fn process(pid: u32, threads: Vec<Thread>) -> Process {
        Process {
            pid,
            run: threads.iter().map(|thread| thread.run).sum(),
            wait: threads.iter().map(|thread| thread.wait).sum(),
            threads,
            ..Process::default()
        }
    }

    #[test]
    fn work_that_moves_between_threads_is_that_of_one() {
        let go = process(
            7,
            vec![
                thread("nats-server", 0.5, 0.01),
                thread("nats-server", 0.3, 0.0),
                thread("nats-server", 0.2, 0.01),
            ],
        );
        let serving = |connections| Serving::of(&go, connections).unwrap();
        assert!(serving(1).core() > 0.99 && serving(1).moves(0.85));
        // For two connections half a core each is not all that there could be.
        assert!((serving(2).core() - 0.51).abs() < 1e-9);
        let tokio = process(
            7,
            vec![
                thread("tokio-runtime-w", 0.6, 0.0),
                thread("tokio-runtime-w", 0.3, 0.0),
            ],
        );
        assert!(Serving::of(&tokio, 1).unwrap().moves(0.85));
        // Stages of a pipeline have names of their own, and each has time left.
        let stages = process(
            7,
            vec![thread("reader", 0.5, 0.0), thread("sender-0", 0.5, 0.0)],
        );
        assert!(Serving::of(&stages, 1).unwrap().core() < 0.85);
    }

    #[test]
    fn waiting_for_a_core_is_blamed_on_who_had_it() {
        let sample = |others: f64, throttled| {
            let mut receiver = process(7, vec![thread("worker-0", 0.4, 0.6)]);
            receiver.throttled = throttled;
            let mut connection = connection(
                1_000_000,
                Some(End {
                    pid: Some(8),
                    ..End::default()
                }),
            );
            connection.end.pid = Some(7);
            Sample {
                seconds: 1.0,
                connections: vec![connection],
                processes: vec![receiver, process(8, vec![thread("sender", 0.5, 0.3)])],
                others: Others {
                    cores: others,
                    ..Others::default()
                },
                cores: vec![
                    Core {
                        steal: 0.1,
                        ..Core::default()
                    },
                    Core {
                        steal: 0.3,
                        ..Core::default()
                    },
                ],
                ..Sample::default()
            }
        };
        let of = |sample: Sample, figure| Facts::of(&sample).get(figure).unwrap();
        // The sender had half a core, others one and a half.
        assert!((of(sample(1.5, None), Figure::ReceiverDisplaced) - 0.45).abs() < 1e-9);
        assert!(of(sample(1.5, None), Figure::SenderDisplaced) > 0.2);
        assert_eq!(of(sample(0.0, None), Figure::ReceiverDisplaced), 0.0);
        // Out of its own quota: nobody took anything.
        assert_eq!(of(sample(1.5, Some(0.7)), Figure::ReceiverDisplaced), 0.0);
        assert!((of(sample(0.0, None), Figure::Stolen) - 0.2).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_seen_is_absent() {
        let mut connection = connection(1000, None);
        connection.end.recv_q = 500.0;
        let sample = Sample {
            seconds: 1.0,
            connections: vec![connection],
            ..Sample::default()
        };
        let facts = Facts::of(&sample);
        for figure in [
            Figure::SenderBusy,
            Figure::Retransmitted,
            Figure::SenderCore,
            Figure::ReceiveCalls,
            Figure::Blocked,
            Figure::Dropped,
        ] {
            assert_eq!(facts.get(figure), None, "{figure:?}");
        }
        assert_eq!(facts.get(Figure::ReceiveQueue), Some(0.5));
        assert_eq!(facts.get(Figure::ReadDelay), Some(500.0));
        assert_eq!(facts.get(Figure::Rate), Some(1000.0));
        let silent = Sample {
            broker_silent: true,
            ..sample
        };
        assert_eq!(Facts::of(&silent).get(Figure::Rate), None);
    }
}
