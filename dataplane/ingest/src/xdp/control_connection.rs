//! The tcp connection of a stream over xdp: the end of the stream comes in, its outcome goes out.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::Arc;

use penstock_auth::PacketKeys;
use penstock_wire::batch::{Frame, HEADER_LEN, Header};
use penstock_wire::packet::TAG_LEN;
use penstock_wire::reply::Fault;
use zerocopy::FromBytes;

use super::close_reason::CloseReason;
use crate::session::reply_queue::ReplyQueue;

/// The control connection, which never blocks.
#[derive(Debug)]
pub(super) struct ControlConnection {
    socket: TcpStream,
    keys: Option<Arc<PacketKeys>>,
    /// Whether it may be readable.
    is_ready: bool,
    /// The end frame and its tag, as far as they arrived.
    frame: [u8; HEADER_LEN + TAG_LEN],
    filled: usize,
    replies: ReplyQueue,
}

impl ControlConnection {
    pub(super) fn new(socket: TcpStream, keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            socket,
            replies: ReplyQueue::new(keys.clone()),
            keys,
            is_ready: true,
            frame: [0; HEADER_LEN + TAG_LEN],
            filled: 0,
        }
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(super) fn set_ready(&mut self) {
        self.is_ready = true;
    }

    pub(super) fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Reads what the publisher has sent. Returns how many batches the stream has, once it says so;
    /// `reads` counts the system calls.
    pub(super) fn read_end(&mut self, reads: &mut u64) -> Result<Option<u64>, CloseReason> {
        let len = match self.keys {
            Some(_) => HEADER_LEN + TAG_LEN,
            None => HEADER_LEN,
        };
        while self.filled < len {
            *reads += 1;
            match (&self.socket).read(&mut self.frame[self.filled..len]) {
                Ok(0) => return Err(CloseReason::Closed),
                Ok(got) => self.filled += got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.is_ready = false;
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CloseReason::Io(error)),
            }
        }
        self.filled = 0;
        self.parse_end().map(Some)
    }

    fn parse_end(&self) -> Result<u64, CloseReason> {
        if let Some(keys) = &self.keys {
            let (header, tag) = self.frame.split_at(HEADER_LEN);
            let tag = tag.try_into().expect("the length matches");
            // There is only one frame.
            if !keys.verify_frame(0, tag, &[header]) {
                let text =
                    "the end frame has an invalid tag: it was changed on the path".to_owned();
                return Err(CloseReason::Fault(Fault::Authentication, text));
            }
        }
        let (header, _) = Header::read_from_prefix(&self.frame).expect("the length matches");
        // Batches do not come this way, so none is short enough.
        match header.parse(0) {
            Ok(Frame::End { batches }) => Ok(batches),
            _ => Err(CloseReason::not_the_end()),
        }
    }

    /// Tells the publisher that the whole stream is committed.
    pub(super) fn complete(&mut self, batches: u64) -> io::Result<()> {
        self.replies.ack(batches, false);
        // The few bytes fit in the socket's buffer, or the peer is gone.
        self.replies.flush(&self.socket).map(drop)
    }

    /// Tells the publisher why the stream ends early. Best effort: the peer sees the connection close in
    /// any case.
    pub(super) fn fail(&mut self, fault: Fault, committed: u64, text: &str) {
        self.replies.error(fault, committed, text);
        let _ = self.replies.flush(&self.socket);
    }
}
