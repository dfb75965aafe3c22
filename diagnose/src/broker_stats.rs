//! What a running Penstock broker reports about itself (`<buffer-dir>/broker-<port>.sock`).

#![allow(missing_docs, reason = "fields are the keys of the JSON")]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use penstock_runtime::deadline;
use serde::{Deserialize, Serialize};

use super::processes;
use penstock_process::foreign_json;

/// A broker answers at once, or not at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two attempts to connect.
const CONNECT_RETRY: Duration = Duration::from_millis(20);
/// Maximum size of an answer: it has some hundred bytes for each worker and each topic.
const MAX_ANSWER: usize = 16 << 20;

/// A broker's answer; what is not used here is left out.
#[derive(Debug, Clone, Deserialize)]
pub struct BrokerSnapshot {
    workers: Vec<WorkerSnapshot>,
    topics: Vec<TopicSnapshot>,
    counters: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Deserialize)]
struct WorkerSnapshot {
    thread: String,
    #[serde(default)]
    connections: usize,
    blocked: usize,
    batches: u64,
    recv_bytes: u64,
    stages: Vec<StageAt>,
    xdp: Option<XdpSnapshot>,
}

#[derive(Debug, Clone, Deserialize)]
struct StageAt {
    name: String,
    total_ns: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct XdpSnapshot {
    window: u64,
    placed: u64,
    malformed: u64,
    corrupt: u64,
    unknown_stream: u64,
    duplicates: u64,
    refused: u64,
    skipped: u64,
    late: u64,
    acks: u64,
    aside: u64,
    empty_polls: u64,
    polls: u64,
    full_polls: u64,
    pauses_idle: u64,
    pauses_credit: u64,
    pauses_congestion: u64,
    sleeps: u64,
    packets: u64,
    bytes: u64,
    rx_dropped: u64,
    rx_ring_full: u64,
    rx_fill_ring_empty: u64,
}

#[derive(Debug, Clone, Deserialize)]
struct TopicSnapshot {
    topic: String,
    ring_bytes: u64,
    readers: usize,
    unread_bytes: u64,
    payload_bytes: u64,
}

/// What the broker did in the interval.
#[derive(Debug, Clone, Serialize)]
pub struct Broker {
    /// Share of the samples in which a connection waited for room in the shared buffer, 0 to 1.
    pub blocked: f64,
    pub workers: Vec<Worker>,
    pub topics: Vec<Topic>,
    /// Events, those that happened.
    pub counters: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Worker {
    pub thread: String,
    pub batches_per_second: f64,
    pub bytes_per_second: f64,
    /// Share of the interval by stage, 0 to 1; `WaitForData` is the rest.
    pub stages: BTreeMap<String, f64>,
    pub xdp: Option<Xdp>,
}

/// The packets of a worker of the xdp path.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Xdp {
    pub packets: u64,
    pub bytes: u64,
    pub placed: u64,
    /// Packets that were lost at the socket, by reason.
    pub dropped: BTreeMap<&'static str, u64>,
    /// Packets that came and were not placed, by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Packets that never arrived, as later ones show.
    pub missing: u64,
    /// Packets that came after later ones.
    pub late: u64,
    /// Batches that were received outside the ring because it had no room.
    pub aside: u64,
    /// Share of polls that found packets, 0 to 1.
    pub hit_rate: f64,
    /// Share of those polls that found a whole burst, 0 to 1.
    pub full_looks: f64,
    pub sleeps: u64,
    /// Times that publishers paused for each ACK, by reason: nothing to send, no credit, congestion
    /// window full.
    pub idle: f64,
    pub credit: f64,
    pub congestion: f64,
    /// Bytes that each stream may have on its way.
    pub window: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Topic {
    pub topic: String,
    pub ring_bytes: u64,
    /// Registered readers.
    pub readers: usize,
    /// What the slowest of them has not read, of the ring, mean over the interval, 0 to 1.
    pub unread: f64,
    pub bytes_per_second: f64,
}

/// The socket of a broker; none if the process is none.
pub fn socket_path(pid: u32) -> Option<PathBuf> {
    let inodes = processes::sockets_of(pid).ok()?;
    let table = fs::read_to_string(format!("/proc/{pid}/net/unix")).ok()?;
    let path = socket_in(&table, |inode| inodes.contains(&inode))?;
    let base = match path.is_absolute() {
        true => fs::read_link(format!("/proc/{pid}/root")).ok()?,
        false => fs::read_link(format!("/proc/{pid}/cwd")).ok()?,
    };
    Some(base.join(path.strip_prefix("/").unwrap_or(&path)))
}

fn socket_in(table: &str, is_theirs: impl Fn(u32) -> bool) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(6);
        let inode = words.next()?.parse().ok()?;
        let path = Path::new(words.next()?);
        let name = path.file_name()?.to_str()?;
        let is_it = name.starts_with("broker-") && name.ends_with(".sock");
        (is_it && is_theirs(inode)).then(|| path.to_owned())
    })
}

/// Connects to a socket that any local process can create, and whose owner may never accept.
fn connect(path: &Path, until: Instant) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path)?;
    loop {
        match socket::connect(socket.as_raw_fd(), &address) {
            Ok(()) => break,
            // Its queue is full (unix(7)).
            Err(Errno::EAGAIN) if Instant::now() < until => thread::sleep(CONNECT_RETRY),
            Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

impl BrokerSnapshot {
    /// Queries a broker.
    pub fn query(socket: &Path) -> Result<Self> {
        let until = Instant::now() + ANSWER_TIMEOUT;
        let answer = connect(socket, until)
            .and_then(|stream| deadline::read_to_end(&stream, MAX_ANSWER, until))
            .with_context(|| format!("the broker does not answer at {}", socket.display()))?;
        foreign_json::from_process(&answer)
            .context("cannot read the broker's answer; is it of another version?")
    }

    /// Streams that are open, over both paths.
    pub fn open_streams(&self) -> usize {
        self.workers.iter().map(|worker| worker.connections).sum()
    }

    /// Payload committed so far, bytes.
    pub fn payload_bytes(&self) -> u64 {
        self.topics.iter().map(|topic| topic.payload_bytes).sum()
    }

    /// Whether a connection waits for room in the shared buffer.
    fn is_blocked(&self) -> bool {
        self.workers.iter().any(|worker| worker.blocked > 0)
    }
}

impl Broker {
    /// What happened between the first and the last of `samples`, `seconds` apart; none for fewer
    /// than two. Counters that went back, for another broker took its place, count as nothing.
    pub fn between(samples: &[BrokerSnapshot], seconds: f64) -> Option<Self> {
        let [start, .., end] = samples else {
            return None;
        };
        let count = samples.len() as f64;
        let blocked = samples.iter().filter(|sample| sample.is_blocked()).count() as f64 / count;
        let workers = end.workers.iter().zip(&start.workers);
        let topics = end.topics.iter().map(|topic| {
            let of = |sample: &BrokerSnapshot| {
                let mut topics = sample.topics.iter();
                topics.find(|other| other.topic == topic.topic).cloned()
            };
            let unread: u64 = samples.iter().filter_map(of).map(|t| t.unread_bytes).sum();
            let before = of(start).map_or(0, |topic| topic.payload_bytes);
            Topic {
                topic: topic.topic.clone(),
                ring_bytes: topic.ring_bytes,
                readers: topic.readers,
                unread: unread as f64 / count / topic.ring_bytes.max(1) as f64,
                bytes_per_second: topic.payload_bytes.saturating_sub(before) as f64 / seconds,
            }
        });
        let counters = end.counters.iter().map(|(name, end)| {
            let start = start.counters.get(name).copied().unwrap_or(0);
            (name.clone(), end.saturating_sub(start))
        });
        Some(Self {
            blocked,
            workers: workers
                .map(|(end, start)| Worker::between(start, end, seconds))
                .collect(),
            topics: topics.collect(),
            counters: counters.filter(|(_, count)| *count > 0).collect(),
        })
    }

    /// Of workers that have packets and never sleep, as with `--poll busy`: share of the interval in
    /// which the busiest worked on packets, 0 to 1. They have their cores all of the time.
    pub fn busy_polling(&self) -> Option<f64> {
        let awake = |xdp: &Xdp| xdp.sleeps == 0 && xdp.packets > 0;
        let workers = self.workers.iter();
        let polling = workers.filter(|worker| worker.xdp.as_ref().is_some_and(awake));
        let busy = polling.filter_map(|worker| Some(1.0 - worker.stages.get("WaitForData")?));
        busy.reduce(f64::max)
    }

    /// All workers of the xdp path together; none without that path.
    pub fn xdp(&self) -> Option<Xdp> {
        let workers = || self.workers.iter().filter_map(|worker| worker.xdp.as_ref());
        let mut sum = workers().next()?.clone();
        for other in workers().skip(1) {
            let weight = other.packets as f64 / (sum.packets + other.packets).max(1) as f64;
            let mix = |a: f64, b: f64| a * (1.0 - weight) + b * weight;
            sum.hit_rate = mix(sum.hit_rate, other.hit_rate);
            sum.full_looks = mix(sum.full_looks, other.full_looks);
            sum.idle = mix(sum.idle, other.idle);
            sum.credit = mix(sum.credit, other.credit);
            sum.congestion = mix(sum.congestion, other.congestion);
            sum.packets += other.packets;
            sum.bytes += other.bytes;
            sum.placed += other.placed;
            sum.missing += other.missing;
            sum.late += other.late;
            sum.aside += other.aside;
            sum.sleeps += other.sleeps;
            add(&mut sum.dropped, &other.dropped);
            add(&mut sum.refused, &other.refused);
            sum.window = sum.window.min(other.window);
        }
        Some(sum)
    }
}

fn add(sum: &mut BTreeMap<&'static str, u64>, other: &BTreeMap<&'static str, u64>) {
    for (name, count) in other {
        *sum.entry(name).or_default() += count;
    }
}

impl Worker {
    fn between(start: &WorkerSnapshot, end: &WorkerSnapshot, seconds: f64) -> Self {
        let stages = end.stages.iter().zip(&start.stages);
        let mut stages: BTreeMap<String, f64> = stages
            .filter(|(end, _)| end.name != "WaitForData")
            .map(|(end, start)| {
                let ns = end.total_ns.saturating_sub(start.total_ns);
                (end.name.clone(), ns as f64 * 1e-9 / seconds)
            })
            .collect();
        let worked: f64 = stages.values().sum();
        stages.insert("WaitForData".to_owned(), (1.0 - worked).max(0.0));
        let xdp = end.xdp.as_ref().zip(start.xdp.as_ref());
        Self {
            thread: end.thread.clone(),
            batches_per_second: end.batches.saturating_sub(start.batches) as f64 / seconds,
            bytes_per_second: end.recv_bytes.saturating_sub(start.recv_bytes) as f64 / seconds,
            stages,
            xdp: xdp.map(|(end, start)| Xdp::between(start, end)),
        }
    }
}

impl Xdp {
    fn between(start: &XdpSnapshot, end: &XdpSnapshot) -> Self {
        let ratio = |a: u64, b: u64| a as f64 / b.max(1) as f64;
        let hits = end.polls.saturating_sub(start.polls);
        let misses = end.empty_polls.saturating_sub(start.empty_polls);
        let acks = end.acks.saturating_sub(start.acks);
        Self {
            packets: end.packets.saturating_sub(start.packets),
            bytes: end.bytes.saturating_sub(start.bytes),
            placed: end.placed.saturating_sub(start.placed),
            dropped: happened([
                ("receive ring full", start.rx_ring_full, end.rx_ring_full),
                (
                    "fill ring empty",
                    start.rx_fill_ring_empty,
                    end.rx_fill_ring_empty,
                ),
                ("other", start.rx_dropped, end.rx_dropped),
            ]),
            refused: happened([
                ("malformed", start.malformed, end.malformed),
                ("corrupt", start.corrupt, end.corrupt),
                ("unknown stream", start.unknown_stream, end.unknown_stream),
                ("duplicate", start.duplicates, end.duplicates),
                ("beyond a limit", start.refused, end.refused),
            ]),
            missing: (end.skipped.saturating_sub(start.skipped))
                .saturating_sub(end.late.saturating_sub(start.late)),
            late: end.late.saturating_sub(start.late),
            aside: end.aside.saturating_sub(start.aside),
            hit_rate: ratio(hits, hits + misses),
            full_looks: ratio(end.full_polls.saturating_sub(start.full_polls), hits),
            sleeps: end.sleeps.saturating_sub(start.sleeps),
            idle: ratio(end.pauses_idle.saturating_sub(start.pauses_idle), acks),
            credit: ratio(end.pauses_credit.saturating_sub(start.pauses_credit), acks),
            congestion: ratio(
                end.pauses_congestion
                    .saturating_sub(start.pauses_congestion),
                acks,
            ),
            window: end.window,
        }
    }
}

fn happened<const N: usize>(counts: [(&'static str, u64, u64); N]) -> BTreeMap<&'static str, u64> {
    let counts = counts
        .into_iter()
        .map(|(name, start, end)| (name, end.saturating_sub(start)));
    counts.filter(|(_, count)| *count > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn snapshot(blocked: usize, unread: u64, packets: u64) -> BrokerSnapshot {
        serde_json::from_value(json!({
            "kind": "broker-live",
            "workers": [{
                "thread": "xdp-0", "path": "xdp", "connections": 1, "blocked": blocked,
                "active_seconds": 1.0, "batches": packets / 10, "recv_calls": 1,
                "recv_bytes": packets * 1000, "eagain": 0,
                "stages": [{"name": "Commit", "total_ns": packets * 1_000_000},
                           {"name": "WaitForData", "total_ns": 1}],
                "xdp": {"window": 65536, "placed": packets, "malformed": 0,
                    "corrupt": packets / 100, "unknown_stream": 0, "duplicates": 0, "refused": 0,
                    "skipped": packets / 10, "late": packets / 50,
                    "acks": packets / 10, "aside": 0, "empty_polls": packets, "polls": packets,
                    "full_polls": packets / 2, "pauses_idle": packets / 50, "pauses_credit": packets / 20,
                    "pauses_congestion": packets / 100, "sleeps": 0,
                    "packets": packets, "bytes": packets * 1000, "rx_dropped": 0,
                    "rx_ring_full": packets / 50, "rx_fill_ring_empty": 0}
            }],
            "topics": [{"topic": "t", "ring_bytes": 1000, "readers": 1, "unread_bytes": unread,
                "payload_bytes": packets * 1000}],
            "counters": {"accepted": 5, "waits_for_space": packets}
        }))
        .unwrap()
    }

    #[test]
    fn what_happened_is_the_difference_of_two_looks() {
        let samples = [
            snapshot(0, 0, 100),
            snapshot(1, 500, 150),
            snapshot(1, 1000, 300),
            snapshot(0, 500, 300),
        ];
        let broker = Broker::between(&samples, 2.0).unwrap();
        assert_eq!((broker.blocked, broker.topics[0].unread), (0.5, 0.5));
        assert_eq!(
            broker.counters,
            [("waits_for_space".to_owned(), 200)].into()
        );
        assert_eq!(broker.workers[0].bytes_per_second, 100_000.0);
        assert!((broker.workers[0].stages["Commit"] - 0.1).abs() < 1e-9);
        let xdp = broker.xdp().unwrap();
        assert_eq!((xdp.packets, xdp.hit_rate, xdp.full_looks), (200, 0.5, 0.5));
        assert_eq!((xdp.missing, xdp.late), (16, 4));
        assert_eq!((xdp.idle, xdp.credit, xdp.congestion), (0.2, 0.5, 0.1));
        assert_eq!(xdp.dropped, [("receive ring full", 4)].into());
        assert_eq!(xdp.refused, [("corrupt", 2)].into());
        assert!(Broker::between(&samples[..1], 1.0).is_none());
        let another = Broker::between(&[snapshot(0, 0, 300), snapshot(0, 0, 100)], 1.0).unwrap();
        assert_eq!(another.xdp().unwrap().packets, 0);
    }

    #[test]
    fn the_socket_is_found_by_its_inode() {
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
            0: 2 0 00010000 0001 01 77 /run/broker-1.sock\n\
            0: 2 0 00010000 0001 01 78 /dev/shm/penstock/broker-1214.sock\n\
            0: 2 0 00010000 0001 01 79\n";
        let found = socket_in(table, |inode| inode == 78).unwrap();
        assert_eq!(found, Path::new("/dev/shm/penstock/broker-1214.sock"));
        assert_eq!(socket_in(table, |inode| inode == 79), None);
    }
}
