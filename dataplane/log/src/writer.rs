//! The writing end, one per thread: reservations of payload space, and commits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use penstock_wire::crc32c;

use super::file::Log;
use super::ring::{Limits, NOTHING_OPEN};
use super::slot::Descriptor;
use super::sync::crash_point;

/// Writes batches into a log. Each thread has its own; any number may write side by side.
///
/// The watermark that keeps others away from open reservations is this writer's alone, so a writer must
/// not be shared, and a reservation goes back to the writer it came from.
#[derive(Debug)]
pub struct Writer {
    log: Arc<Log>,
    number: usize,
    /// Positions of open reservations in the order in which they were taken, so rising; closed
    /// ones that are not yet at the front are `None`.
    open: VecDeque<Option<u64>>,
    /// Sequence number of the first entry of `open`.
    first: u64,
    limits: Limits,
    /// The last round in which readers were checked, and whether the ring waited for them.
    waits_for_readers: Option<(u64, bool)>,
}

/// Room for one batch; end it with [`Writer::commit`] or [`Writer::abort`].
#[derive(Debug)]
#[must_use = "an open reservation blocks every writer after one round of the ring"]
pub struct Reservation {
    position: u64,
    len: u32,
    ticket: u64,
}

/// Memory of a granted reservation, for a system call to write to.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// First byte.
    pub start: *mut u8,
    /// Bytes.
    pub len: usize,
}

/// What is said about a batch when it is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit {
    /// Session that it came from.
    pub session: u64,
    /// Stream inside the session.
    pub stream: u32,
    /// Position in the stream.
    pub batch_seq: u64,
    /// Messages in the payload.
    pub messages: u32,
    /// CRC32C, see [`penstock_wire::batch::checksum`].
    pub checksum: u32,
    /// When the whole batch was there, nanoseconds since the Unix epoch.
    pub arrival_unix_ns: u64,
}

impl Reservation {
    /// Bytes of the batch.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there is nothing to place; no batch is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn end(&self) -> u64 {
        self.position + u64::from(self.len).next_multiple_of(super::layout::ALIGNMENT)
    }
}

impl Log {
    /// A writer for one thread.
    ///
    /// # Panics
    /// If more writers are alive than [`LogOptions::writers`](crate::LogOptions::writers) said.
    #[must_use]
    pub fn writer(self: &Arc<Self>) -> Writer {
        let free = self
            .taken
            .iter()
            .position(|taken| !taken.swap(true, Ordering::AcqRel));
        Writer::new(
            Arc::clone(self),
            free.expect("one writer per worker, as configured"),
        )
    }
}

impl Writer {
    pub(super) fn new(log: Arc<Log>, number: usize) -> Self {
        Self {
            log,
            number,
            open: VecDeque::new(),
            first: 0,
            limits: Limits::default(),
            waits_for_readers: None,
        }
    }

    /// The log that this writes.
    #[inline]
    #[must_use]
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Takes room for a batch of `len` bytes; write to it once it [is granted](Self::is_granted).
    ///
    /// # Panics
    /// If `len` exceeds [`super::Geometry::max_payload`]: callers check what peers claim.
    #[inline]
    pub fn reserve(&mut self, len: u32) -> Reservation {
        assert!(
            len <= self.log.geometry().max_payload(),
            "batch of {len} bytes"
        );
        let watermark = self.log.watermark(self.number);
        let position = self.log.ring().open(watermark, len);
        if self.open.is_empty() {
            watermark.open.store(position, Ordering::Release);
        }
        self.open.push_back(Some(position));
        Reservation {
            position,
            len,
            ticket: self.first + self.open.len() as u64 - 1,
        }
    }

    /// Whether no reader or writer needs the bytes that the reservation will overwrite. While it is
    /// not so, the caller leaves its peer waiting and asks again.
    #[inline]
    pub fn is_granted(&mut self, reservation: &Reservation) -> bool {
        let ring = self.log.ring();
        if !ring.grants(self.limits, reservation.end()) {
            let Limits { position, index } = ring.limits();
            // A reader that registers late may lower what is computed, never what was granted.
            self.limits = Limits {
                position: self.limits.position.max(position),
                index,
            };
        }
        ring.grants(self.limits, reservation.end())
    }

    /// Whether the ring has no room because registered readers have not read on. No publisher can change
    /// that, so what it does not send meanwhile does not count against it.
    ///
    /// It takes a system call, so the answer is kept for one `round` of the caller's loop.
    pub fn waits_for_readers(&mut self, round: u64) -> bool {
        if let Some((at, waits)) = self.waits_for_readers
            && at == round
        {
            return waits;
        }
        let waits = self.log.ring().waits_for_readers();
        self.waits_for_readers = Some((round, waits));
        waits
    }

    /// Bytes of the ring that have been reserved since this writer's oldest open reservation. When
    /// it nears the size of the ring, that reservation holds up every writer.
    #[must_use]
    pub fn oldest_open_age(&self) -> u64 {
        let tail = self.log.ring().control.tail.load(Ordering::Relaxed);
        match self.open.front() {
            Some(Some(position)) => tail - position,
            _ => 0,
        }
    }

    /// How many bytes have been reserved since this reservation was.
    #[must_use]
    pub fn age(&self, reservation: &Reservation) -> u64 {
        self.log.ring().control.tail.load(Ordering::Relaxed) - reservation.position
    }

    /// The memory from `offset` to the end of a granted reservation.
    ///
    /// # Panics
    /// If the reservation is not granted, or `offset` lies beyond it.
    #[inline]
    #[must_use]
    pub fn region(&self, reservation: &Reservation, offset: u32) -> Region {
        assert!(
            reservation.end() <= self.limits.position,
            "written only once granted"
        );
        assert!(
            offset <= reservation.len,
            "offset {offset} of {}",
            reservation.len
        );
        // SAFETY: a reservation does not straddle a segment, so `offset` stays inside the mapping.
        let start = unsafe { self.log.payload(reservation.position).add(offset as usize) };
        Region {
            start,
            len: (reservation.len - offset) as usize,
        }
    }

    /// Copies `bytes` to their place.
    ///
    /// # Panics
    /// If the reservation is not granted, or `bytes` reaches beyond it.
    #[inline]
    pub fn place(&mut self, reservation: &Reservation, offset: u32, bytes: &[u8]) {
        let region = self.region(reservation, offset);
        assert!(
            bytes.len() <= region.len,
            "{} bytes at {offset}",
            bytes.len()
        );
        // SAFETY: the region is valid for region.len bytes; granted memory belongs to this
        // reservation alone, in all processes, so nothing else reads or writes it, and `bytes`
        // cannot overlap it because no reference into the log is ever handed out for writing.
        unsafe {
            region
                .start
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
        crash_point();
    }

    /// As [`Self::place`], in one pass with the checksum: returns the CRC32C of bytes that have `crc`,
    /// followed by `bytes`.
    ///
    /// # Panics
    /// As [`Self::place`].
    #[must_use]
    pub fn place_and_sum(
        &mut self,
        reservation: &Reservation,
        offset: u32,
        bytes: &[u8],
        crc: u32,
    ) -> u32 {
        let region = self.region(reservation, offset);
        assert!(
            bytes.len() <= region.len,
            "{} bytes at {offset}",
            bytes.len()
        );
        // SAFETY: as in `place`; mapped file memory is always initialised.
        let to = unsafe { std::slice::from_raw_parts_mut(region.start, bytes.len()) };
        let crc = crc32c::append_and_copy(crc, bytes, to);
        crash_point();
        crc
    }

    /// The first `len` bytes of a granted reservation, all of which must have been written.
    ///
    /// # Panics
    /// As [`Self::region`].
    #[inline]
    #[must_use]
    pub fn placed(&self, reservation: &Reservation, len: u32) -> &[u8] {
        let region = self.region(reservation, 0);
        assert!(len as usize <= region.len);
        // SAFETY: as in `place`; mapped file memory is always initialised, and nobody writes to
        // it while `self` is borrowed, because writing takes `&mut self` or ends this borrow.
        unsafe { std::slice::from_raw_parts(region.start, len as usize) }
    }

    /// Publishes the batch; returns its index. It is visible, and may be acked, once
    /// [`Self::frontier`] exceeds the index, which is nearly always at once.
    pub fn commit(&mut self, reservation: Reservation, commit: &Commit) -> u64 {
        let descriptor = Descriptor {
            position: reservation.position,
            payload_len: reservation.len,
            messages: commit.messages,
            session: commit.session,
            batch_seq: commit.batch_seq,
            stream: commit.stream,
            checksum: commit.checksum,
            arrival_unix_ns: commit.arrival_unix_ns,
            floor: 0,
        };
        let watermark = self.log.watermark(self.number);
        let index = self.log.ring().commit(watermark, descriptor);
        self.close(reservation);
        self.log.watch.committed();
        index
    }

    /// Gives the room back; what was placed there is never seen.
    pub fn abort(&mut self, reservation: Reservation) {
        self.close(reservation);
    }

    /// Batches that are committed and visible.
    #[must_use]
    pub fn frontier(&self) -> u64 {
        self.log.ring().frontier()
    }

    /// Waits until a committed batch is visible, so for the commits of other writers: each is a few
    /// memory accesses and waits for no peer.
    pub fn wait_until_visible(&self, index: u64) {
        while self.frontier() <= index {
            std::thread::yield_now();
        }
    }

    fn close(&mut self, reservation: Reservation) {
        self.open[(reservation.ticket - self.first) as usize] = None;
        while let Some(None) = self.open.front() {
            self.open.pop_front();
            self.first += 1;
        }
        let low = match self.open.front() {
            Some(position) => position.expect("closed ones were taken from the front"),
            None => NOTHING_OPEN,
        };
        self.log
            .watermark(self.number)
            .open
            .store(low, Ordering::Release);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.log.release_writer(self.number);
    }
}
