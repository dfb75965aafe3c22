//! Where readers start, and readers that name batches by their place in the file.

use super::*;

fn reader_at(path: &Path, start: Start) -> Reader {
    Reader::open(path, start).unwrap()
}

fn sequences(path: &Path, start: Start) -> Vec<u64> {
    let read = drain(&mut reader_at(path, start));
    read.into_iter().map(|(_, seq, _)| seq).collect()
}

#[test]
fn a_reader_starts_at_an_index_or_a_time() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(4, 16, RingFullPolicy::Overwrite));
    let mut writer = log.writer();
    for seq in 0..4 {
        let bytes = payload(0, seq, 64);
        let reservation = writer.reserve(64);
        assert!(writer.is_granted(&reservation));
        writer.place(&reservation, 0, &bytes);
        let arrival_unix_ns = 1000 + 10 * seq;
        let commit = Commit {
            arrival_unix_ns,
            ..commit_for(0, seq, 1, &bytes)
        };
        writer.commit(reservation, &commit);
    }
    assert_eq!(sequences(&path, Start::Index(2)), [2, 3]);
    assert_eq!(sequences(&path, Start::Index(4)), []);
    assert_eq!(sequences(&path, Start::Time(0)), [0, 1, 2, 3]);
    assert_eq!(sequences(&path, Start::Time(1011)), [2, 3]);
    assert_eq!(sequences(&path, Start::Time(1031)), []);
    let beyond = Reader::open(&path, Start::Index(5)).unwrap_err();
    assert!(beyond.to_string().contains("has 4 batches"), "{beyond}");
}

#[test]
fn a_start_that_was_overwritten_reports_what_is_missing() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Overwrite));
    let mut writer = log.writer();
    for seq in 0..40 {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    // The index still knows batch 30, whose payload is gone.
    let known = ReadError::Lapped {
        batches: 6,
        messages: 6,
    };
    assert_eq!(reader_at(&path, Start::Index(30)).next(), Err(known));
    // It no longer knows batch 3, so the number of messages is a lower bound.
    let Err(ReadError::Lapped { batches, messages }) = reader_at(&path, Start::Index(3)).next()
    else {
        panic!("batch 3 was overwritten");
    };
    assert_eq!(batches, 33);
    assert!((1..=33).contains(&messages), "{messages}");
}

#[test]
fn spans_lie_in_the_file_and_are_kept_until_they_are_released() {
    let dir = TempDir::new().unwrap();
    let (path, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Block));
    let mut writer = log.writer();
    let mut spans = SpanReader::new(Arc::clone(&log), Start::Oldest, true).unwrap();
    assert!(spans.is_caught_up() && spans.next().unwrap().is_none());
    for seq in 0..4 {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    let file = fs::File::open(&path).unwrap();
    for seq in 0..4 {
        let span = spans.next().unwrap().unwrap();
        assert_eq!((span.index, span.descriptor.batch_seq), (seq, seq));
        let mut bytes = vec![0; 2048];
        file.read_exact_at(&mut bytes, span.file_offset).unwrap();
        assert_eq!(bytes, payload(0, seq, 2048));
        let mut copy = Vec::new();
        assert!(spans.copy_payload(&span, &mut copy) && copy == bytes);
        assert!(spans.is_whole(&span));
    }
    let fifth = writer.reserve(2048);
    assert!(!writer.is_granted(&fifth), "nothing is released");
    spans.release(1);
    assert!(writer.is_granted(&fifth));
    writer.abort(fifth);
    drop(spans);
    assert_eq!(log.backlog(), (0, 0));
}

#[test]
fn a_lapped_span_reader_learns_what_it_lost_and_that_bytes_changed() {
    let dir = TempDir::new().unwrap();
    let (_, log) = log_in(&dir, &options(2, 16, RingFullPolicy::Overwrite));
    let mut writer = log.writer();
    let mut spans = SpanReader::new(Arc::clone(&log), Start::Oldest, false).unwrap();
    write(&mut writer, 0, 0, &payload(0, 0, 2048));
    let first = spans.next().unwrap().unwrap();
    assert!(spans.is_whole(&first));
    for seq in 1..10 {
        write(&mut writer, 0, seq, &payload(0, seq, 2048));
    }
    assert!(!spans.is_whole(&first));
    let lost = ReadError::Lapped {
        batches: 5,
        messages: 5,
    };
    assert_eq!(spans.next().unwrap_err(), lost);
    assert_eq!(spans.next().unwrap().unwrap().index, 6);
}

#[test]
fn a_reader_that_is_waited_for_loses_nothing_to_a_reservation_that_waits() {
    for full in [RingFullPolicy::Block, RingFullPolicy::Evict] {
        let dir = TempDir::new().unwrap();
        let (path, log) = log_in(&dir, &options(2, 16, full));
        let mut writer = log.writer();
        let mut reader = Reader::open(&path, Start::Oldest).unwrap();
        reader.register().unwrap();
        let mut spans = SpanReader::new(Arc::clone(&log), Start::Oldest, true).unwrap();
        for seq in 0..4 {
            write(&mut writer, 0, seq, &payload(0, seq, 2048));
        }
        let fifth = writer.reserve(2048);
        assert!(!writer.is_granted(&fifth));
        assert_eq!(drain(&mut reader).len(), 4, "{full:?}");
        for seq in 0..4 {
            assert_eq!(spans.next().unwrap().unwrap().index, seq, "{full:?}");
        }
        writer.abort(fifth);
    }
}
