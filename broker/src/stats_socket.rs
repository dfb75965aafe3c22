//! The broker's live figures: each connection to a Unix socket in the buffer directory gets them as one
//! line of JSON. They cost nothing until a client asks.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use penstock_ingest::session::{Counters, Shared, WorkerStats};
use penstock_ingest::tcp;
use penstock_ingest::xdp::{self, XdpStats};
use penstock_log::Access;
use penstock_process::supervisor::Supervisor;
use penstock_runtime::deadline;
use penstock_runtime::profile::StageReport;
use penstock_serve::ServeStats;
use serde::Serialize;
use tracing::warn;

use crate::liveness::{IDLE_ROUND_MS, Pulse};
use crate::report::{self, TopicReport, stages_and_wait};
use crate::threads::rehearse_fault;
use crate::topics::Topics;

/// Time limit for a client to read the whole answer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// A client that asks again within this time gets the same figures, so that polling costs the workers
/// nothing.
const FRESH: Duration = Duration::from_millis(20);
/// Pause after a failed accept: most failures last, such as a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Failures that are logged one by one; the others are only counted.
const MAX_LOGGED_FAILURES: u64 = 10;

/// Where the figures come from.
pub struct Sources {
    pub started: Instant,
    pub listen: SocketAddr,
    pub topics: Arc<Topics>,
    pub shared: Arc<Shared>,
    pub tcp: Vec<tcp::WorkerHandle>,
    pub xdp: Vec<xdp::WorkerHandle>,
    /// Of the worker that serves remote subscribers, if there is one.
    pub serving: Option<penstock_serve::WorkerHandle>,
}

/// The socket in the file system; removed when dropped.
pub struct StatsSocket(PathBuf);

/// The answer to a client; field names are stable.
#[derive(Serialize)]
struct Figures<'a> {
    kind: &'static str,
    pid: u32,
    listen: SocketAddr,
    uptime_seconds: f64,
    workers: Vec<Worker>,
    topics: Vec<TopicReport>,
    /// Remote subscribers, if they are served.
    #[serde(skip_serializing_if = "Option::is_none")]
    subscribers: Option<ServeStats>,
    counters: &'a Counters,
}

#[derive(Serialize)]
struct Worker {
    /// Name of its thread.
    thread: String,
    path: &'static str,
    /// Connections (tcp) or streams (xdp) that it serves.
    connections: usize,
    /// Those of them that are waiting for room in the shared buffer.
    blocked: usize,
    /// First frame to last commit.
    active_seconds: f64,
    batches: u64,
    recv_calls: u64,
    recv_bytes: u64,
    eagain: u64,
    stages: Vec<StageReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    xdp: Option<Xdp>,
}

#[derive(Serialize)]
struct Xdp {
    /// Bytes that each stream may have in flight.
    window: u64,
    #[serde(flatten)]
    stats: XdpStats,
}

/// Answers each connection to `broker-<port>.sock` in `directory`, from a thread of its own.
///
/// Each broker that uses the directory has its own port, so an existing socket of this name was left by
/// a broker that was killed: it is replaced.
pub fn serve(
    directory: &Path,
    access: Access,
    sources: Sources,
    supervisor: &Supervisor,
    stop: &Arc<AtomicBool>,
    pulse: &Pulse,
) -> Result<StatsSocket> {
    let name = format!("broker-{}.sock", sources.listen.port());
    let path = directory.join(&name);
    let failed = || {
        format!(
            "cannot create {}, the socket for live figures",
            path.display()
        )
    };
    let name = OsStr::new(&name);
    let directory = access.open_directory(directory).with_context(failed)?;
    directory.remove_socket(name).with_context(failed)?;
    let listener = UnixListener::bind(&path).with_context(failed)?;
    listener.set_nonblocking(true).with_context(failed)?;
    let pulse = pulse.clone();
    // Only root and the broker's user may connect, whatever the umask is.
    directory
        .set_socket_mode(name, 0o600)
        .with_context(failed)?;
    // The thread runs until the process ends.
    supervisor.spawn("figures", stop, move || -> Result<()> {
        rehearse_fault("figures")?;
        let mut failures = 0;
        let mut latest = None;
        loop {
            pulse.count();
            let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            // What goes wrong here goes wrong with `accept` as well.
            if poll(&mut fds, PollTimeout::from(IDLE_ROUND_MS)) == Ok(0) {
                continue;
            }
            let answered = match listener.accept() {
                Ok((stream, _)) => sources.answer(&stream, &mut latest),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => {
                    thread::sleep(ACCEPT_PAUSE);
                    Err(error)
                }
            };
            if let Err(error) = answered {
                failures += 1;
                if failures <= MAX_LOGGED_FAILURES {
                    warn!(%error, "cannot answer a request for live figures");
                }
            }
        }
    })?;
    Ok(StatsSocket(path))
}

impl Drop for StatsSocket {
    fn drop(&mut self) {
        // Best effort: the next broker on this port replaces it.
        let _ = fs::remove_file(&self.0);
    }
}

impl Sources {
    /// Answers one request; `latest` are the figures of the last answer.
    fn answer(
        &self,
        stream: &UnixStream,
        latest: &mut Option<(Instant, Vec<u8>)>,
    ) -> io::Result<()> {
        let now = Instant::now();
        let fresh = latest.take().filter(|(at, _)| now < *at + FRESH);
        let (at, line) = match fresh {
            Some(kept) => kept,
            None => {
                let mut line = serde_json::to_vec(&self.figures())?;
                line.push(b'\n');
                (now, line)
            }
        };
        let written = deadline::write_all(stream, &line, now + ANSWER_TIMEOUT);
        *latest = Some((at, line));
        written
    }

    fn figures(&self) -> Figures<'_> {
        let topics = report::readable(self.topics.list()).map(TopicReport::new);
        let tcp = self.tcp.iter().enumerate().map(|(number, handle)| {
            let now = handle.now();
            Worker {
                connections: now.connections,
                blocked: now.blocked,
                ..Worker::new(format!("worker-{number}"), "tcp", &now.stats)
            }
        });
        let xdp = self.xdp.iter().enumerate().map(|(number, handle)| {
            let now = handle.now();
            Worker {
                connections: now.streams,
                blocked: now.blocked,
                xdp: Some(Xdp {
                    window: now.window,
                    stats: now.xdp,
                }),
                ..Worker::new(format!("xdp-{number}"), "xdp", &now.stats)
            }
        });
        Figures {
            kind: "broker-live",
            pid: std::process::id(),
            listen: self.listen,
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            workers: tcp.chain(xdp).collect(),
            topics: topics.collect(),
            subscribers: self.serving.as_ref().map(|handle| handle.now()),
            counters: &self.shared.counters,
        }
    }
}

impl Worker {
    fn new(thread: String, path: &'static str, stats: &WorkerStats) -> Self {
        Self {
            thread,
            path,
            connections: 0,
            blocked: 0,
            active_seconds: stats.active_ns as f64 * 1e-9,
            batches: stats.batches,
            recv_calls: stats.recv_calls,
            recv_bytes: stats.recv_bytes,
            eagain: stats.eagain,
            stages: stages_and_wait(stats),
            xdp: None,
        }
    }
}
