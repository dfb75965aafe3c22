//! One connection of a stream over xdp: sends batches as datagrams and takes the broker's ACKs, as far
//! as the socket lets it.
//!
//! What is reliable about it is in `penstock_transport`; this is sockets and time. The
//! tcp connection that opened the stream stays, for its end and for what the broker has to say.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use nix::poll::{PollFd, PollFlags};
use penstock_auth::PacketKeys;
use penstock_process::text::foreign_bytes;
use penstock_runtime::profile::Tick;
use penstock_runtime::sleep;
use penstock_transport::{Nanos, Outgoing, Sender, SenderConfig, Timestamp, Transmit};
use penstock_wire::batch::Header;
use penstock_wire::crc32c::Joiner;
use penstock_wire::handshake::Path;
use penstock_wire::packet::{DATA_LEN, Data, DataPrefix, Feedback, StreamKey, TAG_LEN, Tag};
use penstock_wire::reply::Fault;
use zerocopy::IntoBytes;

use crate::batch::pool::BufferPlan;
use crate::batch::sealed_batch::{Job, SealedBatch};
use crate::net::af_xdp::TransmitError;
use crate::net::udp::{Datagrams, MAX_BYTES, MAX_SEGMENTS};
use crate::shared::Shared;
use crate::stream::connect::Opened;
use crate::stream::connection::{Holdings, Ready, ResumeState, Step, StreamContext, StreamId};
use crate::stream::datagram_tx::DatagramTx;
use crate::stream::metrics::StreamMetrics;
use crate::stream::progress::ProgressClock;
use crate::stream::replies::{FromBroker, NoReply, Replies};
use crate::summary::PublishStage;
use crate::{Config, Error};

/// How often a stream looks around that waits for its end to be confirmed, or for a new path's answer.
const LOOK: Duration = Duration::from_millis(100);
const PATH_LOOK: Duration = Duration::from_millis(50);
/// How long the first packets of a stream may stay unanswered before it falls back to tcp.
const TRIAL: Duration = Duration::from_millis(800);
/// Silence after which a stream with packets in flight checks whether its route has changed.
const QUIET: Nanos = Nanos::from_millis(50);
/// Silence after which a stream with packets in flight falls back to tcp.
const DEAD: Nanos = Nanos::from_secs(3);
/// Minimum time without progress before a stream is given up, so that its path can show that it is
/// dead.
const LEAST_TIMEOUT: Duration = Duration::from_secs(4);

/// The end of a stream, which the broker has been told of.
#[derive(Debug, Clone, Copy)]
struct Ending {
    batches: u64,
    since: Instant,
}

/// One connection of a stream.
pub(crate) struct DatagramStream {
    broker: String,
    control: TcpStream,
    datagrams: Datagrams,
    sending: DatagramTx,
    key: StreamKey,
    sender: Sender,
    start: Instant,
    in_flight: usize,
    batch_size: usize,
    progress: ProgressClock,
    /// Payload bytes that had arrived at the last check.
    delivered: u64,
    shared: Arc<Shared>,
    /// Payload of unacknowledged batches, oldest first.
    kept: VecDeque<SealedBatch>,
    /// What another connection left; sent first.
    leftover: VecDeque<SealedBatch>,
    /// Headers of the packets of one call, and what they carry.
    headers: Vec<DataPrefix>,
    group: Vec<Transmit>,
    /// The kernel had no room for them: they go first.
    is_blocked: bool,
    /// For full packets, whose payload was summed before.
    full: Arc<Joiner>,
    /// A packet that did not fit into the last call.
    carried: Option<Transmit>,
    feedback: Feedback,
    /// If packets are authenticated; and the counter of the newest ACK.
    keys: Option<Arc<PacketKeys>>,
    newest_ack: u64,
    replies: Replies,
    account: StreamMetrics,
    /// Since when only acks are waited for.
    waits_for_acks: Option<Tick>,
    ending: Option<Ending>,
    refused: bool,
    connection_lost: bool,
    was_idle: bool,
}

impl DatagramStream {
    /// Tries the path: if the first packets are not answered soon, it does not work.
    pub(crate) fn open(
        config: &Config,
        target: &StreamId,
        opened: Opened,
        shared: &Arc<Shared>,
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
            phase: shared.start.elapsed().into(),
        };
        let mut stream = Self {
            broker: target.broker.clone(),
            control,
            datagrams,
            sending,
            key,
            sender: Sender::new(&settings, Timestamp::ZERO),
            start: Instant::now(),
            in_flight: config.in_flight,
            batch_size: config.batch_size.min(offer.max_payload as usize),
            progress: ProgressClock::new(config.timeout.max(LEAST_TIMEOUT)),
            delivered: 0,
            shared: Arc::clone(shared),
            kept: VecDeque::with_capacity(config.in_flight),
            leftover: VecDeque::new(),
            headers: Vec::with_capacity(MAX_SEGMENTS),
            group: Vec::with_capacity(MAX_SEGMENTS),
            is_blocked: false,
            full: shared.joiner(0),
            carried: None,
            feedback: Feedback::new(key),
            replies: Replies::new(&target.broker, keys.clone()),
            keys,
            newest_ack: 0,
            account: StreamMetrics::new(config, target.number),
            waits_for_acks: None,
            ending: None,
            refused: false,
            connection_lost: false,
            was_idle: false,
        };
        stream.try_path()?;
        if let Err(error) = stream.try_bypass()? {
            stream.sending = DatagramTx::or_udp(config.mode, target, error)?;
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
            self.wait_for_answer()?;
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
            let DatagramTx::AfXdp(socket) = &mut self.sending else {
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
            self.wait_for_answer()?;
        }
    }

    fn name_path(&mut self) {
        self.account.summary.path = Path::Xdp.name();
        self.account.summary.tx = Some(self.sending.name());
    }

    /// Ensures that packets that bypass the kernel take the same route as its own would.
    fn look_again(&mut self, now: Timestamp) -> Result<(), Error> {
        let DatagramTx::AfXdp(socket) = &mut self.sending else {
            return Ok(());
        };
        let quiet = !self.kept.is_empty() && now - self.sender.last_feedback_at() > QUIET;
        match socket.look_again(now, quiet) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.path_dead(format!("the route has changed: {error}"))),
        }
    }

    /// Waits, while the stream is opened, until a datagram comes or the control connection has something.
    fn wait_for_answer(&mut self) -> Result<(), Error> {
        let mut watched = [
            PollFd::new(self.datagrams.socket().as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
        ];
        let waited = sleep::until_ready(&mut watched, PATH_LOOK);
        waited.map_err(|error| Error::Thread(error.to_string()))?;
        if sleep::is_ready(&watched[1]) {
            self.take_replies()?;
        }
        self.take_acks()
    }

    /// What it holds, how far it is, and what it needs.
    pub(crate) fn holdings(&self) -> Holdings {
        let needed = usize::try_from(self.sender.needed_bytes()).unwrap_or(usize::MAX);
        Holdings {
            held: self.kept.len() + self.leftover.len(),
            done: self.sender.committed(),
            // Batches that are not full count as what they are.
            needed: needed.min(self.in_flight * self.batch_size),
        }
    }

    pub(crate) fn control(&self) -> &TcpStream {
        &self.control
    }

    /// The socket of the datagrams, and what it is to be watched for while the thread sleeps.
    pub(crate) fn datagrams(&self) -> PollFd<'_> {
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, self.is_blocked);
        PollFd::new(self.datagrams.socket().as_fd(), events)
    }

    /// Sends and takes what it can now.
    pub(crate) fn step(&mut self, context: &StreamContext, ready: Ready) -> Result<Step, Error> {
        match self.advance(&context.jobs, ready) {
            Ok(Some(at)) => Ok(Step::Wait(at)),
            // A cancelled stream reports how far it got.
            Ok(None) | Err(Error::Failed) => Ok(Step::Ended(Box::new(self.take_account()))),
            Err(Error::PathDead { reason, .. }) => {
                Ok(Step::Reconnects(Box::new(self.leave(reason))))
            }
            Err(error) => Err(error),
        }
    }

    /// Continues with what another connection left.
    pub(crate) fn take_over(&mut self, left: &mut ResumeState) {
        self.account = std::mem::take(&mut left.account);
        self.name_path();
        self.leftover = std::mem::take(&mut left.unacked);
    }

    /// The time of the next step if nothing happens until then; none at the end of the stream.
    fn advance(&mut self, jobs: &Receiver<Job>, ready: Ready) -> Result<Option<Instant>, Error> {
        self.check_abandoned()?;
        if let Some(since) = self.waits_for_acks.take() {
            self.account.stages.lap(PublishStage::WaitAck, since);
        }
        let confirmed = match ready.is_readable {
            true => self.take_replies()?,
            false => None,
        };
        self.check_error_text()?;
        // Also those that came while other streams had their turn: silence must be the broker's.
        if ready.has_datagrams || self.sender.next_timeout() <= self.now() {
            self.take_acks()?;
        }
        if let Some(ending) = self.ending {
            return self.wait_for_end(ending, confirmed);
        }
        let open = self.take_jobs(jobs);
        let now = self.now();
        if self.sender.next_timeout() <= now {
            self.sender.on_timeout(now);
        }
        self.look_again(now)?;
        if !self.sender.wants_batch(now) {
            self.sender.on_in_flight_limited(now);
        }
        self.transmit()?;
        self.account.answer_flushes(self.sender.committed());
        if !open && self.kept.is_empty() {
            self.end()?;
            return Ok(Some(Instant::now() + LOOK));
        }
        self.rest().map(Some)
    }

    fn check_abandoned(&self) -> Result<(), Error> {
        match self.shared.is_abandoned() {
            true => Err(Error::Failed),
            false => Ok(()),
        }
    }

    /// Takes batches as far as the window allows; says whether more may come.
    fn take_jobs(&mut self, jobs: &Receiver<Job>) -> bool {
        while self.may_take() {
            if let Some(batch) = self.leftover.pop_front() {
                self.enqueue(batch);
                continue;
            }
            match self.shared.next_job(jobs) {
                Ok(Job::Batch(batch)) => self.push(batch),
                Ok(Job::Flush(done)) => self.account.flush(self.next_seq(), done),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    pub(crate) fn may_take(&self) -> bool {
        if self.ending.is_some() {
            return false;
        }
        let has_room = self.kept.len() < self.in_flight && self.sender.has_room();
        has_room && self.sender.wants_batch(self.now())
    }

    /// Number of the next batch that is enqueued.
    fn next_seq(&self) -> u64 {
        self.sender.committed() + self.kept.len() as u64
    }

    fn push(&mut self, batch: SealedBatch) {
        self.account.sent(&batch);
        self.enqueue(batch);
    }

    fn enqueue(&mut self, batch: SealedBatch) {
        if self.kept.is_empty() {
            self.progress.restart(Instant::now());
        }
        let seq = self.next_seq();
        let checksum = batch.header(seq).checksum();
        self.sender
            .push(batch.payload.len() as u32, batch.messages, checksum);
        self.kept.push_back(batch);
    }

    /// Sends what may go out now, many packets a call.
    fn transmit(&mut self) -> Result<(), Error> {
        let start = self.account.stages.now();
        let mut sent = false;
        if self.is_blocked {
            self.send_blocked()?;
            sent = true;
        }
        while !self.is_blocked && self.gather() {
            sent = true;
            self.send_group()?;
        }
        if sent {
            self.account.stages.lap(PublishStage::SendPayload, start);
        }
        Ok(())
    }

    /// Sends the packets that the kernel had no room for, but for those that are of no use any more: their
    /// batch was committed meanwhile.
    fn send_blocked(&mut self) -> Result<(), Error> {
        let first = self.sender.committed();
        let is_of_use = |transmit: &Transmit| match transmit.what {
            Outgoing::Payload { chunk, .. } => chunk.batch.seq >= first,
            Outgoing::Ping { .. } => true,
        };
        self.group.retain(is_of_use);
        self.carried = self.carried.take().filter(is_of_use);
        self.is_blocked = false;
        match self.group.is_empty() {
            true => Ok(()),
            false => self.send_group(),
        }
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
            shared,
            ..
        } = self;
        let segment = sender.segment() as usize;
        if keys.is_none() && full.len() != segment {
            *full = shared.joiner(segment);
            let hint = &shared.packet_payload;
            hint.store(segment as u32, Ordering::Relaxed);
        }
        let first = sender.committed();
        let payload = |transmit: &Transmit| match transmit.what {
            Outgoing::Payload { chunk, len } => {
                let batch: &SealedBatch = &kept[(chunk.batch.seq - first) as usize];
                &batch.payload[chunk.offset as usize..][..len as usize]
            }
            Outgoing::Ping { padding } => &PADDING[..padding as usize],
        };
        let part_checksum = |transmit: &Transmit| match transmit.what {
            Outgoing::Payload { chunk, len } if len as usize == full.len() => {
                let batch: &SealedBatch = &kept[(chunk.batch.seq - first) as usize];
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
            Some(libc::EAGAIN) if matches!(self.sending, DatagramTx::Udp) => {
                self.is_blocked = true;
                Ok(())
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
            shared,
            ..
        } = self;
        let done = kept.drain(..done).map(|batch| {
            account.acked(1, batch.messages.into(), shared);
            batch.payload
        });
        shared.pool.give_back_all(done);
    }

    /// There is nothing more to do now: checks whether the path is alive; returns when there is something
    /// to do.
    fn rest(&mut self) -> Result<Instant, Error> {
        let now = self.now();
        let outstanding = !self.kept.is_empty();
        if outstanding && now - self.sender.last_feedback_at() > DEAD {
            return Err(self.path_dead("no packet arrived for 3 s".to_owned()));
        }
        if outstanding {
            let now = self.start + Duration::from(now);
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
        if outstanding {
            self.waits_for_acks = Some(self.account.stages.now());
        }
        let text = self.replies.deadline();
        let next = match self.is_blocked {
            // Timers bring more packets, for which there is no room.
            true => Duration::from(now) + LOOK,
            false => Duration::from(self.sender.next_timeout()),
        };
        let next = self.start + next;
        Ok(text.map_or(next, |text| text.min(next)))
    }

    /// What the broker says over the control connection: the end is confirmed, or why it ends.
    /// Returns the batches that it confirms.
    fn take_replies(&mut self) -> Result<Option<u64>, Error> {
        let mut confirmed = None;
        loop {
            match self.replies.next(&self.control) {
                Ok(None) => return Ok(confirmed),
                // The broker closes the connection once it has confirmed the end.
                Ok(Some(FromBroker::Closed)) | Err(NoReply::Io(_)) if confirmed.is_some() => {
                    return Ok(confirmed);
                }
                Ok(Some(reply)) => confirmed = self.take_reply(reply)?,
                Err(NoReply::Io(error)) => return Err(self.control_lost(&error.to_string())),
                Err(NoReply::Invalid(error)) => return Err(error),
            }
        }
    }

    fn check_error_text(&mut self) -> Result<(), Error> {
        if self.replies.deadline().is_some()
            && let Some(told) = self.replies.overdue(Instant::now())
        {
            self.take_reply(told)?;
        }
        Ok(())
    }

    fn take_reply(&mut self, reply: FromBroker) -> Result<Option<u64>, Error> {
        match reply {
            FromBroker::Ack { committed, .. } => Ok(Some(committed)),
            FromBroker::Closed => Err(self.control_lost("the broker closed the connection")),
            FromBroker::Error {
                is_whole: false, ..
            } if self.keys.is_some() => Err(self.control_lost("the broker ended the stream")),
            FromBroker::Error { code, text, .. } => {
                self.replies.verify(&text)?;
                Err(self.ended_by_broker(code, foreign_bytes(&text)))
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

    /// Tells the broker that the stream is complete, which it is to confirm.
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
        self.ending = Some(Ending {
            batches,
            since: Instant::now(),
        });
        Ok(())
    }

    fn wait_for_end(
        &self,
        ending: Ending,
        confirmed: Option<u64>,
    ) -> Result<Option<Instant>, Error> {
        if confirmed == Some(ending.batches) {
            return Ok(None);
        }
        if ending.since.elapsed() > Duration::from(DEAD) {
            let reason = "the broker did not confirm the end of the stream";
            return Err(self.path_dead(reason.to_owned()));
        }
        Ok(Some(Instant::now() + LOOK))
    }

    fn take_account(&mut self) -> StreamMetrics {
        let calls = self.sending.calls(&self.datagrams);
        self.account.add_transport(&self.sender, calls);
        std::mem::take(&mut self.account)
    }

    fn leave(&mut self, reason: String) -> ResumeState {
        let mut unacked = std::mem::take(&mut self.kept);
        unacked.append(&mut self.leftover);
        ResumeState {
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

    fn now(&self) -> Timestamp {
        self.start.elapsed().into()
    }
}

/// Header of a packet with a checksum; that of its payload may be known, if it is as long as `full` has it.
fn summed(
    key: StreamKey,
    transmit: &Transmit,
    payload: &[u8],
    payload_sum: Option<u32>,
    full: &Joiner,
) -> DataPrefix {
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
    DataPrefix { data, tag }
}

/// Header of a packet with a tag behind it.
fn sealed(key: StreamKey, keys: &PacketKeys, transmit: &Transmit, payload: &[u8]) -> DataPrefix {
    let (chunk, pause) = match &transmit.what {
        Outgoing::Payload { chunk, .. } => (Some(chunk), transmit.pause),
        Outgoing::Ping { .. } => (None, None),
    };
    let len = payload.len() as u16;
    let data = Data::to_be_sealed(key, transmit.packet, chunk, pause, len);
    let tag = keys.seal_data(transmit.packet, &[data.as_bytes(), payload]);
    DataPrefix { data, tag }
}

fn size_of_packet(transmit: &Transmit) -> usize {
    DATA_LEN
        + match transmit.what {
            Outgoing::Payload { len, .. } => len as usize,
            Outgoing::Ping { padding } => padding as usize,
        }
}
