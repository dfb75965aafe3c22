//! The tcp connection of a stream over xdp: carries the end of the stream, and the broker's answer to it.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::Arc;

use penstock_auth::PacketKeys;
use penstock_wire::batch::Frame;
use penstock_wire::reply::Fault;

use super::close_reason::CloseReason;
use crate::session::frame_parser::FrameParser;
use crate::session::reply_queue::ReplyQueue;

/// The control connection, which never blocks.
#[derive(Debug)]
pub(super) struct ControlConnection {
    socket: TcpStream,
    /// Whether it may be readable.
    is_ready: bool,
    parser: FrameParser,
    replies: ReplyQueue,
}

impl ControlConnection {
    pub(super) fn new(socket: TcpStream, keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            socket,
            replies: ReplyQueue::new(keys.clone()),
            is_ready: true,
            parser: FrameParser::new(keys),
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

    /// Reads what the publisher has sent. Returns the number of batches of the stream once the end frame is
    /// complete; `reads` counts the system calls.
    pub(super) fn read_end(&mut self, reads: &mut u64) -> Result<Option<u64>, CloseReason> {
        loop {
            // Batches do not arrive here, so none is short enough.
            if let Some(frame) = self.parser.next(0) {
                return self.check_end(frame).map(Some);
            }
            *reads += 1;
            match (&self.socket).read(self.parser.missing()) {
                Ok(0) => return Err(CloseReason::Closed),
                Ok(got) => self.parser.advance(got),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.is_ready = false;
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CloseReason::Io(error)),
            }
        }
    }

    fn check_end(&mut self, frame: Result<Frame, String>) -> Result<u64, CloseReason> {
        if self.parser.verify(&[]).is_err() {
            let text = "the end frame has an invalid tag: it was changed on the path".to_owned();
            return Err(CloseReason::Fault(Fault::Authentication, text));
        }
        match frame {
            Ok(Frame::End { batches }) => Ok(batches),
            _ => Err(CloseReason::not_the_end()),
        }
    }

    /// Confirms to the publisher that the whole stream is committed.
    pub(super) fn complete(&mut self, batches: u64) -> io::Result<()> {
        self.replies.ack(batches, false);
        // The few bytes fit in the socket's buffer unless the peer is gone.
        self.replies.flush(&self.socket).map(drop)
    }

    /// Reports to the publisher why the stream ends early. Best effort: the peer sees the connection close in
    /// any case.
    pub(super) fn fail(&mut self, fault: Fault, committed: u64, text: &str) {
        self.replies.error(fault, committed, text);
        let _ = self.replies.flush(&self.socket);
    }
}
