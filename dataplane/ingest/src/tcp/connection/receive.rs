//! Receives a stream's frames: headers into the connection, payload straight into the log or outside it.

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use penstock_wire::batch::{Frame, HEADER_LEN, Header};
use penstock_wire::reply::Fault;
use zerocopy::FromBytes;

use super::batch::{Incoming, State};
use super::close::CloseReason;
use super::{Connection, Context, Need};
use crate::session::claims::Turn;
use crate::session::stats::{Counters, PathStage};

/// Bytes that one connection may receive before others get their turn.
const TURN_BYTES: usize = 4 << 20;
/// Receive calls that one connection may make before others get their turn.
const TURN_CALLS: usize = 64;

impl Connection {
    pub(super) fn receive(&mut self, cx: &mut Context<'_>) -> Result<Need, CloseReason> {
        let (mut bytes, mut calls) = (0, 0);
        while bytes < TURN_BYTES && calls < TURN_CALLS {
            let asked = match &self.state {
                State::Header => self.header_len - self.header_filled,
                State::Waiting { .. } | State::Starved { .. } => {
                    if !self.retry_space(cx)? {
                        return Ok(Need::Space);
                    }
                    continue;
                }
                State::Payload { batch, .. } => batch.missing() as usize + self.header_len,
                State::Aside { .. } => match self.room_aside(cx) {
                    0 => continue,
                    room => room,
                },
                State::Ended => return Ok(Need::Nothing),
                State::Failed { .. } => return self.discard(),
            };
            let got = match self.receive_once(cx, asked) {
                Ok(0) => return Err(self.closed()),
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
            if got < asked {
                // The socket is empty; asking again would only cost a call.
                return Ok(self.need_after_drain());
            }
        }
        Ok(Need::Turn)
    }

    fn need_after_drain(&self) -> Need {
        match self.state {
            State::Waiting { .. } | State::Starved { .. } => Need::Space,
            State::Ended => Need::Nothing,
            _ => Need::Readable,
        }
    }

    /// One receive call to where the next bytes belong. Behind a payload's end there is room for
    /// the next header, so that a batch costs no call of its own for it.
    fn receive_once(&mut self, cx: &mut Context<'_>, asked: usize) -> io::Result<usize> {
        let start = cx.stats.stages.now();
        let (stage, result) = match &mut self.state {
            State::Payload {
                batch, reservation, ..
            } => {
                let region = cx.writer.region(reservation, batch.received);
                let payload = libc::iovec {
                    iov_base: region.start.cast(),
                    iov_len: region.len,
                };
                let header = libc::iovec {
                    iov_base: self.header.as_mut_ptr().cast(),
                    iov_len: self.header_len,
                };
                // SAFETY: the region is this reservation's alone until it is closed, which takes
                // `&mut` of the connection; the header buffer is borrowed exclusively.
                let result = unsafe { receive_vectored(&self.socket, &mut [payload, header]) };
                (PathStage::DrainPayloadToBuffer, result)
            }
            State::Aside { batch } => {
                let into = &mut cx.scratch[..asked];
                let result = (&self.socket).read(into);
                let got = *result.as_ref().unwrap_or(&0);
                let spill = batch
                    .spill
                    .as_mut()
                    .expect("a batch outside the ring has a spill");
                spill.write(batch.received, &into[..got]);
                // Frees memory for bytes that did not arrive.
                spill.truncate(batch.received + got as u32);
                (PathStage::DrainPayloadToBuffer, result)
            }
            _ => {
                let rest = &mut self.header[self.header_filled..self.header_len];
                (PathStage::DrainHeader, (&self.socket).read(rest))
            }
        };
        cx.first_frame.get_or_insert(start);
        cx.stats.stages.lap(stage, start);
        result
    }

    /// Processes `got` more bytes and everything that they complete.
    fn advance(&mut self, cx: &mut Context<'_>, got: usize) -> Result<(), CloseReason> {
        match &mut self.state {
            State::Payload { batch, .. } => {
                let missing = batch.missing() as usize;
                batch.received += got.min(missing) as u32;
                if got < missing {
                    return Ok(());
                }
                self.header_filled = got - missing;
                self.commit(cx)?;
            }
            State::Aside { batch } => {
                batch.received += got as u32;
                if batch.missing() == 0 {
                    self.return_to_ring(cx);
                    self.retry_space(cx)?;
                }
                return Ok(());
            }
            _ => self.header_filled += got,
        }
        if self.header_filled == self.header_len {
            self.header_filled = 0;
            self.begin_frame(cx)?;
        }
        Ok(())
    }

    fn begin_frame(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        let start = cx.stats.stages.now();
        let header = Header::read_from_prefix(&self.header)
            .expect("the length matches")
            .0;
        let protocol = |text: String| CloseReason::Fault(Fault::Protocol, text);
        let frame = header
            .parse(self.admission.max_payload)
            .map_err(|e| protocol(e.to_string()))?;
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
        self.begun = self.header;
        let Frame::Batch(batch) = frame else {
            self.verify(&[])?;
            self.state = State::Ended;
            return Ok(());
        };
        let batch = Incoming::new(batch, cx.now);
        match self.claimant.claim(batch.batch.payload_len, Turn::Next) {
            Some(claim) => self.enter_ring(cx, batch, Some(claim)),
            None => {
                Counters::count(&cx.shared.counters.claims_denied);
                self.state = State::Aside { batch };
            }
        }
        cx.stats.stages.lap(PathStage::ReserveLogSpace, start);
        Ok(())
    }

    /// Checks the tag of the frame that has begun, if it must carry one: nobody on the path changed,
    /// inserted, removed or repeated a frame.
    pub(super) fn verify(&mut self, payload: &[u8]) -> Result<(), CloseReason> {
        let Some(keys) = &self.keys else {
            return Ok(());
        };
        let (header, tag) = self.begun.split_at(HEADER_LEN);
        let tag = tag.try_into().expect("the length matches");
        if keys.verify_frame(self.verified, tag, &[header, payload]) {
            self.verified += 1;
            return Ok(());
        }
        let seq = self.next_seq;
        let text = format!("batch {seq} has an invalid tag: it was changed on the path");
        Err(CloseReason::Fault(Fault::Authentication, text))
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
