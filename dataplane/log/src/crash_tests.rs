//! A writer that ends between any two of its writes, and files damaged anywhere.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;

use super::harness::{Nameless, Snapshot, Written, drain, look_at, payload, small, write};
use super::sync::crash::with_hook;
use super::*;

/// Slots of the index of a small log.
const SLOTS: usize = 8;

fn log_in(dir: &TempDir) -> (PathBuf, Arc<Log>) {
    let path = dir.path().join("topic.log");
    let log = Arc::new(Log::open(&path, &small()).unwrap());
    (path, log)
}

/// Recovers a snapshot and writes on; what was read back before and after.
fn recovered(snapshot: &Snapshot) -> (Vec<Written>, Vec<Written>) {
    let file = Nameless::new().unwrap();
    let path = file.path();
    snapshot.write_to(&File::create(&path).unwrap()).unwrap();
    let log = Arc::new(file.log().unwrap());
    let before = drain(&mut Reader::open(&path, Start::Oldest).unwrap());
    let mut reader = Reader::open(&path, Start::End).unwrap();
    let kept = log.info().batches;
    for seq in 0..3 {
        write(&mut log.writer(), 9, seq, &payload(9, seq, 50));
        let batches = log.info().batches;
        assert_eq!(batches, kept + seq + 1, "what was dropped comes back");
    }
    let after = drain(&mut reader);
    (before, after)
}

/// All that a test's writers did, in the order of its commit, and how much of it was acked.
#[derive(Default)]
struct History {
    begun: Vec<Written>,
    acked: usize,
    snapshots: Vec<(Snapshot, usize, usize)>,
}

/// Writes one batch as the paths do: acked once the frontier has passed it.
fn write_and_ack(
    log: &Arc<Log>,
    writer: &mut Writer,
    history: &RefCell<History>,
    stream: u32,
    seq: u64,
) {
    let bytes = payload(stream, seq, 700);
    history
        .borrow_mut()
        .begun
        .push((stream, seq, bytes.clone()));
    let index = write(writer, stream, seq, &bytes);
    if log.info().batches > index {
        history.borrow_mut().acked = index as usize + 1;
    }
}

/// A writer's steps from a fresh log to several rounds of ring and index, with a snapshot at every
/// one of them, and a reservation that is never committed.
fn snapshots() -> History {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir);
    let history = Rc::new(RefCell::new(History::default()));
    let hook = {
        let history = Rc::clone(&history);
        move || {
            let mut history = history.borrow_mut();
            let now = (
                Snapshot::of(&path).unwrap(),
                history.acked,
                history.begun.len(),
            );
            history.snapshots.push(now);
        }
    };
    with_hook(hook, || {
        let mut writer = log.writer();
        let mut other = log.writer();
        for seq in 0..4 {
            write_and_ack(&log, &mut writer, &history, 0, seq);
        }
        let open = other.reserve(300);
        for seq in 4..8 {
            write_and_ack(&log, &mut writer, &history, 0, seq);
        }
        other.abort(open);
        for seq in 8..20 {
            write_and_ack(&log, &mut writer, &history, 0, seq);
        }
    });
    Rc::into_inner(history).unwrap().into_inner()
}

#[test]
fn a_writer_may_die_at_every_step() {
    let history = snapshots();
    assert!(history.snapshots.len() > 20 * 15, "every write is a step");
    let mut kept_unacked = 0;
    for (step, (snapshot, acked, begun)) in history.snapshots.iter().enumerate() {
        let (before, after) = recovered(snapshot);
        // The ring holds eleven of these; older ones are overwritten.
        let newest = before.last().map_or(0, |(_, seq, _)| *seq as usize + 1);
        assert!(
            (*acked..=*begun).contains(&newest),
            "step {step}: {newest} of {acked} acked"
        );
        let oldest = newest - before.len();
        assert_eq!(before, history.begun[oldest..newest], "step {step}");
        assert!(before.len() >= newest.min(SLOTS - 1), "step {step}");
        assert_eq!(after.len(), 3, "step {step}");
        kept_unacked += newest - acked;
    }
    // Between publishing a batch and acking it the writer has died as well.
    assert!(kept_unacked > 0);
}

#[test]
fn recovery_may_die_at_every_step() {
    let dir = TempDir::new().unwrap();
    let history = snapshots();
    // One of a batch that was begun and not published, with a reservation open.
    for (snapshot, acked, _) in history.snapshots.iter().step_by(41) {
        let path = dir.path().join("recovering.log");
        snapshot.write_to(&File::create(&path).unwrap()).unwrap();
        let steps = Rc::new(RefCell::new(Vec::new()));
        let hook = {
            let (steps, path) = (Rc::clone(&steps), path.clone());
            move || steps.borrow_mut().push(Snapshot::of(&path).unwrap())
        };
        let log = with_hook(hook, || Log::open(&path, &small()).unwrap());
        let batches = log.info().batches as usize;
        assert!(batches >= *acked);
        drop(log);
        for again in steps.borrow().iter() {
            let (before, after) = recovered(again);
            assert_eq!(
                before.last(),
                batches.checked_sub(1).map(|last| &history.begun[last])
            );
            assert_eq!(after.len(), 3);
        }
    }
}

/// Another writer does all its work inside each step of one.
#[test]
fn a_writer_may_die_between_the_steps_of_another() {
    let dir = TempDir::new().unwrap();
    for step in 0.. {
        let (path, log) = log_in(&dir);
        let taken = Rc::new(RefCell::new(None));
        let hook = {
            let (log, path, taken, mut count) =
                (Arc::clone(&log), path.clone(), Rc::clone(&taken), 0);
            move || {
                if count == step {
                    let index = write(&mut log.writer(), 1, 0, b"the other");
                    let acked = log.info().batches > index;
                    *taken.borrow_mut() = Some((Snapshot::of(&path).unwrap(), acked));
                }
                count += 1;
            }
        };
        with_hook(hook, || write(&mut log.writer(), 0, 0, b"the one"));
        drop(log);
        fs::remove_file(path).unwrap();
        let Some((snapshot, acked)) = taken.take() else {
            assert!(step > 15, "every write is a step");
            return;
        };
        let (before, after) = recovered(&snapshot);
        let there = before.iter().any(|(stream, ..)| *stream == 1);
        assert!(there || !acked, "step {step}: an acked batch is lost");
        assert!(
            before
                .iter()
                .all(|(_, _, bytes)| bytes.starts_with(b"the o"))
        );
        assert_eq!(after.len(), 3, "step {step}");
    }
}

#[test]
fn creation_may_die_at_every_step() {
    for step in 0.. {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("topic.log");
        let mut count = 0;
        let hook = move || {
            assert!(count != step, "the process ends");
            count += 1;
        };
        let made = catch_unwind(AssertUnwindSafe(|| {
            with_hook(hook, || Log::open(&path, &small()).map(drop))
        }));
        let log = Arc::new(Log::open(&path, &small()).unwrap());
        write(&mut log.writer(), 0, 0, b"first");
        assert_eq!(
            drain(&mut Reader::open(&path, Start::Oldest).unwrap()).len(),
            1
        );
        let mut files: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|f| f.unwrap().file_name())
            .collect();
        files.sort();
        assert_eq!(
            files,
            ["topic.lock", "topic.log", "topic.writer"],
            "step {step} leaves nothing else"
        );
        if made.is_ok() {
            assert!(step > 10, "every write is a step");
            return;
        }
    }
}

#[test]
fn two_brokers_cannot_create_the_same_log() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("topic.log");
    let second = Rc::new(RefCell::new(Vec::new()));
    let hook = {
        let (second, path) = (Rc::clone(&second), path.clone());
        move || {
            let opened = Log::open(&path, &small());
            second
                .borrow_mut()
                .push(opened.map(drop).map_err(|e| e.to_string()));
        }
    };
    let first = with_hook(hook, || Log::open(&path, &small()));
    let second = second.borrow();
    assert!(
        !second.is_empty()
            && second
                .iter()
                .all(|opened| { opened.as_ref().is_err_and(|e| e.contains("another broker")) }),
        "{second:?}"
    );
    drop(first);
    Log::open(&path, &small()).unwrap();
}

fn any_damage() -> impl Strategy<Value = Vec<(usize, u8)>> {
    // Header, control page and index are small beside the ring: half of the damage goes there.
    let pages = layout::INDEX_OFFSET + SLOTS * slot::SLOT_BYTES;
    let words = (0..64usize).prop_map(|n| layout::CONTROL_OFFSET + n % 8 + 128 * (n / 8 % 4));
    let place = prop_oneof![
        any::<u16>().prop_map(usize::from),
        0..64usize,
        words,
        8192..pages
    ];
    prop::collection::vec((place, 1..=255u8), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_damaged_log_is_recovered_or_refused_and_serves_nothing_wrong(
        batches in 0..24u64,
        damage in any_damage(),
    ) {
        let mut snapshot = Snapshot::with_batches(batches).unwrap();
        for (at, bits) in damage {
            snapshot.damage(at, bits);
        }
        for (stream, seq, bytes) in look_at(&snapshot).unwrap() {
            prop_assert_eq!((stream, &bytes), (0, &payload(0, seq, 700)), "batch {}", seq);
            prop_assert!(seq < batches);
        }
    }
}

#[test]
fn a_control_page_that_contradicts_the_index_is_refused() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir);
    for seq in 0..20 {
        write(&mut log.writer(), 0, seq, &payload(0, seq, 100));
    }
    drop(log);
    let whole = Snapshot::of(&path).unwrap();
    let control = layout::CONTROL_OFFSET as u64;
    for (offset, value, word) in [
        (0, u64::MAX - 63, "next position"),
        (0, 65, "next position"),
        (256, 0, "ahead of its frontier"),
        (256, 12, "newest batch"),
        (256, 21, "newest batch"),
        (256, u64::MAX, "the frontier"),
    ] {
        whole.write_to(&File::create(&path).unwrap()).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&u64::to_le_bytes(value), control + offset)
            .unwrap();
        let error = Log::open(&path, &small()).unwrap_err().to_string();
        assert!(
            error.contains(word) && error.contains("damaged"),
            "{value}: {error}"
        );
        // Readers get what they can from it.
        let mut reader = Reader::open(&path, Start::Oldest).unwrap();
        let _ = reader.info();
        for _ in 0..2 * SLOTS {
            let _ = reader.next().map(drop);
        }
    }
}
