//! The accept loop: sizes socket buffers, speaks the handshake, queues connections to workers.
//!
//! Silent and slow peers stay here, where they cost one small entry each; a worker only ever sees
//! a connection that has been admitted.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use penstock_auth::{Keys, PacketKeys, generate};
use penstock_runtime::poller::{Events, Interest, Poller};
use penstock_runtime::profile::Rounds;
use penstock_wire::handshake::{DatagramOffer, Offer, Path, Refusal, Request, Welcome};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tracing::{debug, info, warn};
use zerocopy::IntoBytes;

use super::FIRST_CREDIT;
use super::accepted_stream::{AcceptedStream, StreamQueue};
use super::admission::{Admission, Admit, Asked, Outcome, REVOKED, Refused};
use super::buffers::{EffectiveBuffers, RequestedBuffers, rmem_max};
use super::handshake::{ServerHandshake, Step};
use super::peer::{Host, Tenant};
use super::pending_streams::PendingStreams;
use super::permits::{StreamPermit, StreamPermits};
use super::shares::{self, Exceeded, Shares, Use};
use super::stats::{Counters, Shared};

/// Key of the listener in the poller.
const LISTENER: usize = usize::MAX - 1;
/// Connections that the kernel queues before accept; it caps this at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// Pause after accept failed for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time limit for opening a topic; enough to allocate the largest possible log.
const TOPIC_PATIENCE: Duration = Duration::from_secs(30);
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

/// Opens a listening socket with its buffer already sized.
///
/// # Errors
/// The kernel's answer: the address is in use, or not one of this host's.
pub fn listen(address: SocketAddr, wanted: &RequestedBuffers) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // [::] also accepts IPv4, whatever the value of net.ipv6.bindv6only.
        socket.set_only_v6(false)?;
    }
    wanted.apply_to_listener(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// A connection that has not finished its handshake.
#[derive(Debug)]
struct PendingHandshake {
    socket: TcpStream,
    peer: SocketAddr,
    buffers: EffectiveBuffers,
    handshake: ServerHandshake,
    deadline: Instant,
    /// Distinguishes it from a later one with the same key.
    number: u64,
    /// Its request, while its topic is being opened.
    waiting: Option<Waiting>,
    /// Whether it waits for its topic, and so counts as a stream, not as a pending handshake.
    has_waited: bool,
}

/// A stream that may be opened as soon as its topic is open.
#[derive(Debug)]
struct Waiting {
    topic: String,
    request: Request,
    permit: StreamPermit,
}

impl PendingHandshake {
    fn asks<'a>(&'a self, topic: &'a str, request: &'a Request) -> Asked<'a> {
        let key = self.handshake.grant().map(|grant| &grant.key);
        let own = self.socket.local_addr().map(|own| own.ip().to_canonical());
        let from = self.peer.ip().to_canonical();
        Asked {
            topic,
            request,
            tenant: Tenant {
                host: Host::of(self.peer),
                key: key.map(|key| *key.id()),
            },
            key,
            // The kernel drops packets from outside that carry a source address of this host
            // (`accept_local` in Documentation/networking/ip-sysctl.rst).
            is_local: from.is_loopback() || own.is_ok_and(|own| own == from),
        }
    }
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

    /// Opens the stream that a new connection asks for, refuses it, or lets it wait for its topic.
    fn admit(&mut self, key: usize, topic: String, request: Request) {
        let permit = match self.permit(key, &topic, &request) {
            Ok(permit) => permit,
            Err(Refused { refusal, text }) => {
                return self.reject(key, Some(refusal), &text, &text);
            }
        };
        let waiting = Waiting {
            topic,
            request,
            permit,
        };
        self.ask(key, waiting);
    }

    /// The cheapest check comes first: the right to publish, then the stream's state, then the limits.
    /// Nothing is created before all of them pass.
    fn permit(
        &mut self,
        key: usize,
        topic: &str,
        request: &Request,
    ) -> Result<StreamPermit, Refused> {
        let pending = self.handshakes[key]
            .as_ref()
            .expect("the connection has just sent its request");
        if let Some(grant) = pending.handshake.grant()
            && !grant.permits(topic)
        {
            let text = format!(
                "key {} may not publish to topic {topic:?}; add the topic to the key's line in the broker's --auth-keys file",
                grant.name
            );
            return Err(Refused {
                refusal: Refusal::Permission,
                text,
            });
        }
        self.check_path(request.path)?;
        let asked = pending.asks(topic, request);
        self.admit.check(&asked)?;
        let (permit, evicts) = self.permits.acquire(asked.tenant, Instant::now())?;
        if evicts {
            Counters::count(&self.shared.counters.stream_evictions);
        }
        Ok(permit)
    }

    fn check_path(&self, path: Path) -> Result<(), Refused> {
        let text = match path {
            Path::Xdp if !self.offers_datagrams() => {
                "this broker takes payload over tcp only: use --mode tcp or auto, or start it with --mode xdp"
            }
            _ => return Ok(()),
        };
        Err(Refused {
            refusal: Refusal::Path,
            text: text.to_owned(),
        })
    }

    /// Opens a stream that has a permit, unless its topic has to be opened first.
    fn ask(&mut self, key: usize, waiting: Waiting) {
        let Some(pending) = &self.handshakes[key] else {
            return;
        };
        let asked = pending.asks(&waiting.topic, &waiting.request);
        match self.admit.admit(&asked) {
            Ok(Outcome::Admitted(mut admission)) => {
                admission.lease = admission.lease.with_permit(waiting.permit);
                self.hand_over(key, *admission);
            }
            Ok(Outcome::TopicOpening) => self.wait_for_topic(key, waiting),
            Err(Refused { refusal, text }) => {
                self.reject(key, Some(refusal), &text, &text);
            }
        }
    }

    /// Lets a connection wait for its topic; nothing is read from it meanwhile. It has a permit, so
    /// there are no more of these than streams.
    fn wait_for_topic(&mut self, key: usize, waiting: Waiting) {
        let Some(pending) = &mut self.handshakes[key] else {
            return;
        };
        if !std::mem::replace(&mut pending.has_waited, true) {
            // Its age no longer counts.
            pending.number = self.next_number;
            self.next_number += 1;
            pending.deadline = Instant::now() + TOPIC_PATIENCE;
            self.waiting.push((key, pending.number));
            self.pending.release(&tenant_of(pending.peer), 1);
            let (socket, nothing) = (&pending.socket, Interest::NOTHING);
            if self.poller.modify(socket, key, nothing).is_err() {
                return self.close(key);
            }
        }
        pending.waiting = Some(waiting);
    }

    /// Tries again for connections whose topics were being opened.
    fn ask_again(&mut self) {
        if !self.admit.has_news() {
            return;
        }
        for (key, number) in self.waiting.clone() {
            let pending = self.handshakes[key].as_mut();
            let pending = pending.filter(|pending| pending.number == number);
            if let Some(waiting) = pending.and_then(|pending| pending.waiting.take()) {
                self.ask(key, waiting);
            }
        }
        self.forget_waiting();
    }

    /// Ends connections that waited too long or whose permit was revoked.
    fn expire_waiting(&mut self, now: Instant) {
        for (key, number) in self.waiting.clone() {
            let pending = self.handshakes[key].as_ref();
            let pending = pending.filter(|pending| pending.number == number);
            let Some(pending) = pending else {
                continue;
            };
            let waiting = pending.waiting.as_ref();
            let text = if now >= pending.deadline {
                "the broker could not open the topic in time; try again later"
            } else if waiting.is_some_and(|waiting| waiting.permit.is_revoked()) {
                REVOKED
            } else {
                continue;
            };
            self.reject(key, Some(Refusal::Resources), text, text);
        }
        self.forget_waiting();
    }

    fn forget_waiting(&mut self) {
        let handshakes = &self.handshakes;
        self.waiting.retain(|&(key, number)| {
            let pending = handshakes[key].as_ref();
            pending.is_some_and(|pending| pending.number == number)
        });
    }

    fn offers_datagrams(&self) -> bool {
        let path = self.datagrams.as_ref();
        path.is_some_and(|path| !path.pending_streams.is_closed())
    }

    fn hand_over(&mut self, key: usize, admission: Admission) {
        let Some(PendingHandshake {
            socket,
            peer,
            buffers,
            mut handshake,
            ..
        }) = self.take(key)
        else {
            return;
        };
        let path = self.datagrams.as_ref();
        let path = path.filter(|_| admission.path == Path::Xdp);
        let authentic = self.packet_auth || handshake.wants_packet_auth();
        let filter_entry = path.map(|path| path.pending_streams.allow(admission.stream as u16));
        let secret = authentic.then(generate).transpose();
        let (filter_entry, secret) = match (filter_entry.transpose(), secret) {
            (Ok(filter_entry), Ok(secret)) => (filter_entry, secret),
            (Err(error), _) | (_, Err(error)) => {
                warn!(%peer, %error, "no random numbers; a connection is dropped");
                return;
            }
        };
        let path = path.zip(filter_entry);
        let offer = Offer {
            session: admission.session,
            max_payload: admission.max_payload,
            committed: admission.lease.committed(),
            datagrams: path.as_ref().map(|(path, filter_entry)| DatagramOffer {
                key: filter_entry.stream().key,
                credit: FIRST_CREDIT,
                max_datagram: admission.max_datagram.min(path.max_datagram),
            }),
        };
        let packets = secret.as_deref().copied().unwrap_or_default();
        let welcome = handshake.seal(Welcome::accept(offer).as_bytes().to_vec(), packets);
        // A new socket has room for these few bytes; one that has not is not worth keeping.
        if !matches!((&socket).write(&welcome), Ok(n) if n == welcome.len()) {
            Counters::count(&self.shared.counters.handshake_closed);
            return;
        }
        Counters::count(&self.shared.counters.streams_opened);
        if self.shared.lines.allows() {
            let key = handshake.grant().map(|grant| grant.name.as_str());
            log_socket(peer, &admission, key, &buffers);
        }
        let opened = AcceptedStream {
            socket,
            peer,
            buffers,
            admission,
            keys: secret.map(|secret| Arc::new(PacketKeys::new(&secret))),
        };
        if let Some((path, filter_entry)) = path {
            return path.pending_streams.insert(filter_entry, opened);
        }
        let least = self.workers.iter().min_by_key(|worker| worker.load());
        let worker = least.expect("a broker has at least one worker");
        if let Err(error) = worker.push(opened) {
            warn!(%peer, %error, "cannot queue a connection");
        }
    }

    /// Ends a handshake; the peer is told one text, the log may get another.
    fn reject(&mut self, key: usize, refusal: Option<Refusal>, told: &str, logged: &str) {
        let Some(mut pending) = self.take(key) else {
            return;
        };
        let counters = &self.shared.counters;
        let Some(refusal) = refusal else {
            Counters::count(&counters.garbage);
            debug!(peer = %pending.peer, "dropped: {logged}");
            return;
        };
        Counters::count(&counters.streams_refused);
        match refusal {
            Refusal::Authentication => Counters::count(&counters.unauthenticated),
            Refusal::Permission => Counters::count(&counters.not_permitted),
            _ => {}
        }
        if self.shared.lines.allows() {
            info!(peer = %pending.peer, "stream refused: {logged}");
        }
        let answer = pending
            .handshake
            .seal(Welcome::refuse(refusal, told), [0; 32]);
        // Best effort: a peer that does not read its refusal sees the connection close.
        let _ = (&pending.socket).write(&answer);
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

/// The tenant that a connection counts for during its handshake.
fn tenant_of(peer: SocketAddr) -> Tenant {
    Tenant {
        host: Host::of(peer),
        key: None,
    }
}

/// Whether a connection has not said yet what it wants.
fn is_pending(handshakes: &[Option<PendingHandshake>], key: usize, number: u64) -> bool {
    let pending = handshakes[key].as_ref();
    pending.is_some_and(|pending| pending.number == number && !pending.has_waited)
}

/// Logs one line per payload socket with its effective buffer sizes.
fn log_socket(
    peer: SocketAddr,
    admission: &Admission,
    key: Option<&str>,
    buffers: &EffectiveBuffers,
) {
    info!(
        %peer,
        topic = admission.topic,
        key,
        path = admission.path.name(),
        stream = admission.stream,
        rcvbuf_requested = buffers.rcvbuf_requested,
        rcvbuf_effective = buffers.rcvbuf_effective,
        rcvbuf_capped_by_rmem_max = buffers.rcvbuf_capped.then(rmem_max).flatten(),
        sndbuf_requested = buffers.sndbuf_requested,
        sndbuf_effective = buffers.sndbuf_effective,
        window_scale = buffers.window_scale,
        rcv_ssthresh = buffers.rcv_ssthresh_first,
        rcv_space = buffers.rcv_space_first,
        "payload socket"
    );
}

fn is_about_the_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
    ) || matches!(
        error.raw_os_error(),
        Some(libc::EPROTO | libc::ENETDOWN | libc::EHOSTUNREACH)
    )
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::session::buffers::RcvbufOn;
    use penstock_wire::handshake::{AckLevel, Hello, OrderLevel};

    /// Longer than anything here takes.
    const LIMIT: Duration = Duration::from_secs(20);

    /// Tells who asks for what; topics are never open.
    struct Asking(mpsc::Sender<String>);

    impl Admit for Asking {
        fn check(&mut self, asked: &Asked<'_>) -> Result<(), Refused> {
            self.0.send(asked.topic.to_owned()).unwrap();
            Ok(())
        }

        fn admit(&mut self, _: &Asked<'_>) -> Result<Outcome, Refused> {
            Ok(Outcome::TopicOpening)
        }
    }

    #[test]
    fn those_that_wait_for_their_topic_take_no_place_from_those_that_say_hello() {
        let wanted = RequestedBuffers {
            rcvbuf: 1 << 16,
            sndbuf: 1 << 16,
            rcvbuf_on: RcvbufOn::None,
            force: false,
        };
        let listener = listen("127.0.0.1:0".parse().unwrap(), &wanted).unwrap();
        let address = listener.local_addr().unwrap();
        let (asking, asked) = mpsc::channel();
        let limits = Limits {
            max_handshakes: 2,
            handshake_timeout: LIMIT,
            ..Limits::default()
        };
        let shared = Arc::new(Shared::default());
        let acceptor = Acceptor::new(
            listener,
            wanted,
            limits,
            Asking(asking),
            Vec::new(),
            None,
            Arc::clone(&shared),
        )
        .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (waker, flag) = (acceptor.poller(), Arc::clone(&stop));
        let thread = thread::spawn(move || acceptor.run(&flag));
        let request = Request {
            session: 0,
            stream: 0,
            streams: 1,
            ack: AckLevel::Committed,
            order: OrderLevel::PerStream,
            max_payload: 1024,
            path: Path::Tcp,
            resume_from: None,
            max_datagram: 0,
        };
        let say_hello = |socket: &mut TcpStream, topic: &str| {
            let hello = Hello::new(&request, topic.len());
            let bytes = [hello.as_bytes(), topic.as_bytes()].concat();
            socket.write_all(&bytes).unwrap();
            assert_eq!(asked.recv_timeout(LIMIT).as_deref(), Ok(topic));
        };
        let connect = || TcpStream::connect(address).unwrap();
        let mut waiting = Vec::new();
        for topic in ["a", "b", "c", "d"] {
            let mut socket = connect();
            say_hello(&mut socket, topic);
            waiting.push(socket);
        }
        let (mut first, mut second) = (connect(), connect());
        say_hello(&mut second, "e");
        say_hello(&mut first, "f");
        let evictions = &shared.counters.handshake_evictions;
        assert_eq!(evictions.load(Ordering::Relaxed), 0);
        stop.store(true, Ordering::Relaxed);
        waker.notify().unwrap();
        thread.join().unwrap().unwrap();
    }
}
