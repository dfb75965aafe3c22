//! The accept loop: sets socket buffers, runs the handshake, queues connections to workers.
//!
//! Silent and slow peers stay here, where each costs one small entry; a worker sees only connections that
//! have been admitted.

mod admit;
mod answer;
mod listener;
mod pending_handshake;
mod subscribe;
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
use penstock_wire::handshake::Purpose;
use slab::Slab;
use socket2::{SockRef, TcpKeepalive};
use tracing::{debug, warn};

use self::listener::is_about_the_peer;
pub use self::listener::listen;
use self::pending_handshake::{HandshakeId, PendingHandshake, tenant_of};
use super::admission::Admit;
use super::buffers::RequestedBuffers;
use super::handshake::{ServerHandshake, Step};
use super::peer::Tenant;
use super::pending_streams::PendingStreams;
use super::permits::StreamPermits;
use super::shares::{self, Exceeded, Shares, Use};
use super::stats::{Counters, Shared};
use super::work_queue::{StreamQueue, SubscriberQueue};

/// Key of the listener in the poller.
const LISTENER: usize = usize::MAX - 1;
/// Pause after accept failed for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Interval of time-based work.
const TICK_INTERVAL: Duration = Duration::from_secs(1);

/// Limits on what peers may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Open streams, all workers together.
    pub max_connections: usize,
    /// Connections that have not finished their handshake. Beyond this limit the acceptor closes the oldest
    /// one of the host with most.
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

/// Which remote subscribers may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadAccess {
    /// Holders of a key that permits reading the topic.
    Keyed,
    /// Anyone, on a broker without keys.
    Anyone,
}

/// The service for remote subscribers, if the broker has it.
#[derive(Debug, Clone)]
pub struct SubscriberService {
    /// To the worker that serves them.
    pub queue: SubscriberQueue,
    /// Who may read.
    pub access: ReadAccess,
    /// Whether a subscriber without a key may register, so that publishers wait for it.
    pub anyone_may_register: bool,
    /// Most subscribers at once.
    pub max: usize,
}

/// The accept loop.
pub struct Acceptor<A> {
    listener: TcpListener,
    buffers: RequestedBuffers,
    limits: Limits,
    admit: A,
    workers: Vec<StreamQueue>,
    datagrams: Option<DatagramPath>,
    subscribers: Option<subscribe::Subscribers>,
    keys: Option<Arc<Keys>>,
    /// Require authenticated packets and frames, even if publishers do not ask for it.
    packet_auth: bool,
    shared: Arc<Shared>,
    poller: Arc<Poller>,
    /// Counts rounds of the loop, so that other threads see progress.
    rounds: Rounds,
    handshakes: Slab<PendingHandshake>,
    /// Pending handshakes by age.
    by_age: VecDeque<HandshakeId>,
    /// The same by host, without connections that wait for their topic: each of those has a permit, so
    /// there are no more of them than streams.
    pending: Shares<HandshakeId>,
    /// Connections whose topics are being opened.
    awaiting_topic: Vec<HandshakeId>,
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
        buffers: RequestedBuffers,
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
            buffers,
            limits,
            admit,
            workers,
            datagrams,
            subscribers: None,
            keys: None,
            packet_auth: false,
            shared,
            poller,
            rounds: Rounds::default(),
            handshakes: Slab::new(),
            by_age: VecDeque::new(),
            pending,
            awaiting_topic: Vec::new(),
            permits,
            next_number: 0,
            next_tick: Instant::now() + TICK_INTERVAL,
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

    /// Lets remote subscribers in.
    #[must_use]
    pub fn with_subscribers(mut self, service: Option<SubscriberService>) -> Self {
        let percent = self.limits.share_percent;
        self.subscribers = service.map(|service| subscribe::Subscribers::new(service, percent));
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

    /// Accepts until `stop` is set.
    ///
    /// # Errors
    /// If the poller fails, which no peer can cause.
    pub fn run(mut self, stop: &AtomicBool) -> io::Result<()> {
        let mut events = Events::default();
        while !stop.load(Ordering::Relaxed) {
            self.rounds.count();
            self.poller.wait(&mut events, self.poll_timeout())?;
            for event in events.iter() {
                match event.key {
                    LISTENER => self.accept_all()?,
                    key => self.on_readable(key),
                }
            }
            self.retry_waiting();
            self.expire(Instant::now())?;
        }
        self.poller.delete(&self.listener)?;
        self.handshakes.clear();
        Ok(())
    }

    fn poll_timeout(&self) -> Duration {
        let now = Instant::now();
        let mut pending = self.by_age.iter().filter_map(|id| id.get(&self.handshakes));
        let oldest = pending.next().map(|pending| pending.deadline);
        let until = [oldest, self.paused_until, Some(self.next_tick)];
        let until = until.into_iter().flatten().min();
        until.map_or(TICK_INTERVAL, |until| until.saturating_duration_since(now))
    }

    fn accept_all(&mut self) -> io::Result<()> {
        loop {
            match self.listener.accept() {
                Ok((socket, peer)) => {
                    Counters::count(&self.shared.counters.accepted);
                    if let Err(error) = self.start_handshake(socket, peer)
                        && self.shared.lines.allows()
                    {
                        warn!(%peer, %error, "cannot prepare an accepted socket; it is dropped");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The peer has reset the connection before accept (accept(2), ECONNABORTED).
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

    /// Sets the socket's buffers before anything else, then waits for the peer's hello.
    fn start_handshake(&mut self, socket: TcpStream, peer: SocketAddr) -> io::Result<()> {
        let buffers = self.buffers.apply_to_accepted(&socket)?;
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(30))
            .with_interval(Duration::from_secs(10));
        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        if self.pending.total() >= self.pending.limit() {
            self.evict_pending(&tenant_of(peer));
        }
        let vacant = self.handshakes.vacant_entry();
        // `take` deletes it, before its key is free and before a worker watches it.
        self.poller.add(&socket, vacant.key(), Interest::READABLE)?;
        let id = HandshakeId {
            key: vacant.key(),
            number: self.next_number,
        };
        self.next_number += 1;
        let deadline = Instant::now() + self.limits.handshake_timeout;
        let handshake = ServerHandshake::new();
        vacant.insert(PendingHandshake {
            socket,
            peer,
            buffers,
            handshake,
            deadline,
            number: id.number,
            waiting: None,
            has_waited: false,
        });
        self.by_age.push_back(id);
        let tenant = tenant_of(peer);
        self.pending.charge(&tenant, 1);
        let handshakes = &self.handshakes;
        let is_gone = |id: &HandshakeId| !id.is_pending(handshakes);
        self.pending.list(&tenant, id, is_gone);
        Ok(())
    }

    fn on_readable(&mut self, key: usize) {
        let Some(pending) = self.handshakes.get_mut(key) else {
            return;
        };
        let peer = pending.peer;
        if pending.waiting.is_some() {
            // While it waits for its topic, epoll reports only that the connection has ended.
            Counters::count(&self.shared.counters.handshake_closed);
            return self.close(key);
        }
        loop {
            let got = match (&pending.socket).read(pending.handshake.missing()) {
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
            match pending.handshake.advance(got, grants.as_deref()) {
                Ok(Step::NeedMore) => {}
                Ok(Step::Send(bytes)) => {
                    // A new socket has room for these few bytes; without them the handshake times out.
                    let _ = (&pending.socket).write(&bytes);
                }
                Ok(Step::Open(Purpose::Publish(request), topic)) => {
                    return self.admit(key, topic, request);
                }
                Ok(Step::Open(Purpose::Subscribe, topic)) => {
                    return self.admit_subscriber(key, topic);
                }
                Err(error) => {
                    let (refusal, text) = (error.refusal(), error.peer_text());
                    return self.reject(key, refusal, &text, &error.to_string());
                }
            }
        }
    }

    fn expire(&mut self, now: Instant) -> io::Result<()> {
        while let Some(id) = self.by_age.front().copied() {
            if let Some(pending) = id.get(&self.handshakes) {
                if now < pending.deadline {
                    break;
                }
                Counters::count(&self.shared.counters.handshake_timeouts);
                debug!(peer = %pending.peer, "no complete hello in time");
                self.close(id.key);
            }
            self.by_age.pop_front();
        }
        if now >= self.next_tick {
            self.next_tick = now + TICK_INTERVAL;
            self.expire_waiting(now);
            self.permits.refresh(now);
            if let Some(subscribers) = &self.subscribers {
                subscribers.refresh(now);
            }
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
    fn evict_pending(&mut self, tenant: &Tenant) {
        let handshakes = &self.handshakes;
        let check = |id: &HandshakeId| match id.is_pending(handshakes) {
            true => Use::Unused,
            false => Use::Gone,
        };
        let evicted = self.pending.evict(tenant, Exceeded::Total, check);
        if let Some((_, id)) = evicted {
            Counters::count(&self.shared.counters.handshake_evictions);
            self.close(id.key);
        }
    }

    fn close(&mut self, key: usize) {
        drop(self.take(key));
    }

    fn take(&mut self, key: usize) -> Option<PendingHandshake> {
        let pending = self.handshakes.try_remove(key)?;
        // Best effort: the descriptor may not be watched any more.
        let _ = self.poller.delete(&pending.socket);
        if !pending.has_waited {
            self.pending.release(&tenant_of(pending.peer), 1);
        }
        Some(pending)
    }
}
