//! One stream: a thread that sends batches over its connection and takes the acks.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TryRecvError};
use penstock_dataplane::auth::PacketKeys;
use penstock_dataplane::profile::Tick;
use penstock_dataplane::text::foreign_bytes;
use penstock_dataplane::wire::batch::{HEADER_LEN, Header};
use penstock_dataplane::wire::handshake::{AckLevel, Path};
use penstock_dataplane::wire::packet::TAG_LEN;
use penstock_dataplane::wire::reply::{Fault, Parsed};
use polling::{AsRawSource, AsSource, Event, Events, PollMode, Poller};
use zerocopy::IntoBytes;

use crate::account::Account;
use crate::config::Mode;
use crate::connect::Opened;
use crate::datagram::{Leftover, Outcome};
use crate::link::{Ends, Target};
use crate::payload::Payload;
use crate::pool::Pool;
use crate::progress::ProgressClock;
use crate::replies::Replies;
use crate::summary::PublishStage;
use crate::tx_queues::TxQueues;
use crate::window::Window;
use crate::{Config, Error};

/// Key of the socket in the poller.
const SOCKET: usize = 0;
/// How often a waiting stream looks whether its broker still lives.
const LOOK: Duration = Duration::from_millis(100);

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

/// What a stream sleeps on; wakes one that sleeps because it has no job, and costs nothing while it
/// is busy.
#[derive(Debug)]
pub(crate) struct Waker {
    pub(crate) poller: Poller,
    sleeping: AtomicBool,
}

impl Waker {
    pub(crate) fn new() -> Result<Self, Error> {
        Ok(Self {
            poller: Poller::new().map_err(|e| Error::Thread(e.to_string()))?,
            sleeping: AtomicBool::new(false),
        })
    }

    /// Watches a socket, until [`Self::forget`] is told of it, which must be before it is closed.
    pub(crate) fn watch(
        &self,
        socket: impl AsRawSource,
        event: Event,
        mode: PollMode,
    ) -> Result<(), Error> {
        // SAFETY: the caller sees to it that the socket is forgotten before it is closed.
        let added = unsafe { self.poller.add_with_mode(socket, event, mode) };
        added.map_err(|e| Error::Thread(e.to_string()))
    }

    pub(crate) fn forget(&self, socket: impl AsSource) {
        // A socket that is not watched any more is what is wanted.
        let _ = self.poller.delete(socket);
    }

    /// The stream is about to sleep; it must look for jobs once more before it does.
    pub(crate) fn going_to_sleep(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Tells of a job that was queued before.
    pub(crate) fn job_queued(&self) -> io::Result<()> {
        // Pairs with the fence in `going_to_sleep`: either this sees that the stream sleeps,
        // or the stream sees the job.
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            self.wake()
        } else {
            Ok(())
        }
    }

    /// Wakes the stream in any case.
    pub(crate) fn wake(&self) -> io::Result<()> {
        self.poller.notify()
    }
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
    /// The publisher is dropped: stop at once.
    pub(crate) abandoned: AtomicBool,
}

/// Whether streams have buffers of their own for what they keep; where payload may go over xdp as
/// well, the pool has enough for that.
pub(crate) fn owns_kept(config: &Config) -> bool {
    config.mode == Mode::Tcp && config.ack == AckLevel::Committed
}

/// One stream, run by its own thread.
pub(crate) struct Stream {
    broker: String,
    socket: TcpStream,
    ends: Ends,
    ack: AckLevel,
    progress: ProgressClock,
    window: Window,
    /// Buffers that stand in for those that are kept until they are acked, so that the publisher
    /// gets as far ahead of the stream as if none were kept, and no farther than the CPU's cache.
    spares: Option<Vec<Payload>>,
    /// What another connection left; sent first.
    leftover: VecDeque<Filled>,
    replies: Replies,
    /// Keys for the tags of frames, if there are any, and the number of frames so far.
    keys: Option<Arc<PacketKeys>>,
    sealed: u64,
    /// The end frame is sent.
    ended: bool,
    /// The broker ended the stream because it was idle.
    was_idle: bool,
    account: Account,
    events: Events,
}

impl Stream {
    pub(crate) fn new(
        config: &Config,
        target: &Target,
        opened: Opened,
        ends: &Ends,
    ) -> Result<Self, Error> {
        let Opened {
            socket,
            offer,
            keys,
            ..
        } = opened;
        ends.waker
            .watch(&socket, Event::all(SOCKET), PollMode::Edge)?;
        let limit = (config.ack == AckLevel::Committed).then_some(config.in_flight);
        let mut account = Account::new(config, target.number);
        account.summary.path = Path::Tcp.name();
        Ok(Self {
            broker: target.broker.clone(),
            socket,
            ends: ends.clone(),
            ack: config.ack,
            progress: ProgressClock::new(config.timeout),
            window: Window::new(limit, offer.committed),
            spares: owns_kept(config).then(|| {
                let buffers = std::iter::repeat_with(|| Payload::with_capacity(config.batch_size));
                buffers.take(config.in_flight).collect()
            }),
            leftover: VecDeque::new(),
            replies: Replies::new(&target.broker, keys.clone()),
            keys,
            sealed: 0,
            ended: false,
            was_idle: false,
            account,
            events: Events::new(),
        })
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

    /// Sends until the publisher closes. A stream whose batches are acked can go on over another
    /// connection when this one ends too early; nothing tells how far one without acks has come.
    pub(crate) fn run(&mut self) -> Result<Outcome, Error> {
        match self.serve() {
            // A cancelled stream reports how far it got.
            Ok(()) | Err(Error::Failed) => {
                Ok(Outcome::Ended(Box::new(std::mem::take(&mut self.account))))
            }
            Err(Error::Lost { source, .. }) if self.ack == AckLevel::Committed => {
                Ok(Outcome::Moves(Box::new(self.leave(source.to_string()))))
            }
            Err(error) => Err(error),
        }
    }

    fn serve(&mut self) -> Result<(), Error> {
        while let Some(batch) = self.leftover.pop_front() {
            self.send(batch)?;
        }
        loop {
            match self.ends.jobs.try_recv() {
                Ok(Job::Batch(batch)) => {
                    self.account.sent(&batch);
                    if let Some(spare) = self.spares.as_mut().and_then(Vec::pop) {
                        self.ends.shared.pool.give_back(spare);
                    }
                    self.send(batch)?;
                }
                Ok(Job::Flush(done)) => self.account.flush(self.window.next_seq(), done),
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => self.wait_for_jobs()?,
            }
            self.take_replies()?;
            self.answer_flushes();
        }
        if self.ends.shared.abandoned.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.end()
    }

    fn leave(&mut self, reason: String) -> Leftover {
        let mut unacked = self.window.take_unacked();
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

    fn send(&mut self, batch: Filled) -> Result<(), Error> {
        let start = self.account.stages.now();
        let header = batch.header(self.window.next_seq());
        if !self.window.is_owed() {
            self.progress.restart(Instant::now());
        }
        let written = self.write_frame(&header, &batch.payload);
        // Kept also if the connection broke inside of it: the next one sends it again.
        if let Some(batch) = self.window.push(batch) {
            self.ends.shared.pool.give_back(batch.payload);
        }
        written?;
        let start = self.account.stages.lap(PublishStage::SendPayload, start);
        if self.window.is_full() {
            self.take_replies()?;
            while self.window.is_full() {
                self.wait(false)?;
                self.take_replies()?;
            }
            self.account.stages.lap(PublishStage::WaitAck, start);
        }
        Ok(())
    }

    /// Writes a frame, with its tag if it needs one; waits whenever the kernel has no room.
    fn write_frame(&mut self, header: &Header, payload: &[u8]) -> Result<(), Error> {
        let header = header.as_bytes();
        let Some(keys) = &self.keys else {
            return self.write_all(header, payload);
        };
        let tag = keys.seal_frame(self.sealed, &[header, payload]);
        self.sealed += 1;
        let mut sealed = [0; HEADER_LEN + TAG_LEN];
        sealed[..HEADER_LEN].copy_from_slice(header);
        sealed[HEADER_LEN..].copy_from_slice(&tag);
        self.write_all(&sealed, payload)
    }

    fn write_all(&mut self, header: &[u8], payload: &[u8]) -> Result<(), Error> {
        let mut sent = 0;
        while sent < header.len() + payload.len() {
            let (header, payload) = match sent.checked_sub(header.len()) {
                None => (&header[sent..], payload),
                Some(sent) => (&[][..], &payload[sent..]),
            };
            match (&self.socket).write_vectored(&[IoSlice::new(header), IoSlice::new(payload)]) {
                Ok(more) => {
                    sent += more;
                    self.progress.on_bytes(Instant::now(), more as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.take_replies()?;
                    self.wait(true)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.explain_loss(error)),
            }
        }
        Ok(())
    }

    /// Tells the broker that the stream is complete, and waits until all of it is acked.
    fn end(&mut self) -> Result<(), Error> {
        let start = self.account.stages.now();
        let header = Header::for_end(self.window.next_seq());
        if !self.window.is_owed() {
            self.progress.restart(Instant::now());
        }
        self.write_frame(&header, &[])?;
        self.ended = true;
        self.take_replies()?;
        while self.window.acked() < self.window.next_seq() {
            self.wait(false)?;
            self.take_replies()?;
        }
        self.account.stages.lap(PublishStage::WaitAck, start);
        self.answer_flushes();
        Ok(())
    }

    fn wait_for_jobs(&mut self) -> Result<(), Error> {
        self.ends.waker.going_to_sleep();
        let waited = if self.ends.jobs.is_empty() {
            self.wait(false)
        } else {
            Ok(())
        };
        self.ends.waker.awake();
        waited
    }

    /// Sleeps until the socket or the publisher has something new, or it is time to look around.
    /// The socket is watched for edges, so the caller has read until nothing was left, or written
    /// until there was no room.
    fn wait(&mut self, for_room: bool) -> Result<(), Error> {
        let io = |error: io::Error| Error::Thread(error.to_string());
        self.events.clear();
        self.ends
            .waker
            .poller
            .wait(&mut self.events, Some(LOOK))
            .map_err(io)?;
        let owed = for_room || self.ended || self.window.is_owed();
        if owed {
            let unacked = || self.window.unacked_messages();
            self.progress.check(Instant::now(), &self.broker, unacked)?;
        }
        if self.ends.shared.abandoned.load(Ordering::Relaxed) {
            return Err(Error::Failed);
        }
        Ok(())
    }

    /// Takes every reply that has come, without waiting.
    fn take_replies(&mut self) -> Result<(), Error> {
        loop {
            let got = match (&self.socket).read(self.replies.room()) {
                Ok(0) => return self.closed_by_broker(),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.lost(source)),
            };
            if let Some(reply) = self.replies.received(got)? {
                self.take_reply(reply)?;
            }
        }
    }

    fn take_reply(&mut self, reply: Parsed) -> Result<(), Error> {
        match reply {
            Parsed::Ack { committed, blocked } => {
                self.progress.on_heard(Instant::now(), blocked);
                self.account(committed)
            }
            Parsed::Error {
                committed,
                text_len,
                code,
            } => {
                let text = self.read_text(text_len);
                self.replies.verify(&text)?;
                self.account(committed)?;
                let text = foreign_bytes(&text);
                Err(self.ended_by_broker(code, text))
            }
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
            unacked: self.window.unacked_messages(),
            text,
        }
    }

    fn account(&mut self, committed: u64) -> Result<(), Error> {
        let before = self.window.acked();
        let acked = self.window.ack(committed).map_err(|source| Error::BadAck {
            broker: self.broker.clone(),
            source,
        })?;
        let batches = committed - before;
        if batches > 0 {
            self.progress.restart(Instant::now());
        }
        self.account
            .acked(batches, acked.messages, &self.ends.shared);
        let buffers = acked.batches.map(|batch| batch.payload);
        match &mut self.spares {
            Some(spares) => spares.extend(buffers),
            None => self.ends.shared.pool.give_back_all(buffers),
        }
        Ok(())
    }

    /// Reads the text behind an error; what does not come in time is not waited for.
    fn read_text(&mut self, len: usize) -> Vec<u8> {
        let mut text = vec![0; len];
        let mut filled = 0;
        let patience = Instant::now() + Duration::from_secs(1);
        while filled < len && Instant::now() < patience {
            match (&self.socket).read(&mut text[filled..]) {
                Ok(0) => break,
                Ok(got) => filled += got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.wait(false).is_err() {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        text.truncate(filled);
        text
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
    fn explain_loss(&mut self, source: io::Error) -> Error {
        match self.take_replies() {
            Err(told @ (Error::Ended { .. } | Error::Lost { .. } | Error::Forged { .. })) => told,
            _ => self.lost(source),
        }
    }

    fn lost(&self, source: io::Error) -> Error {
        let unacked = self.window.unacked_messages();
        Error::Lost {
            broker: self.broker.clone(),
            unacked,
            source,
        }
    }

    fn answer_flushes(&mut self) {
        let done = match self.ack {
            AckLevel::Committed => self.window.acked(),
            AckLevel::None => self.window.next_seq(),
        };
        self.account.answer_flushes(done);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.ends.waker.forget(&self.socket);
    }
}
