//! A worker: one thread that drives its sockets, its streams and their control connections.

pub mod bench_support;
mod clock;
mod metrics;
mod stream_index;
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

/// Interval of time-based work.
const TICK_INTERVAL: Nanos = Nanos::from_millis(1);
/// Longest sleep.
const MAX_SLEEP: Duration = Duration::from_millis(50);
/// Pause of a worker that has received packets since its last pause. More packets gather meanwhile: a wake-up
/// for each would cost the sender's core, and the rings hold many times what arrives. A worker without packets
/// sleeps until the kernel wakes it.
const SHORT_PAUSE: Duration = Duration::from_micros(50);
/// Pause while packets arrive steadily: half as many rounds and ACKs, and no batch waits until the worker
/// notices its first packet.
const LONG_PAUSE: Duration = Duration::from_micros(100);
/// Pauses without a sleep between them after which packets count as arriving steadily.
const STEADY_AFTER: u32 = 16;
/// Longest sleep while a stream waits for room in the ring.
const BLOCKED_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// What a worker does while no packet arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polling {
    /// Polls without a pause: owns its core, and has the lowest latency.
    Busy,
    /// Polls for a moment, then sleeps until the kernel wakes it.
    Adaptive,
}

/// Settings of a worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Verify the checksum of each batch before its commit. Checksums of packets are always verified.
    pub verify_on_receive: bool,
    /// What to do while no packet arrives.
    pub polling: Polling,
    /// Time without a packet after which a stream ends.
    pub idle_timeout: Duration,
    /// Bytes of batches that may be in flight to this worker, all streams together: the capacity of its
    /// receive rings.
    pub capacity: u64,
}

/// Access to a running worker.
pub type WorkerHandle = session::WorkerHandle<WorkerSnapshot>;

/// A worker that does not run yet.
#[derive(Debug)]
pub struct Worker {
    sockets: Vec<XskRxSocket>,
    table: StreamTable,
    stop: Arc<AtomicBool>,
    events: Events,
    snapshot: Arc<SnapshotCell<WorkerSnapshot>>,
    /// Counts rounds of the loop, so that other threads see progress.
    rounds: Rounds,
    /// Time of the next snapshot.
    next_snapshot: Timestamp,
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
            next_snapshot: Timestamp::ZERO,
        };
        Ok((worker, handle))
    }

    /// Serves streams until the stop flag is set; returns its counters. An interface that is down or gone is
    /// not an error: no packets arrive from it.
    ///
    /// # Errors
    /// If the kernel reports an error of a socket.
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
                self.table.metrics.xdp.polls += 1;
                self.table.metrics.xdp.full_polls += u64::from(packets >= BURST);
                self.table.commit_dirty(now);
            } else {
                self.table.metrics.xdp.empty_polls += 1;
                hint::spin_loop();
            }
            self.send_acks(now)?;
            if now >= next_tick {
                self.tick(now)?;
                next_tick = now + TICK_INTERVAL;
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
        let start = self.table.metrics.stats.stages.now();
        let sockets = &mut self.sockets;
        // An ACK without a free frame counts as lost in the network.
        let are_sent = self.table.write_acks(now, |socket, frame| {
            sockets[socket].send(frame);
        });
        if are_sent {
            for socket in &mut self.sockets {
                socket.flush()?;
            }
            self.table
                .metrics
                .stats
                .stages
                .lap(PathStage::SendAck, start);
        }
        Ok(())
    }

    fn tick(&mut self, now: Timestamp) -> io::Result<()> {
        self.rounds.count();
        self.poll_controls()?;
        for number in 0..self.table.streams.capacity() {
            self.table.with(number, now, Stream::tick);
        }
        self.table.reclaim(now);
        self.table.pending_streams.expire();
        if now >= self.next_snapshot {
            self.next_snapshot = now + Nanos::from(SNAPSHOT_INTERVAL);
            self.publish_snapshot()?;
        }
        Ok(())
    }

    /// Finds the streams whose control connections are readable.
    fn poll_controls(&mut self) -> io::Result<()> {
        let poller = &self.table.poller;
        poller.wait(&mut self.events, Duration::ZERO)?;
        for event in self.events.iter() {
            if let Some(entry) = self.table.streams.get_mut(event.key) {
                entry.stream.control.set_ready();
            }
        }
        Ok(())
    }

    fn publish_snapshot(&self) -> io::Result<()> {
        let (stats, xdp) = self.sum_up()?;
        let table = &self.table;
        self.snapshot.publish(WorkerSnapshot {
            stats,
            xdp,
            streams: table.streams.len(),
            blocked: table.streams().filter(|stream| stream.is_blocked()).count(),
            window: table.window(),
        });
        Ok(())
    }

    fn sum_up(&self) -> io::Result<(WorkerStats, XdpStats)> {
        let (mut stats, mut xdp) = self.table.metrics.sum_up();
        for socket in &self.sockets {
            xdp.add_socket(&socket.stats()?);
        }
        stats.polls = xdp.sleeps;
        stats.recv_calls = xdp.socket.kicks;
        stats.recv_bytes = xdp.socket.bytes;
        Ok((stats, xdp))
    }

    /// Whether an ACK becomes due before a sleep would end.
    fn owes_ack(&self) -> bool {
        let mut streams = self.table.streams();
        streams.any(|stream| stream.ack_due().is_some())
    }

    /// Sleeps until a packet arrives or a control connection is readable.
    fn sleep(&mut self) -> io::Result<()> {
        let is_blocked = self.table.streams().any(Stream::is_blocked);
        let longest = match is_blocked {
            true => BLOCKED_POLL_INTERVAL,
            false => MAX_SLEEP,
        };
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut watched: Vec<_> = self
            .sockets
            .iter()
            .map(|socket| readable(socket.fd()))
            .collect();
        watched.push(readable(self.table.poller.as_fd()));
        self.table.metrics.xdp.sleeps += 1;
        sleep::until_ready(&mut watched, longest)
    }

    fn shut_down(mut self) -> io::Result<(WorkerStats, XdpStats)> {
        let is_gone = self.table.pending_streams.is_closed();
        for number in 0..self.table.streams.capacity() {
            let reason = match is_gone {
                // The publisher continues over another path if its connection closes without an error.
                true => CloseReason::Io(io::Error::from_raw_os_error(libc::ENETDOWN)),
                false => {
                    CloseReason::Fault(Fault::Shutdown, "the broker is shutting down".to_owned())
                }
            };
            self.table.remove(number, &reason);
        }
        let sums = self.sum_up();
        close(self.sockets);
        sums
    }
}

/// The length of the next pause, after `pauses` pauses without a sleep.
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
