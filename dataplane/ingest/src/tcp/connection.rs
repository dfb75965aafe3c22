//! One stream after its handshake: frames come in, payload goes to its place in the log, acks go
//! out. Owns no loop and never blocks; a worker drives it.

use std::fmt;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use penstock_auth::PacketKeys;
use penstock_log::{Reservation, Writer};
use penstock_runtime::profile::Tick;
use penstock_wire::batch::{Batch, Frame, HEADER_LEN, Header};
use penstock_wire::handshake::{AckLevel, Path};
use penstock_wire::packet::{BatchInfo, TAG_LEN};
use penstock_wire::reply::Fault;
use zerocopy::FromBytes;

use super::worker::WorkerConfig;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::admission::{Admission, REVOKED};
use crate::session::buffers::EffectiveBuffers;
use crate::session::claims::{self, Claimant, RingClaim, Spill, Turn, Waiting};
use crate::session::commit::Committed;
use crate::session::reply_queue::ReplyQueue;
use crate::session::stats::{ConnectionReport, Counters, PathStage, Shared, WorkerStats};

/// Bytes that one connection may receive before others get their turn.
const TURN_BYTES: usize = 4 << 20;
/// Receive calls that one connection may make before others get their turn.
const TURN_CALLS: usize = 64;
/// Bytes after which an ack is sent even though more is coming in. An ack costs a packet's way
/// through both stacks, as much as receiving some 50 kB.
const ACK_EVERY: u64 = 512 << 10;
/// Maximum and minimum number of bytes that one receive call takes for a batch outside the ring.
pub(super) const SCRATCH: usize = 64 << 10;
const LEAST_SCRATCH: u32 = 4 << 10;
/// How long a peer that was told an error may take to read it before the socket goes.
const LINGER: Duration = Duration::from_secs(1);
/// Time limit for a batch that must leave the ring to get memory outside it.
const EVICTION_WAIT: Duration = Duration::from_millis(200);

/// What a worker lends to the connection that it drives.
pub(super) struct Context<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) stats: &'a mut WorkerStats,
    pub(super) first_frame: &'a mut Option<Tick>,
    pub(super) last_commit: &'a mut Option<Tick>,
    pub(super) shared: &'a Shared,
    pub(super) config: &'a WorkerConfig,
    /// [`SCRATCH`] bytes.
    pub(super) scratch: &'a mut [u8],
    /// Of the worker's loop.
    pub(super) round: u64,
    pub(super) now: Instant,
}

/// A batch that is being received.
#[derive(Debug)]
struct Incoming {
    batch: Batch,
    received: u32,
    /// When its first byte could arrive, postponed by the time that it waited for the broker.
    since: Instant,
    /// The bytes received outside the ring.
    spill: Option<Box<Spill>>,
}

/// Where the next bytes belong.
#[derive(Debug)]
enum State {
    /// To the header of the next frame.
    Header,
    /// Nowhere yet: the batch waits for its place in the ring. Without a claim it is complete.
    Waiting {
        batch: Incoming,
        reservation: Reservation,
        claim: Option<RingClaim>,
        paused: Instant,
    },
    /// To a batch in the ring.
    Payload {
        batch: Incoming,
        reservation: Reservation,
        claim: Option<RingClaim>,
    },
    /// To a batch outside the ring: its shares of the ring are used up, or its publisher is slow.
    Aside { batch: Incoming },
    /// Nowhere yet: the shares of both ring and memory are used up.
    Starved {
        batch: Incoming,
        paused: Instant,
        turn: Waiting,
    },
    /// Nowhere: the stream has ended well and its last ack is going out.
    Ended,
    /// Nowhere: an error is going out, and the peer gets time to read it.
    Failed { until: Instant },
}

impl Incoming {
    fn new(batch: Batch, now: Instant) -> Self {
        Self {
            batch,
            received: 0,
            since: now,
            spill: None,
        }
    }

    fn missing(&self) -> u32 {
        self.batch.payload_len - self.received
    }

    /// Accounts for the time from `paused` to `now`, in which it waited for the broker.
    fn go_on(mut self, paused: Instant, now: Instant) -> Self {
        self.since += now - paused;
        self
    }
}

/// Why a connection ends.
#[derive(Debug)]
pub(super) enum CloseReason {
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

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => f.write_str("completed"),
            Self::Closed => f.write_str("closed by the publisher without an end frame"),
            Self::Superseded => f.write_str("the publisher continues over another connection"),
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
    buffers: EffectiveBuffers,
    pub(super) admission: Admission,
    claimant: Claimant,
    /// Since when its batch must leave the ring but gets no memory.
    evicted: Option<Instant>,
    state: State,
    /// Header of the next frame, with its tag.
    header: [u8; HEADER_LEN + TAG_LEN],
    header_len: usize,
    header_filled: usize,
    /// Keys for the tags of frames, if there are any, and the number of frames so far.
    keys: Option<Arc<PacketKeys>>,
    verified: u64,
    /// Header and tag of the batch that is being received; the next header may arrive with its end.
    begun: [u8; HEADER_LEN + TAG_LEN],
    /// Sequence number of the next batch, which is the number of committed ones.
    next_seq: u64,
    /// Index of the last committed batch, if it was not yet visible when last looked at.
    unseen: Option<u64>,
    /// What the last ack said.
    acked: u64,
    /// Payload bytes committed since.
    unacked_bytes: u64,
    replies: ReplyQueue,
    outbox_empty: bool,
    last_progress: Instant,
    /// When the publisher was last told that the broker waits for room.
    last_heartbeat: Option<Instant>,
    committed: Committed,
    failure: Option<String>,
}

impl Connection {
    pub(super) fn new(opened: AcceptedStream, shared: &Shared, now: Instant) -> Self {
        let AcceptedStream {
            socket,
            peer,
            buffers,
            admission,
            keys,
        } = opened;
        let first_batch = admission.lease.committed();
        Self {
            socket,
            peer,
            buffers,
            claimant: shared.claims.claimant(&admission.log, &admission.tenant),
            evicted: None,
            admission,
            state: State::Header,
            header: [0; HEADER_LEN + TAG_LEN],
            header_len: HEADER_LEN + if keys.is_some() { TAG_LEN } else { 0 },
            header_filled: 0,
            verified: 0,
            begun: [0; HEADER_LEN + TAG_LEN],
            next_seq: first_batch,
            unseen: None,
            acked: first_batch,
            unacked_bytes: 0,
            replies: ReplyQueue::new(keys.clone()),
            keys,
            outbox_empty: true,
            last_progress: now,
            last_heartbeat: None,
            committed: Committed::default(),
            failure: None,
        }
    }

    /// Receives, commits and acknowledges as far as it goes without waiting.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) -> Result<Need, CloseReason> {
        let need = match self.receive(cx) {
            Err(CloseReason::Fault(fault, text)) => {
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
        matches!(self.state, State::Waiting { .. } | State::Starved { .. })
    }

    /// Acks what has become visible; says what is needed besides more bytes.
    pub(super) fn acknowledge(&mut self, cx: &mut Context<'_>) -> Result<Need, CloseReason> {
        self.reply(cx)?;
        match self.state {
            State::Ended if self.outbox_empty && self.acked == self.next_seq => {
                Err(CloseReason::Completed)
            }
            State::Ended if self.unseen.is_none() => Ok(Need::Nothing),
            State::Waiting { .. } | State::Starved { .. } => Ok(Need::Space),
            _ if self.unseen.is_some() => Ok(Need::Space),
            _ => Ok(Need::Readable),
        }
    }

    fn receive(&mut self, cx: &mut Context<'_>) -> Result<Need, CloseReason> {
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

    /// Takes memory for what the next receive call may bring to a batch outside the ring; returns its
    /// size. If there is none at all, the batch waits.
    fn room_aside(&mut self, cx: &Context<'_>) -> usize {
        let State::Aside { batch } = &mut self.state else {
            return 0;
        };
        let wanted = batch.missing().min(SCRATCH as u32);
        let spill = batch
            .spill
            .get_or_insert_with(|| Box::new(self.claimant.spill()));
        // The rest of a piece that the batch already has needs no new one.
        let rest = LEAST_SCRATCH - batch.received % LEAST_SCRATCH;
        for room in [wanted, wanted.min(LEAST_SCRATCH), wanted.min(rest)] {
            if spill.reserve(batch.received, room, Turn::Next).is_ok() {
                return room as usize;
            }
        }
        if let State::Aside { batch } = std::mem::replace(&mut self.state, State::Header) {
            self.state = State::Starved {
                batch,
                paused: cx.now,
                turn: self.claimant.wait(),
            };
        }
        0
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

    /// Takes room in the ring for a batch; the batch waits if others still need the room.
    fn enter_ring(&mut self, cx: &mut Context<'_>, batch: Incoming, claim: Option<RingClaim>) {
        let reservation = cx.writer.reserve(batch.batch.payload_len);
        if batch.spill.is_none() && cx.writer.is_granted(&reservation) {
            self.state = State::Payload {
                batch,
                reservation,
                claim,
            };
            return;
        }
        Counters::count(&cx.shared.counters.waits_for_space);
        self.state = State::Waiting {
            batch,
            reservation,
            claim,
            paused: cx.now,
        };
    }

    /// Continues if there is room now.
    fn retry_space(&mut self, cx: &mut Context<'_>) -> Result<bool, CloseReason> {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Waiting {
                batch,
                reservation,
                claim,
                paused,
            } => {
                if !cx.writer.is_granted(&reservation) {
                    // The workers that block it may be asleep.
                    cx.shared.claims.wake_others();
                    self.state = State::Waiting {
                        batch,
                        reservation,
                        claim,
                        paused,
                    };
                    return Ok(false);
                }
                let mut batch = batch.go_on(paused, cx.now);
                if let Some(spill) = batch.spill.take() {
                    for (offset, part) in spill.parts(batch.received) {
                        cx.writer.place(&reservation, offset, part);
                    }
                }
                let is_complete = batch.missing() == 0;
                self.last_progress = cx.now;
                self.state = State::Payload {
                    batch,
                    reservation,
                    claim,
                };
                if is_complete {
                    self.commit(cx)?;
                }
                Ok(true)
            }
            State::Starved {
                batch,
                paused,
                turn,
            } => {
                let len = batch.batch.payload_len;
                if let Some(claim) = self.claimant.claim(len, Turn::Waiting) {
                    let batch = batch.go_on(paused, cx.now);
                    let claim = claim.after(batch.received.into());
                    self.enter_ring(cx, batch, Some(claim));
                    return Ok(true);
                }
                let mut batch = batch;
                let spill = batch
                    .spill
                    .as_mut()
                    .expect("a batch outside the ring has a spill");
                if spill.reserve(batch.received, 1, Turn::Next).is_err() {
                    self.state = State::Starved {
                        batch,
                        paused,
                        turn,
                    };
                    return Ok(false);
                }
                self.last_progress = cx.now;
                let batch = batch.go_on(paused, cx.now);
                self.state = State::Aside { batch };
                Ok(true)
            }
            other => {
                self.state = other;
                Ok(true)
            }
        }
    }

    /// Checks the tag of the frame that has begun, if it must carry one: nobody on the path changed,
    /// inserted, removed or repeated a frame.
    fn verify(&mut self, payload: &[u8]) -> Result<(), CloseReason> {
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

    fn commit(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        let State::Payload {
            batch: Incoming {
                batch, received, ..
            },
            reservation,
            claim,
        } = std::mem::replace(&mut self.state, State::Header)
        else {
            unreachable!("only a batch in the ring can be committed");
        };
        if let Some(claim) = claim {
            claim.fill();
        }
        self.evicted = None;
        let start = cx.stats.stages.now();
        if self.keys.is_some()
            && let Err(ending) = self.verify(cx.writer.placed(&reservation, received))
        {
            cx.writer.abort(reservation);
            return Err(ending);
        }
        let info = BatchInfo {
            seq: batch.batch_seq,
            len: batch.payload_len,
            messages: batch.messages,
            checksum: batch.checksum,
        };
        let (admission, verify) = (&self.admission, cx.config.verify_on_receive);
        let committed = &mut self.committed;
        let index = committed
            .commit(cx.writer, reservation, admission, &info, verify)
            .map_err(|text| CloseReason::Fault(Fault::Checksum, text))?;
        self.next_seq += 1;
        self.unacked_bytes += u64::from(received);
        self.unseen = Some(index);
        cx.stats.batches += 1;
        *cx.last_commit = Some(cx.stats.stages.lap(PathStage::Commit, start));
        Ok(())
    }

    /// Acks what has become visible, and sends what waits.
    fn reply(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
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
            self.replies.ack(self.acked, false);
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

    fn flush(&mut self) -> Result<(), CloseReason> {
        self.outbox_empty = self.replies.flush(&self.socket).map_err(CloseReason::Io)?;
        if self.outbox_empty && matches!(self.state, State::Failed { .. }) {
            self.socket
                .shutdown(Shutdown::Write)
                .map_err(CloseReason::Io)?;
        }
        Ok(())
    }

    /// Whether the socket should be watched for room to send.
    pub(super) fn wants_to_write(&self) -> bool {
        !self.outbox_empty
    }

    /// Handles time: heartbeats, stalls, pressure on the ring. Called a few times a second.
    pub(super) fn tick(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        if self.admission.lease.is_wanted() {
            return Err(CloseReason::Superseded);
        }
        let is_over = matches!(self.state, State::Failed { .. } | State::Ended);
        if self.admission.lease.is_revoked() && !is_over {
            self.fail(cx, Fault::Stalled, REVOKED.to_owned());
            return self.reply(cx);
        }
        if let Some(lost) = cx.writer.log().lost()
            && !is_over
        {
            let (fault, text) = (lost.fault(), lost.reason.clone());
            // A committed batch that was not acknowledged counts as never received.
            self.next_seq = self.acked;
            self.admission.lease.set_committed(self.acked);
            self.fail(cx, fault, text);
            return self.reply(cx);
        }
        if cx.writer.waits_for_readers(cx.round) {
            self.excuse(cx.now);
        }
        let silent_for = cx.now - self.last_progress;
        let may_stall = cx.config.stall_timeout;
        match &self.state {
            State::Starved { paused, .. } if cx.now - *paused > may_stall => {
                let text = format!(
                    "no room for batch {} for {may_stall:.0?}: too many batches of this host, or of all publishers, are incomplete; send smaller batches (--batch-size) or fewer at a time (--in-flight)",
                    self.next_seq
                );
                self.fail(cx, Fault::Stalled, text);
                return self.reply(cx);
            }
            State::Waiting { .. } | State::Starved { .. }
                if self
                    .last_heartbeat
                    .is_none_or(|at| cx.now - at >= cx.config.heartbeat) =>
            {
                self.last_heartbeat = Some(cx.now);
                self.replies.ack(self.acked, true);
                return self.flush();
            }
            State::Payload { .. } | State::Aside { .. } if silent_for > may_stall => {
                let text = format!("no byte of batch {} for {silent_for:.0?}", self.next_seq);
                self.fail(cx, Fault::Stalled, text);
                return self.reply(cx);
            }
            State::Payload { batch, .. } | State::Aside { batch } => {
                let (elapsed, received) = (cx.now - batch.since, batch.received.into());
                if claims::is_overdue(elapsed, received, may_stall) {
                    let len = batch.batch.payload_len;
                    let text = claims::overdue_text(self.next_seq, received, len, elapsed);
                    self.fail(cx, Fault::Stalled, text);
                    return self.reply(cx);
                }
            }
            State::Failed { until } if cx.now >= *until => return Err(CloseReason::Closed),
            _ => {}
        }
        Ok(())
    }

    /// Registered readers hold up the ring: the time that its batch waits does not count against its
    /// publisher.
    fn excuse(&mut self, now: Instant) {
        self.evicted = None;
        if let State::Starved { batch, paused, .. } = &mut self.state {
            batch.since += now - *paused;
            *paused = now;
        }
    }

    /// Whether its batch has been in the ring for half a round and arrives slowly, so that it will soon
    /// block all others, unless readers block them already.
    pub(super) fn holds_up(&self, cx: &mut Context<'_>) -> bool {
        let State::Payload {
            batch, reservation, ..
        } = &self.state
        else {
            return false;
        };
        let half = cx.writer.log().geometry().ring_bytes() / 2;
        cx.writer.age(reservation) > half
            && claims::is_slow(cx.now - batch.since, batch.received.into())
            && !cx.writer.waits_for_readers(cx.round)
    }

    /// Bytes of the ring or of memory that its batch holds and others wait for; 0 if it arrives at a
    /// fair rate, and nothing of a ring that readers hold up.
    pub(super) fn reclaimable(&self, cx: &mut Context<'_>) -> u64 {
        let now = cx.now;
        match &self.state {
            State::Payload {
                batch,
                claim: Some(_),
                ..
            } if self.claimant.pressure().ring
                && claims::is_slow(now - batch.since, batch.received.into())
                && !cx.writer.waits_for_readers(cx.round) =>
            {
                batch.batch.payload_len.into()
            }
            State::Aside { batch }
                if self.claimant.pressure().memory
                    && claims::is_stalling(now - batch.since, batch.received.into()) =>
            {
                batch.spill.as_ref().map_or(0, |spill| spill.held())
            }
            _ => 0,
        }
    }

    /// Releases what its batch holds. A batch in the ring continues outside it if its memory share has
    /// room for the bytes received so far. Otherwise the stream ends, unless only its share of the ring
    /// is needed and the batch still makes progress.
    pub(super) fn give_way(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Payload {
                batch,
                reservation,
                claim,
            } => {
                let mut spill = self.claimant.spill();
                let fits = match batch.received {
                    0 => Ok(()),
                    received => spill.reserve(0, received, Turn::Next),
                };
                if fits.is_ok() {
                    Counters::count(&cx.shared.counters.evacuated_batches);
                    spill.write(0, cx.writer.placed(&reservation, batch.received));
                    cx.writer.abort(reservation);
                    if let Some(claim) = claim {
                        claim.leave(batch.received.into());
                    }
                    self.evicted = None;
                    self.state = State::Aside {
                        batch: Incoming {
                            spill: Some(Box::new(spill)),
                            ..batch
                        },
                    };
                    return Ok(());
                }
                let elapsed = cx.now - batch.since;
                let goes_on = !claims::is_stalling(elapsed, batch.received.into());
                self.state = State::Payload {
                    batch,
                    reservation,
                    claim,
                };
                if goes_on && !self.holds_up(cx) {
                    return Ok(());
                }
                // Streams with more memory than this one needs may give way.
                if cx.now - *self.evicted.get_or_insert(cx.now) < EVICTION_WAIT {
                    return Ok(());
                }
            }
            other => self.state = other,
        }
        let text = format!(
            "batch {} arrives too slowly and blocks others, and the memory for such batches is used up; send smaller batches",
            self.next_seq
        );
        self.fail(cx, Fault::Stalled, text);
        self.reply(cx)
    }

    fn return_to_ring(&mut self, cx: &mut Context<'_>) {
        if let State::Aside { batch } = std::mem::replace(&mut self.state, State::Header) {
            // The batch is complete, so it blocks no other.
            self.enter_ring(cx, batch, None);
        }
    }

    /// Gives back what the connection holds, tells the peer why, and waits a little for it to read.
    fn fail(&mut self, cx: &mut Context<'_>, fault: Fault, text: String) {
        let counters = &cx.shared.counters;
        Counters::count(match fault {
            Fault::Protocol => &counters.protocol_errors,
            Fault::Checksum => &counters.checksum_errors,
            Fault::Stalled => &counters.stalled,
            Fault::Shutdown | Fault::LogLost => &counters.streams_cut,
            Fault::Authentication => &counters.forged,
        });
        self.release(cx);
        // A level 0 stream has no acks, but what it had committed stays committed.
        self.replies.error(fault, self.next_seq, &text);
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

    fn discard(&mut self) -> Result<Need, CloseReason> {
        let mut scratch = [0; 16 << 10];
        match (&self.socket).read(&mut scratch) {
            Ok(0) => Err(CloseReason::Closed),
            Ok(_) => Ok(Need::Turn),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Need::Readable),
            Err(error) => Err(CloseReason::Io(error)),
        }
    }

    fn closed(&self) -> CloseReason {
        match &self.state {
            State::Payload { batch, .. } | State::Aside { batch } => CloseReason::CutInBatch {
                received: batch.received as usize,
                len: batch.batch.payload_len,
            },
            _ => CloseReason::Closed,
        }
    }

    fn release(&mut self, cx: &mut Context<'_>) {
        // Memory is given back when it is dropped.
        if let State::Waiting {
            batch,
            reservation,
            claim,
            ..
        }
        | State::Payload {
            batch,
            reservation,
            claim,
        } = std::mem::replace(&mut self.state, State::Ended)
        {
            cx.writer.abort(reservation);
            if let Some(claim) = claim {
                claim.leave(batch.received.into());
            }
        }
    }

    /// Gives back what the connection holds, and sums it up.
    pub(super) fn finish(mut self, cx: &mut Context<'_>, ending: &CloseReason) -> ConnectionReport {
        self.release(cx);
        // The stream's next connection tells the publisher that these are committed, so they must be
        // visible, as for an ack.
        if let Some(index) = self.unseen {
            cx.writer.wait_until_visible(index);
        }
        let counters = &cx.shared.counters;
        if matches!(ending, CloseReason::Completed) {
            Counters::count(&counters.streams_completed);
        } else if self.failure.is_none() {
            Counters::count(&counters.streams_cut);
        }
        let ended = self.failure.take().unwrap_or_else(|| ending.to_string());
        let (admission, buffers) = (&self.admission, self.buffers);
        ConnectionReport::new(
            self.peer,
            Path::Tcp,
            admission,
            buffers,
            &self.committed,
            ended,
        )
    }

    pub(super) fn log(&self) -> &Arc<penstock_log::Log> {
        &self.admission.log
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
