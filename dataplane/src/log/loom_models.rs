//! Every interleaving of small cases where threads meet in the shared buffer.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p penstock-dataplane --release --lib loom`.
//! Payload is modelled as one cell per segment: a ring of two segments, one batch in each.

use crossbeam_utils::CachePadded;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use super::layout::Geometry;
use super::ring::{Control, NOTHING_OPEN, Place, Ring};
use super::slot::{Descriptor, Found, Slot};

const SEGMENT: u64 = 4096;

struct Model {
    control: Control,
    slots: Vec<Slot>,
    places: Vec<Place>,
    lows: Vec<CachePadded<AtomicU64>>,
    /// Payload that is only ever touched by who may: loom reports a race.
    exclusive: Vec<UnsafeCell<u64>>,
    /// Payload that a reader may copy while it is overwritten.
    shared: Vec<AtomicU64>,
}

impl Model {
    fn new(writers: usize, places: usize) -> Arc<Self> {
        Arc::new(Self {
            control: Control::default(),
            slots: (0..2).map(|_| Slot::default()).collect(),
            places: (0..places).map(|_| Place::default()).collect(),
            lows: (0..writers)
                .map(|_| CachePadded::new(AtomicU64::new(NOTHING_OPEN)))
                .collect(),
            exclusive: (0..2).map(|_| UnsafeCell::new(0)).collect(),
            shared: (0..2).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    fn ring(&self) -> Ring<'_> {
        Ring {
            geometry: Geometry::new(2 * SEGMENT, SEGMENT, 2).unwrap(),
            control: &self.control,
            slots: &self.slots,
            places: &self.places,
            lows: &self.lows,
        }
    }

    /// Reserves a segment, waits for the grant, writes, commits.
    fn write(&self, writer: usize, value: u64) {
        let ring = self.ring();
        let low = &self.lows[writer];
        let position = ring.open(low, SEGMENT as u32);
        low.store(position, Ordering::Release);
        while position + SEGMENT > ring.limits().position {
            thread::yield_now();
        }
        let cell = (position / SEGMENT % 2) as usize;
        // SAFETY: that nobody else touches the cell now is what the model checks.
        self.exclusive[cell].with_mut(|payload| unsafe { *payload = value });
        self.shared[cell].store(value, Ordering::Relaxed);
        ring.commit(Descriptor {
            position,
            payload_len: SEGMENT as u32,
            messages: 1,
            batch_seq: value,
            ..Descriptor::default()
        });
        low.store(NOTHING_OPEN, Ordering::Release);
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
fn loom_a_copying_reader_takes_no_torn_batch() {
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
            let low = &writer.lows[0];
            let position = ring.open(low, SEGMENT as u32);
            low.store(position, Ordering::Release);
            let second = ring.open(low, SEGMENT as u32);
            if second + SEGMENT <= ring.limits().position {
                // SAFETY: that nobody else touches the cell now is what the model checks.
                writer.exclusive[0].with_mut(|payload| unsafe { *payload = 102 });
            }
        });
        let ring = model.ring();
        model.places[0].cursor.store(0, Ordering::SeqCst);
        if let Found::Published(d, _) = ring.slot(0).read(0)
            && ring.may_lend(d.position)
        {
            // SAFETY: that nobody writes the cell now is what the model checks.
            model.exclusive[0].with(|payload| assert_eq!(unsafe { *payload }, 100));
        }
        thread.join().unwrap();
    });
}
