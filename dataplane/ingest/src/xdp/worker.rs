//! A worker: one thread that drives its sockets, its streams and their control connections.

pub mod bench_support;
mod stream_table;

use std::hint;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags};
use penstock_runtime::poller::{Events, Poller};
use penstock_runtime::profile::{Rounds, SNAPSHOT_INTERVAL, SnapshotCell};
use penstock_runtime::sleep;
use penstock_transport::{Nanos, Timestamp};
use penstock_wire::reply::Fault;
use penstock_xsk::{BURST, XskRxSocket};

use self::stream_table::StreamTable;
use super::close_reason::CloseReason;
use super::stats::{WorkerSnapshot, XdpStats};
use super::stream::Stream;
use crate::session;
use crate::session::pending_streams::PendingStreams;
use crate::session::stats::{PathStage, Shared, WorkerStats};

/// How often time is looked after.
const TICK: Nanos = Nanos::from_millis(1);
/// Longest sleep.
const SLEEP: Duration = Duration::from_millis(50);
/// Pause of a worker that received packets since its last one. More packets gather meanwhile: waking it for each
/// would cost the sender's core, and the rings hold many times what arrives. A worker that received none
/// sleeps until the kernel wakes it.
const SHORT_PAUSE: Duration = Duration::from_micros(50);
/// Pause while packets arrive steadily: half as many rounds and ACKs, and no batch waits for its first
/// packet to be noticed.
const LONG_PAUSE: Duration = Duration::from_micros(100);
/// Pauses without a sleep between them after which packets count as arriving steadily.
const STEADY_AFTER: u32 = 16;
/// How often one that waits for room in the ring looks for it.
const BLOCKED: Duration = Duration::from_millis(1);

/// What a worker does while no packet comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polling {
    /// Looks again at once: owns its core, answers fastest.
    Busy,
    /// Looks for a moment, then sleeps until the kernel has something.
    Adaptive,
}

/// Settings of a worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Compare each batch with its checksum before it is committed. Packets are always compared
    /// with theirs.
    pub verify_on_receive: bool,
    /// What to do while no packet comes.
    pub polling: Polling,
    /// A stream from which no packet comes for so long is ended.
    pub idle_timeout: Duration,
    /// Bytes of batches that may be on their way to this worker, all streams together: what its
    /// receive rings hold.
    pub capacity: u64,
}

/// The way to a running worker.
pub type WorkerHandle = session::WorkerHandle<WorkerSnapshot>;

/// A worker, before it runs.
#[derive(Debug)]
pub struct Worker {
    sockets: Vec<XskRxSocket>,
    table: StreamTable,
    stop: Arc<AtomicBool>,
    events: Events,
    snapshot: Arc<SnapshotCell<WorkerSnapshot>>,
    /// Shows other threads that the loop makes progress.
    rounds: Rounds,
    /// When figures are shown next.
    show_at: Timestamp,
}

impl Worker {
    /// A worker that runs until `stop` is set, with streams of `pending_streams`.
    ///
    /// # Errors
    /// If the kernel gives no epoll instance.
    pub fn new(
        config: WorkerConfig,
        sockets: Vec<XskRxSocket>,
        pending_streams: Arc<PendingStreams>,
        shared: Arc<Shared>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<(Self, WorkerHandle)> {
        let poller = Arc::new(Poller::new()?);
        shared.claims.register_worker(&poller);
        let handle = WorkerHandle::new(&poller);
        let table = StreamTable::new(config, pending_streams, shared, poller);
        let worker = Self {
            sockets,
            table,
            stop,
            events: Events::default(),
            snapshot: handle.snapshot(),
            rounds: handle.rounds(),
            show_at: Timestamp::ZERO,
        };
        Ok((worker, handle))
    }

    /// Serves streams until told to stop; returns what it did. An interface that is down or gone
    /// is no failure: nothing comes from it.
    ///
    /// # Errors
    /// If the kernel does not answer for a socket.
    pub fn run(mut self) -> io::Result<(WorkerStats, XdpStats)> {
        sleep::minimize_timer_slack()?;
        let mut next_tick = Timestamp::ZERO;
        let (mut since_pause, mut pauses) = (0, 0_u32);
        while !self.stop.load(Ordering::Relaxed) {
            let mut packets = 0;
            for (number, socket) in self.sockets.iter_mut().enumerate() {
                socket.drive();
                let now = self.table.now();
                packets += socket.receive(|parts| self.table.datagram(number, parts, now));
            }
            let now = self.table.now();
            since_pause += packets as u64;
            if packets > 0 {
                self.table.xdp.polls += 1;
                self.table.xdp.full_polls += u64::from(packets >= BURST);
                self.table.commit_dirty(now);
            } else {
                self.table.xdp.empty_polls += 1;
                hint::spin_loop();
            }
            self.send_acks(now)?;
            if now >= next_tick {
                self.tick(now)?;
                next_tick = now + TICK;
            }
            if packets == 0 && self.table.config.polling == Polling::Adaptive {
                if since_pause > 0 || self.owes_ack() {
                    pauses = pauses.saturating_add(1);
                    thread::sleep(pause(pauses));
                } else {
                    self.sleep()?;
                    (next_tick, pauses) = (Timestamp::ZERO, 0);
                }
                since_pause = 0;
            }
        }
        self.shut_down()
    }

    /// Sends the ACKs that are due, one system call for all of a socket.
    fn send_acks(&mut self, now: Timestamp) -> io::Result<()> {
        let start = self.table.stats.stages.now();
        let sockets = &mut self.sockets;
        // An ACK for which there is no frame is like one that got lost.
        let are_sent = self.table.write_acks(now, |socket, frame| {
            sockets[socket].send(frame);
        });
        if are_sent {
            for socket in &mut self.sockets {
                socket.flush()?;
            }
            self.table.stats.stages.lap(PathStage::SendAck, start);
        }
        Ok(())
    }

    fn tick(&mut self, now: Timestamp) -> io::Result<()> {
        self.rounds.count();
        self.look_at_controls()?;
        for number in 0..self.table.streams.len() {
            self.table.with(number, now, Stream::tick);
        }
        self.table.relieve(now);
        self.table.pending_streams.expire();
        if now >= self.show_at {
            self.show_at = now + Nanos::from(SNAPSHOT_INTERVAL);
            self.show()?;
        }
        Ok(())
    }

    /// Finds the streams whose publishers have said something over the control connection.
    fn look_at_controls(&mut self) -> io::Result<()> {
        let poller = &self.table.poller;
        poller.wait(&mut self.events, Duration::ZERO)?;
        for event in self.events.iter() {
            if let Some(Some(entry)) = self.table.streams.get_mut(event.key) {
                entry.stream.control.set_ready();
            }
        }
        Ok(())
    }

    fn show(&self) -> io::Result<()> {
        let (stats, xdp) = self.sum_up()?;
        let table = &self.table;
        let streams = || table.streams.iter().flatten();
        self.snapshot.publish(WorkerSnapshot {
            stats,
            xdp,
            streams: streams().count(),
            blocked: streams().filter(|entry| entry.stream.is_blocked()).count(),
            window: table.window(),
        });
        Ok(())
    }

    fn sum_up(&self) -> io::Result<(WorkerStats, XdpStats)> {
        let table = &self.table;
        let (mut stats, mut xdp) = (table.stats.clone(), table.xdp);
        if let (Some(first), Some(last)) = (table.first_packet, table.last_commit) {
            stats.active_ns = stats.stages.nanos_between(first, last);
        }
        for socket in &self.sockets {
            xdp.add_socket(&socket.stats()?);
        }
        stats.polls = xdp.sleeps;
        stats.recv_calls = xdp.socket.kicks;
        stats.recv_bytes = xdp.socket.bytes;
        Ok((stats, xdp))
    }

    /// Whether an ACK is due, soon: before any sleep would end.
    fn owes_ack(&self) -> bool {
        let mut streams = self.table.streams.iter().flatten();
        streams.any(|entry| entry.stream.ack_due().is_some())
    }

    /// Until a packet comes, or somebody says something over a control connection.
    fn sleep(&mut self) -> io::Result<()> {
        let mut streams = self.table.streams.iter().flatten();
        let blocked = streams.any(|entry| entry.stream.is_blocked());
        let longest = if blocked { BLOCKED } else { SLEEP };
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut watched: Vec<_> = self
            .sockets
            .iter()
            .map(|socket| readable(socket.fd()))
            .collect();
        watched.push(readable(self.table.poller.as_fd()));
        self.table.xdp.sleeps += 1;
        sleep::until_ready(&mut watched, longest)
    }

    fn shut_down(mut self) -> io::Result<(WorkerStats, XdpStats)> {
        let gone = self.table.pending_streams.is_closed();
        for number in 0..self.table.streams.len() {
            let ending = match gone {
                // The publisher goes on over another path when its connection just closes.
                true => CloseReason::Io(io::Error::from_raw_os_error(libc::ENETDOWN)),
                false => {
                    CloseReason::Fault(Fault::Shutdown, "the broker is shutting down".to_owned())
                }
            };
            self.table.remove(number, &ending);
        }
        let sums = self.sum_up();
        close(self.sockets);
        sums
    }
}

/// The pause of a worker that has not slept for `pauses` of them.
fn pause(pauses: u32) -> Duration {
    match pauses <= STEADY_AFTER {
        true => SHORT_PAUSE,
        false => LONG_PAUSE,
    }
}

/// Closes the sockets, several at a time. Each close waits milliseconds for the kernel
/// (`synchronize_net` in `xsk_unbind_dev`); parallel closes share that wait.
fn close(mut sockets: Vec<XskRxSocket>) {
    const AT_A_TIME: usize = 16;
    let each = sockets.len().div_ceil(AT_A_TIME);
    thread::scope(|scope| {
        while sockets.len() > each {
            let some = sockets.split_off(sockets.len() - each);
            // Without a thread, close them here.
            let _ = thread::Builder::new().spawn_scoped(scope, move || drop(some));
        }
        drop(sockets);
    });
}

#[cfg(test)]
mod tests;
