//! One connection of a stream over tcp: sends batches and takes the acks, as far as the socket lets it.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use penstock_auth::PacketKeys;
use penstock_process::text::foreign_bytes;
use penstock_runtime::profile::Tick;
use penstock_runtime::tcp_info::TcpInfo;
use penstock_wire::batch::Header;
use penstock_wire::handshake::{AckLevel, Path};
use penstock_wire::reply::Fault;
use zerocopy::IntoBytes;

use crate::batch::pool::BufferPlan;
use crate::batch::sealed_batch::{Job, SealedBatch};
use crate::config::OnBrokerLoss;
use crate::shared::Shared;
use crate::stream::connect::Opened;
use crate::stream::connection::{Holdings, Ready, ResumeState, Step, StreamId};
use crate::stream::frame_writer::{FrameWriter, Written};
use crate::stream::in_flight_batches::InFlightBatches;
use crate::stream::metrics::StreamMetrics;
use crate::stream::progress::ProgressClock;
use crate::stream::replies::{FromBroker, NoReply, Replies};
use crate::stream::silence::{ConnectionSample, Silence, SilenceDetector};
use crate::summary::PublishStage;
use crate::{Config, Error};

/// How often a stream that waits for its broker checks how long it has done so.
const PROGRESS_CHECK: Duration = Duration::from_millis(100);
/// Batches that are written before other streams of the thread get their turn.
const BATCHES_PER_STEP: usize = 8;

/// One connection of a stream.
pub(crate) struct Stream {
    broker: String,
    socket: TcpStream,
    shared: Arc<Shared>,
    ack: AckLevel,
    on_loss: OnBrokerLoss,
    batch_size: usize,
    progress: ProgressClock,
    silence: SilenceDetector,
    /// The broker fell silent.
    is_silent: bool,
    window: InFlightBatches,
    /// What another connection left; sent first.
    leftover: VecDeque<SealedBatch>,
    frames: FrameWriter,
    /// When writing them began, or the last one before them was written.
    writing_since: Option<Tick>,
    /// The kernel had no room for the rest of the frames.
    is_blocked: bool,
    replies: Replies,
    /// Keys for the tags of frames, if there are any, and the number of frames so far.
    keys: Option<Arc<PacketKeys>>,
    sealed: u64,
    /// Since when only acks are waited for.
    waits_for_acks: Option<Tick>,
    /// The end frame was begun, and is sent.
    is_ending: bool,
    ended: bool,
    /// The broker ended the stream because it was idle.
    was_idle: bool,
    account: StreamMetrics,
}

impl Stream {
    pub(crate) fn new(
        config: &Config,
        target: &StreamId,
        opened: Opened,
        shared: &Arc<Shared>,
    ) -> Self {
        let Opened {
            socket,
            offer,
            keys,
            ..
        } = opened;
        let limit = (config.ack == AckLevel::Committed).then_some(config.in_flight);
        let mut account = StreamMetrics::new(config, target.number);
        account.summary.path = Path::Tcp.name();
        Self {
            broker: target.broker.clone(),
            socket,
            shared: Arc::clone(shared),
            ack: config.ack,
            on_loss: config.broker_loss(),
            batch_size: config.batch_size,
            progress: ProgressClock::new(config.timeout),
            silence: SilenceDetector::default(),
            is_silent: false,
            window: InFlightBatches::new(
                limit,
                BufferPlan::new(config).min_in_flight,
                config.batch_size,
                offer.committed,
                shared.timestamp(Instant::now()),
            ),
            leftover: VecDeque::new(),
            frames: FrameWriter::default(),
            writing_since: None,
            is_blocked: false,
            replies: Replies::new(&target.broker, keys.clone()),
            keys,
            sealed: 0,
            waits_for_acks: None,
            is_ending: false,
            ended: false,
            was_idle: false,
            account,
        }
    }

    /// Continues with what another connection left.
    pub(crate) fn take_over(&mut self, left: &mut ResumeState) {
        self.account = std::mem::take(&mut left.account);
        self.account.summary.path = Path::Tcp.name();
        self.account.summary.tx = None;
        self.leftover = std::mem::take(&mut left.unacked);
    }

    /// What it holds, how far it is, and what it needs.
    pub(crate) fn holdings(&self) -> Holdings {
        let kept = self.window.len() + self.frames.len();
        Holdings {
            held: kept + self.leftover.len(),
            done: self.done(),
            needed: kept * self.batch_size,
        }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether the next job could be begun now.
    pub(crate) fn may_take(&self) -> bool {
        self.frames.is_empty()
            && !self.is_ending
            && self.leftover.is_empty()
            && self.has_room(Instant::now())
    }

    /// Batches that are acknowledged, or written where none is.
    fn done(&self) -> u64 {
        match self.ack {
            AckLevel::Committed => self.window.acked(),
            AckLevel::None => self.window.next_seq(),
        }
    }

    /// Whether the stream can go on over another connection when this one ends too early. The progress of a
    /// stream without acks is unknown: it goes on only if it may lose what it has sent.
    fn may_move(&self) -> bool {
        self.ack == AckLevel::Committed || self.on_loss == OnBrokerLoss::Reroute
    }

    /// Sends and takes what it can now.
    pub(crate) fn step(&mut self, jobs: &Receiver<Job>, ready: Ready) -> Result<Step, Error> {
        match self.advance(jobs, ready) {
            Ok(Some(at)) => Ok(Step::Wait(at)),
            // A cancelled stream reports how far it got.
            Ok(None) | Err(Error::Failed) => {
                Ok(Step::Ended(Box::new(std::mem::take(&mut self.account))))
            }
            Err(Error::Lost { source, .. }) if self.may_move() => {
                Ok(Step::Reconnects(Box::new(self.leave(source.to_string()))))
            }
            Err(error) if error.is_standstill() && self.on_loss == OnBrokerLoss::Reroute => {
                let left = self.leave(error.to_string());
                let is_stuck = true;
                Ok(Step::Reconnects(Box::new(ResumeState { is_stuck, ..left })))
            }
            Err(error) => Err(error),
        }
    }

    /// The time of the next step if nothing happens until then; none at the end of the stream.
    fn advance(&mut self, jobs: &Receiver<Job>, ready: Ready) -> Result<Option<Instant>, Error> {
        if self.shared.is_abandoned() {
            return Err(Error::Failed);
        }
        let now = Instant::now();
        if ready.is_readable {
            self.take_replies(now)?;
        }
        self.check_error_text(now)?;
        self.is_blocked &= !ready.is_writable;
        let is_out_of_turn = self.send_batches(now, jobs)?;
        self.account.answer_flushes(self.done());
        if self.ended && self.window.acked() == self.window.next_seq() {
            self.end_wait_for_acks();
            return Ok(None);
        }
        if is_out_of_turn {
            return Ok(Some(now));
        }
        if !self.frames.is_empty() || self.ended || self.window.is_owed() {
            let unacked = || self.unacked_messages();
            self.progress.check(now, &self.broker, unacked)?;
            self.check_silence(now)?;
        }
        let check = now + PROGRESS_CHECK;
        let probe = self.window.probe_end(self.shared.timestamp(now));
        let probe = probe.map(|at| self.shared.start + Duration::from(at));
        let first = [self.replies.deadline(), probe].into_iter().flatten().min();
        Ok(Some(first.map_or(check, |first| first.min(check))))
    }

    /// Detects a broker that fell silent, unless the stream waits for its broker in any case.
    fn check_silence(&mut self, now: Instant) -> Result<(), Error> {
        if self.on_loss == OnBrokerLoss::Wait {
            return Ok(());
        }
        let socket = &self.socket;
        let sample = || {
            let info = TcpInfo::of(socket).ok()?;
            Some(ConnectionSample {
                in_flight: info.unacked,
                last_ack: Duration::from_millis(info.last_ack_recv.into()),
                round_trip: Duration::from_micros(info.rtt.into()),
            })
        };
        let owed_since = self.progress.owed_since();
        let text = match self.silence.check(now, owed_since, sample) {
            None => return Ok(()),
            // Without acks nothing is heard of a broker that waits for room.
            Some(Silence::Process(_)) if self.ack == AckLevel::None => return Ok(()),
            Some(Silence::Process(quiet)) => {
                format!("the broker has not answered for {} ms", quiet.as_millis())
            }
            Some(Silence::Host(quiet)) => format!(
                "the broker's host has not answered for {} ms",
                quiet.as_millis()
            ),
        };
        self.is_silent = true;
        Err(self.lost(io::Error::new(io::ErrorKind::TimedOut, text)))
    }

    /// Ends this connection; another one continues.
    pub(crate) fn leave(&mut self, mut reason: String) -> ResumeState {
        let is_owed = !self.frames.is_empty() || self.ended || self.window.is_owed();
        let unconfirmed = self.window.unacked_messages();
        if self.ack == AckLevel::None && unconfirmed > 0 {
            reason +=
                &format!("; {unconfirmed} messages that it was sent without acks may be lost");
        }
        let first = self.done();
        let mut unacked = self.window.take_unacked();
        // The next connection sends it again from its start.
        unacked.extend(self.frames.take_batches());
        unacked.append(&mut self.leftover);
        ResumeState {
            reason,
            connection_lost: true,
            was_idle: self.was_idle,
            is_silent: self.is_silent,
            is_stuck: false,
            quiet: is_owed.then(|| self.progress.owed_since().elapsed()),
            account: std::mem::take(&mut self.account),
            unacked,
            first,
        }
    }

    /// Writes frames while there are some, the window is open and the kernel has room; says whether more
    /// could be written, but others have their turn first.
    fn send_batches(&mut self, now: Instant, jobs: &Receiver<Job>) -> Result<bool, Error> {
        let mut written = 0;
        while !self.is_blocked {
            while self.frames.has_room() && self.begin_next(now, jobs) {}
            if self.frames.is_empty() {
                return Ok(false);
            }
            if written >= BATCHES_PER_STEP {
                return Ok(true);
            }
            written += self.write_frames(now)?;
        }
        Ok(false)
    }

    /// Begins the next frame; says whether there is one.
    fn begin_next(&mut self, now: Instant, jobs: &Receiver<Job>) -> bool {
        if self.is_ending {
            return false;
        }
        if !self.has_room(now) {
            if self.frames.is_empty() {
                let start = self.account.stages.now();
                self.waits_for_acks.get_or_insert(start);
                self.window.on_limited(self.shared.timestamp(now));
            }
            return false;
        }
        self.end_wait_for_acks();
        loop {
            let batch = match self.leftover.pop_front() {
                Some(batch) => batch,
                None => match self.shared.next_job(jobs) {
                    Ok(Job::Batch(batch)) => {
                        self.account.sent(&batch);
                        batch
                    }
                    Ok(Job::Flush(done)) => {
                        self.account.flush(self.next_seq(), done);
                        continue;
                    }
                    Err(TryRecvError::Empty) => return false,
                    Err(TryRecvError::Disconnected) => {
                        self.is_ending = true;
                        self.begin_frame(now, Header::for_end(self.next_seq()), None);
                        return true;
                    }
                },
            };
            self.begin_frame(now, batch.header(self.next_seq()), Some(batch));
            return true;
        }
    }

    /// Whether the window has room for one more batch.
    fn has_room(&self, now: Instant) -> bool {
        let bytes = self
            .frames
            .batches()
            .map(|batch| batch.payload.len() as u64);
        let (now, begun) = (self.shared.timestamp(now), self.frames.len());
        self.window.has_room(now, begun, bytes.sum())
    }

    /// Sequence number of the next batch that is begun.
    fn next_seq(&self) -> u64 {
        self.window.next_seq() + self.frames.len() as u64
    }

    fn begin_frame(&mut self, now: Instant, header: Header, batch: Option<SealedBatch>) {
        if self.frames.is_empty() && !self.window.is_owed() {
            self.progress.restart(now);
        }
        let begun = self.account.stages.now();
        self.writing_since.get_or_insert(begun);
        let tag = self.keys.as_ref().map(|keys| {
            let payload = batch.as_ref().map_or(&[][..], |batch| &batch.payload);
            self.sealed += 1;
            keys.seal_frame(self.sealed - 1, &[header.as_bytes(), payload])
        });
        self.frames.push(&header, tag, batch);
    }

    /// Writes more of the frames; returns how many became complete.
    fn write_frames(&mut self, now: Instant) -> Result<usize, Error> {
        match self.frames.write(&self.socket) {
            Ok(more) => self.progress.on_bytes(now, more as u64),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(0),
            Err(error) => return Err(self.explain_loss(now, error)),
        }
        let mut written = 0;
        while let Some(frame) = self.frames.pop_written() {
            self.finish_frame(now, frame);
            written += 1;
        }
        // A short write also means that there is no room (epoll(7), question 9).
        self.is_blocked = !self.frames.is_empty();
        Ok(written)
    }

    fn finish_frame(&mut self, now: Instant, frame: Written) {
        let stages = &mut self.account.stages;
        let begun = self.writing_since.take().unwrap_or_else(|| stages.now());
        let end = stages.lap(PublishStage::SendPayload, begun);
        if !self.frames.is_empty() {
            self.writing_since = Some(end);
        }
        match frame {
            Written::End => {
                self.ended = true;
                self.waits_for_acks = Some(end);
            }
            Written::Batch(batch) => {
                if let Some(batch) = self.window.push(self.shared.timestamp(now), batch) {
                    self.shared.pool.give_back(batch.payload);
                }
                if !self.has_room(now) {
                    self.waits_for_acks = Some(end);
                }
            }
        }
    }

    fn end_wait_for_acks(&mut self) {
        if let Some(since) = self.waits_for_acks.take() {
            self.account.stages.lap(PublishStage::WaitAck, since);
        }
    }

    /// Takes every reply that has come, without waiting.
    fn take_replies(&mut self, now: Instant) -> Result<(), Error> {
        loop {
            match self.replies.next(&self.socket) {
                Ok(Some(FromBroker::Closed)) => return self.closed_by_broker(),
                Ok(Some(reply)) => self.take_reply(now, reply)?,
                Ok(None) => return Ok(()),
                Err(NoReply::Io(source)) => return Err(self.lost(source)),
                Err(NoReply::Invalid(error)) => return Err(error),
            }
        }
    }

    fn check_error_text(&mut self, now: Instant) -> Result<(), Error> {
        match self.replies.overdue(now) {
            Some(told) => self.take_reply(now, told),
            None => Ok(()),
        }
    }

    fn take_reply(&mut self, now: Instant, reply: FromBroker) -> Result<(), Error> {
        match reply {
            FromBroker::Ack { committed, blocked } => {
                self.progress.on_heard(now, blocked);
                self.account(now, committed)
            }
            FromBroker::Error {
                committed,
                code,
                text,
                ..
            } => {
                self.replies.verify(&text)?;
                self.account(now, committed)?;
                Err(self.ended_by_broker(code, foreign_bytes(&text)))
            }
            FromBroker::Closed => self.closed_by_broker(),
        }
    }

    /// A broker that restarted, or that received nothing while this host slept, continues a stream with
    /// acks; any other error is final.
    fn ended_by_broker(&mut self, code: u16, text: String) -> Error {
        self.was_idle = code == Fault::Stalled as u16;
        let for_now = code == Fault::Shutdown as u16 || code == Fault::Stalled as u16;
        if for_now && self.may_move() {
            return self.lost(io::Error::other(text));
        }
        Error::Ended {
            broker: self.broker.clone(),
            unacked: self.unacked_messages(),
            text,
        }
    }

    fn account(&mut self, now: Instant, committed: u64) -> Result<(), Error> {
        let before = self.window.acked();
        let acked = self
            .window
            .ack(self.shared.timestamp(now), committed)
            .map_err(|source| Error::BadAck {
                broker: self.broker.clone(),
                source,
            })?;
        let batches = committed - before;
        if batches > 0 {
            self.progress.restart(now);
        }
        self.account.acked(batches, acked.messages, &self.shared);
        let buffers = acked.batches.map(|(_, batch)| batch.payload);
        self.shared.pool.give_back_all(buffers);
        Ok(())
    }

    /// The broker closes when it has acked the end of the stream; before that it is a loss.
    fn closed_by_broker(&mut self) -> Result<(), Error> {
        if self.ended && self.window.acked() == self.window.next_seq() {
            return Ok(());
        }
        let kind = io::ErrorKind::UnexpectedEof;
        Err(self.lost(io::Error::new(kind, "the broker closed the connection")))
    }

    /// A send failed: the broker may have said why before it closed.
    fn explain_loss(&mut self, now: Instant, source: io::Error) -> Error {
        let told = self
            .take_replies(now)
            .and_then(|()| match self.replies.take_error() {
                Some(told) => self.take_reply(now, told),
                None => Ok(()),
            });
        match told {
            Err(told @ (Error::Ended { .. } | Error::Lost { .. } | Error::Forged { .. })) => told,
            _ => self.lost(source),
        }
    }

    fn lost(&self, source: io::Error) -> Error {
        Error::Lost {
            broker: self.broker.clone(),
            unacked: self.unacked_messages(),
            source,
        }
    }

    /// Messages that are sent, or being sent, and not acknowledged.
    fn unacked_messages(&self) -> u64 {
        let begun = self.frames.batches().map(|batch| u64::from(batch.messages));
        self.window.unacked_messages() + begun.sum::<u64>()
    }
}
