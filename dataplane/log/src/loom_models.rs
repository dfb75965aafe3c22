//! Every interleaving of small cases where threads meet in the shared buffer.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p penstock-log --release --lib loom`.
//! Payload is modelled as one cell per segment: a ring of two segments, one batch in each.

use crossbeam_utils::CachePadded;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use super::layout::Geometry;
use super::ring::{Control, FREE, MAX_READERS, NOTHING_OPEN, ReaderCursors, Ring, WriterWatermark};
use super::slot::{Descriptor, Found, Slot};

const SEGMENT: u64 = 4096;

/// Cursors of registered readers.
#[derive(Debug)]
struct Readers(Vec<AtomicU64>);

impl ReaderCursors for Readers {
    fn load(&self) -> [u64; MAX_READERS] {
        let mut cursors = [FREE; MAX_READERS];
        for (cursor, reader) in cursors.iter_mut().zip(&self.0) {
            *cursor = reader.load(Ordering::Acquire);
        }
        cursors
    }
}

struct Model {
    control: Control,
    slots: Vec<Slot>,
    readers: Readers,
    watermarks: Vec<CachePadded<WriterWatermark>>,
    /// Payload that only its owner may touch: loom reports a race.
    exclusive: Vec<UnsafeCell<u64>>,
    /// Payload that a reader may copy while a writer overwrites it.
    shared: Vec<AtomicU64>,
}

impl Model {
    fn new(writers: usize, readers: usize) -> Arc<Self> {
        Self::with_slots(2, writers, readers)
    }

    fn with_slots(slots: usize, writers: usize, readers: usize) -> Arc<Self> {
        Arc::new(Self {
            control: Control::default(),
            slots: (0..slots).map(|_| Slot::default()).collect(),
            readers: Readers((0..readers).map(|_| AtomicU64::new(FREE)).collect()),
            watermarks: (0..writers).map(|_| CachePadded::default()).collect(),
            exclusive: (0..2).map(|_| UnsafeCell::new(0)).collect(),
            shared: (0..2).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    fn ring(&self) -> Ring<'_> {
        Ring {
            geometry: Geometry::new(2 * SEGMENT, SEGMENT, self.slots.len() as u64).unwrap(),
            control: &self.control,
            slots: &self.slots,
            readers: (!self.readers.0.is_empty()).then_some(&self.readers),
            watermarks: &self.watermarks,
        }
    }

    /// Reserves a segment, waits for the grant, writes, commits.
    fn write(&self, writer: usize, value: u64) {
        let position = self.open(writer);
        let ring = self.ring();
        while !ring.grants(ring.limits(), position + SEGMENT) {
            thread::yield_now();
        }
        let cell = (position / SEGMENT % 2) as usize;
        // SAFETY: the model checks that no other thread accesses the cell now.
        self.exclusive[cell].with_mut(|payload| unsafe { *payload = value });
        self.shared[cell].store(value, Ordering::Relaxed);
        self.commit(writer, position, value);
    }

    fn open(&self, writer: usize) -> u64 {
        let watermark = &self.watermarks[writer];
        let position = self.ring().open(watermark, SEGMENT as u32);
        watermark.open.store(position, Ordering::Release);
        position
    }

    fn commit(&self, writer: usize, position: u64, value: u64) {
        let watermark = &self.watermarks[writer];
        let descriptor = Descriptor {
            position,
            payload_len: SEGMENT as u32,
            messages: 1,
            batch_seq: value,
            ..Descriptor::default()
        };
        self.ring().commit(watermark, descriptor);
        watermark.open.store(NOTHING_OPEN, Ordering::Release);
    }
}

/// Every execution with at most `preemptions` forced switches: nearly all known races need two
/// (Musuvathi and Qadeer, "Iterative context bounding", PLDI 2007).
fn bounded(preemptions: usize) -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder
}

#[test]
fn loom_two_committers_leave_no_gap_and_exact_totals() {
    bounded(2).check(|| {
        let model = Model::new(2, 0);
        let other = Arc::clone(&model);
        let thread = thread::spawn(move || other.write(1, 11));
        model.write(0, 10);
        thread.join().unwrap();
        let ring = model.ring();
        assert_eq!(ring.frontier(), 2);
        assert_eq!(ring.totals_below(2).messages, 2);
        assert_eq!(ring.totals_below(2).payload_bytes, 2 * (SEGMENT - 4));
    });
}

#[test]
fn loom_writers_never_share_a_segment_across_a_lap() {
    bounded(2).check(|| {
        let model = Model::new(2, 0);
        let other = Arc::clone(&model);
        let thread = thread::spawn(move || {
            other.write(1, 1);
            other.write(1, 2);
        });
        model.write(0, 3);
        thread.join().unwrap();
        assert_eq!(model.ring().frontier(), 3);
        assert_eq!(model.ring().totals_below(3).messages, 3);
    });
}

#[test]
fn loom_a_copying_reader_returns_no_torn_batch() {
    bounded(2).check(|| {
        let model = Model::new(1, 0);
        let writer = Arc::clone(&model);
        let thread = thread::spawn(move || (0..3).for_each(|n| writer.write(0, 100 + n)));
        let ring = model.ring();
        for index in 0..2 {
            if ring.frontier() > index
                && let Found::Published(d, totals) = ring.slot(index).read(index)
            {
                assert_eq!(d.batch_seq, 100 + index);
                assert_eq!(totals.messages, index + 1);
                let copy =
                    model.shared[(d.position / SEGMENT % 2) as usize].load(Ordering::Relaxed);
                if ring.is_whole(d.position) {
                    assert_eq!(copy, 100 + index, "a torn batch passed for whole");
                }
            }
        }
        thread.join().unwrap();
    });
}

#[test]
fn loom_nothing_is_written_under_a_registered_reader() {
    bounded(2).check(|| {
        let model = Model::new(1, 1);
        let writer = Arc::clone(&model);
        model.write(0, 100);
        let thread = thread::spawn(move || {
            // Not waiting for the reader: a blocked writer would only spin in the model.
            let ring = writer.ring();
            writer.open(0);
            let second = ring.open(&writer.watermarks[0], SEGMENT as u32);
            if second + SEGMENT <= ring.limits().position {
                // SAFETY: the model checks that no other thread accesses the cell now.
                writer.exclusive[0].with_mut(|payload| unsafe { *payload = 102 });
            }
        });
        let ring = model.ring();
        model.readers.0[0].store(0, Ordering::SeqCst);
        if let Found::Published(d, _) = ring.slot(0).read(0)
            && ring.can_borrow(d.position)
        {
            // SAFETY: the model checks that no thread writes the cell now.
            model.exclusive[0].with(|payload| assert_eq!(unsafe { *payload }, 100));
        }
        thread.join().unwrap();
    });
}

#[test]
fn loom_a_batch_above_the_frontier_is_kept_for_a_registered_reader() {
    bounded(2).check(|| {
        let model = Model::with_slots(4, 2, 1);
        model.readers.0[0].store(0, Ordering::SeqCst);
        let (first, second) = (model.open(0), model.open(1));
        let other = Arc::clone(&model);
        // If this one takes index 0 and is held up, the other's batch is published above the
        // frontier: no longer open, and not yet what the reader waits for.
        let thread = thread::spawn(move || other.commit(1, second, 11));
        model.commit(0, first, 10);
        let granted = model.ring().limits().position;
        assert!(granted <= first + 2 * SEGMENT, "unread payload was granted");
        thread.join().unwrap();
    });
}
