//! The accept loop: sizes socket buffers, speaks the handshake, queues connections to workers.
//!
//! Silent and slow peers stay here, where they cost one small entry each; a worker only ever sees
//! a connection that has been admitted.

mod admit;
mod answer;
mod listener;
mod pending_handshake;
#[cfg(test)]
mod tests;
mod topic_wait;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use penstock_auth::Keys;
use penstock_runtime::poller::{Events, Interest, Poller};
use penstock_runtime::profile::Rounds;
use socket2::{SockRef, TcpKeepalive};
use tracing::{debug, warn};

use self::listener::is_about_the_peer;
pub use self::listener::listen;
use self::pending_handshake::{PendingHandshake, is_pending, tenant_of};
use super::accepted_stream::StreamQueue;
use super::admission::Admit;
use super::buffers::RequestedBuffers;
use super::handshake::{ServerHandshake, Step};
use super::peer::Tenant;
use super::pending_streams::PendingStreams;
use super::permits::StreamPermits;
use super::shares::{self, Exceeded, Shares, Use};
use super::stats::{Counters, Shared};

/// Key of the listener in the poller.
const LISTENER: usize = usize::MAX - 1;
/// Pause after accept failed for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Interval of time-based work.
const TICK: Duration = Duration::from_secs(1);

/// Limits on what peers may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Open streams, all workers together.
    pub max_connections: usize,
    /// Connections that have not finished their handshake; the oldest of the host with most goes first.
    pub max_handshakes: usize,
    /// Time limit for a handshake.
    pub handshake_timeout: Duration,
    /// Maximum share of the streams that others leave free that one host may have, percent.
    pub share_percent: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_handshakes: 4096,
            handshake_timeout: Duration::from_secs(5),
            share_percent: shares::DEFAULT_PERCENT,
        }
    }
}

/// The path for payload as datagrams, if the broker has it.
#[derive(Debug, Clone)]
pub struct DatagramPath {
    /// Where opened streams wait for their first packet.
    pub pending_streams: Arc<PendingStreams>,
    /// Largest UDP payload that the interface takes, bytes.
    pub max_datagram: u32,
}

/// The accept loop.
pub struct Acceptor<A> {
    listener: TcpListener,
    wanted: RequestedBuffers,
    limits: Limits,
    admit: A,
    workers: Vec<StreamQueue>,
    datagrams: Option<DatagramPath>,
    keys: Option<Arc<Keys>>,
    /// Require authenticated packets and frames, even if publishers do not ask for it.
    packet_auth: bool,
    shared: Arc<Shared>,
    poller: Arc<Poller>,
    /// Shows other threads that the loop makes progress.
    rounds: Rounds,
    handshakes: Vec<Option<PendingHandshake>>,
    free: Vec<usize>,
    /// Newcomers by age: key and number.
    by_age: VecDeque<(usize, u64)>,
    /// The same by host, without connections that wait for their topic: each of those has a permit, so
    /// there are no more of them than streams.
    pending: Shares<(usize, u64)>,
    /// Connections whose topics are being opened: key and number.
    waiting: Vec<(usize, u64)>,
    permits: StreamPermits,
    next_number: u64,
    next_tick: Instant,
    paused_until: Option<Instant>,
}

impl<A: Admit> Acceptor<A> {
    /// An accept loop on `listener`, which came from [`listen`].
    ///
    /// # Errors
    /// If the kernel gives no epoll instance.
    pub fn new(
        listener: TcpListener,
        wanted: RequestedBuffers,
        limits: Limits,
        admit: A,
        workers: Vec<StreamQueue>,
        datagrams: Option<DatagramPath>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let poller = Arc::new(Poller::new()?);
        poller.add(&listener, LISTENER, Interest::READABLE)?;
        let permits = StreamPermits::new(limits.max_connections, limits.share_percent);
        let pending = Shares::new(limits.max_handshakes, 100);
        Ok(Self {
            listener,
            wanted,
            limits,
            admit,
            workers,
            datagrams,
            keys: None,
            packet_auth: false,
            shared,
            poller,
            rounds: Rounds::default(),
            handshakes: Vec::new(),
            free: Vec::new(),
            by_age: VecDeque::new(),
            pending,
            waiting: Vec::new(),
            permits,
            next_number: 0,
            next_tick: Instant::now() + TICK,
            paused_until: None,
        })
    }

    /// Lets only holders of a key publish; without keys, anyone may. With `packet_auth`, only with
    /// authenticated packets and frames.
    #[must_use]
    pub fn with_keys(mut self, keys: Option<Arc<Keys>>, packet_auth: bool) -> Self {
        (self.keys, self.packet_auth) = (keys, packet_auth);
        self
    }

    /// Round counter, which grows at least once a second while the loop makes progress.
    #[must_use]
    pub fn rounds(&self) -> Rounds {
        self.rounds.clone()
    }

    /// Wakes the loop, so that it checks its stop flag.
    #[must_use]
    pub fn poller(&self) -> Arc<Poller> {
        Arc::clone(&self.poller)
    }

    /// Accepts until `stop` is set; then the workers are woken to stop as well.
    ///
    /// # Errors
    /// If the poller fails, which no peer can cause.
    pub fn run(mut self, stop: &AtomicBool) -> io::Result<()> {
        let mut events = Events::default();
        while !stop.load(Ordering::Relaxed) {
            self.rounds.count();
            self.poller.wait(&mut events, self.patience())?;
            for event in events.iter() {
                match event.key {
                    LISTENER => self.accept_all()?,
                    key => self.on_readable(key),
                }
            }
            self.ask_again();
            self.expire(Instant::now())?;
        }
        self.poller.delete(&self.listener)?;
        (0..self.handshakes.len()).for_each(|key| self.close(key));
        Ok(())
    }

    fn patience(&self) -> Duration {
        let now = Instant::now();
        let oldest = self.by_age.iter().find_map(|(key, number)| {
            let pending = self.handshakes[*key].as_ref()?;
            (pending.number == *number).then_some(pending.deadline)
        });
        let until = [oldest, self.paused_until, Some(self.next_tick)];
        let until = until.into_iter().flatten().min();
        until.map_or(TICK, |until| until.saturating_duration_since(now))
    }

    fn accept_all(&mut self) -> io::Result<()> {
        loop {
            match self.listener.accept() {
                Ok((socket, peer)) => {
                    Counters::count(&self.shared.counters.accepted);
                    if let Err(error) = self.welcome(socket, peer)
                        && self.shared.lines.allows()
                    {
                        warn!(%peer, %error, "cannot prepare an accepted socket; it is dropped");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The peer was gone before it was accepted (accept(2), ECONNABORTED).
                Err(error) if is_about_the_peer(&error) => {}
                Err(error) => {
                    Counters::count(&self.shared.counters.accept_failures);
                    if self.shared.lines.allows() {
                        warn!(%error, "cannot accept; raise the limit of open files (ulimit -n) or lower the number of publishers");
                    }
                    self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                    let nothing = Interest::NOTHING;
                    return self.poller.modify(&self.listener, LISTENER, nothing);
                }
            }
        }
    }

    /// Sizes the socket's buffers before anything else, then waits for its hello.
    fn welcome(&mut self, socket: TcpStream, peer: SocketAddr) -> io::Result<()> {
        let buffers = self.wanted.apply_to_accepted(&socket)?;
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(30))
            .with_interval(Duration::from_secs(10));
        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        if self.pending.total() >= self.pending.limit() {
            self.make_room(&tenant_of(peer));
        }
        let key = self.free.pop().unwrap_or_else(|| {
            self.handshakes.push(None);
            self.handshakes.len() - 1
        });
        // It is deleted in `take`, before its key is free and before a worker watches it.
        if let Err(error) = self.poller.add(&socket, key, Interest::READABLE) {
            self.free.push(key);
            return Err(error);
        }
        let number = self.next_number;
        self.next_number += 1;
        let deadline = Instant::now() + self.limits.handshake_timeout;
        let handshake = ServerHandshake::new();
        self.handshakes[key] = Some(PendingHandshake {
            socket,
            peer,
            buffers,
            handshake,
            deadline,
            number,
            waiting: None,
            has_waited: false,
        });
        self.by_age.push_back((key, number));
        let tenant = tenant_of(peer);
        self.pending.charge(&tenant, 1);
        let handshakes = &self.handshakes;
        let is_gone = |&(key, number): &(usize, u64)| !is_pending(handshakes, key, number);
        self.pending.list(&tenant, (key, number), is_gone);
        Ok(())
    }

    fn on_readable(&mut self, key: usize) {
        let Some(pending) = self.handshakes[key].as_mut() else {
            return;
        };
        let peer = pending.peer;
        if pending.waiting.is_some() {
            // Only the end of the connection is reported meanwhile.
            Counters::count(&self.shared.counters.handshake_closed);
            return self.close(key);
        }
        loop {
            let got = match (&pending.socket).read(pending.handshake.wanted()) {
                Ok(0) => {
                    Counters::count(&self.shared.counters.handshake_closed);
                    debug!(%peer, "closed before its hello was complete");
                    return self.close(key);
                }
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    Counters::count(&self.shared.counters.handshake_closed);
                    debug!(%peer, %error, "lost before its hello was complete");
                    return self.close(key);
                }
            };
            let grants = self.keys.as_ref().map(|keys| keys.grants());
            match pending.handshake.received(got, grants.as_deref()) {
                Ok(Step::More) => {}
                Ok(Step::Say(bytes)) => {
                    // A new socket has room for these few bytes; without them nothing more comes.
                    let _ = (&pending.socket).write(&bytes);
                }
                Ok(Step::Ask(request, topic)) => return self.admit(key, topic, request),
                Err(error) => {
                    let (refusal, told) = (error.refusal(), error.told());
                    return self.reject(key, refusal, &told, &error.to_string());
                }
            }
        }
    }

    fn expire(&mut self, now: Instant) -> io::Result<()> {
        while let Some((key, number)) = self.by_age.front().copied() {
            match &self.handshakes[key] {
                Some(pending) if pending.number == number => {
                    if now < pending.deadline {
                        break;
                    }
                    Counters::count(&self.shared.counters.handshake_timeouts);
                    debug!(peer = %pending.peer, "said no hello in time");
                    self.close(key);
                }
                _ => {}
            }
            self.by_age.pop_front();
        }
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.expire_waiting(now);
            self.permits.look(now);
            self.admit.tick(now);
        }
        if self.paused_until.is_some_and(|until| now >= until) {
            self.paused_until = None;
            let readable = Interest::READABLE;
            self.poller.modify(&self.listener, LISTENER, readable)?;
        }
        Ok(())
    }

    /// Drops the oldest pending connection of the site and host that have most, so that no site alone can
    /// displace others.
    fn make_room(&mut self, pending: &Tenant) {
        let handshakes = &self.handshakes;
        let look = |&(key, number): &(usize, u64)| match is_pending(handshakes, key, number) {
            true => Use::Unused,
            false => Use::Gone,
        };
        if let Some((_, (key, _))) = self.pending.evict(pending, Exceeded::Total, look) {
            Counters::count(&self.shared.counters.handshake_evictions);
            self.close(key);
        }
    }

    fn close(&mut self, key: usize) {
        drop(self.take(key));
    }

    fn take(&mut self, key: usize) -> Option<PendingHandshake> {
        let pending = self.handshakes[key].take()?;
        // Deleting a descriptor that is not watched is no failure.
        let _ = self.poller.delete(&pending.socket);
        if !pending.has_waited {
            self.pending.release(&tenant_of(pending.peer), 1);
        }
        self.free.push(key);
        Some(pending)
    }
}
