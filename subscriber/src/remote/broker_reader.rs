//! The thread that reads one broker: connects, asks, receives, and connects again when the connection is lost.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use penstock_client::{ClientHandshake, happy_eyeballs};
use penstock_log::ChecksumMismatch;
use penstock_process::text::{foreign, foreign_bytes};
use penstock_runtime::address::resolve;
use penstock_runtime::poison::lock;
use penstock_wire::delivery::{BatchInfo, Delivery, StartAt};
use penstock_wire::handshake::{Offer, Purpose};
use penstock_wire::reply::Fault;
use penstock_wire::{batch, message};
use socket2::{SockRef, TcpKeepalive};
use tracing::{info, warn};

use super::deliveries::{Arrived, BadDelivery, Deliveries, Payload};
use super::flow::Flow;
use super::{Error, LogPosition, RemoteConfig};

/// How often a thread that receives nothing checks whether the broker is still there.
const TICK: Duration = Duration::from_millis(500);
/// First and longest pause between attempts to connect; each failure doubles it.
const PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Connections in a row that may end with a bad delivery.
const MAX_BAD: u32 = 3;

/// What a thread reports of its broker.
#[derive(Debug)]
pub(super) enum News {
    /// A connection is open, to the log with this identity. `is_new_log`: the broker has made it anew.
    Connected {
        log: u64,
        is_new_log: bool,
    },
    Disconnected(Instant),
    Batch {
        info: BatchInfo,
        payload: Payload,
        bytes: u64,
    },
    /// A batch came twice with other bytes than its publisher sent.
    Corrupt {
        mismatch: ChecksumMismatch,
        bytes: u64,
    },
    Lost {
        next: u64,
        batches: u64,
        messages: u64,
        bytes: u64,
    },
    Damaged {
        index: u64,
        bytes: u64,
    },
    CaughtUp {
        next: u64,
        at: Instant,
        bytes: u64,
    },
    Evicted {
        bytes: u64,
    },
    Failed(Error),
}

/// Asks threads to end.
#[derive(Debug, Default)]
pub(super) struct Stop {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    pub(super) fn set(&self) {
        *lock(&self.is_set) = true;
        self.changed.notify_all();
    }

    fn is_set(&self) -> bool {
        *lock(&self.is_set)
    }

    /// Sleeps, unless the threads are to end.
    fn sleep(&self, time: Duration) {
        let is_set = lock(&self.is_set);
        let _unused = self.changed.wait_timeout_while(is_set, time, |set| !*set);
    }
}

/// How a connection ended.
enum Ended {
    Stopped,
    /// Another attempt may succeed.
    Lost(String),
    /// What arrived is wrong.
    Bad(BadDelivery),
    /// As [`Self::Bad`], in a way that only this text tells.
    Wrong(String),
    /// A batch is requested again: it may have been overwritten while it was sent.
    AskAgain(String),
    Failed(Error),
}

/// The thread of one broker.
pub(super) struct BrokerReader {
    pub(super) number: usize,
    pub(super) broker: String,
    pub(super) config: Arc<RemoteConfig>,
    pub(super) flow: Arc<Flow>,
    pub(super) news: Sender<(usize, News)>,
    pub(super) stop: Arc<Stop>,
    /// Where to start if there is no position.
    pub(super) start: StartAt,
    /// The next batch, once one was seen.
    pub(super) position: Option<LogPosition>,
    /// Identity of the log, as the broker told it; 0 if it did not.
    pub(super) log: u64,
    pub(super) progress: Attempts,
}

/// What happened since the last delivery.
pub(super) struct Attempts {
    was_connected: bool,
    since: Instant,
    failures: u32,
    bad: u32,
    /// The batch that was asked for again.
    asked_again: Option<u64>,
    /// Batches that were asked for again since the last whole one.
    asked: u32,
}

impl Default for Attempts {
    fn default() -> Self {
        Self {
            was_connected: false,
            since: Instant::now(),
            failures: 0,
            bad: 0,
            asked_again: None,
            asked: 0,
        }
    }
}

/// Errors that the same request would meet again.
const FINAL: [u16; 3] = [
    Fault::Protocol as u16,
    Fault::Authentication as u16,
    Fault::Permission as u16,
];

/// Reports that a thread has ended without its own decision.
struct ReportPanic(Sender<(usize, News)>, usize);

impl Drop for ReportPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = Error::Thread("a thread that reads a broker panicked".to_owned());
            // Fails if the subscriber was dropped.
            let _ = self.0.send((self.1, News::Failed(error)));
        }
    }
}

impl BrokerReader {
    /// Reads until the subscriber is dropped, or the broker cannot be read.
    pub(super) fn run(mut self) {
        let _report = ReportPanic(self.news.clone(), self.number);
        loop {
            let ended = match self.read_connection() {
                Ok(never) => match never {},
                Err(ended) => ended,
            };
            self.flow.end();
            if self.stop.is_set() {
                return;
            }
            if let Err(error) = self.on_ended(ended) {
                self.report(News::Failed(error));
                return;
            }
        }
    }

    /// Waits before the next attempt, or says why there is none.
    fn on_ended(&mut self, ended: Ended) -> Result<(), Error> {
        let broker = self.broker.clone();
        self.report(News::Disconnected(Instant::now()));
        let reason = match ended {
            Ended::Stopped => return Ok(()),
            Ended::Failed(error) => return Err(error),
            Ended::AskAgain(reason) => {
                // At once, unless no batch was whole since: the log is then overwritten faster than it is read.
                match self.progress.asked {
                    0 => warn!(broker, "{reason}; the batch is requested again"),
                    asked => self.stop.sleep(pause(asked - 1, fastrand::f64())),
                }
                self.progress.asked = self.progress.asked.saturating_add(1);
                return Ok(());
            }
            Ended::Lost(reason) => reason,
            Ended::Bad(bad) if self.is_forged_again(bad) => return Err(Error::Forged { broker }),
            Ended::Bad(bad) => self.count_bad(bad.to_string())?,
            Ended::Wrong(reason) => self.count_bad(reason)?,
        };
        let progress = &mut self.progress;
        if progress.failures == 0 {
            progress.since = Instant::now();
        }
        let limit = match progress.was_connected {
            true => self.config.reconnect_for,
            false => self.config.wait,
        };
        let waited = progress.since.elapsed();
        if waited >= limit {
            return Err(Error::Unreachable {
                broker,
                reason,
                waited,
            });
        }
        if progress.failures == 0 {
            warn!(broker, "{reason}; trying again");
        }
        let pause = pause(progress.failures, fastrand::f64());
        progress.failures = progress.failures.saturating_add(1);
        self.stop.sleep(pause.min(limit - waited));
        Ok(())
    }

    fn count_bad(&mut self, reason: String) -> Result<String, Error> {
        self.progress.bad += 1;
        match self.progress.bad < MAX_BAD {
            true => Ok(reason),
            false => Err(Error::BadDelivery {
                broker: self.broker.clone(),
                reason,
            }),
        }
    }

    fn report(&self, news: News) {
        // Fails if the subscriber was dropped.
        let _ = self.news.send((self.number, news));
    }

    fn read_connection(&mut self) -> Result<std::convert::Infallible, Ended> {
        if self.stop.is_set() {
            return Err(Ended::Stopped);
        }
        let lost = |error: io::Error| Ended::Lost(error.to_string());
        let (socket, mut deliveries) = self.open()?;
        socket.set_read_timeout(Some(TICK)).map_err(lost)?;
        let mut arrived = Vec::new();
        let mut silent = Duration::ZERO;
        loop {
            match { &socket }.read_vectored(&mut deliveries.room()) {
                Ok(0) => return Err(Ended::Lost("the broker closed the connection".to_owned())),
                Ok(count) => {
                    silent = Duration::ZERO;
                    let flow = &self.flow;
                    let credit = flow.credit();
                    let taken =
                        deliveries.on_received(count, credit, || flow.buffer(), &mut arrived);
                    let head = deliveries.head_len();
                    for arrived in arrived.drain(..) {
                        self.take(arrived, head)?;
                    }
                    taken.map_err(|bad| self.on_bad(bad))?;
                }
                Err(error) if is_timeout(&error) => {
                    // A broker without credit says nothing.
                    silent = match deliveries.received() >= self.flow.credit() {
                        true => Duration::ZERO,
                        false => silent + TICK,
                    };
                    if silent >= self.config.keepalive {
                        return Err(Ended::Lost(format!("no sign of life for {silent:.1?}")));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(lost(error)),
            }
            if self.stop.is_set() {
                return Err(Ended::Stopped);
            }
        }
    }

    /// A batch with a wrong tag may have been overwritten while it was sent, like one with a wrong checksum.
    fn on_bad(&mut self, bad: BadDelivery) -> Ended {
        match bad {
            BadDelivery::Forged { batch: Some(index) }
                if self.progress.asked_again != Some(index) =>
            {
                self.progress.asked_again = Some(index);
                Ended::AskAgain(format!("batch {index}: {bad}"))
            }
            bad => Ended::Bad(bad),
        }
    }

    fn is_forged_again(&self, bad: BadDelivery) -> bool {
        match bad {
            BadDelivery::Forged { batch: Some(_) } => true,
            BadDelivery::Forged { batch: None } => self.progress.bad > 0,
            _ => false,
        }
    }

    /// Connects, and requests the topic from the next batch on.
    fn open(&mut self) -> Result<(TcpStream, Deliveries), Ended> {
        let config = &self.config;
        let wait = config.connect_timeout;
        let deadline = Instant::now() + wait;
        let lost = |error: io::Error| {
            Ended::Lost(format!(
                "cannot connect: {error}; check that penstock-broker is running there, and the port"
            ))
        };
        let addresses = resolve(&self.broker, wait)
            .map_err(|error| Ended::Lost(foreign(error.reason()).to_string()))?;
        let socket = happy_eyeballs::connect(&addresses, wait).map_err(lost)?;
        socket.set_nodelay(true).map_err(lost)?;
        let keepalive = TcpKeepalive::new().with_time(config.keepalive);
        SockRef::from(&socket)
            .set_tcp_keepalive(&keepalive)
            .map_err(lost)?;
        let handshake = ClientHandshake {
            socket: &socket,
            deadline,
            topic: &config.topic,
            key: config.key.as_ref(),
            packet_auth: config.packet_auth,
        };
        let (offer, keys) = handshake.ask(&Purpose::Subscribe).map_err(|error| {
            match Error::from_handshake(&self.broker, error) {
                Ok(error) => Ended::Failed(error),
                Err(reason) => Ended::Lost(reason),
            }
        })?;
        let max = offer.max_payload;
        if max > batch::MAX_PAYLOAD || (max as usize) < message::OVERHEAD {
            let reason = format!("the broker claims batches of up to {max} bytes");
            return Err(Ended::Wrong(reason));
        }
        let batches = offer.committed;
        match self.start {
            StartAt::Index(index) if self.position.is_none() && batches < index => {
                return Err(Ended::Failed(Error::Beyond {
                    broker: self.broker.clone(),
                    index,
                    batches,
                }));
            }
            _ => {}
        }
        let is_new_log = self.is_new_log(&offer);
        let at = match self.position {
            Some(_) if is_new_log => StartAt::Oldest,
            Some(position) => StartAt::Index(position.next),
            None => self.start,
        };
        let keys = keys.map(Arc::new);
        let sent = self.flow.start(&socket, keys.clone(), at, is_new_log);
        sent.map_err(lost)?;
        self.log = offer.session;
        if let Some(position) = &mut self.position {
            position.log = offer.session;
            if is_new_log {
                position.next = 0;
                self.progress.asked_again = None;
            }
        }
        if self.progress.failures > 0 {
            info!(broker = self.broker, "connected");
        }
        self.progress.was_connected = true;
        self.report(News::Connected {
            log: offer.session,
            is_new_log,
        });
        Ok((socket, Deliveries::new(max, keys)))
    }

    /// Whether the log is another one than the position is about.
    fn is_new_log(&self, offer: &Offer) -> bool {
        self.position.is_some_and(|position| {
            let (old, new) = (position.log, offer.session);
            offer.committed < position.next || (old != 0 && new != 0 && old != new)
        })
    }

    fn take(&mut self, arrived: Arrived, head: usize) -> Result<(), Ended> {
        let head = head as u64;
        let delivery = match arrived {
            Arrived::Batch(info, payload, intact) => {
                return self.take_batch(info, payload, intact, head);
            }
            Arrived::Error { code, text } => {
                let text = foreign_bytes(&text);
                if FINAL.contains(&code) {
                    let broker = self.broker.clone();
                    return Err(Ended::Failed(Error::Rejected { broker, text }));
                }
                return Err(Ended::Lost(format!(
                    "the broker ended the connection: {text}"
                )));
            }
            Arrived::Other(delivery) => delivery,
        };
        let before = self.position.map(|position| position.next);
        let news = match delivery {
            Delivery::Lost {
                next,
                batches,
                messages,
            } => {
                self.move_to(next)?;
                News::Lost {
                    next,
                    batches,
                    messages,
                    bytes: head,
                }
            }
            Delivery::Damaged { index } => {
                self.skip_to(index)?;
                self.move_to(index.saturating_add(1))?;
                News::Damaged { index, bytes: head }
            }
            Delivery::CaughtUp { next } => {
                self.skip_to(next)?;
                News::CaughtUp {
                    next,
                    at: Instant::now(),
                    bytes: head,
                }
            }
            Delivery::Evicted => News::Evicted { bytes: head },
            Delivery::Batch(_) | Delivery::Error { .. } => return Ok(()),
        };
        self.progress.failures = 0;
        let next = self.position.map(|position| position.next);
        self.flow.on_received(head, before.or(next).unwrap_or(0));
        self.report(news);
        Ok(())
    }

    fn take_batch(
        &mut self,
        info: BatchInfo,
        payload: Payload,
        intact: Result<(), ChecksumMismatch>,
        head: u64,
    ) -> Result<(), Ended> {
        self.skip_to(info.index)?;
        let bytes = head + u64::from(info.payload_len);
        let news = match intact {
            Ok(()) => {
                self.progress.asked = 0;
                News::Batch {
                    info,
                    payload,
                    bytes,
                }
            }
            Err(mismatch) if self.progress.asked_again != Some(info.index) => {
                self.progress.asked_again = Some(info.index);
                return Err(Ended::AskAgain(mismatch.to_string()));
            }
            Err(mismatch) => News::Corrupt { mismatch, bytes },
        };
        self.move_to(info.index.saturating_add(1))?;
        self.progress.failures = 0;
        self.progress.bad = 0;
        self.flow.on_received(bytes, info.index);
        self.report(news);
        Ok(())
    }

    /// The next batch has this index. Those before it that were neither delivered nor reported count as lost.
    fn skip_to(&mut self, index: u64) -> Result<(), Ended> {
        let expected = self.position.map_or(index, |position| position.next);
        self.move_to(index)?;
        if index > expected {
            self.report(News::Lost {
                next: index,
                batches: index - expected,
                messages: 0,
                bytes: 0,
            });
        }
        Ok(())
    }

    fn move_to(&mut self, next: u64) -> Result<(), Ended> {
        let log = self.log;
        let position = self.position.get_or_insert(LogPosition { next, log });
        if next < position.next {
            return Err(Ended::Wrong(format!(
                "the broker goes back from batch {} to batch {next}",
                position.next
            )));
        }
        position.next = next;
        Ok(())
    }
}

/// Pause after this many failures in a row; `random` is from 0 to 1.
fn pause(failures: u32, random: f64) -> Duration {
    let pause = PAUSE.saturating_mul(1 << failures.min(16)).min(MAX_PAUSE);
    pause.mul_f64(0.5 + random / 2.0)
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_differ() {
        assert_eq!(pause(0, 1.0), PAUSE);
        assert_eq!(pause(1, 0.0), PAUSE);
        assert_eq!(pause(u32::MAX, 1.0), MAX_PAUSE);
        assert!(pause(5, 0.2) < pause(5, 0.8));
    }
}
