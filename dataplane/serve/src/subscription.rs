//! One remote subscriber: its requests in, its deliveries out.

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
const TURN: u64 = 1 << 20;
/// Interval of the signs of life to a subscriber that has everything.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// `TCP_USER_TIMEOUT` (tcp(7)): a subscriber that acknowledges nothing for this long is gone. A registered one would hold
/// up publishers until then.
const UNACKED_TIMEOUT: Duration = Duration::from_secs(30);
/// `TCP_NOTSENT_LOWAT` (tcp(7)), bytes: what waits in the kernel beyond what the window allows.
const UNSENT: u32 = 256 << 10;

/// What a subscription waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Requests of its subscriber: the first one, or more credit.
    Request,
    /// Room in its socket.
    Writable,
    /// Batches in the log.
    Batches,
    /// Nothing: others have their turn.
    Yield,
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
    /// As of its latest request.
    progress: Progress,
    /// When to tell again that it has everything; `None` while it does not know.
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
        stats: &mut ServeStats,
        copy: &mut Vec<u8>,
    ) -> Result<Need, CloseReason> {
        self.read_requests()?;
        let turn_ends = self.outbox.total() + TURN;
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
            let need = reading.fill(now, &mut self.outbox, &self.permit, stats, copy);
            if self.outbox.is_empty() {
                return Ok(need);
            }
        }
    }

    /// Time-based checks; about once a second.
    pub(crate) fn tick(&mut self, now: Instant) -> Result<(), CloseReason> {
        if let Some(lost) = self.log.lost() {
            return Err(CloseReason::new(lost.fault(), &lost.reason));
        }
        if !matches!(self.log.check_file(), Ok(FileState::Whole)) {
            let text = "the topic's log was deleted, replaced or truncated";
            return Err(CloseReason::new(Fault::LogLost, text));
        }
        if self.permit.is_revoked() {
            let text = "nothing was delivered for a while, and another subscriber needs the place: reconnect";
            return Err(CloseReason::new(Fault::Stalled, text));
        }
        match &mut self.stage {
            Stage::Starting { deadline } if now >= *deadline => {
                let text = "no request to start arrived in time";
                Err(CloseReason::new(Fault::Stalled, text))
            }
            Stage::Starting { .. } => Ok(()),
            Stage::Reading(reading) => {
                if reading.next_heartbeat.is_some_and(|at| now >= at) && self.outbox.is_empty() {
                    reading.tell_caught_up(now, &mut self.outbox);
                }
                Ok(())
            }
        }
    }

    /// Says why it ends, as far as the socket takes it without waiting.
    pub(crate) fn close(mut self, reason: &CloseReason) {
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

    fn read_requests(&mut self) -> Result<(), CloseReason> {
        loop {
            let got = match (&self.socket).read(self.requests.missing()) {
                Ok(0) => return Err(CloseReason::Left),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            if let Some(request) = self.requests.advance(got) {
                self.apply(&request?)?;
            }
        }
    }

    fn apply(&mut self, request: &Request) -> Result<(), CloseReason> {
        let protocol = |text: &str| Err(CloseReason::new(Fault::Protocol, text));
        match (&mut self.stage, request) {
            (Stage::Starting { .. }, Request::Start(start)) => {
                let reading = Reading::start(&self.log, start)?;
                self.stage = Stage::Reading(reading);
                Ok(())
            }
            (Stage::Reading(reading), Request::Progress(progress)) => reading.apply(*progress),
            (Stage::Starting { .. }, Request::Progress(_)) => {
                protocol("the first frame of a subscriber must say where to start")
            }
            (Stage::Reading(_), Request::Start(_)) => {
                protocol("a subscriber can start once in a connection")
            }
        }
    }
}

impl Reading {
    fn start(log: &Arc<Log>, start: &delivery::Start) -> Result<Self, CloseReason> {
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
            next_heartbeat: None,
        })
    }

    fn apply(&mut self, progress: Progress) -> Result<(), CloseReason> {
        let is_monotonic = progress.needed_from >= self.progress.needed_from
            && progress.credit >= self.progress.credit;
        if !is_monotonic || progress.needed_from > self.spans.next_index() {
            let text = "credit and position of a subscriber never fall, and its position does not pass what was sent";
            return Err(CloseReason::new(Fault::Protocol, text));
        }
        self.progress = progress;
        self.spans.release(progress.needed_from);
        Ok(())
    }

    /// Queues deliveries until the outbox is full; returns what it needs if it is not.
    fn fill(
        &mut self,
        now: Instant,
        outbox: &mut Outbox,
        permit: &StreamPermit,
        stats: &mut ServeStats,
        copy: &mut Vec<u8>,
    ) -> Need {
        while !outbox.is_full() {
            if outbox.total() >= self.progress.credit {
                return Need::Request;
            }
            match self.spans.next() {
                Ok(Some(span)) => {
                    self.next_heartbeat = None;
                    permit.note_batch();
                    stats.batches += 1;
                    stats.payload_bytes += u64::from(span.descriptor.payload_len);
                    self.push(&span, outbox, stats, copy);
                }
                Ok(None) => {
                    if self.next_heartbeat.is_none() {
                        self.tell_caught_up(now, outbox);
                    }
                    return Need::Batches;
                }
                Err(error) => {
                    self.next_heartbeat = None;
                    let delivery = self.what_was_skipped(error, stats);
                    outbox.push(&delivery, &[]);
                }
            }
        }
        Need::Yield
    }

    fn push(&self, span: &Span, outbox: &mut Outbox, stats: &mut ServeStats, copy: &mut Vec<u8>) {
        let batch = Delivery::Batch(info(span));
        if span.descriptor.payload_len > COPY_LIMIT && !outbox.has_keys() {
            stats.sent_from_file += 1;
            return outbox.push_from_file(&batch, span);
        }
        if self.spans.copy_payload(span, copy) {
            return outbox.push(&batch, copy);
        }
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
