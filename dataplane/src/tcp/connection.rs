//! One stream after its handshake: frames come in, payload goes to its place in the log, acks go
//! out. Owns no loop and never blocks; a worker drives it.

use std::fmt;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use zerocopy::FromBytes;

use super::buffers::Effective;
use super::outbox::Outbox;
use super::stats::{ConnectionReport, Counters, PathStage, Shared, WorkerStats};
use super::{LINGER, worker::WorkerConfig};
use crate::admission::{Admission, REVOKED};
use crate::auth::PacketKeys;
use crate::log::{Commit, Reservation, Writer};
use crate::profile::Tick;
use crate::wire::batch::{self, Batch, Frame, HEADER_LEN, Header};
use crate::wire::handshake::{AckLevel, Path};
use crate::wire::message;
use crate::wire::reply::Fault;

/// Bytes that one connection may receive before others get their turn.
const TURN_BYTES: usize = 4 << 20;
/// Receive calls that one connection may make before others get their turn.
const TURN_CALLS: usize = 64;
/// Bytes after which an ack is sent even though more is coming in. An ack costs a packet's way
/// through both stacks, as much as receiving some 50 kB.
const ACK_EVERY: u64 = 512 << 10;

/// What a worker lends to the connection that it drives.
pub(super) struct Context<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) stats: &'a mut WorkerStats,
    pub(super) first_frame: &'a mut Option<Tick>,
    pub(super) last_commit: &'a mut Option<Tick>,
    pub(super) shared: &'a Shared,
    pub(super) config: &'a WorkerConfig,
    pub(super) now: Instant,
}

/// A handshaken connection on its way to a worker.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) socket: TcpStream,
    pub(crate) peer: SocketAddr,
    pub(crate) buffers: Effective,
    pub(crate) admission: Admission,
    /// Of its packets, over xdp, if they are authenticated.
    pub(crate) keys: Option<Arc<PacketKeys>>,
}

/// Where the next bytes belong.
#[derive(Debug)]
enum State {
    /// To the header of the next frame.
    Header,
    /// Nowhere yet: the batch waits for room in the ring.
    Waiting {
        batch: Batch,
        reservation: Reservation,
    },
    /// To a batch in the ring.
    Payload {
        batch: Batch,
        reservation: Reservation,
        received: u32,
    },
    /// To a batch that was moved out of the ring, because its publisher is slow.
    Aside { batch: Batch, bytes: Vec<u8> },
    /// Nowhere yet: a batch that was aside is complete and waits for room in the ring.
    Returning {
        batch: Batch,
        bytes: Vec<u8>,
        reservation: Reservation,
    },
    /// Nowhere: the stream has ended well and its last ack is going out.
    Ended,
    /// Nowhere: an error is going out, and the peer gets time to read it.
    Failed { until: Instant },
}

/// Why a connection ends.
#[derive(Debug)]
pub(super) enum Ending {
    Completed,
    Closed,
    /// The publisher opened another connection for the stream.
    Superseded,
    CutInBatch {
        received: usize,
        len: u32,
    },
    Fault(Fault, String),
    Io(io::Error),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => f.write_str("completed"),
            Self::Closed => f.write_str("closed by the publisher without an end frame"),
            Self::Superseded => f.write_str("the publisher goes on over another connection"),
            Self::CutInBatch { received, len } => {
                write!(
                    f,
                    "closed by the publisher inside a batch, after {received} of {len} bytes"
                )
            }
            Self::Fault(_, text) => f.write_str(text),
            Self::Io(error) => error.fmt(f),
        }
    }
}

/// What a connection needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// More bytes from its socket.
    Readable,
    /// Another turn: its socket holds more.
    Turn,
    /// Room in the ring, or the frontier: ask again soon.
    Space,
    /// To acknowledge, unless more bytes come first.
    Ack,
    /// Nothing: it is over.
    Nothing,
}

/// An open stream.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: TcpStream,
    peer: SocketAddr,
    buffers: Effective,
    pub(super) admission: Admission,
    state: State,
    header: [u8; HEADER_LEN],
    header_filled: usize,
    /// Sequence number of the next batch; so many are committed.
    next_seq: u64,
    /// Index of the last committed batch, if it was not yet visible when last looked at.
    unseen: Option<u64>,
    /// What the last ack said.
    acked: u64,
    /// Payload bytes committed since.
    unacked_bytes: u64,
    outbox: Outbox,
    outbox_empty: bool,
    last_progress: Instant,
    last_heartbeat: Instant,
    /// Batches committed over this connection, and their message bytes.
    batches: u64,
    payload_bytes: u64,
    failure: Option<String>,
}

impl Connection {
    pub(super) fn new(opened: Opened, now: Instant) -> Self {
        let Opened {
            socket,
            peer,
            buffers,
            admission,
            keys: _,
        } = opened;
        let first_batch = admission.lease.committed();
        Self {
            socket,
            peer,
            buffers,
            admission,
            state: State::Header,
            header: [0; HEADER_LEN],
            header_filled: 0,
            next_seq: first_batch,
            unseen: None,
            acked: first_batch,
            unacked_bytes: 0,
            outbox: Outbox::default(),
            outbox_empty: true,
            last_progress: now,
            last_heartbeat: now,
            batches: 0,
            payload_bytes: 0,
            failure: None,
        }
    }

    /// Receives, commits and acknowledges as far as it goes without waiting.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) -> Result<Need, Ending> {
        let need = match self.receive(cx) {
            Err(Ending::Fault(fault, text)) => {
                self.fail(cx, fault, text);
                Ok(Need::Readable)
            }
            other => other,
        };
        match need {
            Ok(Need::Turn) if self.may_ack_later() => return Ok(Need::Turn),
            Ok(Need::Readable) if self.may_ack_later() => return Ok(Need::Ack),
            _ => {}
        }
        // What was committed before the peer went away is still acked, if it can be.
        let acknowledged = self.acknowledge(cx);
        match (need?, acknowledged?) {
            (need, Need::Readable) => Ok(need),
            (_, other) => Ok(other),
        }
    }

    /// Whether an ack is owed, and little enough, with nothing else to send.
    fn may_ack_later(&self) -> bool {
        self.acked < self.next_seq
            && self.admission.ack == AckLevel::Committed
            && self.unacked_bytes < ACK_EVERY
            && self.outbox_empty
            && !matches!(self.state, State::Failed { .. })
    }

    /// Whether it waits for room in the shared buffer.
    pub(super) fn is_blocked(&self) -> bool {
        matches!(self.state, State::Waiting { .. } | State::Returning { .. })
    }

    /// Acks what has become visible; says what is needed besides more bytes.
    pub(super) fn acknowledge(&mut self, cx: &mut Context<'_>) -> Result<Need, Ending> {
        self.reply(cx)?;
        match self.state {
            State::Ended if self.outbox_empty && self.acked == self.next_seq => {
                Err(Ending::Completed)
            }
            State::Ended if self.unseen.is_none() => Ok(Need::Nothing),
            State::Waiting { .. } | State::Returning { .. } => Ok(Need::Space),
            _ if self.unseen.is_some() => Ok(Need::Space),
            _ => Ok(Need::Readable),
        }
    }

    fn receive(&mut self, cx: &mut Context<'_>) -> Result<Need, Ending> {
        let (mut bytes, mut calls) = (0, 0);
        while bytes < TURN_BYTES && calls < TURN_CALLS {
            let asked = match &self.state {
                State::Header => HEADER_LEN - self.header_filled,
                State::Waiting { .. } | State::Returning { .. } => {
                    if !self.retry_space(cx)? {
                        return Ok(Need::Space);
                    }
                    continue;
                }
                State::Payload {
                    reservation,
                    received,
                    ..
                } => (reservation.len() - received) as usize + HEADER_LEN,
                State::Aside { batch, bytes } => batch.payload_len as usize - bytes.len(),
                State::Ended => return Ok(Need::Nothing),
                State::Failed { .. } => return self.discard(),
            };
            let got = match self.receive_once(cx) {
                Ok(0) => return Err(self.closed()),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    cx.stats.eagain += 1;
                    return Ok(Need::Readable);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Ending::Io(error)),
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
            State::Waiting { .. } | State::Returning { .. } => Need::Space,
            State::Ended => Need::Nothing,
            _ => Need::Readable,
        }
    }

    /// One receive call to where the next bytes belong. Behind a payload's end there is room for
    /// the next header, so that a batch costs no call of its own for it.
    fn receive_once(&mut self, cx: &mut Context<'_>) -> io::Result<usize> {
        let start = cx.stats.stages.now();
        let (stage, result) = match &mut self.state {
            State::Payload {
                reservation,
                received,
                ..
            } => {
                let region = cx.writer.region(reservation, *received);
                let payload = libc::iovec {
                    iov_base: region.start.cast(),
                    iov_len: region.len,
                };
                let header = libc::iovec {
                    iov_base: self.header.as_mut_ptr().cast(),
                    iov_len: HEADER_LEN,
                };
                // SAFETY: the region is this reservation's alone until it is closed, which takes
                // `&mut` of the connection; the header buffer is borrowed exclusively.
                let result = unsafe { receive_vectored(&self.socket, &mut [payload, header]) };
                (PathStage::DrainPayloadToBuffer, result)
            }
            State::Aside { batch, bytes } => {
                let missing = batch.payload_len as usize - bytes.len();
                let mut limited = (&self.socket).take(missing.min(64 << 10) as u64);
                let before = bytes.len();
                let result = limited.read_to_end(bytes);
                let got = bytes.len() - before;
                // What came before the socket ran dry counts.
                let result = if got > 0 { Ok(got) } else { result };
                (PathStage::DrainPayloadToBuffer, result)
            }
            _ => {
                let rest = &mut self.header[self.header_filled..];
                (PathStage::DrainHeader, (&self.socket).read(rest))
            }
        };
        cx.first_frame.get_or_insert(start);
        cx.stats.stages.lap(stage, start);
        result
    }

    /// Takes note of `got` more bytes; runs through what became complete.
    fn advance(&mut self, cx: &mut Context<'_>, got: usize) -> Result<(), Ending> {
        match &mut self.state {
            State::Payload {
                reservation,
                received,
                ..
            } => {
                let missing = (reservation.len() - *received) as usize;
                *received += got.min(missing) as u32;
                if got < missing {
                    return Ok(());
                }
                self.header_filled = got - missing;
                self.commit(cx)?;
            }
            State::Aside { batch, bytes } if bytes.len() == batch.payload_len as usize => {
                self.return_to_ring(cx);
                return Ok(());
            }
            State::Aside { .. } => return Ok(()),
            _ => self.header_filled += got,
        }
        if self.header_filled == HEADER_LEN {
            self.header_filled = 0;
            self.begin_frame(cx)?;
        }
        Ok(())
    }

    fn begin_frame(&mut self, cx: &mut Context<'_>) -> Result<(), Ending> {
        let start = cx.stats.stages.now();
        let header = Header::read_from_bytes(&self.header).expect("a header is plain bytes");
        let protocol = |text: String| Ending::Fault(Fault::Protocol, text);
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
        let Frame::Batch(batch) = frame else {
            self.state = State::Ended;
            return Ok(());
        };
        let reservation = cx.writer.reserve(batch.payload_len);
        self.state = match cx.writer.is_granted(&reservation) {
            true => State::Payload {
                batch,
                reservation,
                received: 0,
            },
            false => {
                Counters::count(&cx.shared.counters.waits_for_space);
                State::Waiting { batch, reservation }
            }
        };
        cx.stats.stages.lap(PathStage::ReserveLogSpace, start);
        Ok(())
    }

    /// Goes on if the ring has room now.
    fn retry_space(&mut self, cx: &mut Context<'_>) -> Result<bool, Ending> {
        let (State::Waiting { reservation, .. } | State::Returning { reservation, .. }) =
            &self.state
        else {
            return Ok(true);
        };
        if !cx.writer.is_granted(reservation) {
            return Ok(false);
        }
        self.last_progress = cx.now;
        match std::mem::replace(&mut self.state, State::Header) {
            State::Waiting { batch, reservation } => {
                self.state = State::Payload {
                    batch,
                    reservation,
                    received: 0,
                };
            }
            State::Returning {
                batch,
                bytes,
                reservation,
            } => {
                cx.writer.place(&reservation, 0, &bytes);
                release_aside(cx.shared, &batch);
                self.state = State::Payload {
                    received: batch.payload_len,
                    batch,
                    reservation,
                };
                self.commit(cx)?;
            }
            other => self.state = other,
        }
        Ok(true)
    }

    fn commit(&mut self, cx: &mut Context<'_>) -> Result<(), Ending> {
        let State::Payload {
            batch,
            reservation,
            received,
        } = std::mem::replace(&mut self.state, State::Header)
        else {
            unreachable!("only a batch in the ring is committed");
        };
        let start = cx.stats.stages.now();
        if cx.config.verify_on_receive {
            let placed = cx.writer.placed(&reservation, received);
            if batch::checksum(batch.batch_seq, batch.messages, placed) != batch.checksum {
                cx.writer.abort(reservation);
                let text = format!("batch {}: its checksum does not match", batch.batch_seq);
                return Err(Ending::Fault(Fault::Checksum, text));
            }
        }
        let arrival = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let index = cx.writer.commit(
            reservation,
            &Commit {
                session: self.admission.session,
                stream: self.admission.stream,
                batch_seq: batch.batch_seq,
                messages: batch.messages,
                checksum: batch.checksum,
                arrival_unix_ns: arrival.as_nanos() as u64,
            },
        );
        self.next_seq += 1;
        self.admission.lease.set_committed(self.next_seq);
        self.unacked_bytes += u64::from(received);
        self.unseen = Some(index);
        self.payload_bytes +=
            u64::from(batch.payload_len) - u64::from(batch.messages) * message::OVERHEAD as u64;
        self.batches += 1;
        cx.stats.batches += 1;
        *cx.last_commit = Some(cx.stats.stages.lap(PathStage::Commit, start));
        Ok(())
    }

    /// Acks what has become visible, and sends what waits.
    fn reply(&mut self, cx: &mut Context<'_>) -> Result<(), Ending> {
        if self
            .unseen
            .is_some_and(|index| cx.writer.frontier() > index)
        {
            self.unseen = None;
        }
        let wanted =
            self.admission.ack == AckLevel::Committed || matches!(self.state, State::Ended);
        // The end of a stream is confirmed even if the stream was empty.
        let news = self.acked < self.next_seq || matches!(self.state, State::Ended);
        if wanted && news && self.unseen.is_none() && !matches!(self.state, State::Failed { .. }) {
            let start = cx.stats.stages.now();
            self.acked = self.next_seq;
            self.unacked_bytes = 0;
            self.outbox.ack(self.acked, false);
            self.flush()?;
            cx.stats.stages.lap(PathStage::SendAck, start);
            return Ok(());
        }
        if self.outbox_empty {
            Ok(())
        } else {
            self.flush()
        }
    }

    fn flush(&mut self) -> Result<(), Ending> {
        self.outbox_empty = self.outbox.flush(&self.socket).map_err(Ending::Io)?;
        if self.outbox_empty && matches!(self.state, State::Failed { .. }) {
            self.socket.shutdown(Shutdown::Write).map_err(Ending::Io)?;
        }
        Ok(())
    }

    /// Whether the socket should be watched for room to send.
    pub(super) fn wants_to_write(&self) -> bool {
        !self.outbox_empty
    }

    /// Looks after time: heartbeats, stalls, the ring's needs. Called a few times a second.
    pub(super) fn tick(&mut self, cx: &mut Context<'_>) -> Result<(), Ending> {
        if self.admission.lease.is_wanted() {
            return Err(Ending::Superseded);
        }
        let is_over = matches!(self.state, State::Failed { .. } | State::Ended);
        if self.admission.lease.is_revoked() && !is_over {
            self.fail(cx, Fault::Stalled, REVOKED.to_owned());
            return self.reply(cx);
        }
        let silent_for = cx.now - self.last_progress;
        match &self.state {
            State::Waiting { .. } | State::Returning { .. }
                if cx.now - self.last_heartbeat >= cx.config.heartbeat =>
            {
                self.last_heartbeat = cx.now;
                self.outbox.ack(self.acked, true);
                return self.flush();
            }
            State::Payload { .. } | State::Aside { .. } if silent_for > cx.config.stall_timeout => {
                let text = format!("no byte of batch {} for {silent_for:.0?}", self.next_seq);
                self.fail(cx, Fault::Stalled, text);
                return self.reply(cx);
            }
            State::Payload { reservation, .. }
                if cx.writer.age(reservation) > cx.writer.log().geometry().ring_bytes() / 2 =>
            {
                return self.evacuate(cx);
            }
            State::Failed { until } if cx.now >= *until => return Err(Ending::Closed),
            _ => {}
        }
        Ok(())
    }

    /// Moves a half received batch out of the ring, so that a slow publisher holds up nobody.
    fn evacuate(&mut self, cx: &mut Context<'_>) -> Result<(), Ending> {
        let State::Payload {
            batch,
            reservation,
            received,
        } = std::mem::replace(&mut self.state, State::Header)
        else {
            return Ok(());
        };
        let len = u64::from(batch.payload_len);
        let held = &cx.shared.counters.evacuated_bytes;
        if held.fetch_add(len, Ordering::Relaxed) + len > cx.config.max_evacuated {
            held.fetch_sub(len, Ordering::Relaxed);
            cx.writer.abort(reservation);
            let text = "too many publishers stall inside a batch; send smaller batches".to_owned();
            self.fail(cx, Fault::Stalled, text);
            return self.reply(cx);
        }
        Counters::count(&cx.shared.counters.evacuated_batches);
        let mut bytes = Vec::with_capacity(batch.payload_len as usize);
        bytes.extend_from_slice(cx.writer.placed(&reservation, received));
        cx.writer.abort(reservation);
        self.state = State::Aside { batch, bytes };
        Ok(())
    }

    fn return_to_ring(&mut self, cx: &mut Context<'_>) {
        if let State::Aside { batch, bytes } = std::mem::replace(&mut self.state, State::Header) {
            let reservation = cx.writer.reserve(batch.payload_len);
            self.state = State::Returning {
                batch,
                bytes,
                reservation,
            };
        }
    }

    /// Gives back what the connection holds, tells the peer why, and waits a little for it to read.
    fn fail(&mut self, cx: &mut Context<'_>, fault: Fault, text: String) {
        let counters = &cx.shared.counters;
        Counters::count(match fault {
            Fault::Protocol => &counters.protocol_errors,
            Fault::Checksum => &counters.checksum_errors,
            Fault::Stalled => &counters.stalled,
            Fault::Shutdown => &counters.streams_cut,
        });
        self.release(cx);
        // A level 0 stream has no acks, but what it had committed stays committed.
        self.outbox.error(fault, self.next_seq, &text);
        self.outbox_empty = false;
        self.failure = Some(text);
        self.state = State::Failed {
            until: cx.now + LINGER,
        };
    }

    /// Ends the stream because the broker ends.
    pub(super) fn shut_down(&mut self, cx: &mut Context<'_>) {
        if !matches!(self.state, State::Failed { .. } | State::Ended) {
            self.fail(
                cx,
                Fault::Shutdown,
                "the broker is shutting down".to_owned(),
            );
            // Best effort: the peer sees the connection close in any case.
            let _ = self.flush();
        }
    }

    fn discard(&mut self) -> Result<Need, Ending> {
        let mut scratch = [0; 16 << 10];
        match (&self.socket).read(&mut scratch) {
            Ok(0) => Err(Ending::Closed),
            Ok(_) => Ok(Need::Turn),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Need::Readable),
            Err(error) => Err(Ending::Io(error)),
        }
    }

    fn closed(&self) -> Ending {
        match &self.state {
            State::Payload {
                batch, received, ..
            } => Ending::CutInBatch {
                received: *received as usize,
                len: batch.payload_len,
            },
            State::Aside { batch, bytes } => Ending::CutInBatch {
                received: bytes.len(),
                len: batch.payload_len,
            },
            _ => Ending::Closed,
        }
    }

    fn release(&mut self, cx: &mut Context<'_>) {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Waiting { reservation, .. } | State::Payload { reservation, .. } => {
                cx.writer.abort(reservation);
            }
            State::Returning {
                batch, reservation, ..
            } => {
                cx.writer.abort(reservation);
                release_aside(cx.shared, &batch);
            }
            State::Aside { batch, .. } => release_aside(cx.shared, &batch),
            State::Header | State::Ended | State::Failed { .. } => {}
        }
    }

    /// Gives back what the connection holds, and sums it up.
    pub(super) fn finish(mut self, cx: &mut Context<'_>, ending: &Ending) -> ConnectionReport {
        self.release(cx);
        // The stream's next connection tells the publisher that these are committed, so they must be
        // visible, as for an ack.
        if let Some(index) = self.unseen {
            cx.writer.wait_until_visible(index);
        }
        let counters = &cx.shared.counters;
        if matches!(ending, Ending::Completed) {
            Counters::count(&counters.streams_completed);
        } else if self.failure.is_none() {
            Counters::count(&counters.streams_cut);
        }
        ConnectionReport {
            peer: self.peer,
            path: Path::Tcp.name(),
            topic: self.admission.topic.clone(),
            session: format!("{:016x}", self.admission.session),
            stream: self.admission.stream,
            buffers: self.buffers,
            batches: self.batches,
            payload_bytes: self.payload_bytes,
            ended: self.failure.take().unwrap_or_else(|| ending.to_string()),
        }
    }

    pub(super) fn log(&self) -> &Arc<crate::log::Log> {
        &self.admission.log
    }
}

fn release_aside(shared: &Shared, batch: &Batch) {
    let len = u64::from(batch.payload_len);
    shared
        .counters
        .evacuated_bytes
        .fetch_sub(len, Ordering::Relaxed);
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
