//! One stream over xdp: a thread that sends batches as datagrams and takes the broker's ACKs.
//!
//! What is reliable about it is in `penstock_dataplane::transport`; this is sockets and time. The
//! tcp connection that opened the stream stays, for its end and for what the broker has to say.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::TryRecvError;
use nix::poll::{PollFd, PollFlags};
use penstock_dataplane::auth::PacketKeys;
use penstock_dataplane::sleep;
use penstock_dataplane::text::foreign_bytes;
use penstock_dataplane::transport::{Outgoing, Sender, SenderConfig, Transmit};
use penstock_dataplane::wire::batch::Header;
use penstock_dataplane::wire::crc32c::Joiner;
use penstock_dataplane::wire::handshake::Path;
use penstock_dataplane::wire::packet::{DATA_LEN, Data, Feedback, Head, StreamKey, TAG_LEN, Tag};
use penstock_dataplane::wire::reply::{Fault, Parsed};
use polling::{Event, Events, PollMode};
use zerocopy::IntoBytes;

use crate::account::Account;
use crate::af_xdp::TransmitError;
use crate::connect::Opened;
use crate::link::{Ends, Target};
use crate::pool::BufferPlan;
use crate::progress::ProgressClock;
use crate::replies::Replies;
use crate::sending::Sending;
use crate::stream::{Filled, Job, Shared};
use crate::summary::PublishStage;
use crate::udp::{Datagrams, MAX_BYTES, MAX_SEGMENTS};
use crate::{Config, Error};

/// Key of the control connection in the poller. The socket of the datagrams is not there: the kernel
/// would look for somebody to wake with each packet that it is done with.
const CONTROL: usize = 0;
/// How often a waiting stream looks around.
const LOOK: Duration = Duration::from_millis(100);
/// Waits shorter than this are not worth a system call.
const SPIN: u64 = 20_000;
/// How long the first packets of a stream may stay unanswered before it falls back to tcp.
const TRIAL: Duration = Duration::from_millis(800);
/// Silence, nanoseconds, after which a stream with packets in flight checks whether its route has
/// changed.
const QUIET: u64 = 50_000_000;
/// Silence after which a stream with packets in flight falls back to tcp.
const DEAD: u64 = 3_000_000_000;
/// Minimum time without progress before a stream is given up, so that its path can show that it is
/// dead.
const LEAST_TIMEOUT: Duration = Duration::from_secs(4);

/// How a stream over xdp ended.
pub(crate) enum Outcome {
    /// Everything is acknowledged.
    Ended(Box<Account>),
    /// The path is dead or the broker is gone: the stream continues over another connection.
    Moves(Box<Leftover>),
}

/// What another connection needs to continue.
pub(crate) struct Leftover {
    pub(crate) reason: String,
    /// The control connection ended as well, so the broker may have been restarted.
    pub(crate) connection_lost: bool,
    /// The broker ended the stream because it was idle.
    pub(crate) was_idle: bool,
    pub(crate) account: Account,
    /// Unacknowledged batches, oldest first; the first has the number `first`.
    pub(crate) unacked: VecDeque<Filled>,
    pub(crate) first: u64,
}

impl Leftover {
    pub(crate) fn unacked_messages(&self) -> u64 {
        let messages = self.unacked.iter().map(|batch| u64::from(batch.messages));
        messages.sum()
    }

    /// Batches that turned out to be committed are done; their buffers go to the pool if they are
    /// the pool's.
    pub(crate) fn drop_committed(&mut self, committed: u64, shared: &Shared, pooled: bool) {
        while self.first < committed {
            let Some(batch) = self.unacked.pop_front() else {
                return;
            };
            self.first += 1;
            self.account.acked(1, batch.messages.into(), shared);
            if pooled {
                shared.pool.give_back(batch.payload);
            }
        }
    }
}

/// One stream, run by its own thread.
pub(crate) struct DatagramStream {
    broker: String,
    control: TcpStream,
    datagrams: Datagrams,
    sending: Sending,
    key: StreamKey,
    sender: Sender,
    start: Instant,
    in_flight: usize,
    batch_size: usize,
    /// Buffers that the pool withholds, because the path needs fewer batches on their way.
    withheld: usize,
    progress: ProgressClock,
    /// Payload bytes that had arrived at the last check.
    delivered: u64,
    ends: Ends,
    /// Payload of unacknowledged batches, oldest first.
    kept: VecDeque<Filled>,
    /// What another connection left; sent first.
    leftover: VecDeque<Filled>,
    /// Headers of the packets of one call, and what they carry.
    headers: Vec<Head>,
    group: Vec<Transmit>,
    /// For full packets, whose payload was summed before.
    full: Joiner,
    /// A packet that did not fit into the last call.
    carried: Option<Transmit>,
    feedback: Feedback,
    /// If packets are authenticated; and the counter of the newest ACK.
    keys: Option<Arc<PacketKeys>>,
    newest_ack: u64,
    replies: Replies,
    account: Account,
    events: Events,
    refused: bool,
    connection_lost: bool,
    was_idle: bool,
}

impl DatagramStream {
    /// Tries the path: if the first packets are not answered soon, it does not work.
    pub(crate) fn open(
        config: &Config,
        target: &Target,
        opened: Opened,
        ends: &Ends,
    ) -> Result<Self, Error> {
        let Opened {
            socket: control,
            offer,
            keys,
            datagrams,
        } = opened;
        let (Some(offered), Some((datagrams, sending))) = (offer.datagrams, datagrams) else {
            return Err(Error::PathDead {
                broker: target.broker.clone(),
                reason: "the broker does not offer it".to_owned(),
            });
        };
        ends.waker
            .watch(&control, Event::readable(CONTROL), PollMode::Level)?;
        let key = StreamKey {
            key: offered.key,
            stream: target.number as u16,
        };
        let tag_len = if keys.is_some() { TAG_LEN } else { 0 };
        let settings = SenderConfig {
            first_batch: offer.committed,
            credit: offered.credit,
            max_datagram: offered.max_datagram.saturating_sub(tag_len as u32),
            min_in_flight: (BufferPlan::new(config).min_in_flight * config.batch_size) as u64,
            phase: ends.shared.start.elapsed().as_nanos() as u64,
        };
        let mut stream = Self {
            broker: target.broker.clone(),
            control,
            datagrams,
            sending,
            key,
            sender: Sender::new(&settings, 0),
            start: Instant::now(),
            in_flight: config.in_flight,
            batch_size: config.batch_size.min(offer.max_payload as usize),
            withheld: 0,
            progress: ProgressClock::new(config.timeout.max(LEAST_TIMEOUT)),
            delivered: 0,
            ends: ends.clone(),
            kept: VecDeque::with_capacity(config.in_flight),
            leftover: VecDeque::new(),
            headers: Vec::with_capacity(MAX_SEGMENTS),
            group: Vec::with_capacity(MAX_SEGMENTS),
            full: Joiner::new(0),
            carried: None,
            feedback: Feedback::new(key),
            replies: Replies::new(&target.broker, keys.clone()),
            keys,
            newest_ack: 0,
            account: Account::new(config, target.number),
            events: Events::new(),
            refused: false,
            connection_lost: false,
            was_idle: false,
        };
        stream.try_path()?;
        if let Err(error) = stream.try_bypass()? {
            stream.sending = Sending::or_udp(config.mode, target, error)?;
        }
        stream.name_path();
        Ok(stream)
    }

    fn try_path(&mut self) -> Result<(), Error> {
        while !self.sender.rtt().is_known() {
            if self.start.elapsed() > TRIAL || self.refused {
                let why = if self.refused {
                    "the broker's host reports that the port is closed"
                } else {
                    "there is no answer"
                };
                let cause = match self.datagrams.ends() {
                    Ok((own, broker)) if own.ip() == broker.ip() => {
                        "the broker is on this host, so packets go over lo and not through the broker's --iface; use --mode tcp here"
                    }
                    _ => {
                        "a firewall may drop them, or they may arrive on an interface other than the broker's --iface"
                    }
                };
                return Err(Error::PathDead {
                    broker: self.broker.clone(),
                    reason: format!("datagrams were sent to its port, but {why}; {cause}"),
                });
            }
            self.sender.probe();
            self.transmit()?;
            self.wait(Duration::from_millis(50))?;
            self.take_acks()?;
        }
        Ok(())
    }

    /// Tries, where the path is known to be there, whether packets also arrive that do not go through
    /// the kernel.
    fn try_bypass(&mut self) -> Result<Result<(), TransmitError>, Error> {
        let start = Instant::now();
        // The first packet that went so.
        let mut first = None;
        loop {
            let Sending::AfXdp(socket) = &mut self.sending else {
                return Ok(Ok(()));
            };
            let largest = self.feedback.received.first();
            if first.is_some_and(|first| largest.is_some_and(|&(_, largest)| largest >= first)) {
                return Ok(Ok(()));
            }
            if start.elapsed() > TRIAL {
                return Ok(Err(match first {
                    Some(_) => socket.unanswered(),
                    None => socket.unresolved(),
                }));
            }
            if !socket.is_ready()
                && let Err(error) = socket.look()
            {
                return Ok(Err(error));
            }
            if socket.is_ready() && first.is_none() {
                first = Some(self.sender.next_packet());
            }
            self.sender.probe();
            self.transmit()?;
            self.wait(Duration::from_millis(50))?;
            self.take_acks()?;
        }
    }

    fn name_path(&mut self) {
        self.account.summary.path = Path::Xdp.name();
        self.account.summary.tx = Some(self.sending.name());
    }

    /// Ensures that packets that bypass the kernel take the same route as its own would.
    fn look_again(&mut self, now: u64) -> Result<(), Error> {
        let Sending::AfXdp(socket) = &mut self.sending else {
            return Ok(());
        };
        let quiet = !self.kept.is_empty() && now - self.sender.heard_at() > QUIET;
        match socket.look_again(now, quiet) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.path_dead(format!("the route has changed: {error}"))),
        }
    }

    /// Sends until the publisher closes.
    pub(crate) fn run(&mut self) -> Result<Outcome, Error> {
        sleep::be_punctual().map_err(|e| Error::Thread(e.to_string()))?;
        match self.serve() {
            // A cancelled stream reports how far it got.
            Ok(()) | Err(Error::Failed) => Ok(Outcome::Ended(Box::new(self.take_account()))),
            Err(Error::PathDead { reason, .. }) => Ok(Outcome::Moves(Box::new(self.leave(reason)))),
            Err(error) => Err(error),
        }
    }

    /// Continues with what another connection left.
    pub(crate) fn take_over(&mut self, left: &mut Leftover) {
        self.account = std::mem::take(&mut left.account);
        self.name_path();
        self.leftover = std::mem::take(&mut left.unacked);
    }

    fn serve(&mut self) -> Result<(), Error> {
        loop {
            let open = self.take_jobs();
            self.take_acks()?;
            let now = self.now();
            if self.sender.next_timeout() <= now {
                self.sender.on_timeout(now);
            }
            self.look_again(now)?;
            self.follow_limit(now);
            let sent = self.transmit()?;
            self.account.answer_flushes(self.sender.committed());
            if !open && self.kept.is_empty() {
                return self.end();
            }
            self.check_abandoned()?;
            if !sent {
                self.rest()?;
            }
        }
    }

    fn check_abandoned(&self) -> Result<(), Error> {
        match self.ends.shared.abandoned.load(Ordering::Relaxed) {
            true => Err(Error::Failed),
            false => Ok(()),
        }
    }

    /// Takes batches as far as the window allows; says whether more may come.
    fn take_jobs(&mut self) -> bool {
        while self.may_take() {
            if let Some(batch) = self.leftover.pop_front() {
                self.enqueue(batch);
                continue;
            }
            match self.ends.jobs.try_recv() {
                Ok(Job::Batch(batch)) => self.push(batch),
                Ok(Job::Flush(done)) => self.account.flush(self.next_seq(), done),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    fn may_take(&self) -> bool {
        let has_room = self.kept.len() < self.in_flight && self.sender.has_room();
        has_room && self.sender.wants_batch(self.now())
    }

    /// The publisher fills no more batches ahead than the path needs: they would wait in front of the
    /// stream instead.
    fn follow_limit(&mut self, now: u64) {
        let limit = self.sender.in_flight_limit(now);
        let room = limit.saturating_sub(self.sender.unacked_bytes());
        // Batches that are not full count as what they are.
        let more = room.div_ceil(self.batch_size as u64) as usize;
        let most = self.kept.len() + self.leftover.len() + more;
        let withheld = self.in_flight - most.clamp(1, self.in_flight);
        if withheld != self.withheld {
            self.ends.shared.pool.withhold(self.withheld, withheld);
            self.withheld = withheld;
        }
        if !self.sender.wants_batch(now) {
            self.sender.on_in_flight_limited(now);
        }
    }

    /// Number of the next batch that is enqueued.
    fn next_seq(&self) -> u64 {
        self.sender.committed() + self.kept.len() as u64
    }

    fn push(&mut self, batch: Filled) {
        self.account.sent(&batch);
        self.enqueue(batch);
    }

    fn enqueue(&mut self, batch: Filled) {
        if self.kept.is_empty() {
            self.progress.restart(Instant::now());
        }
        let seq = self.next_seq();
        let checksum = batch.header(seq).checksum();
        self.sender
            .push(batch.payload.len() as u32, batch.messages, checksum);
        self.kept.push_back(batch);
    }

    /// Sends what may go out now, many packets a call; says whether anything was sent.
    fn transmit(&mut self) -> Result<bool, Error> {
        let start = self.account.stages.now();
        let mut sent = false;
        while self.gather() {
            sent = true;
            self.send_group()?;
        }
        if sent {
            self.account.stages.lap(PublishStage::SendPayload, start);
        }
        Ok(sent)
    }

    /// Collects packets for one call: all of one size, but for the last.
    fn gather(&mut self) -> bool {
        let now = self.now();
        self.group.clear();
        let most = if self.datagrams.has_segments() {
            MAX_SEGMENTS
        } else {
            1
        };
        let tag_len = if self.keys.is_some() { TAG_LEN } else { 0 };
        let (mut segment, mut total) = (0, 0);
        while self.group.len() < most {
            let next = self
                .carried
                .take()
                .or_else(|| self.sender.poll_transmit(now));
            let Some(transmit) = next else { break };
            let size = size_of_packet(&transmit) + tag_len;
            if !self.group.is_empty() && (size > segment || total + size > MAX_BYTES) {
                self.carried = Some(transmit);
                break;
            }
            if self.group.is_empty() {
                segment = size;
            }
            total += size;
            self.group.push(transmit);
            if size < segment {
                break;
            }
        }
        !self.group.is_empty()
    }

    fn send_group(&mut self) -> Result<(), Error> {
        static PADDING: [u8; MAX_BYTES] = [0; MAX_BYTES];
        let Self {
            group,
            headers,
            kept,
            sender,
            key,
            keys,
            datagrams,
            sending,
            full,
            ends,
            ..
        } = self;
        let segment = sender.segment() as usize;
        if keys.is_none() && full.len() != segment {
            *full = Joiner::new(segment);
            let hint = &ends.shared.packet_payload;
            hint.store(segment as u32, Ordering::Relaxed);
        }
        let first = sender.committed();
        let payload = |transmit: &Transmit| match transmit.what {
            Outgoing::Payload { chunk, len } => {
                let batch: &Filled = &kept[(chunk.batch.seq - first) as usize];
                &batch.payload[chunk.offset as usize..][..len as usize]
            }
            Outgoing::Ping { padding } => &PADDING[..padding as usize],
        };
        let part_checksum = |transmit: &Transmit| match transmit.what {
            Outgoing::Payload { chunk, len } if len as usize == full.len() => {
                let batch: &Filled = &kept[(chunk.batch.seq - first) as usize];
                let offset = chunk.offset as usize;
                batch.payload.part_checksum(offset, len as usize)
            }
            _ => None,
        };
        headers.clear();
        headers.extend(group.iter().map(|transmit| {
            let payload = payload(transmit);
            match keys {
                None => summed(*key, transmit, payload, part_checksum(transmit), full),
                Some(keys) => sealed(*key, keys, transmit, payload),
            }
        }));
        let mut packets = [[IoSlice::new(&[]); 2]; MAX_SEGMENTS];
        for ((packet, header), transmit) in packets.iter_mut().zip(&*headers).zip(&*group) {
            let payload = IoSlice::new(payload(transmit));
            *packet = [IoSlice::new(header.on_wire()), payload];
        }
        match sending.send(datagrams, &packets[..group.len()]) {
            Ok(()) => Ok(()),
            Err(error) => self.explain(&error),
        }
    }

    /// What a failed call means. Packets that did not leave are like packets that got lost.
    fn explain(&mut self, error: &io::Error) -> Result<(), Error> {
        match error.raw_os_error() {
            _ if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            Some(libc::EMSGSIZE) => {
                let now = self.now();
                // The first is the largest.
                let mut smaller = true;
                for transmit in self.group.iter().rev() {
                    smaller = self.sender.on_too_large(now, transmit.packet);
                }
                if smaller {
                    return Ok(());
                }
                let reason = "the kernel takes no datagrams of the least size now (ip link: mtu)";
                Err(self.path_dead(reason.to_owned()))
            }
            // An earlier packet was answered by ICMP: nobody takes them at the other end.
            Some(libc::ECONNREFUSED) => {
                self.refused = true;
                Ok(())
            }
            Some(
                libc::ENOBUFS
                | libc::EAGAIN
                | libc::EPERM
                | libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::ENETDOWN,
            ) => Ok(()),
            _ => Err(self.path_dead(format!("cannot send datagrams: {error}"))),
        }
    }

    /// Takes every ACK that has come.
    fn take_acks(&mut self) -> Result<(), Error> {
        loop {
            let count = match self.datagrams.receive() {
                Ok(count) => count,
                Err(error) => return self.explain(&error),
            };
            let mut heard = false;
            for index in 0..count {
                // What is no ACK of this stream is a stranger's.
                let datagram = self.datagrams.ack(index);
                let ack = match &self.keys {
                    None => datagram,
                    Some(keys) => match keys.open_ack(datagram) {
                        Some((counter, ack)) if counter > self.newest_ack => {
                            self.newest_ack = counter;
                            ack
                        }
                        // ACKs are cumulative: an old one, perhaps repeated by others, has nothing new.
                        _ => continue,
                    },
                };
                let read = self.feedback.read(ack);
                if read.is_err() || self.feedback.stream != self.key {
                    continue;
                }
                self.refused = false;
                heard = true;
                let now = self.now();
                let told = self.sender.on_feedback(now, &self.feedback);
                told.map_err(|source| Error::BadFeedback {
                    broker: self.broker.clone(),
                    source,
                })?;
            }
            if heard {
                self.note_progress();
            }
            self.release();
            if count < Datagrams::BATCH {
                return Ok(());
            }
        }
    }

    /// What the ACKs reported: payload arrived, batches were committed, or only that the broker is
    /// alive.
    fn note_progress(&mut self) {
        let now = Instant::now();
        self.progress.on_heard(now, self.sender.is_blocked());
        let delivered = self.sender.stats().delivered;
        self.progress.on_bytes(now, delivered - self.delivered);
        self.delivered = delivered;
        if self.kept.len() > self.sender.uncommitted() {
            self.progress.restart(now);
        }
    }

    /// Gives the buffers of acked batches back, all at once.
    fn release(&mut self) {
        let done = self.kept.len() - self.sender.uncommitted();
        let Self {
            kept,
            account,
            ends,
            ..
        } = self;
        let done = kept.drain(..done).map(|batch| {
            account.acked(1, batch.messages.into(), &ends.shared);
            batch.payload
        });
        ends.shared.pool.give_back_all(done);
    }

    /// Sleeps until something is to be done, unless that is very soon.
    fn rest(&mut self) -> Result<(), Error> {
        let now = self.now();
        let outstanding = !self.kept.is_empty();
        if outstanding && now - self.sender.heard_at() > DEAD {
            return Err(self.path_dead("no packet arrived for 3 s".to_owned()));
        }
        if outstanding {
            let now = self.start + Duration::from_nanos(now);
            self.progress
                .check(now, &self.broker, || self.unacked_messages())?;
        }
        let since = self.sender.undelivered_since();
        // A broker that waits for room in its log may have none for new payload.
        let is_lost = since.is_some_and(|since| now - since > DEAD);
        if is_lost && !self.sender.is_blocked() {
            let reason = "the broker answers, but no payload arrives intact";
            return Err(self.path_dead(reason.to_owned()));
        }
        let due = self.sender.next_timeout().saturating_sub(now);
        if due < SPIN {
            return Ok(());
        }
        let start = self.account.stages.now();
        let patience = Duration::from_nanos(due).min(LOOK);
        self.ends.waker.going_to_sleep();
        let waited = if !self.may_take() || self.ends.jobs.is_empty() {
            self.wait(patience)
        } else {
            Ok(())
        };
        self.ends.waker.awake();
        if outstanding {
            self.account.stages.lap(PublishStage::WaitAck, start);
        }
        waited
    }

    fn wait(&mut self, patience: Duration) -> Result<(), Error> {
        if self.sleep(patience)? {
            self.take_replies()?;
        }
        Ok(())
    }

    /// Sleeps until a datagram comes, the publisher calls, or the control connection has something:
    /// whether it does.
    fn sleep(&mut self, patience: Duration) -> Result<bool, Error> {
        let failed = |e: io::Error| Error::Thread(e.to_string());
        let poller = &self.ends.waker.poller;
        let mut watched = [
            PollFd::new(self.datagrams.socket().as_fd(), PollFlags::POLLIN),
            PollFd::new(poller.as_fd(), PollFlags::POLLIN),
        ];
        sleep::until_ready(&mut watched, patience).map_err(failed)?;
        if !sleep::is_ready(&watched[1]) {
            return Ok(false);
        }
        self.events.clear();
        poller
            .wait(&mut self.events, Some(Duration::ZERO))
            .map_err(failed)?;
        Ok(self.events.iter().any(|event| event.key == CONTROL))
    }

    /// What the broker says over the control connection: the end is confirmed, or why it ends.
    /// Returns the batches that it confirms.
    fn take_replies(&mut self) -> Result<Option<u64>, Error> {
        loop {
            let got = match (&self.control).read(self.replies.room()) {
                Ok(0) => return Err(self.control_lost("the broker closed the connection")),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.control_lost(&error.to_string())),
            };
            match self.replies.received(got)? {
                None => {}
                Some(Parsed::Ack { committed, .. }) => return Ok(Some(committed)),
                Some(Parsed::Error { code, text_len, .. }) => {
                    let mut text = vec![0; text_len];
                    // Best effort: it comes with the reply, or not at all.
                    let got = (&self.control).read(&mut text).unwrap_or(0);
                    if got < text_len && self.keys.is_some() {
                        return Err(self.control_lost("the broker ended the stream"));
                    }
                    self.replies.verify(&text[..got])?;
                    let text = foreign_bytes(&text[..got]);
                    return Err(self.ended_by_broker(code, text));
                }
            }
        }
    }

    /// A broker that restarted, or that heard nothing while this host slept, accepts the stream again;
    /// any other error is final.
    fn ended_by_broker(&mut self, code: u16, text: String) -> Error {
        if code == Fault::Shutdown as u16 || code == Fault::Stalled as u16 {
            self.was_idle = code == Fault::Stalled as u16;
            return self.control_lost(&text);
        }
        Error::Ended {
            broker: self.broker.clone(),
            unacked: self.unacked_messages(),
            text,
        }
    }

    /// Tells the broker that the stream is complete; it confirms.
    fn end(&mut self) -> Result<(), Error> {
        let batches = self.sender.committed();
        let header = Header::for_end(batches);
        let mut frame = header.as_bytes().to_vec();
        if let Some(keys) = &self.keys {
            // The only frame of this connection.
            frame.extend(keys.seal_frame(0, &[header.as_bytes()]));
        }
        let written = (&self.control).write_all(&frame);
        written.map_err(|e| self.control_lost(&e.to_string()))?;
        let start = Instant::now();
        loop {
            if self.take_replies()? == Some(batches) {
                return Ok(());
            }
            if start.elapsed() > Duration::from_nanos(DEAD) {
                return Err(
                    self.path_dead("the broker did not confirm the end of the stream".to_owned())
                );
            }
            self.check_abandoned()?;
            self.wait_for_control()?;
        }
    }

    fn wait_for_control(&mut self) -> Result<(), Error> {
        self.sleep(LOOK)?;
        // Late packets are of no interest any more, but keep this awake.
        self.take_acks()
    }

    fn take_account(&mut self) -> Account {
        let calls = self.sending.calls(&self.datagrams);
        self.account.add_transport(&self.sender, calls);
        std::mem::take(&mut self.account)
    }

    fn leave(&mut self, reason: String) -> Leftover {
        let mut unacked = std::mem::take(&mut self.kept);
        unacked.append(&mut self.leftover);
        Leftover {
            reason,
            connection_lost: self.connection_lost,
            was_idle: self.was_idle,
            account: self.take_account(),
            first: self.sender.committed(),
            unacked,
        }
    }

    fn unacked_messages(&self) -> u64 {
        let unacked = self.kept.iter().chain(&self.leftover);
        unacked.map(|batch| u64::from(batch.messages)).sum()
    }

    fn path_dead(&self, reason: String) -> Error {
        Error::PathDead {
            broker: self.broker.clone(),
            reason,
        }
    }

    fn control_lost(&mut self, reason: &str) -> Error {
        self.connection_lost = true;
        self.path_dead(reason.to_owned())
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

impl Drop for DatagramStream {
    fn drop(&mut self) {
        self.ends.shared.pool.withhold(self.withheld, 0);
        self.ends.waker.forget(&self.control);
    }
}

/// Header of a packet with a checksum; that of its payload may be known, if it is as long as `full` has it.
fn summed(
    key: StreamKey,
    transmit: &Transmit,
    payload: &[u8],
    payload_sum: Option<u32>,
    full: &Joiner,
) -> Head {
    let (packet, pause) = (transmit.packet, transmit.pause);
    let data = match (&transmit.what, payload_sum) {
        (Outgoing::Payload { chunk, .. }, Some(sum)) => {
            Data::summed_payload(key, packet, chunk, pause, sum, full)
        }
        (Outgoing::Payload { chunk, .. }, None) => {
            Data::payload(key, packet, chunk, pause, payload)
        }
        (Outgoing::Ping { .. }, _) => Data::ping(key, packet, payload),
    };
    let tag = Tag::default();
    Head { data, tag }
}

/// Header of a packet with a tag behind it.
fn sealed(key: StreamKey, keys: &PacketKeys, transmit: &Transmit, payload: &[u8]) -> Head {
    let (chunk, pause) = match &transmit.what {
        Outgoing::Payload { chunk, .. } => (Some(chunk), transmit.pause),
        Outgoing::Ping { .. } => (None, None),
    };
    let len = payload.len() as u16;
    let data = Data::to_be_sealed(key, transmit.packet, chunk, pause, len);
    let tag = keys.seal_data(transmit.packet, &[data.as_bytes(), payload]);
    Head { data, tag }
}

fn size_of_packet(transmit: &Transmit) -> usize {
    DATA_LEN
        + match transmit.what {
            Outgoing::Payload { len, .. } => len as usize,
            Outgoing::Ping { padding } => padding as usize,
        }
}
