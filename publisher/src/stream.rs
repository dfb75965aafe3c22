//! One connection of a stream over tcp: sends batches and takes the acks, as far as the socket lets it.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use penstock_dataplane::auth::PacketKeys;
use penstock_dataplane::profile::Tick;
use penstock_dataplane::text::foreign_bytes;
use penstock_dataplane::wire::batch::{HEADER_LEN, Header};
use penstock_dataplane::wire::handshake::{AckLevel, Path};
use penstock_dataplane::wire::packet::TAG_LEN;
use penstock_dataplane::wire::reply::Fault;
use zerocopy::IntoBytes;

use crate::account::Account;
use crate::config::Mode;
use crate::connect::Opened;
use crate::link::{Leftover, Ready, Step, StreamContext, Target};
use crate::payload::Payload;
use crate::pool::Pool;
use crate::progress::ProgressClock;
use crate::replies::{FromBroker, NoReply, Replies};
use crate::summary::PublishStage;
use crate::tx_queues::TxQueues;
use crate::window::Window;
use crate::{Config, Error};

/// How often a stream that waits for its broker checks how long it has done so.
const PROGRESS_CHECK: Duration = Duration::from_millis(100);
/// Batches that are written before other streams of the thread get their turn.
const BATCHES_PER_STEP: usize = 8;

/// A batch that is ready to go.
#[derive(Debug)]
pub(crate) struct Filled {
    pub(crate) payload: Payload,
    pub(crate) messages: u32,
    /// CRC32C of the payload.
    pub(crate) checksum: u32,
    /// When it became complete.
    pub(crate) sealed: Tick,
}

impl Filled {
    /// Header of the batch at its place in a stream.
    pub(crate) fn header(&self, seq: u64) -> Header {
        Header::for_batch(seq, self.messages, self.payload.len() as u32, self.checksum)
    }
}

/// What a stream is asked to do.
#[derive(Debug)]
pub(crate) enum Job {
    Batch(Filled),
    /// Answer once everything before is acked (at ack level 0: sent).
    Flush(Sender<()>),
}

/// What a stream shares with the publisher.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Where buffers go once they are acked.
    pub(crate) pool: Pool,
    pub(crate) tx_queues: Arc<TxQueues>,
    pub(crate) start: Instant,
    pub(crate) acked_messages: AtomicU64,
    /// Bytes of payload that a full packet carries, over xdp; 0 while that is not known.
    pub(crate) packet_payload: AtomicU32,
    /// The publisher is closed: no stream gets more jobs.
    pub(crate) closed: AtomicBool,
    /// The publisher is dropped: stop at once.
    pub(crate) abandoned: AtomicBool,
}

impl Shared {
    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// Whether streams have buffers of their own for what they keep; where payload may go over xdp as
/// well, the pool has enough for that.
pub(crate) fn owns_kept(config: &Config) -> bool {
    config.mode == Mode::Tcp && config.ack == AckLevel::Committed
}

/// A frame that is being written.
struct FrameInProgress {
    /// Header, and tag if it needs one.
    head: [u8; HEADER_LEN + TAG_LEN],
    head_len: usize,
    /// None for the end of the stream.
    batch: Option<Filled>,
    written: usize,
    begun: Tick,
}

/// One connection of a stream.
pub(crate) struct Stream {
    broker: String,
    socket: TcpStream,
    shared: Arc<Shared>,
    ack: AckLevel,
    progress: ProgressClock,
    window: Window,
    /// Buffers that stand in for those that are kept until they are acked, so that the publisher
    /// gets as far ahead of the stream as if none were kept, and no farther than the CPU's cache.
    spares: Option<Vec<Payload>>,
    /// What another connection left; sent first.
    leftover: VecDeque<Filled>,
    frame: Option<FrameInProgress>,
    /// The kernel had no room for the rest of the frame.
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
    account: Account,
}

impl Stream {
    pub(crate) fn new(
        config: &Config,
        target: &Target,
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
        let mut account = Account::new(config, target.number);
        account.summary.path = Path::Tcp.name();
        Self {
            broker: target.broker.clone(),
            socket,
            shared: Arc::clone(shared),
            ack: config.ack,
            progress: ProgressClock::new(config.timeout),
            window: Window::new(limit, offer.committed),
            spares: owns_kept(config).then(|| {
                let buffers = std::iter::repeat_with(|| Payload::with_capacity(config.batch_size));
                buffers.take(config.in_flight).collect()
            }),
            leftover: VecDeque::new(),
            frame: None,
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
    pub(crate) fn take_over(&mut self, left: &mut Leftover) {
        self.account = std::mem::take(&mut left.account);
        self.account.summary.path = Path::Tcp.name();
        self.account.summary.tx = None;
        self.leftover = std::mem::take(&mut left.unacked);
        if let Some(spares) = &mut self.spares {
            spares.truncate(spares.len() - self.leftover.len());
        }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether the next job could be begun now.
    pub(crate) fn may_take(&self) -> bool {
        self.frame.is_none()
            && !self.is_ending
            && self.leftover.is_empty()
            && !self.window.is_full()
    }

    /// Sends and takes what it can now. A stream whose batches are acked can go on over another
    /// connection when this one ends too early; nothing tells how far one without acks has come.
    pub(crate) fn step(&mut self, context: &StreamContext, ready: Ready) -> Result<Step, Error> {
        match self.advance(&context.jobs, ready) {
            Ok(Some(at)) => Ok(Step::Wait(at)),
            // A cancelled stream reports how far it got.
            Ok(None) | Err(Error::Failed) => {
                Ok(Step::Ended(Box::new(std::mem::take(&mut self.account))))
            }
            Err(Error::Lost { source, .. }) if self.ack == AckLevel::Committed => {
                Ok(Step::Moves(Box::new(self.leave(source.to_string()))))
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
        let done = match self.ack {
            AckLevel::Committed => self.window.acked(),
            AckLevel::None => self.window.next_seq(),
        };
        self.account.answer_flushes(done);
        if self.ended && self.window.acked() == self.window.next_seq() {
            self.end_wait_for_acks();
            return Ok(None);
        }
        if is_out_of_turn {
            return Ok(Some(now));
        }
        if self.frame.is_some() || self.ended || self.window.is_owed() {
            let unacked = || self.unacked_messages();
            self.progress.check(now, &self.broker, unacked)?;
        }
        let check = now + PROGRESS_CHECK;
        let text = self.replies.deadline();
        Ok(Some(text.map_or(check, |text| text.min(check))))
    }

    fn leave(&mut self, reason: String) -> Leftover {
        let mut unacked = self.window.take_unacked();
        // The next connection sends it again from its start.
        let begun = self.frame.take().and_then(|frame| frame.batch);
        unacked.extend(begun);
        unacked.append(&mut self.leftover);
        Leftover {
            reason,
            connection_lost: true,
            was_idle: self.was_idle,
            account: std::mem::take(&mut self.account),
            unacked,
            first: self.window.acked(),
        }
    }

    /// Writes frames while there are some, the window is open and the kernel has room; says whether more
    /// could be written, but others have their turn first.
    fn send_batches(&mut self, now: Instant, jobs: &Receiver<Job>) -> Result<bool, Error> {
        for _ in 0..BATCHES_PER_STEP {
            if self.frame.is_none() && !self.begin_next(now, jobs) {
                return Ok(false);
            }
            if self.is_blocked || !self.write_frame(now)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Begins the next frame; says whether there is one.
    fn begin_next(&mut self, now: Instant, jobs: &Receiver<Job>) -> bool {
        if self.is_ending {
            return false;
        }
        if self.window.is_full() {
            let start = self.account.stages.now();
            self.waits_for_acks.get_or_insert(start);
            return false;
        }
        self.end_wait_for_acks();
        loop {
            let batch = match self.leftover.pop_front() {
                Some(batch) => batch,
                None => match jobs.try_recv() {
                    Ok(Job::Batch(batch)) => {
                        self.account.sent(&batch);
                        if let Some(spare) = self.spares.as_mut().and_then(Vec::pop) {
                            self.shared.pool.give_back(spare);
                        }
                        batch
                    }
                    Ok(Job::Flush(done)) => {
                        self.account.flush(self.window.next_seq(), done);
                        continue;
                    }
                    Err(TryRecvError::Empty) => return false,
                    Err(TryRecvError::Disconnected) => {
                        self.is_ending = true;
                        self.begin_frame(now, Header::for_end(self.window.next_seq()), None);
                        return true;
                    }
                },
            };
            self.begin_frame(now, batch.header(self.window.next_seq()), Some(batch));
            return true;
        }
    }

    fn begin_frame(&mut self, now: Instant, header: Header, batch: Option<Filled>) {
        if !self.window.is_owed() {
            self.progress.restart(now);
        }
        let begun = self.account.stages.now();
        let header = header.as_bytes();
        let mut head = [0; HEADER_LEN + TAG_LEN];
        let mut head_len = HEADER_LEN;
        head[..HEADER_LEN].copy_from_slice(header);
        if let Some(keys) = &self.keys {
            let payload = batch.as_ref().map_or(&[][..], |batch| &batch.payload);
            let tag = keys.seal_frame(self.sealed, &[header, payload]);
            self.sealed += 1;
            head[HEADER_LEN..].copy_from_slice(&tag);
            head_len += TAG_LEN;
        }
        self.frame = Some(FrameInProgress {
            head,
            head_len,
            batch,
            written: 0,
            begun,
        });
    }

    /// Writes more of the frame; says whether it is complete.
    fn write_frame(&mut self, now: Instant) -> Result<bool, Error> {
        while let Some(frame) = &mut self.frame {
            let head = &frame.head[..frame.head_len];
            let payload = frame.batch.as_ref().map_or(&[][..], |batch| &batch.payload);
            if frame.written == head.len() + payload.len() {
                break;
            }
            let (head, payload) = match frame.written.checked_sub(head.len()) {
                None => (&head[frame.written..], payload),
                Some(written) => (&[][..], &payload[written..]),
            };
            match (&self.socket).write_vectored(&[IoSlice::new(head), IoSlice::new(payload)]) {
                Ok(more) => {
                    frame.written += more;
                    self.progress.on_bytes(now, more as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.is_blocked = true;
                    return Ok(false);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.explain_loss(now, error)),
            }
        }
        self.finish_frame();
        Ok(true)
    }

    fn finish_frame(&mut self) {
        let Some(frame) = self.frame.take() else {
            return;
        };
        let Some(batch) = frame.batch else {
            self.ended = true;
            self.waits_for_acks = Some(frame.begun);
            return;
        };
        if let Some(batch) = self.window.push(batch) {
            self.shared.pool.give_back(batch.payload);
        }
        let stages = &mut self.account.stages;
        let end = stages.lap(PublishStage::SendPayload, frame.begun);
        if self.window.is_full() {
            self.waits_for_acks = Some(end);
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

    /// A broker that restarted, or that heard nothing while this host slept, continues a stream with
    /// acks; any other error is final.
    fn ended_by_broker(&mut self, code: u16, text: String) -> Error {
        self.was_idle = code == Fault::Stalled as u16;
        let for_now = code == Fault::Shutdown as u16 || code == Fault::Stalled as u16;
        if for_now && self.ack == AckLevel::Committed {
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
        let acked = self.window.ack(committed).map_err(|source| Error::BadAck {
            broker: self.broker.clone(),
            source,
        })?;
        let batches = committed - before;
        if batches > 0 {
            self.progress.restart(now);
        }
        self.account.acked(batches, acked.messages, &self.shared);
        let buffers = acked.batches.map(|batch| batch.payload);
        match &mut self.spares {
            Some(spares) => spares.extend(buffers),
            None => self.shared.pool.give_back_all(buffers),
        }
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
        let begun = self.frame.as_ref().and_then(|frame| frame.batch.as_ref());
        self.window.unacked_messages() + begun.map_or(0, |batch| u64::from(batch.messages))
    }
}
