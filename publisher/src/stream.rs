//! One stream: a thread that sends batches over its connection and takes the acks.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use penstock_dataplane::profile::StageTimer;
use penstock_dataplane::wire::batch::Header;
use penstock_dataplane::wire::handshake::AckLevel;
use penstock_dataplane::wire::message::{Messages, OVERHEAD};
use penstock_dataplane::wire::reply::{Parsed, REPLY_LEN, Reply};
use polling::{Event, Events, PollMode, Poller};
use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, IntoBytes};

use crate::pool::Pool;
use crate::summary::{PublishStage, StreamSummary};
use crate::window::Window;
use crate::{Config, Error};

/// Key of the socket in the poller.
const SOCKET: usize = 0;
/// How often a waiting stream looks whether its broker still lives.
const LOOK: Duration = Duration::from_millis(100);

/// A batch that is ready to go.
#[derive(Debug)]
pub(crate) struct Filled {
    pub(crate) payload: Vec<u8>,
    pub(crate) messages: u32,
}

/// What a stream is asked to do.
#[derive(Debug)]
pub(crate) enum Job {
    Batch(Filled),
    /// Answer once everything before is acked (at ack level 0: sent).
    Flush(Sender<()>),
}

/// Wakes a stream that sleeps because it has no job; costs nothing while it is busy.
#[derive(Debug)]
pub(crate) struct Waker {
    poller: Poller,
    sleeping: AtomicBool,
}

impl Waker {
    /// Tells of a job that was queued before.
    pub(crate) fn job_queued(&self) -> io::Result<()> {
        // Pairs with the fence in `Stream::wait_for_jobs`: either this sees that the stream sleeps,
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
    pub(crate) acked_messages: AtomicU64,
    /// The publisher is dropped: stop at once.
    pub(crate) abandoned: AtomicBool,
}

/// One stream, run by its own thread.
pub(crate) struct Stream {
    pub(crate) broker: String,
    pub(crate) socket: TcpStream,
    pub(crate) waker: Arc<Waker>,
    pub(crate) jobs: Receiver<Job>,
    pub(crate) shared: Arc<Shared>,
    ack: AckLevel,
    timeout: Duration,
    window: Window,
    flushes: Vec<(u64, Sender<()>)>,
    reply: [u8; REPLY_LEN],
    reply_filled: usize,
    /// The end frame is sent.
    ended: bool,
    last_life: Instant,
    stages: StageTimer<PublishStage>,
    summary: StreamSummary,
    digest: Option<Sha256>,
    events: Events,
}

impl Stream {
    pub(crate) fn new(
        config: &Config,
        broker: &str,
        number: u32,
        socket: TcpStream,
        jobs: Receiver<Job>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let waker = Arc::new(Waker {
            poller: Poller::new()?,
            sleeping: AtomicBool::new(false),
        });
        // SAFETY: the socket is deleted from the poller in `drop`, before it is closed.
        unsafe {
            waker
                .poller
                .add_with_mode(&socket, Event::all(SOCKET), PollMode::Edge)?
        };
        Ok(Self {
            broker: broker.to_owned(),
            socket,
            waker,
            jobs,
            shared,
            ack: config.ack,
            timeout: config.timeout,
            window: Window::new((config.ack == AckLevel::Committed).then_some(config.in_flight)),
            flushes: Vec::new(),
            reply: [0; REPLY_LEN],
            reply_filled: 0,
            ended: false,
            last_life: Instant::now(),
            stages: StageTimer::default(),
            summary: StreamSummary {
                stream: number,
                ..StreamSummary::default()
            },
            digest: config.digest.then(Sha256::new),
            events: Events::new(),
        })
    }

    /// Sends until the publisher closes; returns what was done, and the time per stage.
    pub(crate) fn run(mut self) -> Result<(StreamSummary, StageTimer<PublishStage>), Error> {
        loop {
            match self.jobs.try_recv() {
                Ok(Job::Batch(batch)) => self.send(batch)?,
                Ok(Job::Flush(done)) => self.flushes.push((self.window.next_seq(), done)),
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => self.wait_for_jobs()?,
            }
            self.take_replies()?;
            self.answer_flushes();
        }
        if !self.shared.abandoned.load(Ordering::Relaxed) {
            self.end()?;
        }
        let digest = self.digest.take();
        self.summary.sha256 = digest.map(|digest| hex(&digest.finalize()));
        Ok((std::mem::take(&mut self.summary), self.stages.clone()))
    }

    fn send(&mut self, batch: Filled) -> Result<(), Error> {
        let start = self.stages.now();
        let Filled { payload, messages } = batch;
        let header = Header::for_batch(self.window.next_seq(), messages, &payload);
        let start = self.stages.lap(PublishStage::BufferWrite, start);
        if let Some(digest) = &mut self.digest {
            for message in Messages::new(&payload).filter_map(Result::ok) {
                digest.update(message);
                digest.update(b"\n");
            }
        }
        self.summary.batches += 1;
        self.summary.messages += u64::from(messages);
        self.summary.payload_bytes += (payload.len() - messages as usize * OVERHEAD) as u64;
        self.window.push(messages);
        self.last_life = Instant::now();
        self.write_all(header.as_bytes(), &payload)?;
        // The kernel has it; what the cache still holds of the buffer is used for the next batch.
        self.shared.pool.give_back(payload);
        let start = self.stages.lap(PublishStage::SendPayload, start);
        if self.window.is_full() {
            self.take_replies()?;
            while self.window.is_full() {
                self.wait(false)?;
                self.take_replies()?;
            }
            self.stages.lap(PublishStage::WaitAck, start);
        }
        Ok(())
    }

    /// Writes a frame, waiting as often as the kernel asks for it.
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
                    self.last_life = Instant::now();
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
        let start = self.stages.now();
        let header = Header::for_end(self.window.next_seq());
        self.write_all(header.as_bytes(), &[])?;
        self.ended = true;
        self.take_replies()?;
        while self.window.acked() < self.window.next_seq() {
            self.wait(false)?;
            self.take_replies()?;
        }
        self.stages.lap(PublishStage::WaitAck, start);
        self.answer_flushes();
        Ok(())
    }

    fn wait_for_jobs(&mut self) -> Result<(), Error> {
        self.waker.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let waited = if self.jobs.is_empty() {
            self.wait(false)
        } else {
            Ok(())
        };
        self.waker.sleeping.store(false, Ordering::Relaxed);
        waited
    }

    /// Sleeps until the socket or the publisher has something new, or it is time to look around.
    /// The socket is watched for edges, so the caller has read until nothing was left, or written
    /// until there was no room.
    fn wait(&mut self, for_room: bool) -> Result<(), Error> {
        let io = |error: io::Error| Error::Thread(error.to_string());
        self.events.clear();
        self.waker
            .poller
            .wait(&mut self.events, Some(LOOK))
            .map_err(io)?;
        let owed = for_room || self.ended || self.window.is_owed();
        if owed && self.last_life.elapsed() > self.timeout {
            return Err(Error::Silent {
                broker: self.broker.clone(),
                timeout: self.timeout,
                unacked: self.window.unacked_messages(),
            });
        }
        if self.shared.abandoned.load(Ordering::Relaxed) {
            return Err(Error::Failed);
        }
        Ok(())
    }

    /// Takes every reply that has come, without waiting.
    fn take_replies(&mut self) -> Result<(), Error> {
        loop {
            let room = &mut self.reply[self.reply_filled..];
            match (&self.socket).read(room) {
                Ok(0) => return self.closed_by_broker(),
                Ok(got) => self.reply_filled += got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.lost(source)),
            }
            if self.reply_filled == REPLY_LEN {
                self.reply_filled = 0;
                self.last_life = Instant::now();
                self.take_reply()?;
            }
        }
    }

    fn take_reply(&mut self) -> Result<(), Error> {
        let reply = Reply::read_from_bytes(&self.reply).expect("a reply is plain bytes");
        let parsed = reply.parse().map_err(|source| Error::BadReply {
            broker: self.broker.clone(),
            source,
        })?;
        match parsed {
            Parsed::Ack { committed, .. } => self.account(committed),
            Parsed::Error {
                committed,
                text_len,
                ..
            } => {
                self.account(committed)?;
                let text = self.read_text(text_len);
                let unacked = self.window.unacked_messages();
                Err(Error::Ended {
                    broker: self.broker.clone(),
                    unacked,
                    text,
                })
            }
        }
    }

    fn account(&mut self, committed: u64) -> Result<(), Error> {
        let messages = self.window.ack(committed).map_err(|source| Error::BadAck {
            broker: self.broker.clone(),
            source,
        })?;
        self.summary.messages_acked += messages;
        self.shared
            .acked_messages
            .fetch_add(messages, Ordering::Relaxed);
        Ok(())
    }

    /// Reads the text behind an error; what does not come in time is not waited for.
    fn read_text(&mut self, len: usize) -> String {
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
        String::from_utf8_lossy(&text[..filled]).into_owned()
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
            Err(told @ Error::Ended { .. }) => told,
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
        if self.flushes.is_empty() {
            return;
        }
        let done = match self.ack {
            AckLevel::Committed => self.window.acked(),
            AckLevel::None => self.window.next_seq(),
        };
        self.flushes.retain(|(seq, waiter)| {
            let waits = *seq > done;
            if !waits {
                // Nobody may be listening any more, which is as well.
                let _ = waiter.send(());
            }
            waits
        });
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A socket that is not watched any more is what is wanted.
        let _ = self.waker.poller.delete(&self.socket);
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string");
        text
    })
}
