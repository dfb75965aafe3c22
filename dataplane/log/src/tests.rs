//! The shared buffer against a plain reference, across threads, and after crashes of its writer.

mod starts;

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;
use tempfile::TempDir;

use super::harness::{commit_for, drain, payload, write};
use super::*;

const SEGMENT: u64 = 4096;

fn options(segments: u64, slots: u64, full: RingFullPolicy) -> LogOptions {
    let geometry = Geometry::new(segments * SEGMENT, SEGMENT, slots).unwrap();
    LogOptions {
        geometry,
        full,
        access: Access::default(),
        writers: 4,
    }
}

fn log_in(dir: &TempDir, options: &LogOptions) -> (PathBuf, Arc<Log>) {
    let path = dir.path().join("topic.log");
    let log = Arc::new(Log::open(&path, options).unwrap());
    (path, log)
}

#[test]
fn file_modes_allow_readers_only_what_they_need() {
    let dir = TempDir::new().unwrap();
    let mut options = options(2, 8, RingFullPolicy::Block);
    for (mode, registry) in [
        (0o640, 0o660),
        (0o644, 0o660),
        (0o600, 0o600),
        (0o604, 0o600),
    ] {
        options.access = Access::new(mode, None).unwrap();
        let (path, _log) = log_in(&dir, &options);
        let mode_of = |path: PathBuf| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode_of(path.clone()), mode);
        assert_eq!(
            mode_of(path.with_extension("readers")),
            registry,
            "{mode:o}"
        );
    }
}

#[test]
fn committed_batches_are_read_back_and_aborted_ones_are_not() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(4, 16, RingFullPolicy::Block));
    let mut writer = log.writer();
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    assert_eq!(reader.next(), Ok(None));
    let aborted = writer.reserve(100);
    let late = writer.reserve(50);
    write(&mut writer, 0, 0, b"first to be committed");
    assert!(writer.is_granted(&late));
    writer.place(&late, 0, &[7; 50]);
    writer.abort(aborted);
    writer.commit(late, &commit_for(1, 0, 1, &[7; 50]));
    let read = drain(&mut reader);
    assert_eq!(
        read,
        [
            (0, 0, b"first to be committed".to_vec()),
            (1, 0, vec![7; 50])
        ]
    );
    let info = log.info();
    assert_eq!((info.batches, info.messages), (2, 2));
    assert_eq!(
        info.payload_bytes,
        21 - 4 + 50 - 4,
        "framing is not counted"
    );
}

impl PartialEq for Batch<'_> {
    fn eq(&self, other: &Self) -> bool {
        (self.index, self.payload) == (other.index, other.payload)
    }
}

#[test]
fn a_lapped_reader_learns_exactly_what_it_lost() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Overwrite));
    let mut writer = log.writer();
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    let total = 20;
    for seq in 0..total {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    let Err(ReadError::Lapped { batches, messages }) = reader.next() else {
        panic!("twenty batches do not fit in a ring of four");
    };
    assert_eq!(batches, messages, "one message a batch");
    let rest = drain(&mut reader);
    assert_eq!(batches + rest.len() as u64, total);
    assert_eq!(rest.len(), 4);
    for (n, (_, seq, bytes)) in rest.into_iter().enumerate() {
        assert_eq!(seq, batches + n as u64);
        assert_eq!(bytes, payload(0, seq, 2048));
    }
}

#[test]
fn a_registered_reader_blocks_the_writer_until_it_reads_or_dies() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Block));
    let mut writer = log.writer();
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    assert_eq!(log.backlog(), (0, 0));
    reader.register().unwrap();
    assert_eq!(log.backlog(), (1, 0));
    for seq in 0..4 {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    let fifth = writer.reserve(2048);
    assert!(
        !writer.is_granted(&fifth),
        "the ring is full of unread batches"
    );
    assert_eq!(log.backlog(), (1, 4 * 2048));
    assert_eq!(log.sweep_readers().unwrap(), 0, "the reader lives");
    assert_eq!(reader.next().unwrap().unwrap().batch_seq, 0);
    assert!(!writer.is_granted(&fifth), "the first batch is still lent");
    assert_eq!(reader.next().unwrap().unwrap().batch_seq, 1);
    assert!(writer.is_granted(&fifth));
    writer.place(&fifth, 0, &payload(0, 4, 2048));
    writer.commit(fifth, &commit_for(0, 4, 1, &payload(0, 4, 2048)));
    let sixth = writer.reserve(2048);
    assert!(!writer.is_granted(&sixth));
    drop(reader);
    assert!(writer.is_granted(&sixth), "nobody is left to wait for");
    assert_eq!(log.backlog(), (0, 0));
}

#[test]
fn a_stopped_reader_is_evicted_learns_of_it_and_sees_no_torn_byte() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Evict));
    let mut writer = log.writer();
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    reader.register().unwrap();
    for seq in 0..4 {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    // It stops with a batch in its hands.
    let held = reader.next().unwrap().unwrap();
    let fifth = writer.reserve(2048);
    assert!(!writer.is_granted(&fifth), "its broker waits for it");
    let stopped = log.readers().unwrap();
    assert_eq!(stopped.len(), 1);
    assert_eq!(stopped[0].process, u64::from(std::process::id()));
    assert_eq!(stopped[0].unread_batches, 4);
    assert!(stopped[0].holds_up);
    assert!(log.evict_reader(&stopped[0]).unwrap());
    assert!(writer.is_granted(&fifth));
    writer.place(&fifth, 0, &payload(0, 4, 2048));
    writer.commit(fifth, &commit_for(0, 4, 1, &payload(0, 4, 2048)));
    for seq in 5..9 {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    assert_eq!(held.payload, payload(0, 0, 2048));
    assert_eq!(reader.next(), Err(ReadError::Evicted));
    let lapped = ReadError::Lapped {
        batches: 4,
        messages: 4,
    };
    assert_eq!(reader.next(), Err(lapped));
    assert_eq!(drain(&mut reader).len(), 4);
    assert_eq!(log.backlog().0, 0);
    assert_eq!(log.sweep_readers().unwrap(), 0);
    reader.register().unwrap();
    assert_eq!(log.backlog().0, 1);
}

#[test]
fn a_reader_with_a_borrowed_batch_of_an_earlier_broker_is_evicted_at_its_next_read() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Block));
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    reader.register().unwrap();
    let mut writer = log.writer();
    for seq in 0..4 {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    let borrowed = reader.next().unwrap().unwrap();
    drop((writer, log));
    let (_, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Evict));
    let seen = || log.readers().unwrap()[0];
    assert!(seen().holds_up);
    assert!(!log.evict_reader(&seen()).unwrap());
    assert_eq!(borrowed.payload, payload(0, 0, 2048));
    assert_eq!(reader.next().unwrap().unwrap().batch_seq, 1);
    assert!(log.evict_reader(&seen()).unwrap());
}

/// The registry is a blocking broker's; the one that has the log now overwrites.
#[test]
fn a_registered_reader_borrows_nothing_from_an_overwriting_writer() {
    let dir = TempDir::new().unwrap();
    drop(log_in(&dir, &options(2, 16, RingFullPolicy::Block)));
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Overwrite));
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    reader.register().unwrap();
    let mut writer = log.writer();
    write(&mut writer, 0, 0, &payload(0, 0, 2048));
    let batch = reader.next().unwrap().unwrap();
    for seq in 1..9 {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    assert_eq!(batch.payload, payload(0, 0, 2048));
}

#[test]
fn registration_fails_without_a_registry() {
    let dir = TempDir::new().unwrap();
    let (path, _log) = log_in(&dir, &options(2, 16, RingFullPolicy::Overwrite));
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    let refused = reader.register().unwrap_err();
    assert!(matches!(refused, OpenError::NoRegistry(_)), "{refused}");
    assert!(
        !path.with_extension("readers").exists(),
        "readers make none"
    );
}

#[test]
fn a_truncated_registry_ends_neither_writer_nor_reader() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Block));
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    reader.register().unwrap();
    let mut writer = log.writer();
    let registry = path.with_extension("readers");
    for seq in 0..20 {
        let file = OpenOptions::new().write(true).open(&registry).unwrap();
        file.set_len(0).unwrap();
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
        assert_eq!(reader.next().unwrap().unwrap().batch_seq, seq);
    }
    assert_eq!(log.backlog().0, 1, "it registers again as it reads on");
}

#[test]
fn a_deleted_replaced_or_resized_log_is_detected() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Block));
    assert_eq!(log.check_file().unwrap(), FileState::Whole);
    let aside = dir.path().join("aside");
    fs::rename(&path, &aside).unwrap();
    assert_eq!(log.check_file().unwrap(), FileState::Gone);
    fs::write(&path, "another").unwrap();
    assert_eq!(log.check_file().unwrap(), FileState::Gone);
    fs::rename(&aside, &path).unwrap();
    assert_eq!(log.check_file().unwrap(), FileState::Whole);
    log.mapping.file.set_len(4096).unwrap();
    assert_eq!(
        log.check_file().unwrap(),
        FileState::Resized { bytes: 4096 }
    );
}

#[test]
fn a_log_whose_creation_fails_is_removed() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("topic.log");
    // As when there is no room for it.
    fs::create_dir(path.with_extension("readers")).unwrap();
    let options = options(2, 8, RingFullPolicy::Block);
    Log::open(&path, &options).unwrap_err();
    assert!(!path.exists());
    // One that was there before stays.
    fs::remove_dir(path.with_extension("readers")).unwrap();
    drop(Log::open(&path, &options).unwrap());
    fs::remove_file(path.with_extension("readers")).unwrap();
    fs::create_dir(path.with_extension("readers")).unwrap();
    Log::open(&path, &options).unwrap_err();
    assert!(path.exists());
}

#[test]
fn a_deleted_or_replaced_registry_is_detected() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 8, RingFullPolicy::Block));
    assert_eq!(log.check_registry().unwrap(), FileState::Whole);
    let registry = path.with_extension("readers");
    fs::remove_file(&registry).unwrap();
    assert_eq!(log.check_registry().unwrap(), FileState::Gone);
    fs::write(&registry, "").unwrap();
    assert_eq!(log.check_registry().unwrap(), FileState::Gone);
    assert_eq!(log.check_file().unwrap(), FileState::Whole);
}

#[test]
fn a_new_log_may_replace_a_truncated_one() {
    let options = options(2, 8, RingFullPolicy::Overwrite);
    let lost = || Lost {
        reason: "truncated".to_owned(),
        is_replaced: true,
    };
    let dir = TempDir::new().unwrap();
    let (path, first) = log_in(&dir, &options);
    assert!(Log::open(&path, &options).is_err(), "it is locked");
    let truncate = || {
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(0)
    };
    truncate().unwrap();
    first.set_lost(lost());
    let aside = dir.path().join("topic.log.lost");
    assert_eq!(aside.metadata().unwrap().len(), 0);
    let second = Log::open(&path, &options).unwrap();
    // Another file that has the name by now stays.
    truncate().unwrap();
    fs::remove_file(&aside).unwrap();
    fs::rename(&path, dir.path().join("moved")).unwrap();
    fs::write(&path, "a backup").unwrap();
    second.set_lost(lost());
    assert_eq!(fs::read(&path).unwrap(), b"a backup");
    assert!(!aside.exists());
}

#[test]
fn a_full_index_blocks_as_a_full_ring_does() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(16, 4, RingFullPolicy::Block));
    let mut writer = log.writer();
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    reader.register().unwrap();
    let mut seq = 0;
    let waiting = loop {
        let reservation = writer.reserve(2048);
        if !writer.is_granted(&reservation) {
            break reservation;
        }
        writer.place(&reservation, 0, &payload(0, seq, 2048));
        writer.commit(reservation, &commit_for(0, seq, 1, &payload(0, seq, 2048)));
        seq += 1;
    };
    assert!(
        seq < 32,
        "the index has four slots, and the reader has read nothing"
    );
    assert_eq!(
        drain(&mut reader).len() as u64,
        seq,
        "nothing unread was overwritten"
    );
    assert!(writer.is_granted(&waiting));
    writer.abort(waiting);
}

#[test]
fn an_open_reservation_is_never_overwritten() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 64, RingFullPolicy::Overwrite));
    let (mut slow, mut fast) = (log.writer(), log.writer());
    let held = slow.reserve(2048);
    assert!(slow.is_granted(&held));
    slow.place(&held, 0, &payload(9, 0, 2048));
    for seq in 0..3 {
        write(&mut fast, 0, seq, &payload(0, seq, 2048));
    }
    let blocked = fast.reserve(2048);
    assert!(!fast.is_granted(&blocked));
    assert_eq!(slow.age(&held), 2 * SEGMENT + 2048);
    assert_eq!(slow.oldest_open_age(), slow.age(&held));
    slow.commit(held, &commit_for(9, 0, 1, &payload(9, 0, 2048)));
    assert!(fast.is_granted(&blocked));
    // What the waiting reservation will overwrite counts as lost from now on; the rest is whole.
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    for seq in 0..3 {
        assert_eq!(
            reader.next().unwrap().unwrap().payload,
            payload(0, seq, 2048)
        );
    }
    assert_eq!(
        reader.next(),
        Err(ReadError::Lapped {
            batches: 1,
            messages: 1
        })
    );
    fast.abort(blocked);
}

/// Writers on several threads, readers of both kinds: per-stream order, every byte, exact totals.
#[test]
fn many_writers_and_readers() {
    const EACH: u64 = 3000;
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(8, 64, RingFullPolicy::Block));
    let done = Arc::new(AtomicBool::new(false));
    let mut registered = Reader::open(&path, Start::Oldest).unwrap();
    registered.register().unwrap();
    let copying = Reader::open(&path, Start::Oldest).unwrap();
    let consume = |mut reader: Reader, done: Arc<AtomicBool>| {
        thread::spawn(move || {
            let (mut next, mut batches, mut lost) = (HashMap::new(), 0, 0);
            loop {
                let finished = done.load(Ordering::Acquire);
                match reader.next() {
                    Ok(Some(batch)) => {
                        batch.verify().unwrap();
                        let len = batch.payload.len();
                        assert_eq!(batch.payload, payload(batch.stream, batch.batch_seq, len));
                        let expected = next.entry(batch.stream).or_insert(0);
                        assert!(batch.batch_seq >= *expected, "order inside a stream");
                        *expected = batch.batch_seq + 1;
                        batches += 1;
                    }
                    Ok(None) if finished => return (batches, lost),
                    Ok(None) => thread::yield_now(),
                    Err(ReadError::Lapped { batches, messages }) => {
                        assert_eq!(batches, messages);
                        lost += batches;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        })
    };
    let registered = consume(registered, Arc::clone(&done));
    let copying = consume(copying, Arc::clone(&done));
    let writers: Vec<_> = (0..3)
        .map(|stream| {
            let mut writer = log.writer();
            thread::spawn(move || {
                for seq in 0..EACH {
                    let len = 4 + (seq as usize * 131 + stream as usize * 977) % 2000;
                    write(&mut writer, stream, seq, &payload(stream, seq, len));
                }
            })
        })
        .collect();
    writers
        .into_iter()
        .for_each(|writer| writer.join().unwrap());
    done.store(true, Ordering::Release);
    assert_eq!(
        registered.join().unwrap(),
        (3 * EACH, 0),
        "nothing lost by the registered reader"
    );
    let (read, lost) = copying.join().unwrap();
    assert_eq!(
        read + lost,
        3 * EACH,
        "every batch was read, or reported lost"
    );
    assert_eq!(log.info().messages, 3 * EACH);
}

#[test]
fn a_log_outlives_its_writer_and_open_batches_are_dropped() {
    let dir = TempDir::new().unwrap();
    let wanted = options(4, 16, RingFullPolicy::Block);
    let (path, log) = log_in(&dir, &wanted);
    let mut writer = log.writer();
    write(&mut writer, 0, 0, b"kept by the log");
    let lost = writer.reserve(64);
    assert!(writer.is_granted(&lost));
    writer.place(&lost, 0, &[1; 64]);
    // As after a crash: neither committed nor aborted.
    drop((writer, log));
    let log = Arc::new(Log::open(&path, &wanted).unwrap());
    assert_eq!(log.info().epoch, 2);
    write(&mut log.writer(), 0, 1, b"written by the second one");
    let read = drain(&mut Reader::open(&path, Start::Oldest).unwrap());
    let kept = [
        (0, 0, b"kept by the log".to_vec()),
        (0, 1, b"written by the second one".to_vec()),
    ];
    assert_eq!(read, kept);
    assert_eq!(log.info().messages, 2);
}

#[test]
fn a_slot_published_behind_a_gap_is_dropped_on_recovery() {
    let dir = TempDir::new().unwrap();
    let wanted = options(4, 16, RingFullPolicy::Overwrite);
    let (path, log) = log_in(&dir, &wanted);
    write(&mut log.writer(), 0, 0, b"below the frontier");
    // A writer that died between taking place 1 and publishing it, while another published 2.
    let ring = log.ring();
    ring.control.index_tail.store(3, Ordering::SeqCst);
    ring.slot(2).publish(2, &super::slot::Descriptor::default());
    drop(log);
    let log = Arc::new(Log::open(&path, &wanted).unwrap());
    for seq in 1..3 {
        write(&mut log.writer(), 0, seq, b"after recovery");
    }
    let sequences: Vec<_> = drain(&mut Reader::open(&path, Start::Oldest).unwrap())
        .iter()
        .map(|b| b.1)
        .collect();
    assert_eq!(sequences, [0, 1, 2]);
}

#[test]
fn only_one_process_writes() {
    let dir = TempDir::new().unwrap();
    let wanted = options(4, 16, RingFullPolicy::Block);
    let (path, log) = log_in(&dir, &wanted);
    let reader = Reader::open(&path, Start::End).unwrap();
    assert!(reader.writer_is_alive());
    assert!(matches!(
        Log::open(&path, &wanted),
        Err(OpenError::Locked { holder, .. }) if holder == format!("process {}", std::process::id())
    ));
    drop(log);
    assert!(!reader.writer_is_alive());
}

#[test]
fn a_child_that_inherits_the_file_does_not_keep_the_lock() {
    let dir = TempDir::new().unwrap();
    let wanted = options(4, 16, RingFullPolicy::Block);
    let (path, log) = log_in(&dir, &wanted);
    // As between fork and exec, before close-on-exec takes effect.
    let _child = log.lock.lock().unwrap().as_ref().unwrap().share();
    drop(log);
    drop(Log::open(&path, &wanted).unwrap());
}

/// A process that may read the log can lock all of it.
#[test]
fn a_lock_of_a_reader_neither_blocks_nor_hides_a_broker() {
    let dir = TempDir::new().unwrap();
    let wanted = options(4, 16, RingFullPolicy::Block);
    let (path, log) = log_in(&dir, &wanted);
    drop(log);
    let lock_all = |file: &fs::File| {
        let mut all: libc::flock = libc::flock {
            l_type: libc::F_RDLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // SAFETY: the descriptor is open, and the kernel reads one flock.
        let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut all) };
        assert_eq!(locked, 0);
    };
    let held = fs::File::open(&path).unwrap();
    lock_all(&held);
    let reader = Reader::open(&path, Start::End).unwrap();
    assert!(!reader.writer_is_alive(), "a reader's lock is no writer");
    let log = Log::open(&path, &wanted).unwrap();
    assert!(reader.writer_is_alive());
    // What readers may open beside it they may lock as well, for the next broker to find.
    let shown = fs::File::open(path.with_extension("writer")).unwrap();
    drop(log);
    lock_all(&shown);
    assert!(!reader.writer_is_alive());
    let _log = Log::open(&path, &wanted).unwrap();
    assert!(reader.writer_is_alive());
    let lock = path.with_extension("lock").metadata().unwrap();
    assert_eq!(lock.permissions().mode() & 0o777, 0o600);
}

/// In a directory that others may write to, nothing is touched.
#[test]
fn untrusted_links_are_not_followed() {
    let dir = TempDir::new().unwrap();
    let wanted = options(4, 16, RingFullPolicy::Block);
    let victim = dir.path().join("victim");
    let logs = dir.path().join("logs");
    fs::create_dir(&logs).unwrap();
    fs::write(&victim, vec![b'A'; 9000]).unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let intact = || {
        let about = victim.metadata().unwrap();
        assert_eq!(
            (about.len(), about.permissions().mode() & 0o777),
            (9000, 0o600)
        );
    };
    let path = logs.join("topic.log");
    for extension in ["log", "new", "readers", "lock"] {
        for hard in [false, true] {
            let trap = path.with_extension(extension);
            let _ = fs::remove_file(&trap);
            match hard {
                true => fs::hard_link(&victim, &trap).unwrap(),
                false => std::os::unix::fs::symlink(&victim, &trap).unwrap(),
            }
            let refused = Log::open(&path, &wanted).unwrap_err().to_string();
            assert!(refused.contains("link"), "{extension}: {refused}");
            intact();
            let _ = fs::remove_file(&trap);
            let _ = fs::remove_file(&path);
        }
    }
    // The file that shows that there is a writer is always created anew.
    std::os::unix::fs::symlink(&victim, path.with_extension("writer")).unwrap();
    drop(Log::open(&path, &wanted).unwrap());
    intact();
    fs::set_permissions(&logs, fs::Permissions::from_mode(0o777)).unwrap();
    let refused = Log::open(&path, &wanted).unwrap_err().to_string();
    assert!(refused.contains("chmod go-w"), "{refused}");
}

#[test]
fn a_sparse_log_is_allocated_when_it_is_opened() {
    let dir = TempDir::new().unwrap();
    let wanted = options(4, 16, RingFullPolicy::Block);
    let (path, log) = log_in(&dir, &wanted);
    write(&mut log.writer(), 0, 0, b"kept");
    drop(log);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let whole = file.metadata().unwrap();
    file.set_len(wanted.geometry.segments_offset() + 4).unwrap();
    file.set_len(whole.len()).unwrap();
    let log = Log::open(&path, &wanted).unwrap();
    assert!(file.metadata().unwrap().blocks() * 512 >= whole.len());
    assert_eq!(log.info().messages, 1);
}

#[test]
fn files_that_are_not_logs_are_refused_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let wanted = options(4, 16, RingFullPolicy::Block);
    let refused = |path: &Path| Log::open(path, &wanted).unwrap_err().to_string();
    let path = dir.path().join("text.log");
    fs::write(
        &path,
        "just some text, longer than a header would be, but no log",
    )
    .unwrap();
    assert!(refused(&path).contains("not a Penstock log"));
    let reading = Reader::open(&path, Start::Oldest).unwrap_err().to_string();
    assert!(reading.contains("not a Penstock log"));
    let missing = Reader::open(&dir.path().join("none.log"), Start::Oldest).unwrap_err();
    assert!(missing.to_string().contains("no such log"));
    let (path, log) = log_in(&dir, &options(8, 16, RingFullPolicy::Block));
    drop(log);
    assert!(
        refused(&path).contains("ring of 32768 bytes"),
        "{}",
        refused(&path)
    );
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&9u64.to_le_bytes(), 8).unwrap();
    assert!(refused(&path).contains("version 9"));
    let nowhere = dir.path().join("missing-directory/topic.log");
    assert!(refused(&nowhere).contains("cannot create"));
}

#[test]
fn damaged_batches_are_reported_and_never_served() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(4, 16, RingFullPolicy::Overwrite));
    for seq in 0..3 {
        write(&mut log.writer(), 0, seq, &payload(0, seq, 100));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let flip = |offset: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
    };
    flip(layout::INDEX_OFFSET as u64 + super::slot::SLOT_BYTES as u64 + 24);
    flip(log.geometry().offset_of(128) as u64);
    let mut reader = Reader::open(&path, Start::Oldest).unwrap();
    reader.next().unwrap().unwrap().verify().unwrap();
    assert_eq!(reader.next(), Err(ReadError::Damaged { index: 1 }));
    let last = reader.next().unwrap().unwrap();
    assert_eq!(last.batch_seq, 2);
    last.verify().unwrap();
}

#[derive(Debug, Clone)]
enum Step {
    Reserve(u32),
    Commit(prop::sample::Index),
    Abort(prop::sample::Index),
    Read,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (4u32..=2048).prop_map(Step::Reserve),
        3 => any::<prop::sample::Index>().prop_map(Step::Commit),
        1 => any::<prop::sample::Index>().prop_map(Step::Abort),
        2 => Just(Step::Read),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A plain list is the reference: what was committed, in that order, is what is read; gaps only
    /// where the reader was told so, and never when it is registered with a blocking log.
    #[test]
    fn behaves_as_a_list(steps in steps(), block: bool) {
        let dir = TempDir::new().unwrap();
        let full = if block { RingFullPolicy::Block } else { RingFullPolicy::Overwrite };
        let (path, log) = log_in(&dir, &options(4, 8, full));
        let mut writer = log.writer();
        let mut reader = Reader::open(&path, Start::Oldest).unwrap();
        if block {
            reader.register().unwrap();
        }
        let mut open: Vec<(Reservation, bool)> = Vec::new();
        let mut committed: Vec<Vec<u8>> = Vec::new();
        let mut read = 0;
        let mut read_one = |committed: &[Vec<u8>]| -> Result<bool, TestCaseError> {
            match reader.next() {
                Ok(Some(batch)) => {
                    prop_assert_eq!(batch.payload, &committed[read][..]);
                    prop_assert_eq!(batch.index, read as u64);
                    read += 1;
                }
                Ok(None) => {
                    prop_assert_eq!(read, committed.len());
                    return Ok(false);
                }
                Err(ReadError::Lapped { batches, .. }) => {
                    prop_assert!(!block, "a registered reader loses nothing");
                    prop_assert!(batches > 0);
                    read += batches as usize;
                }
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            }
            Ok(true)
        };
        for step in steps {
            match step {
                Step::Reserve(len) if open.len() < 4 => open.push((writer.reserve(len), false)),
                Step::Commit(which) if !open.is_empty() => {
                    let (reservation, _) = open.swap_remove(which.index(open.len()));
                    if writer.is_granted(&reservation) {
                        let seq = committed.len() as u64;
                        let bytes = payload(0, seq, reservation.len() as usize);
                        writer.place(&reservation, 0, &bytes);
                        writer.commit(reservation, &commit_for(0, seq, 1, &bytes));
                        committed.push(bytes);
                    } else {
                        writer.abort(reservation);
                    }
                }
                Step::Abort(which) if !open.is_empty() => {
                    let (reservation, _) = open.swap_remove(which.index(open.len()));
                    writer.abort(reservation);
                }
                Step::Read => {
                    read_one(&committed)?;
                }
                Step::Reserve(_) | Step::Commit(_) | Step::Abort(_) => {}
            }
        }
        while read_one(&committed)? {}
        prop_assert_eq!(log.info().batches, committed.len() as u64);
        open.into_iter().for_each(|(reservation, _)| writer.abort(reservation));
    }
}
