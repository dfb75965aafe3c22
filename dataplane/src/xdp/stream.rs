//! One stream in its worker: packets go to their place in the log, complete batches are committed,
//! acks and the end of the stream are told. Owns no loop and never blocks.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::FromBytes;

use super::frame::{Datagram, Headers};
use super::gate::Pass;
use super::stats::XdpStats;
use crate::admission::{Admission, REVOKED};
use crate::auth::PacketKeys;
use crate::log::{Commit, Reservation, Writer};
use crate::tcp::{ConnectionReport, Effective, Opened, Outbox, PathStage, WorkerStats};
use crate::transport::{Limits, Receiver, Refusal, Turn};
use crate::wire::batch::{self, Frame, HEADER_LEN, Header};
use crate::wire::message;
use crate::wire::packet::{BatchInfo, Chunk, Feedback, MAX_ACK_LEN, StreamKey};
use crate::wire::reply::Fault;

/// An ack is sent after so many packets, if nothing else asks for one earlier.
const ACK_EVERY: u32 = 32;
/// An ack waits no longer than this, nanoseconds.
const ACK_DELAY: u64 = 100_000;

/// Where a batch lies.
#[derive(Debug)]
struct Room {
    reservation: Reservation,
    /// Its bytes, while the ring has no room for them.
    aside: Option<Vec<u8>>,
}

/// Why a stream ends.
#[derive(Debug)]
pub(super) enum Ending {
    Completed,
    Closed,
    Superseded,
    Fault(Fault, String),
    Io(io::Error),
}

/// What a worker lends to the stream that it drives.
pub(super) struct Context<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) stats: &'a mut WorkerStats,
    pub(super) xdp: &'a mut XdpStats,
    pub(super) verify: bool,
    /// Nanoseconds.
    pub(super) idle_timeout: u64,
    pub(super) now: u64,
}

/// An open stream.
#[derive(Debug)]
pub(super) struct Stream {
    pass: Pass,
    pub(super) control: TcpStream,
    peer: SocketAddr,
    buffers: Effective,
    pub(super) admission: Admission,
    receiver: Receiver<Room>,
    /// If its packets are authenticated; and how many ACKs were.
    pub(super) keys: Option<Arc<PacketKeys>>,
    acks: u64,
    /// Complete batches that wait for room in the ring.
    complete: VecDeque<(BatchInfo, Room)>,
    /// Batches committed.
    committed: u64,
    /// Batches that readers see; with index in the log and number of those that they do not yet.
    visible: u64,
    unseen: Option<(u64, u64)>,
    /// Where ACKs go, once a packet came from the publisher's host; and which port it came to.
    pub(super) back: Option<Headers>,
    pub(super) port: usize,
    /// The host that ACKs go to: the other end of the control connection, whose address is proven.
    host: IpAddr,
    /// Where the newest packet came from, if that was somewhere else.
    elsewhere: Option<Headers>,
    /// When its last packet came.
    heard_at: u64,
    unacked: u32,
    /// When an ack is due at the latest.
    ack_due: Option<u64>,
    told: u64,
    header: [u8; HEADER_LEN],
    header_filled: usize,
    /// Batches that the publisher says the stream has.
    end: Option<u64>,
    outbox: Outbox,
    batches: u64,
    payload_bytes: u64,
}

impl Stream {
    pub(super) fn new(opened: Opened, pass: Pass, port: usize, window: u64, now: u64) -> Self {
        let Opened {
            socket,
            peer,
            buffers,
            admission,
            keys,
        } = opened;
        let first = admission.lease.committed();
        let limits = Limits {
            max_payload: admission.max_payload,
            window,
        };
        let key = pass.stream();
        Self {
            pass,
            control: socket,
            peer,
            buffers,
            keys,
            acks: 0,
            receiver: Receiver::new(key, first, limits, now),
            complete: VecDeque::with_capacity(8),
            committed: first,
            visible: first,
            unseen: None,
            back: None,
            port,
            host: peer.ip().to_canonical(),
            elsewhere: None,
            heard_at: now,
            unacked: 0,
            ack_due: None,
            told: first,
            header: [0; HEADER_LEN],
            header_filled: 0,
            end: None,
            outbox: Outbox::default(),
            batches: 0,
            payload_bytes: 0,
            admission,
        }
    }

    pub(super) fn key(&self) -> StreamKey {
        self.pass.stream()
    }

    pub(super) fn set_window(&mut self, window: u64) {
        self.receiver.set_window(window);
    }

    /// Whether a packet is the newest: a repeated one neither moves the stream nor keeps it alive.
    pub(super) fn is_newest(&self, packet: u64) -> bool {
        self.receiver.is_newest(packet)
    }

    /// Its newest packet came, to this port. Returns false if it came from another host than the
    /// publisher's: it is placed, but nobody gets an ACK for it.
    ///
    /// Anybody can open a stream and send its packets with the source address of somebody else, who
    /// would get larger ACKs than these packets are (RFC 9000 section 8). So ACKs go only to the host
    /// that the control connection proves; its port is learnt.
    ///
    /// The port may change, after a router in between forgot it. Answers follow it with the second
    /// packet in a row: the checksum does not cover addresses, and one that was damaged on the way must
    /// not lead them astray. Whoever repeats its packets from elsewhere gets none, for those are not the
    /// newest (as RFC 9000 section 9.3 has it).
    pub(super) fn heard(
        &mut self,
        now: u64,
        port: usize,
        frame: &[u8],
        datagram: &Datagram,
    ) -> bool {
        self.heard_at = now;
        let known = self.back.as_ref();
        if known.is_some_and(|back| back.leads_back(frame, datagram)) {
            self.port = port;
            self.elsewhere = None;
            return true;
        }
        let back = Headers::back(frame, datagram);
        if back.peer().ip() != self.host {
            return false;
        }
        self.port = port;
        let is_second = self.elsewhere.as_ref() == Some(&back);
        match &self.back {
            Some(_) if !is_second => self.elsewhere = Some(back),
            _ => {
                self.elsewhere = None;
                self.back = Some(back);
            }
        }
        true
    }

    /// A packet that only asks for an ack.
    pub(super) fn ping(&mut self, cx: &mut Context<'_>, packet: u64) {
        let newest = self.receiver.is_newest(packet);
        let turn = self.receiver.arrived(cx.now, packet);
        cx.xdp.note_turn(turn);
        cx.xdp.pings += 1;
        if newest {
            self.ack_due = Some(cx.now);
        } else {
            self.ack_later(cx.now);
        }
    }

    /// Within the delay that an ack may have: however many packets are repeated, that many answers.
    fn ack_later(&mut self, now: u64) {
        self.ack_due.get_or_insert(now + ACK_DELAY);
    }

    /// Places a packet's payload; `parts` has `len` bytes.
    pub(super) fn payload(
        &mut self,
        cx: &mut Context<'_>,
        packet: u64,
        chunk: &Chunk,
        parts: &[&[u8]],
        len: u32,
    ) {
        match self.receiver.offer(packet, chunk, len) {
            Ok(Some(_)) => {}
            Ok(None) => {
                let start = cx.stats.stages.now();
                let room = new_room(cx, chunk.batch.len);
                self.receiver.give_room(&chunk.batch, room);
                cx.stats.stages.lap(PathStage::ReserveLogSpace, start);
            }
            Err(Refusal::Duplicate) => {
                cx.xdp.duplicates += 1;
                // Perhaps the ack was lost.
                self.ack_later(cx.now);
                return;
            }
            Err(_) => {
                cx.xdp.refused += 1;
                return;
            }
        }
        let room = self.receiver.room(&chunk.batch);
        let mut at = chunk.offset;
        for part in parts {
            match &mut room.aside {
                None => cx.writer.place(&room.reservation, at, part),
                Some(bytes) => bytes[at as usize..at as usize + part.len()].copy_from_slice(part),
            }
            at += part.len() as u32;
        }
        let turn = self.receiver.placed(cx.now, packet, chunk, len);
        cx.xdp.note_turn(turn);
        cx.xdp.placed += 1;
        self.unacked += 1;
        if turn != Turn::InTurn || self.unacked >= ACK_EVERY {
            self.ack_due = Some(cx.now);
        } else {
            self.ack_later(cx.now);
        }
    }

    /// Commits what is complete and has room.
    pub(super) fn commit(&mut self, cx: &mut Context<'_>) -> Result<(), Ending> {
        while let Some(complete) = self.receiver.next_complete() {
            self.complete.push_back(complete);
        }
        while let Some((_, room)) = self.complete.front_mut() {
            if !settle(cx, room) {
                break;
            }
            let start = cx.stats.stages.now();
            let (info, room) = self.complete.pop_front().expect("looked at above");
            self.commit_one(cx, &info, room.reservation)?;
            cx.stats.stages.lap(PathStage::Commit, start);
        }
        self.look_at_frontier(cx);
        Ok(())
    }

    fn commit_one(
        &mut self,
        cx: &mut Context<'_>,
        info: &BatchInfo,
        reservation: Reservation,
    ) -> Result<(), Ending> {
        if cx.verify {
            let placed = cx.writer.placed(&reservation, info.len);
            if batch::checksum(info.seq, info.messages, placed) != info.checksum {
                cx.writer.abort(reservation);
                let text = format!("batch {}: its checksum does not match", info.seq);
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
                batch_seq: info.seq,
                messages: info.messages,
                checksum: info.checksum,
                arrival_unix_ns: arrival.as_nanos() as u64,
            },
        );
        self.committed += 1;
        self.admission.lease.set_committed(self.committed);
        self.unseen = Some((index, self.committed));
        self.batches += 1;
        self.payload_bytes +=
            u64::from(info.len) - u64::from(info.messages) * message::OVERHEAD as u64;
        cx.stats.batches += 1;
        Ok(())
    }

    fn look_at_frontier(&mut self, cx: &Context<'_>) {
        if let Some((index, committed)) = self.unseen
            && cx.writer.frontier() > index
        {
            self.unseen = None;
            self.visible = committed;
            self.ack_due = Some(cx.now);
        }
    }

    /// Writes an ACK packet to `frame`, headers and all, if one is due; returns its length.
    pub(super) fn ack(
        &mut self,
        now: u64,
        feedback: &mut Feedback,
        frame: &mut [u8],
    ) -> Option<usize> {
        if self.ack_due.is_none_or(|due| due > now) {
            return None;
        }
        self.ack_due = None;
        self.unacked = 0;
        let back = self.back.as_ref()?;
        let blocked = !self.complete.is_empty();
        self.receiver.feedback(now, blocked, feedback);
        feedback.committed = self.visible;
        self.told = self.visible;
        let headers = back.len();
        let (head, rest) = frame.split_at_mut(headers);
        let mut len = feedback.write(&mut rest[..MAX_ACK_LEN]);
        if let Some(keys) = &self.keys {
            self.acks += 1;
            len = keys.seal_ack(self.acks, rest, len);
        }
        back.write(head, &[&rest[..len]]);
        Some(headers + len)
    }

    /// Whether an ack is owed that is not due yet.
    pub(super) fn ack_due(&self) -> Option<u64> {
        self.ack_due
    }

    pub(super) fn is_blocked(&self) -> bool {
        !self.complete.is_empty()
    }

    /// Looks after rooms, time and the control connection; called about once a millisecond.
    pub(super) fn tick(&mut self, cx: &mut Context<'_>) -> Result<(), Ending> {
        if self.admission.lease.is_wanted() {
            return Err(Ending::Superseded);
        }
        if self.admission.lease.is_revoked() {
            return Err(Ending::Fault(Fault::Stalled, REVOKED.to_owned()));
        }
        // A publisher that lives sends something every second; one whose host went away closes nothing.
        if cx.now - self.heard_at > cx.idle_timeout {
            let text = format!("no packet came for {} s", cx.idle_timeout / 1_000_000_000);
            return Err(Ending::Fault(Fault::Stalled, text));
        }
        let ring = cx.writer.log().geometry().ring_bytes();
        for room in self.receiver.rooms_mut() {
            settle(cx, room);
            if room.aside.is_none() && cx.writer.age(&room.reservation) > ring / 2 {
                evacuate(cx, room);
            }
        }
        self.commit(cx)?;
        self.control()
    }

    /// Takes what the publisher says over the control connection, and answers the end.
    fn control(&mut self) -> Result<(), Ending> {
        loop {
            match (&self.control).read(&mut self.header[self.header_filled..]) {
                Ok(0) => return Err(Ending::Closed),
                Ok(got) => self.header_filled += got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Ending::Io(error)),
            }
            if self.header_filled < HEADER_LEN {
                continue;
            }
            self.header_filled = 0;
            let header = Header::read_from_bytes(&self.header).expect("a header is plain bytes");
            match header.parse(self.admission.max_payload) {
                Ok(Frame::End { batches }) if batches >= self.committed => self.end = Some(batches),
                _ => {
                    let text =
                        "only the end of the stream is said over the control connection".to_owned();
                    return Err(Ending::Fault(Fault::Protocol, text));
                }
            }
        }
        if self.end == Some(self.visible) {
            self.outbox.ack(self.visible, false);
            self.end = None;
            // The few bytes fit in the socket's buffer, or the peer is gone.
            self.outbox.flush(&self.control).map_err(Ending::Io)?;
            return Err(Ending::Completed);
        }
        Ok(())
    }

    /// Gives back what the stream holds, tells the publisher what it does not know, and sums up.
    pub(super) fn finish(mut self, writer: &mut Writer, ending: &Ending) -> ConnectionReport {
        if let Ending::Fault(fault, text) = ending {
            self.outbox.error(*fault, self.visible, text);
            // Best effort: the peer sees the connection close in any case.
            let _ = self.outbox.flush(&self.control);
        }
        let open = self.receiver.into_rooms();
        for room in open.chain(self.complete.into_iter().map(|(_, room)| room)) {
            writer.abort(room.reservation);
        }
        // The stream's next connection tells the publisher that these are committed.
        if let Some((index, _)) = self.unseen {
            writer.wait_until_visible(index);
        }
        ConnectionReport {
            peer: self.peer,
            path: "xdp",
            topic: self.admission.topic.clone(),
            session: format!("{:016x}", self.admission.session),
            stream: self.admission.stream,
            buffers: self.buffers,
            batches: self.batches,
            payload_bytes: self.payload_bytes,
            ended: ending.to_string(),
        }
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Completed => f.write_str("completed"),
            Self::Closed => f.write_str("closed by the publisher without an end frame"),
            Self::Superseded => f.write_str("the publisher goes on over another connection"),
            Self::Fault(_, text) => f.write_str(text),
            Self::Io(error) => error.fmt(f),
        }
    }
}

/// Room in the ring, or outside of it while there is none.
fn new_room(cx: &mut Context<'_>, len: u32) -> Room {
    let reservation = cx.writer.reserve(len);
    let aside = if cx.writer.is_granted(&reservation) {
        None
    } else {
        cx.xdp.aside += 1;
        Some(vec![0; len as usize])
    };
    Room { reservation, aside }
}

/// Moves a batch into the ring once there is room; returns whether it lies there.
fn settle(cx: &mut Context<'_>, room: &mut Room) -> bool {
    if room.aside.is_some() && !cx.writer.is_granted(&room.reservation) {
        return false;
    }
    if let Some(bytes) = room.aside.take() {
        cx.writer.place(&room.reservation, 0, &bytes);
    }
    true
}

/// Moves a batch that does not become complete out of the ring, so that it holds up nobody.
fn evacuate(cx: &mut Context<'_>, room: &mut Room) {
    let len = room.reservation.len();
    let bytes = cx.writer.placed(&room.reservation, len).to_vec();
    let fresh = cx.writer.reserve(len);
    let old = std::mem::replace(&mut room.reservation, fresh);
    cx.writer.abort(old);
    cx.xdp.aside += 1;
    room.aside = Some(bytes);
}
