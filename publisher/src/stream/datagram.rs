//! One connection of a stream over xdp: sends batches as datagrams and takes the broker's ACKs, as far
//! as the socket lets it.
//!
//! `penstock_transport` makes this reliable; here are sockets and time. [`packet_writer`] puts packets into
//! system calls, [`ack_reader`] reads ACKs, [`control_connection`] is the tcp connection that opened the stream,
//! [`batches`] keeps what is not committed, and [`path_trial`] tries whether packets arrive at all.

mod ack_reader;
mod batches;
mod control_connection;
mod packet_writer;
mod path_trial;

use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use nix::poll::{PollFd, PollFlags};
use penstock_runtime::profile::Tick;
use penstock_transport::{Nanos, Sender, SenderConfig, Timestamp};
use penstock_wire::handshake::Path;
use penstock_wire::packet::{StreamKey, TAG_LEN};

use self::ack_reader::AckReader;
use self::batches::Batches;
use self::control_connection::ControlConnection;
use self::packet_writer::PacketWriter;
use crate::batch::pool::BufferPlan;
use crate::batch::sealed_batch::{Job, SealedBatch};
use crate::config::OnBrokerLoss;
use crate::net::udp::{Datagrams, MAX_SEGMENTS};
use crate::shared::Shared;
use crate::stream::connect::Opened;
use crate::stream::connection::{Holdings, Ready, ResumeState, Step, StreamId};
use crate::stream::datagram_tx::DatagramTx;
use crate::stream::metrics::StreamMetrics;
use crate::stream::progress::ProgressClock;
use crate::stream::silence;
use crate::summary::PublishStage;
use crate::{Config, Error};

/// Longest time until the next step of a stream whose end is not confirmed, or whose socket has no room.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Silence after which a stream with packets in flight checks whether its route has changed.
const QUIET_AFTER: Nanos = Nanos::from_millis(50);
/// Silence after which a stream with packets in flight falls back to tcp.
const DEAD_AFTER: Nanos = Nanos::from_secs(3);
/// Minimum time without progress before a stream fails: a dead path is detected first.
const MIN_TIMEOUT: Duration = Duration::from_secs(4);

/// One connection of a stream.
pub(crate) struct DatagramStream {
    broker: String,
    control: ControlConnection,
    datagrams: Datagrams,
    tx: DatagramTx,
    packets: PacketWriter,
    acks: AckReader,
    sender: Sender,
    batches: Batches,
    shared: Arc<Shared>,
    start: Instant,
    progress: ProgressClock,
    /// Payload bytes that had arrived at the last check.
    delivered: u64,
    metrics: StreamMetrics,
    /// Since when only acks are waited for.
    waits_for_acks: Option<Tick>,
    /// The broker's host reported that the port is closed, and no ACK has come since.
    refused: bool,
    on_loss: OnBrokerLoss,
    /// The broker fell silent.
    is_silent: bool,
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
        let (Some(offered), Some((datagrams, tx))) = (offer.datagrams, datagrams) else {
            let reason = "the broker does not offer it";
            return Err(Error::path_dead(&target.broker, reason));
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
        let batch_size = config.batch_size.min(offer.max_payload as usize);
        let mut stream = Self {
            broker: target.broker.clone(),
            control: ControlConnection::new(&target.broker, control, keys.clone()),
            datagrams,
            tx,
            packets: PacketWriter::new(key, keys.clone(), shared),
            acks: AckReader::new(key, keys),
            sender: Sender::new(&settings, Timestamp::ZERO),
            batches: Batches::new(config.in_flight, batch_size),
            shared: Arc::clone(shared),
            start: Instant::now(),
            progress: ProgressClock::new(config.timeout.max(MIN_TIMEOUT)),
            delivered: 0,
            metrics: StreamMetrics::new(config, target.number),
            waits_for_acks: None,
            refused: false,
            on_loss: config.broker_loss(),
            is_silent: false,
        };
        stream.try_path()?;
        if let Err(error) = stream.try_bypass()? {
            stream.tx = DatagramTx::or_udp(config.mode, target, error)?;
        }
        stream.name_path();
        Ok(stream)
    }

    fn name_path(&mut self) {
        self.metrics.summary.path = Path::Xdp.name();
        self.metrics.summary.tx = Some(self.tx.name());
    }

    /// Ensures that packets that bypass the kernel take the same route as its own would.
    fn check_route(&mut self, now: Timestamp) -> Result<(), Error> {
        let DatagramTx::AfXdp(socket) = &mut self.tx else {
            return Ok(());
        };
        let quiet =
            !self.batches.pushed.is_empty() && now - self.sender.last_feedback_at() > QUIET_AFTER;
        match socket.look_again(now, quiet) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.path_dead(format!("the route has changed: {error}"))),
        }
    }

    /// What it holds, how far it is, and what it needs.
    pub(crate) fn holdings(&self) -> Holdings {
        let needed = usize::try_from(self.sender.needed_bytes()).unwrap_or(usize::MAX);
        Holdings {
            held: self.batches.len(),
            done: self.sender.committed(),
            // Batches that are not full count as what they are.
            needed: needed.min(self.batches.max_bytes()),
        }
    }

    pub(crate) fn control(&self) -> &TcpStream {
        self.control.socket()
    }

    /// The socket of the datagrams, and what it is to be watched for while the thread sleeps.
    pub(crate) fn datagrams(&self) -> PollFd<'_> {
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, self.packets.is_blocked());
        PollFd::new(self.datagrams.socket().as_fd(), events)
    }

    /// Sends and takes what it can now.
    pub(crate) fn step(&mut self, jobs: &Receiver<Job>, ready: Ready) -> Result<Step, Error> {
        match self.advance(jobs, ready) {
            Ok(Some(at)) => Ok(Step::Wait(at)),
            // A cancelled stream reports how far it got.
            Ok(None) | Err(Error::Failed) => Ok(Step::Ended(Box::new(self.take_metrics()))),
            Err(Error::PathDead { reason, .. }) => {
                Ok(Step::Reconnects(Box::new(self.leave(reason))))
            }
            Err(error) if error.is_standstill() && self.on_loss == OnBrokerLoss::Reroute => {
                let left = self.leave(error.to_string());
                let is_stuck = true;
                Ok(Step::Reconnects(Box::new(ResumeState { is_stuck, ..left })))
            }
            Err(error) => Err(error),
        }
    }

    /// Continues with what another connection left.
    pub(crate) fn take_over(&mut self, left: &mut ResumeState) {
        self.metrics = std::mem::take(&mut left.account);
        self.name_path();
        self.batches.leftover = std::mem::take(&mut left.unacked);
    }

    /// The time of the next step if nothing happens until then; none at the end of the stream.
    fn advance(&mut self, jobs: &Receiver<Job>, ready: Ready) -> Result<Option<Instant>, Error> {
        self.check_abandoned()?;
        if let Some(since) = self.waits_for_acks.take() {
            self.metrics.stages.lap(PublishStage::WaitAck, since);
        }
        let confirmed = match ready.is_readable {
            true => self.read_control()?,
            false => None,
        };
        let batches = &self.batches;
        self.control.check_error_text(|| batches.messages())?;
        // Also those that came while other streams had their turn: silence must be the broker's.
        if ready.has_datagrams || self.sender.next_timeout() <= self.now() {
            self.take_acks()?;
        }
        if self.control.has_ended(confirmed, DEAD_AFTER.into())? {
            return Ok(None);
        }
        if self.control.is_ending() {
            return Ok(Some(Instant::now() + CHECK_INTERVAL));
        }
        let open = self.take_jobs(jobs);
        let now = self.now();
        if self.sender.next_timeout() <= now {
            self.sender.on_timeout(now);
        }
        self.check_route(now)?;
        if !self.sender.wants_batch(now) {
            self.sender.on_in_flight_limited(now);
        }
        self.transmit()?;
        self.metrics.answer_flushes(self.sender.committed());
        if !open && self.batches.pushed.is_empty() {
            self.control.end(self.sender.committed())?;
            return Ok(Some(Instant::now() + CHECK_INTERVAL));
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
            if let Some(batch) = self.batches.leftover.pop_front() {
                self.enqueue(batch);
                continue;
            }
            match self.shared.next_job(jobs) {
                Ok(Job::Batch(batch)) => self.push(batch),
                Ok(Job::Flush(done)) => self.metrics.flush(self.next_seq(), done),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    pub(crate) fn may_take(&self) -> bool {
        !self.control.is_ending()
            && self.batches.has_room()
            && self.sender.has_room()
            && self.sender.wants_batch(self.now())
    }

    /// Number of the next batch that is enqueued.
    fn next_seq(&self) -> u64 {
        self.sender.committed() + self.batches.pushed.len() as u64
    }

    fn push(&mut self, batch: SealedBatch) {
        self.metrics.sent(&batch);
        self.enqueue(batch);
    }

    fn enqueue(&mut self, batch: SealedBatch) {
        if self.batches.pushed.is_empty() {
            self.progress.restart(Instant::now());
        }
        let seq = self.next_seq();
        let checksum = batch.header(seq).checksum();
        self.sender
            .push(batch.payload.len() as u32, batch.messages, checksum);
        self.batches.pushed.push_back(batch);
    }

    /// Sends what may go out now, many packets a call.
    fn transmit(&mut self) -> Result<(), Error> {
        let start = self.metrics.stages.now();
        let mut sent = false;
        if self.packets.is_blocked() {
            if self.packets.retry(self.sender.committed()) {
                self.send_packets()?;
            }
            sent = true;
        }
        while !self.packets.is_blocked() {
            // Asked each time: a call may show that the interface does not segment.
            let limit = match self.datagrams.has_segments() {
                true => MAX_SEGMENTS,
                false => 1,
            };
            let now = self.now();
            if !self.packets.gather(&mut self.sender, now, limit) {
                break;
            }
            sent = true;
            self.send_packets()?;
        }
        if sent {
            self.metrics.stages.lap(PublishStage::SendPayload, start);
        }
        Ok(())
    }

    fn send_packets(&mut self) -> Result<(), Error> {
        let batches = &self.batches.pushed;
        let (tx, datagrams) = (&mut self.tx, &mut self.datagrams);
        match self.packets.send(&self.sender, batches, tx, datagrams) {
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
                for packet in self.packets.packets().rev() {
                    smaller = self.sender.on_too_large(now, packet);
                }
                if smaller {
                    return Ok(());
                }
                let reason = "the kernel takes no datagrams of the least size now (ip link: mtu)";
                Err(self.path_dead(reason))
            }
            Some(libc::EAGAIN) if matches!(self.tx, DatagramTx::Udp) => {
                self.packets.on_blocked();
                Ok(())
            }
            // ICMP answered an earlier packet: the port is closed.
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
            let mut has_news = false;
            for index in 0..count {
                let Some(feedback) = self.acks.read(self.datagrams.ack(index)) else {
                    continue;
                };
                self.refused = false;
                has_news = true;
                let now = self.start.elapsed().into();
                let taken = self.sender.on_feedback(now, feedback);
                taken.map_err(|source| Error::BadFeedback {
                    broker: self.broker.clone(),
                    source,
                })?;
            }
            if has_news {
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
        if self.batches.pushed.len() > self.sender.uncommitted() {
            self.progress.restart(now);
        }
    }

    /// Gives the buffers of acked batches back, all at once.
    fn release(&mut self) {
        let Self {
            batches: Batches { pushed, .. },
            metrics,
            shared,
            ..
        } = self;
        let done = pushed.len() - self.sender.uncommitted();
        let done = pushed.drain(..done).map(|batch| {
            metrics.acked(1, batch.messages.into(), shared);
            batch.payload
        });
        shared.pool.give_back_all(done);
    }

    /// There is nothing more to do now: checks whether the path is alive; returns when there is something
    /// to do.
    fn rest(&mut self) -> Result<Instant, Error> {
        let now = self.now();
        let outstanding = !self.batches.pushed.is_empty();
        let silent_at = outstanding.then(|| self.silent_at());
        if silent_at.is_some_and(|at| now > at) {
            let quiet = Duration::from(now - self.sender.last_feedback_at());
            self.is_silent = quiet < DEAD_AFTER.into();
            let reason = format!("no packet arrived for {:.1} s", quiet.as_secs_f64());
            return Err(self.path_dead(reason));
        }
        if outstanding {
            let now = self.start + Duration::from(now);
            self.progress
                .check(now, &self.broker, || self.batches.messages())?;
        }
        let since = self.sender.undelivered_since();
        // A broker that waits for room in its log may have none for new payload.
        let is_lost = since.is_some_and(|since| now - since > DEAD_AFTER);
        if is_lost && !self.sender.is_blocked() {
            let reason = "the broker answers, but no payload arrives intact";
            return Err(self.path_dead(reason));
        }
        if outstanding {
            self.waits_for_acks = Some(self.metrics.stages.now());
        }
        let text = self.control.deadline();
        let next = match self.packets.is_blocked() {
            // Timers bring more packets, for which there is no room.
            true => Duration::from(now) + CHECK_INTERVAL,
            false => Duration::from(self.sender.next_timeout()),
        };
        let next = self.start + next;
        let silent_at = silent_at.map(|at| self.start + Duration::from(at));
        let first = [text, silent_at].into_iter().flatten().min();
        Ok(first.map_or(next, |first| first.min(next)))
    }

    /// When the path counts as dead if nothing arrives until then. A stream that may go to another broker
    /// finds out sooner, and asks the broker itself before it goes.
    fn silent_at(&self) -> Timestamp {
        let heard = self.sender.last_feedback_at();
        if self.on_loss == OnBrokerLoss::Wait {
            return heard + DEAD_AFTER;
        }
        let owed = self.progress.owed_since();
        let owed = Timestamp::from(owed.saturating_duration_since(self.start));
        let round_trip = Duration::from(self.sender.rtt().smoothed());
        let limit = Nanos::from(silence::lost_after(round_trip)).min(DEAD_AFTER);
        heard.max(owed) + limit
    }

    /// Takes what the broker reports over the control connection. Returns the batches that it confirms at the
    /// end of the stream.
    fn read_control(&mut self) -> Result<Option<u64>, Error> {
        let batches = &self.batches;
        self.control.read(|| batches.messages())
    }

    fn take_metrics(&mut self) -> StreamMetrics {
        let calls = self.tx.calls(&self.datagrams);
        self.metrics.add_transport(&self.sender, calls);
        std::mem::take(&mut self.metrics)
    }

    /// Ends this connection; another one continues.
    pub(crate) fn leave(&mut self, reason: String) -> ResumeState {
        let is_owed = !self.batches.pushed.is_empty() || self.control.is_ending();
        ResumeState {
            reason,
            connection_lost: self.control.is_lost(),
            was_idle: self.control.was_idle(),
            is_silent: self.is_silent,
            is_stuck: false,
            quiet: is_owed.then(|| self.progress.owed_since().elapsed()),
            account: self.take_metrics(),
            first: self.sender.committed(),
            unacked: self.batches.take(),
        }
    }

    fn path_dead(&self, reason: impl Into<String>) -> Error {
        Error::path_dead(&self.broker, reason)
    }

    fn now(&self) -> Timestamp {
        self.start.elapsed().into()
    }
}
