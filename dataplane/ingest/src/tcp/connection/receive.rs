//! Receives a stream's frames: headers into the parser, payload straight into the log or outside the ring.

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use penstock_wire::batch::Frame;
use penstock_wire::reply::Fault;

use super::close::CloseReason;
use super::state::{IncomingBatch, State};
use super::{Connection, Context, Need};
use crate::session::claims::ClaimPriority;
use crate::session::stats::{Counters, PathStage};

/// Bytes that one connection may receive before it yields to others.
const YIELD_AFTER_BYTES: usize = 4 << 20;
/// Receive calls that one connection may make before it yields to others.
const YIELD_AFTER_CALLS: usize = 64;

impl Connection {
    pub(super) fn receive(&mut self, cx: &mut Context<'_>) -> Result<Need, CloseReason> {
        let (mut bytes, mut calls) = (0, 0);
        while bytes < YIELD_AFTER_BYTES && calls < YIELD_AFTER_CALLS {
            let wanted = match &self.state {
                State::Header => self.parser.missing().len(),
                State::AwaitingGrant { .. } | State::AwaitingShare { .. } => {
                    if !self.retry_space(cx)? {
                        return Ok(Need::Space);
                    }
                    continue;
                }
                State::InRing { batch, .. } => batch.missing() as usize + self.parser.header_len(),
                State::Spilled { .. } => match self.reserve_spill(cx) {
                    0 => continue,
                    len => len,
                },
                State::Ended => return Ok(Need::Nothing),
                State::Failed { .. } => return self.discard_input(),
            };
            let got = match self.receive_once(cx, wanted) {
                Ok(0) => return Err(self.end_of_input()),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    cx.stats.eagain += 1;
                    return Ok(Need::Readable);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(CloseReason::Io(error)),
            };
            cx.stats.recv_calls += 1;
            cx.stats.recv_bytes += got as u64;
            self.last_progress = cx.now;
            (bytes, calls) = (bytes + got, calls + 1);
            self.advance(cx, got)?;
            if got < wanted {
                // The socket is empty; another call would only return EAGAIN.
                return Ok(self.need_after_drain());
            }
        }
        Ok(Need::Yield)
    }

    fn need_after_drain(&self) -> Need {
        match self.state {
            State::AwaitingGrant { .. } | State::AwaitingShare { .. } => Need::Space,
            State::Ended => Need::Nothing,
            _ => Need::Readable,
        }
    }

    /// One receive call to where the next bytes go. Behind a payload it asks for the next header as well,
    /// so that the header costs no call of its own.
    fn receive_once(&mut self, cx: &mut Context<'_>, wanted: usize) -> io::Result<usize> {
        let start = cx.stats.stages.now();
        let (stage, result) = match &mut self.state {
            State::InRing {
                batch, reservation, ..
            } => {
                let region = cx.writer.region(reservation, batch.received);
                let payload = libc::iovec {
                    iov_base: region.start.cast(),
                    iov_len: region.len,
                };
                let header = self.parser.missing();
                let header = libc::iovec {
                    iov_base: header.as_mut_ptr().cast(),
                    iov_len: header.len(),
                };
                // SAFETY: the region belongs to this reservation alone until it is closed, which takes
                // `&mut` of the connection; the header buffer is borrowed exclusively.
                let result = unsafe { receive_vectored(&self.socket, &mut [payload, header]) };
                (PathStage::DrainPayloadToBuffer, result)
            }
            State::Spilled { batch } => {
                let buffer = &mut cx.scratch[..wanted];
                let result = (&self.socket).read(buffer);
                let got = *result.as_ref().unwrap_or(&0);
                let received = batch.received;
                let spill = batch.spill_mut();
                spill.write(received, &buffer[..got]);
                // Frees memory that was reserved for bytes that did not arrive.
                spill.truncate(received + got as u32);
                (PathStage::DrainPayloadToBuffer, result)
            }
            _ => {
                let result = (&self.socket).read(self.parser.missing());
                (PathStage::DrainHeader, result)
            }
        };
        cx.first_frame.get_or_insert(start);
        cx.stats.stages.lap(stage, start);
        result
    }

    /// Processes `got` more bytes and everything that they complete.
    fn advance(&mut self, cx: &mut Context<'_>, got: usize) -> Result<(), CloseReason> {
        match &mut self.state {
            State::InRing { batch, .. } => {
                let missing = batch.missing() as usize;
                batch.received += got.min(missing) as u32;
                if got < missing {
                    return Ok(());
                }
                self.commit(cx)?;
                self.parser.advance(got - missing);
            }
            State::Spilled { batch } => {
                batch.received += got as u32;
                if batch.missing() == 0 {
                    self.return_to_ring(cx);
                    self.retry_space(cx)?;
                }
                return Ok(());
            }
            _ => self.parser.advance(got),
        }
        self.begin_frame(cx)
    }

    /// Starts the next frame, if its header is complete.
    fn begin_frame(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        let start = cx.stats.stages.now();
        let Some(frame) = self.parser.next(self.admission.max_payload) else {
            return Ok(());
        };
        let protocol = |text: String| CloseReason::Fault(Fault::Protocol, text);
        let frame = frame.map_err(protocol)?;
        let seq = match frame {
            Frame::Batch(batch) => batch.batch_seq,
            Frame::End { batches } => batches,
        };
        if seq != self.next_seq {
            let expected = self.next_seq;
            return Err(protocol(format!(
                "batch {seq} where {expected} was expected"
            )));
        }
        let start = cx.stats.stages.lap(PathStage::DrainHeader, start);
        let Frame::Batch(header) = frame else {
            self.verify(&[])?;
            self.state = State::Ended;
            return Ok(());
        };
        let batch = IncomingBatch::new(header, cx.now);
        match self.claimant.claim(header.payload_len, ClaimPriority::Next) {
            Some(claim) => self.enter_ring(cx, batch, Some(claim)),
            None => {
                Counters::count(&cx.shared.counters.claims_denied);
                self.state = State::Spilled { batch };
            }
        }
        cx.stats.stages.lap(PathStage::ReserveLogSpace, start);
        Ok(())
    }

    /// Verifies the tag of the current frame, if the connection has keys.
    pub(super) fn verify(&mut self, payload: &[u8]) -> Result<(), CloseReason> {
        self.parser.verify(payload).map_err(|_| {
            let seq = self.next_seq;
            let text = format!("batch {seq} has an invalid tag: it was changed on the path");
            CloseReason::Fault(Fault::Authentication, text)
        })
    }
}

/// recvmsg(2) without waiting.
///
/// # Safety
/// The buffers must be valid for writes, and nothing else may access them during the call.
unsafe fn receive_vectored(socket: &TcpStream, buffers: &mut [libc::iovec]) -> io::Result<usize> {
    // SAFETY: a msghdr of zeros is valid: no name, no control data, no buffers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_mut_ptr();
    message.msg_iovlen = buffers.len();
    // SAFETY: the descriptor is open, and the caller vouches for the buffers.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}
