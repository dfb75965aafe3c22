//! One remote subscriber: reads its requests and sends its deliveries.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use penstock_ingest::session::AcceptedSubscriber;
use penstock_ingest::session::permits::StreamPermit;
use penstock_log::{FileState, Log, OpenError, ReadError, Span, SpanReader, Start};
use penstock_wire::delivery::{self, BatchInfo, Delivery, Progress, Request, StartAt};
use penstock_wire::reply::Fault;
use socket2::SockRef;
use thiserror::Error;

use super::outbox::Outbox;
use super::request_reader::{RequestError, RequestReader};
use super::stats::ServeStats;

/// Payload up to this length is copied: that takes less time than the system call that sends it from the file.
const COPY_LIMIT: u32 = 16 << 10;
/// Bytes after which other subscribers get their turn.
const TURN_BYTES: u64 = 1 << 20;
/// Requests after which other subscribers get their turn.
const TURN_REQUESTS: usize = 64;
/// Interval of heartbeats to a subscriber that has caught up.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// `TCP_USER_TIMEOUT` (tcp(7)): a subscriber that acknowledges nothing for this long counts as lost. A registered one
/// can hold up publishers until then.
const UNACKED_TIMEOUT: Duration = Duration::from_secs(30);
/// `TCP_NOTSENT_LOWAT` (tcp(7)), bytes: limit of unsent data in the kernel.
const UNSENT: u32 = 256 << 10;

/// Error text for a subscriber that may read, but not register.
const NOT_REGISTERED: &str = "this subscriber may not register, because publishers would wait for it: read without --register, or add register:TOPIC to its key's line in the broker's --auth-keys file (without keys: start the broker with --remote-registration any)";

/// Maximum bytes that all outboxes together hold for large batches. These are copied only if they need a tag.
const MAX_HELD: usize = 64 << 20;

/// What subscriptions use of their worker.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    pub(crate) stats: ServeStats,
    /// Buffer for the payload of a batch that is copied.
    copy: Vec<u8>,
    /// Sum of [`Outbox::held`] of all subscriptions.
    held: usize,
}

/// What a subscription waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Requests of its subscriber: the first one, or more credit.
    Request,
    /// Room in its socket.
    Writable,
    /// Batches in the log.
    Batches,
    /// Nothing; it yields to the others.
    Yield,
    /// Memory that other subscribers hold.
    Memory,
}

/// Why a subscription ends.
#[derive(Debug, Error)]
pub(crate) enum CloseReason {
    #[error("the subscriber closed the connection")]
    Left,
    #[error("the connection was lost: {0}")]
    Lost(#[from] io::Error),
    #[error("{text}")]
    Fault { fault: Fault, text: String },
}

impl CloseReason {
    fn new(fault: Fault, text: impl ToString) -> Self {
        let text = text.to_string();
        Self::Fault { fault, text }
    }
}

impl From<RequestError> for CloseReason {
    fn from(error: RequestError) -> Self {
        let fault = match error {
            RequestError::Tag => Fault::Authentication,
            RequestError::Invalid(_) => Fault::Protocol,
        };
        Self::new(fault, error)
    }
}

/// A subscriber that is being served.
#[derive(Debug)]
pub(crate) struct Subscription {
    pub(crate) socket: TcpStream,
    pub(crate) peer: SocketAddr,
    pub(crate) topic: String,
    log: Arc<Log>,
    permit: StreamPermit,
    may_register: bool,
    requests: RequestReader,
    outbox: Outbox,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The subscriber has not said yet where to start.
    Starting {
        deadline: Instant,
    },
    Reading(Reading),
}

#[derive(Debug)]
struct Reading {
    spans: SpanReader,
    /// Credit and position in its latest request.
    progress: Progress,
    /// When its position last rose, or publishers did not wait for it.
    progressed: Instant,
    /// When the next *caught up* is due; `None` if none was sent since the last batch.
    next_heartbeat: Option<Instant>,
}

impl Subscription {
    /// A subscription whose first request must arrive before `deadline`.
    pub(crate) fn new(accepted: AcceptedSubscriber, deadline: Instant) -> io::Result<Self> {
        let AcceptedSubscriber {
            socket,
            peer,
            topic,
            log,
            keys,
            permit,
            may_register,
        } = accepted;
        let options = SockRef::from(&socket);
        options.set_tcp_user_timeout(Some(UNACKED_TIMEOUT))?;
        options.set_tcp_notsent_lowat(UNSENT)?;
        Ok(Self {
            requests: RequestReader::new(keys.clone()),
            outbox: Outbox::new(keys),
            stage: Stage::Starting { deadline },
            socket,
            peer,
            topic,
            log,
            permit,
            may_register,
        })
    }

    /// The log that it reads.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Whether there are batches for it. False until it has started.
    pub(crate) fn has_batches(&self) -> bool {
        matches!(&self.stage, Stage::Reading(reading) if !reading.spans.is_caught_up())
    }

    /// Does what can be done without waiting.
    pub(crate) fn drive(
        &mut self,
        now: Instant,
        resources: &mut Resources,
    ) -> Result<Need, CloseReason> {
        resources.held -= self.outbox.held();
        let need = self.send(now, resources);
        resources.held += self.outbox.held();
        need
    }

    fn send(&mut self, now: Instant, resources: &mut Resources) -> Result<Need, CloseReason> {
        self.read_requests(now)?;
        let turn_ends = self.outbox.total() + TURN_BYTES;
        loop {
            if !self.flush()? {
                return Ok(Need::Writable);
            }
            if self.outbox.total() >= turn_ends {
                return Ok(Need::Yield);
            }
            let Stage::Reading(reading) = &mut self.stage else {
                return Ok(Need::Request);
            };
            let need = reading.fill(now, &mut self.outbox, &self.permit, resources);
            if self.outbox.is_empty() {
                return Ok(need);
            }
        }
    }

    /// Time-based checks, about once a second. Fails for a registered subscriber that makes no progress for
    /// `reader_timeout` while it holds up publishers.
    pub(crate) fn tick(
        &mut self,
        now: Instant,
        reader_timeout: Duration,
    ) -> Result<(), CloseReason> {
        if let Some(lost) = self.log.lost() {
            return Err(CloseReason::new(lost.fault(), &lost.reason));
        }
        if !matches!(self.log.check_file(), Ok(FileState::Whole)) {
            let text = "the topic's log was deleted, replaced or truncated";
            return Err(CloseReason::new(Fault::LogLost, text));
        }
        if self.permit.is_revoked() {
            let text = "no batch was delivered for a while, and another subscriber needs the place: reconnect, or raise the broker's --max-subscribers or --max-share";
            return Err(CloseReason::new(Fault::Stalled, text));
        }
        match &mut self.stage {
            Stage::Starting { deadline } if now >= *deadline => {
                let text = "no request to start arrived in time";
                Err(CloseReason::new(Fault::Stalled, text))
            }
            Stage::Starting { .. } => Ok(()),
            Stage::Reading(reading) => {
                if reading.spans.holds_up() {
                    if now - reading.progressed >= reader_timeout {
                        let text = "this registered subscriber made no progress for the broker's --reader-timeout while publishers waited for it";
                        return Err(CloseReason::new(Fault::Stalled, text));
                    }
                } else {
                    reading.progressed = now;
                }
                let has_credit = self.outbox.total() < reading.progress.credit;
                let is_due = reading.next_heartbeat.is_some_and(|at| now >= at);
                if is_due && has_credit && self.outbox.is_empty() {
                    reading.tell_caught_up(now, &mut self.outbox);
                }
                Ok(())
            }
        }
    }

    /// Sends the reason, if the socket accepts it without blocking.
    pub(crate) fn close(mut self, reason: &CloseReason, resources: &mut Resources) {
        resources.held -= self.outbox.held();
        if let CloseReason::Fault { fault, text } = reason
            && !self.outbox.is_full()
        {
            self.outbox.push_error(*fault, text);
            // Best effort: a subscriber that takes nothing sees the connection close.
            let _ = self.outbox.flush(&self.socket, self.log.file());
        }
    }

    fn flush(&mut self) -> Result<bool, CloseReason> {
        let flushed = self.outbox.flush(&self.socket, self.log.file());
        flushed.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                CloseReason::new(Fault::LogLost, "the topic's log was truncated")
            }
            _ => CloseReason::Lost(error),
        })
    }

    fn read_requests(&mut self, now: Instant) -> Result<(), CloseReason> {
        // The poller reports what is left in the next round.
        for _ in 0..TURN_REQUESTS {
            let got = match (&self.socket).read(self.requests.missing()) {
                Ok(0) => return Err(CloseReason::Left),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            if let Some(request) = self.requests.advance(got) {
                self.apply(&request?, now)?;
            }
        }
        Ok(())
    }

    fn apply(&mut self, request: &Request, now: Instant) -> Result<(), CloseReason> {
        let protocol = |text: &str| Err(CloseReason::new(Fault::Protocol, text));
        match (&mut self.stage, request) {
            (Stage::Starting { .. }, Request::Start(start))
                if start.is_registered && !self.may_register =>
            {
                Err(CloseReason::new(Fault::Permission, NOT_REGISTERED))
            }
            (Stage::Starting { .. }, Request::Start(start)) => {
                let reading = Reading::start(&self.log, start, now)?;
                self.stage = Stage::Reading(reading);
                Ok(())
            }
            (Stage::Reading(reading), Request::Progress(progress)) => reading.apply(*progress, now),
            (Stage::Starting { .. }, Request::Progress(_)) => {
                protocol("the first frame of a subscriber must say where to start")
            }
            (Stage::Reading(_), Request::Start(_)) => {
                protocol("a subscriber must not start twice in a connection")
            }
        }
    }
}

impl Reading {
    fn start(log: &Arc<Log>, start: &delivery::Start, now: Instant) -> Result<Self, CloseReason> {
        let at = match start.at {
            StartAt::Oldest => Start::Oldest,
            StartAt::End => Start::End,
            StartAt::Index(index) => Start::Index(index),
            StartAt::Time(time) => Start::Time(time),
        };
        let spans = SpanReader::new(Arc::clone(log), at, start.is_registered);
        let spans = spans.map_err(|error| {
            let fault = match error {
                OpenError::Beyond { .. } => Fault::LogLost,
                _ => Fault::Protocol,
            };
            CloseReason::new(fault, error)
        })?;
        Ok(Self {
            progress: Progress {
                needed_from: spans.next_index(),
                credit: start.credit,
            },
            spans,
            progressed: now,
            next_heartbeat: None,
        })
    }

    fn apply(&mut self, progress: Progress, now: Instant) -> Result<(), CloseReason> {
        let is_monotonic = progress.needed_from >= self.progress.needed_from
            && progress.credit >= self.progress.credit;
        if !is_monotonic || progress.needed_from > self.spans.next_index() {
            let text = "credit and position of a subscriber must not decrease, and its position must not exceed the next batch";
            return Err(CloseReason::new(Fault::Protocol, text));
        }
        if progress.needed_from > self.progress.needed_from {
            self.progressed = now;
        }
        self.progress = progress;
        self.spans.release(progress.needed_from);
        Ok(())
    }

    /// Queues deliveries until the outbox is full, or something else is needed first; returns what that is.
    fn fill(
        &mut self,
        now: Instant,
        outbox: &mut Outbox,
        permit: &StreamPermit,
        resources: &mut Resources,
    ) -> Need {
        while !outbox.is_full() {
            if outbox.total() >= self.progress.credit {
                return Need::Request;
            }
            if outbox.has_keys() && resources.held > 0 && self.exceeds_memory(resources.held) {
                return Need::Memory;
            }
            match self.spans.next() {
                Ok(Some(span)) => {
                    self.next_heartbeat = None;
                    permit.note_batch();
                    self.push(&span, outbox, resources);
                }
                Ok(None) => {
                    if self.next_heartbeat.is_none() {
                        self.tell_caught_up(now, outbox);
                    }
                    return Need::Batches;
                }
                Err(error) => {
                    self.next_heartbeat = None;
                    let delivery = self.what_was_skipped(error, &mut resources.stats);
                    outbox.push(&delivery, &[]);
                }
            }
        }
        Need::Yield
    }

    /// Whether a copy of the next batch would exceed [`MAX_HELD`].
    fn exceeds_memory(&self, held: usize) -> bool {
        let len = self.spans.next_len().filter(|len| *len > COPY_LIMIT);
        len.is_some_and(|len| held + len as usize > MAX_HELD)
    }

    fn push(&self, span: &Span, outbox: &mut Outbox, resources: &mut Resources) {
        let Resources { stats, copy, .. } = resources;
        let batch = Delivery::Batch(info(span));
        let is_large = span.descriptor.payload_len > COPY_LIMIT;
        let from_file = is_large && !outbox.has_keys() && !self.spans.is_endangered(span);
        if from_file {
            stats.sent_from_file += 1;
            outbox.push_from_file(&batch, span);
        } else if self.spans.copy_payload(span, copy) {
            outbox.push(&batch, copy);
        } else {
            return self.push_overwritten(span, outbox, stats);
        }
        stats.batches += 1;
        stats.payload_bytes += u64::from(span.descriptor.payload_len);
    }

    fn push_overwritten(&self, span: &Span, outbox: &mut Outbox, stats: &mut ServeStats) {
        let messages = span.descriptor.messages.into();
        stats.lost_batches += 1;
        let lost = Delivery::Lost {
            next: span.index + 1,
            batches: 1,
            messages,
        };
        outbox.push(&lost, &[]);
    }

    fn what_was_skipped(&self, error: ReadError, stats: &mut ServeStats) -> Delivery {
        match error {
            ReadError::Lapped { batches, messages } => {
                stats.lost_batches += batches;
                Delivery::Lost {
                    next: self.spans.next_index(),
                    batches,
                    messages,
                }
            }
            ReadError::Damaged { index } => Delivery::Damaged { index },
            ReadError::Evicted => Delivery::Evicted,
        }
    }

    fn tell_caught_up(&mut self, now: Instant, outbox: &mut Outbox) {
        let next = self.spans.next_index();
        outbox.push(&Delivery::CaughtUp { next }, &[]);
        self.next_heartbeat = Some(now + HEARTBEAT);
    }
}

fn info(span: &Span) -> BatchInfo {
    let descriptor = &span.descriptor;
    BatchInfo {
        index: span.index,
        session: descriptor.session,
        stream: descriptor.stream,
        batch_seq: descriptor.batch_seq,
        messages: descriptor.messages,
        payload_len: descriptor.payload_len,
        checksum: descriptor.checksum,
        arrival_unix_ns: descriptor.arrival_unix_ns,
    }
}
