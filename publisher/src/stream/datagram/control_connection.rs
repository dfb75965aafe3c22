//! The tcp connection that opened the stream. It stays for the end of the stream, and for what the broker
//! reports.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use penstock_auth::PacketKeys;
use penstock_process::text::foreign_bytes;
use penstock_wire::batch::Header;
use penstock_wire::reply::Fault;
use zerocopy::IntoBytes;

use crate::Error;
use crate::stream::replies::{FromBroker, NoReply, Replies};

/// The end of a stream, which the broker has to confirm.
#[derive(Debug, Clone, Copy)]
struct End {
    batches: u64,
    since: Instant,
}

/// The control connection of one stream.
pub(super) struct ControlConnection {
    broker: String,
    socket: TcpStream,
    keys: Option<Arc<PacketKeys>>,
    replies: Replies,
    end: Option<End>,
    is_lost: bool,
    was_idle: bool,
}

impl ControlConnection {
    pub(super) fn new(broker: &str, socket: TcpStream, keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            broker: broker.to_owned(),
            socket,
            replies: Replies::new(broker, keys.clone()),
            keys,
            end: None,
            is_lost: false,
            was_idle: false,
        }
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether the connection ended, so that the broker may have been restarted.
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Whether the broker ended the stream because it was idle.
    pub(super) fn was_idle(&self) -> bool {
        self.was_idle
    }

    /// Until when the text of an error is waited for.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.replies.deadline()
    }

    /// Reads what has arrived: how many batches the broker confirms at the end of the stream, or why it ends
    /// the stream. `unacked` counts the messages that are not acknowledged.
    pub(super) fn read(&mut self, unacked: impl Fn() -> u64) -> Result<Option<u64>, Error> {
        let mut confirmed = None;
        loop {
            match self.replies.next(&self.socket) {
                Ok(None) => return Ok(confirmed),
                // The broker closes the connection once it has confirmed the end.
                Ok(Some(FromBroker::Closed)) | Err(NoReply::Io(_)) if confirmed.is_some() => {
                    return Ok(confirmed);
                }
                Ok(Some(reply)) => confirmed = self.take_reply(reply, &unacked)?,
                Err(NoReply::Io(error)) => return Err(self.lost(&error.to_string())),
                Err(NoReply::Invalid(error)) => return Err(error),
            }
        }
    }

    /// Takes an error whose text did not arrive in time.
    pub(super) fn check_error_text(&mut self, unacked: impl Fn() -> u64) -> Result<(), Error> {
        if self.replies.deadline().is_some()
            && let Some(reply) = self.replies.overdue(Instant::now())
        {
            self.take_reply(reply, &unacked)?;
        }
        Ok(())
    }

    fn take_reply(
        &mut self,
        reply: FromBroker,
        unacked: impl Fn() -> u64,
    ) -> Result<Option<u64>, Error> {
        match reply {
            FromBroker::Ack { committed, .. } => Ok(Some(committed)),
            FromBroker::Closed => Err(self.lost("the broker closed the connection")),
            FromBroker::Error {
                is_whole: false, ..
            } if self.keys.is_some() => Err(self.lost("the broker ended the stream")),
            FromBroker::Error { code, text, .. } => {
                self.replies.verify(&text)?;
                Err(self.ended_by_broker(code, foreign_bytes(&text), unacked()))
            }
        }
    }

    /// A broker that restarted, or that received nothing while this host slept, accepts the stream again;
    /// any other error is final.
    fn ended_by_broker(&mut self, code: u16, text: String, unacked: u64) -> Error {
        if code == Fault::Shutdown as u16 || code == Fault::Stalled as u16 {
            self.was_idle = code == Fault::Stalled as u16;
            return self.lost(&text);
        }
        Error::Ended {
            broker: self.broker.clone(),
            unacked,
            text,
        }
    }

    /// Reports to the broker that the stream is complete, which it has to confirm.
    pub(super) fn end(&mut self, batches: u64) -> Result<(), Error> {
        let header = Header::for_end(batches);
        let mut frame = header.as_bytes().to_vec();
        if let Some(keys) = &self.keys {
            // The only frame of this connection.
            frame.extend(keys.seal_frame(0, &[header.as_bytes()]));
        }
        let written = (&self.socket).write_all(&frame);
        written.map_err(|e| self.lost(&e.to_string()))?;
        self.end = Some(End {
            batches,
            since: Instant::now(),
        });
        Ok(())
    }

    /// Whether the end was reported to the broker.
    pub(super) fn is_ending(&self) -> bool {
        self.end.is_some()
    }

    /// Whether the broker has confirmed the end, with what it confirmed now.
    ///
    /// # Errors
    /// If it did not within `limit`.
    pub(super) fn has_ended(&self, confirmed: Option<u64>, limit: Duration) -> Result<bool, Error> {
        let Some(end) = self.end else {
            return Ok(false);
        };
        if confirmed == Some(end.batches) {
            return Ok(true);
        }
        if end.since.elapsed() > limit {
            let reason = "the broker did not confirm the end of the stream";
            return Err(Error::path_dead(&self.broker, reason));
        }
        Ok(false)
    }

    fn lost(&mut self, reason: &str) -> Error {
        self.is_lost = true;
        Error::path_dead(&self.broker, reason)
    }
}
