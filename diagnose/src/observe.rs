//! Samples a process and its connections for some seconds, and summarizes the samples.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::broker_stats::{self, Broker, BrokerSnapshot};
use super::cpu::{CoresSnapshot, Process, ProcessSnapshot};
use super::interfaces::InterfacesSnapshot;
use super::namespaces::{self, Namespace};
use super::other_processes::OthersSnapshot;
use super::processes::{self, Owners};
use super::routes;
use super::sample::{Connection, End, Listener, Sample, Unavailable};
use super::settings::{Pressure, Settings};
use super::sockets::{self, Followed, Memory, Socket};
use super::syscalls::{Syscall, Tracer};
use super::target::Target;
use super::verdict::counted;
use penstock_process::interrupt::Interrupt;
use penstock_runtime::tcp_info::TcpInfo;

/// Samples in an interval. More of them show gauges such as Recv-Q more precisely, and cost more.
const SAMPLES: u32 = 25;
/// Minimum interval between samples: each costs the observed host about a millisecond.
const MIN_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum number of connections whose receive buffer is queried.
const MAX_BUFFERS_QUERIED: usize = 64;
/// Maximum number of connections whose routes are queried: each query enters a namespace.
const ROUTES_ASKED: usize = 8;

/// What tracing shows.
const SYSTEM_CALLS: &str = "system calls by name, rate and time";

/// The samples of one connection.
#[derive(Debug, Default)]
struct Track {
    ours: Vec<Socket>,
    theirs: Vec<Socket>,
}

/// Both addresses and the inode, for addresses may be used again.
type Key = (SocketAddr, SocketAddr, u32);

/// Another namespace: its sockets in this sample, and the other ends among them.
struct Elsewhere {
    namespace: Namespace,
    sockets: Vec<Socket>,
    ends: Followed,
}

/// What is being watched.
struct Observer<'a> {
    target: &'a Target,
    /// The target's connections and listeners, and other ends in its namespace.
    ours: Followed,
    /// Other namespaces, in which other ends may be.
    others: Vec<Elsewhere>,
    owners: Owners,
    tracks: BTreeMap<Key, Track>,
    /// Processes as they were when first seen, and in which order.
    processes: HashMap<u32, ProcessSnapshot>,
    order: Vec<u32>,
    broker: Option<PathBuf>,
    figures: Vec<BrokerSnapshot>,
    /// Listening sockets, one entry per sample.
    listeners: BTreeMap<(SocketAddr, u32), Vec<Socket>>,
}

/// Observes for `duration`; system calls for `trace` of it.
pub fn observe(
    target: &Target,
    duration: Duration,
    trace: Duration,
    interrupt: &Interrupt,
    unavailable: &mut Vec<Unavailable>,
) -> Result<Sample> {
    let mut observer = Observer::new(target, unavailable);
    let cores = CoresSnapshot::now()?;
    let others = OthersSnapshot::now();
    let interfaces = interfaces(target, &mut Vec::new());
    let began = Instant::now();
    let interval = (duration / SAMPLES).max(MIN_INTERVAL);
    observer.take_sample()?;
    let traced_pid = observer.serving().or(target.pid);
    let mut tracer = start_tracer(traced_pid, trace, unavailable);
    let mut syscalls = None;
    let mut samples = 1_u32;
    loop {
        let now = began.elapsed();
        if now >= trace.min(duration)
            && let Some(tracer) = tracer.take()
        {
            syscalls = finish_tracer(tracer, unavailable);
        }
        if now >= duration {
            break;
        }
        let next = (interval * samples).min(duration);
        while began.elapsed() < next {
            interrupt.pause()?;
        }
        observer.take_sample()?;
        samples += 1;
    }
    let seconds = began.elapsed().as_secs_f64();
    let broker = Broker::between(&observer.figures, seconds);
    let broker_silent = broker.is_none() && observer.broker.is_some();
    if broker_silent {
        unavailable.push(Unavailable::silent_broker(observer.figures.len(), samples));
    }
    let cores_end = CoresSnapshot::now()?;
    let interfaces_end = self::interfaces(target, unavailable);
    let pressure = Pressure::read();
    if pressure.is_none() {
        unavailable.push(Unavailable::no_pressure());
    }
    let processes = observer.processes_since(seconds);
    let cores = cores_end.since(&cores, seconds)?;
    let observed = processes.iter().map(|process| process.pid).collect();
    let observed_run = processes.iter().map(|process| process.run).sum();
    let others = OthersSnapshot::now().since(&others, &observed, observed_run, &cores, seconds);
    Ok(Sample {
        seconds,
        looks: samples,
        others,
        listeners: observer.listeners(),
        pid: target.pid,
        name: target.name.clone(),
        ports: target.ports.iter().copied().collect(),
        processes,
        cores,
        syscalls,
        traced_pid,
        interfaces: interfaces_end.since(&interfaces),
        tcp_events: interfaces_end.tcp_events_since(&interfaces),
        settings: target.namespace.settings.clone().or(&Settings::read()),
        pressure,
        broker,
        broker_silent,
        connections: observer.connections(seconds, unavailable),
    })
}

/// Counters of the target's interfaces; those of drivers as well, if its namespace can be entered.
fn interfaces(target: &Target, unavailable: &mut Vec<Unavailable>) -> InterfacesSnapshot {
    let counted = InterfacesSnapshot::now(target.pid);
    let asked = counted.clone().with_drivers(&target.namespace.handle);
    asked.unwrap_or_else(|error| {
        unavailable.push(Unavailable {
            what: "receive queues and offloads of the interfaces".to_owned(),
            why: format!("{error:#}"),
            how: "run with sudo".to_owned(),
        });
        counted
    })
}

fn start_tracer(
    pid: Option<u32>,
    trace: Duration,
    unavailable: &mut Vec<Unavailable>,
) -> Option<Tracer> {
    if trace.is_zero() {
        return None;
    }
    if !processes::sees_the_host() {
        unavailable.push(Unavailable {
            what: SYSTEM_CALLS.to_owned(),
            why: "this program runs in a PID namespace, and the kernel's tracing does not know its process numbers"
                .to_owned(),
            how: "run it on the host, with the process's number there (--pid)".to_owned(),
        });
        return None;
    }
    let tracer = Tracer::start(pid?);
    tracer
        .map_err(|error| unavailable.push(no_syscalls(&error)))
        .ok()
}

fn finish_tracer(tracer: Tracer, unavailable: &mut Vec<Unavailable>) -> Option<Vec<Syscall>> {
    let calls = tracer.finish();
    let calls = calls.map_err(|error| unavailable.push(no_syscalls(&error)));
    let calls = calls.ok()?;
    if calls.is_empty() {
        unavailable.push(Unavailable {
            what: SYSTEM_CALLS.to_owned(),
            why: "the process made no system call while they were traced: it is stopped, asleep in one call, or busy in its own code"
                .to_owned(),
            how: "trace for longer (--trace); cat /proc/PID/stack as root shows the call it is in".to_owned(),
        });
    }
    Some(calls)
}

fn no_syscalls(error: &anyhow::Error) -> Unavailable {
    Unavailable {
        what: SYSTEM_CALLS.to_owned(),
        why: format!("{error:#}"),
        how: "run with sudo".to_owned(),
    }
}

impl<'a> Observer<'a> {
    fn new(target: &'a Target, unavailable: &mut Vec<Unavailable>) -> Self {
        let mut observer = Self {
            target,
            ours: Followed::default(),
            others: other_namespaces(target.namespace.id, unavailable),
            owners: Owners::default(),
            tracks: BTreeMap::new(),
            processes: HashMap::new(),
            order: Vec::new(),
            broker: target.pid.and_then(broker_stats::socket_path),
            figures: Vec::new(),
            listeners: BTreeMap::new(),
        };
        if let Some(socket) = &observer.broker
            && let Err(error) = BrokerSnapshot::query(socket)
        {
            observer.broker = None;
            unavailable.push(Unavailable {
                what: "what the broker says of itself".to_owned(),
                why: format!("{error:#}"),
                how: "run as the broker's user, or with sudo".to_owned(),
            });
        }
        observer.follow(target.pid);
        observer
    }

    /// Samples everything that is a gauge.
    fn take_sample(&mut self) -> Result<()> {
        // New connections are looked for at both ends at the same time.
        let list = self.ours.is_list_due();
        let ours = self.ours.sample(&self.target.namespace.diag, list)?;
        let inodes = match (self.target.pid, self.target.ports.is_empty()) {
            (Some(pid), true) => processes::sockets_of(pid).unwrap_or_default(),
            _ => Default::default(),
        };
        let is_ours = |socket: &&Socket| {
            self.target.ports.contains(&socket.local.port()) || inodes.contains(&socket.inode)
        };
        let (listening, connected): (Vec<&Socket>, Vec<&Socket>) = ours
            .iter()
            .filter(is_ours)
            .partition(|socket| socket.is_listening());
        for socket in listening {
            let key = (socket.local, socket.inode);
            self.listeners.entry(key).or_default().push(socket.clone());
        }
        let elsewhere = self.sample_elsewhere(list, &ours, &connected)?;
        let mut present = Vec::new();
        for socket in connected {
            let peer = other_end(socket, &ours, &elsewhere);
            present.push(socket.inode);
            present.extend(peer.map(|peer| peer.inode));
            let key = (socket.local, socket.remote, socket.inode);
            let track = self.tracks.entry(key).or_default();
            track.ours.push(socket.clone());
            track.theirs.extend(peer.cloned());
        }
        let is_end = |socket: &&Socket| present.contains(&socket.inode);
        self.ours
            .keep(ours.iter().filter(|s| is_ours(s) || is_end(s)));
        for other in &mut self.others {
            other.ends.keep(other.sockets.iter().filter(is_end));
        }
        self.owners.find(present.iter().copied());
        for inode in present {
            self.follow(self.owners.of(inode));
        }
        if let Some(socket) = &self.broker
            && let Ok(figures) = BrokerSnapshot::query(socket)
        {
            self.figures.push(figures);
        }
        Ok(())
    }

    /// Sockets of other namespaces, with the other ends of `connected` among them; new ones are looked
    /// for if `list`.
    fn sample_elsewhere(
        &mut self,
        list: bool,
        ours: &[Socket],
        connected: &[&Socket],
    ) -> Result<Vec<Socket>> {
        for other in &mut self.others {
            let diag = &other.namespace.diag;
            other.sockets = match list {
                true => diag.other_ends(connected)?,
                false => other.ends.sample(diag, false)?,
            };
        }
        let all = |others: &[Elsewhere]| -> Vec<Socket> {
            let sockets = others.iter().flat_map(|other| other.sockets.clone());
            sockets.collect()
        };
        let found = all(&self.others);
        let is_alone = |socket: &&&Socket| {
            !socket.remote.ip().is_loopback() && other_end(socket, ours, &found).is_none()
        };
        if !list || connected.iter().find(is_alone).is_none() {
            return Ok(found);
        }
        // An end that is bound to an interface is only found in a list.
        for other in &mut self.others {
            other.sockets = other.namespace.diag.sockets()?;
        }
        Ok(all(&self.others))
    }

    /// The process with the busiest connection so far, perhaps a child of the one that listens.
    fn serving(&self) -> Option<u32> {
        let carried = |track: &&Track| {
            let last = track.ours.last();
            let info = last.and_then(|socket| socket.info);
            let queued = last.map_or(0, |s| u64::from(s.recv_q) + u64::from(s.send_q));
            info.map_or(0, |i| i.bytes_received + i.bytes_acked) + queued
        };
        let busiest = self.tracks.values().max_by_key(carried)?;
        self.owners.of(busiest.ours.last()?.inode)
    }

    /// Notes what a process has used so far, when it is first seen.
    fn follow(&mut self, pid: Option<u32>) {
        let Some(pid) = pid.filter(|pid| !self.processes.contains_key(pid)) else {
            return;
        };
        if let Some(now) = ProcessSnapshot::now(pid) {
            self.processes.insert(pid, now);
            self.order.push(pid);
        }
    }

    fn processes_since(&self, seconds: f64) -> Vec<Process> {
        let did = self.order.iter().filter_map(|pid| {
            let end = ProcessSnapshot::now(*pid)?;
            let name = processes::name_of(*pid);
            Some(end.since(&self.processes[pid], *pid, name, seconds))
        });
        did.collect()
    }

    /// The fullest first.
    fn listeners(&self) -> Vec<Listener> {
        let listeners = self
            .listeners
            .iter()
            .filter_map(|((local, inode), samples)| {
                let asked = self
                    .target
                    .pid
                    .and_then(|pid| sockets::receive_buffer(pid, *inode).ok());
                let backlog = samples.last()?.send_q;
                let count = samples.len() as f64;
                let full = samples
                    .iter()
                    .filter(|sample| sample.recv_q >= sample.send_q.max(1));
                Some(Listener {
                    local: *local,
                    waiting: samples
                        .iter()
                        .map(|sample| f64::from(sample.recv_q))
                        .sum::<f64>()
                        / count,
                    backlog,
                    full: full.count() as f64 / count,
                    // A listener has no route of its own.
                    window_clamp: asked
                        .map(|buffer| buffer.window_clamp)
                        .filter(|clamp| *clamp > 0),
                })
            });
        let mut listeners: Vec<Listener> = listeners.collect();
        listeners.sort_by(|a, b| {
            (b.full, b.waiting)
                .partial_cmp(&(a.full, a.waiting))
                .unwrap_or(Ordering::Equal)
        });
        listeners
    }

    fn connections(&self, seconds: f64, unavailable: &mut Vec<Unavailable>) -> Vec<Connection> {
        let weight = |c: &Connection| c.bytes() as f64 + c.queued();
        let tracks = self.tracks.iter();
        let mut tracked: Vec<(Connection, &Track)> = tracks
            .map(|(key, track)| (self.connection(key, track, seconds), track))
            .collect();
        tracked.sort_by(|(a, _), (b, _)| weight(b).total_cmp(&weight(a)));
        ask_buffers(&mut tracked, unavailable);
        ask_routes(&mut tracked);
        let connections: Vec<_> = tracked.into_iter().map(|(c, _)| c).collect();
        let alone = connections.iter().filter(|c| c.peer.is_none()).count();
        if alone > 0 {
            unavailable.push(Unavailable {
                what: format!("the other end of {}", counted(alone, "connection")),
                why: "it is not on this host, or in a namespace that cannot be looked into"
                    .to_owned(),
                how: "run penstock-lab diagnose there as well, with the pid of that end".to_owned(),
            });
        }
        connections
    }

    fn connection(&self, (local, remote, _): &Key, track: &Track, seconds: f64) -> Connection {
        let end = self.end(&track.ours, seconds);
        let peer = (!track.theirs.is_empty()).then(|| self.end(&track.theirs, seconds));
        let last = track.ours.last();
        let info = last.and_then(|socket| socket.info);
        // Over its whole life, and with what still waits: acks alone do not turn it round.
        let received = info.map_or(0, |i| i.bytes_received);
        let sent = info.map_or(0, |i| i.bytes_acked) + last.map_or(0, |s| u64::from(s.send_q));
        Connection {
            local: *local,
            remote: *remote,
            receives: received >= sent,
            end,
            peer,
        }
    }

    fn end(&self, samples: &[Socket], seconds: f64) -> End {
        let mut end = End::summarize(samples, seconds);
        let inode = samples.last().map_or(0, |socket| socket.inode);
        end.pid = self.owners.of(inode);
        end.process = end.pid.map(processes::name_of);
        end
    }
}

fn other_namespaces(own: u64, unavailable: &mut Vec<Unavailable>) -> Vec<Elsewhere> {
    let handles = namespaces::all();
    let others = handles.iter().filter(|(id, _)| **id != own);
    let (open, closed): (Vec<_>, Vec<_>) = others
        .map(|(_, handle)| Namespace::open(handle))
        .partition(Result::is_ok);
    if !closed.is_empty() {
        unavailable.push(Unavailable {
            what: format!(
                "{}, where other ends may be",
                counted(closed.len(), "other network namespace")
            ),
            why: "entering a namespace takes CAP_SYS_ADMIN".to_owned(),
            how: "run with sudo".to_owned(),
        });
    }
    let open = open.into_iter().flatten();
    open.map(|namespace| Elsewhere {
        namespace,
        sockets: Vec::new(),
        ends: Followed::default(),
    })
    .collect()
}

/// Asks receivers whether their buffer was sized by the application.
fn ask_buffers(tracked: &mut [(Connection, &Track)], unavailable: &mut Vec<Unavailable>) {
    let mut refused = None;
    for (connection, track) in tracked.iter_mut().take(MAX_BUFFERS_QUERIED) {
        let (receiver, samples) = match connection.receives {
            true => (Some(&mut connection.end), &track.ours),
            false => (connection.peer.as_mut(), &track.theirs),
        };
        let (Some(receiver), Some(socket)) = (receiver, samples.last()) else {
            continue;
        };
        let Some(pid) = receiver.pid else { continue };
        match sockets::receive_buffer(pid, socket.inode) {
            Ok(buffer) => {
                receiver.receive_buffer_set = Some(buffer.is_set);
                receiver.window_clamp = Some(buffer.window_clamp);
            }
            Err(error) => refused = Some(error),
        }
    }
    if let Some(error) = refused {
        unavailable.push(Unavailable {
            what: "whether the application sized its receive buffers (autotuning)".to_owned(),
            why: format!("the socket cannot be asked: {error}"),
            how: "run with sudo".to_owned(),
        });
    }
}

/// Queries the limits of the routes. A namespace that cannot be entered is already listed as not seen.
fn ask_routes(tracked: &mut [(Connection, &Track)]) {
    for (connection, _) in tracked.iter_mut().take(ROUTES_ASKED) {
        let Connection { local, remote, .. } = connection;
        let (local, remote) = (local.ip(), remote.ip());
        ask_route(&mut connection.end, remote);
        if let Some(peer) = &mut connection.peer {
            ask_route(peer, local);
        }
    }
}

fn ask_route(end: &mut End, to: IpAddr) {
    let Some(pid) = end.pid else { return };
    let limits = namespaces::inside(&namespaces::handle_of(pid), || Ok(routes::limits(to)?));
    if let Ok(limits) = limits {
        end.route_window = limits.window;
        end.route_cwnd = limits.cwnd;
    }
}

/// The other end of a connection: the socket with the same addresses the other way round. Namespaces
/// may use the same addresses; then it is the one that sent what this one received.
fn other_end<'s>(
    socket: &Socket,
    here: &'s [Socket],
    elsewhere: &'s [Socket],
) -> Option<&'s Socket> {
    let mirrors = |other: &&Socket| {
        other.local == socket.remote && other.remote == socket.local && !other.is_listening()
    };
    // Both ends of a connection over loopback are in one namespace.
    let found = here.iter().find(mirrors);
    if found.is_some() || socket.remote.ip().is_loopback() {
        return found;
    }
    let received = socket.info.map_or(0, |info| info.bytes_received);
    let distance = |other: &&Socket| {
        let acked = other.info.map_or(0, |info| info.bytes_acked);
        acked.abs_diff(received)
    };
    elsewhere.iter().filter(mirrors).min_by_key(distance)
}

impl End {
    /// Gauges are means over the samples, counters the difference of the last and the first.
    fn summarize(samples: &[Socket], seconds: f64) -> Self {
        let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
            return Self::default();
        };
        let mean = |of: &dyn Fn(&Socket) -> f64| {
            samples.iter().map(of).sum::<f64>() / samples.len() as f64
        };
        let memory = |s: &Socket, of: &dyn Fn(&Memory) -> u32| s.memory.as_ref().map_or(0, of);
        let mut end = Self {
            recv_q: mean(&|s| f64::from(s.recv_q)),
            recv_q_last: last.recv_q,
            send_q: mean(&|s| f64::from(s.send_q)),
            receive_memory: mean(&|s| f64::from(memory(s, &|m| m.receive_queue))),
            send_memory: mean(&|s| f64::from(memory(s, &|m| m.send_queue))),
            receive_buffer: memory(last, &|m| m.receive_queue_max),
            send_buffer: memory(last, &|m| m.send_queue_max),
            congestion_control: last.congestion.clone(),
            ..Self::default()
        };
        if let (Some(start), Some(now)) = (first.info, last.info) {
            end.count(&start, &now, seconds);
        }
        let share = |of: &dyn Fn(&TcpInfo) -> bool| {
            mean(&|s| f64::from(u8::from(s.info.as_ref().is_some_and(of))))
        };
        end.app_limited = share(&|info| info.is_app_limited());
        end.cwnd_full = share(&|info| info.unacked >= info.snd_cwnd);
        end.rtt_us = mean(&|s| s.info.map_or(0.0, |info| f64::from(info.rtt)));
        end
    }

    fn count(&mut self, start: &TcpInfo, now: &TcpInfo, seconds: f64) {
        let of_time = |end: u64, start: u64| end.saturating_sub(start) as f64 * 1e-6 / seconds;
        self.rcv_space = now.rcv_space;
        self.rcv_ssthresh_first = start.rcv_ssthresh;
        self.rcv_ssthresh = now.rcv_ssthresh;
        self.rcv_wnd = now.rcv_wnd;
        self.snd_wnd = now.snd_wnd;
        self.rcv_wscale = now.rcv_wscale();
        self.window_scaling = Some(now.scales_windows());
        self.snd_wscale = now.snd_wscale();
        self.bytes_received = now.bytes_received.saturating_sub(start.bytes_received);
        self.bytes_acked = now.bytes_acked.saturating_sub(start.bytes_acked);
        self.bytes_sent = now.bytes_sent.saturating_sub(start.bytes_sent);
        self.bytes_retransmitted = now.bytes_retrans.saturating_sub(start.bytes_retrans);
        self.retransmits = now.total_retrans.saturating_sub(start.total_retrans);
        self.out_of_order = now.rcv_ooopack.saturating_sub(start.rcv_ooopack);
        self.busy = of_time(now.busy_time, start.busy_time);
        self.rwnd_limited = of_time(now.rwnd_limited, start.rwnd_limited);
        self.sndbuf_limited = of_time(now.sndbuf_limited, start.sndbuf_limited);
        self.cwnd = now.snd_cwnd;
        self.mss = now.snd_mss;
        self.min_rtt_us = f64::from(now.min_rtt);
        self.rcv_rtt_us = f64::from(now.rcv_rtt);
        self.delivery_rate = now.delivery_rate;
        self.pacing_rate = now.pacing_rate;
    }
}
