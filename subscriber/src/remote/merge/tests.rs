use super::*;
use proptest::prelude::*;

const GAP_TIMEOUT: Duration = Duration::from_secs(10);
const WINDOW: u64 = 100;

fn merge(brokers: usize, begins_in_the_middle: bool, now: Instant) -> Merge<u64> {
    let mut merge = Merge::new(brokers, begins_in_the_middle, GAP_TIMEOUT, WINDOW, now);
    (0..brokers).for_each(|broker| merge.on_delivery(broker));
    merge
}

fn place(broker: usize, stream: u32, batch_seq: u64) -> Place {
    Place {
        broker,
        stream: (1, stream),
        batch_seq,
        arrival_unix_ns: 0,
        bytes: 10,
    }
}

fn put(merge: &mut Merge<u64>, broker: usize, batch_seq: u64, now: Instant) {
    merge.on_batch(place(broker, 0, batch_seq), batch_seq, || now);
}

/// Numbers delivered, and gaps as (first, batches).
type Shown = (Vec<u64>, Vec<(u64, u64)>);

fn drain(merge: &mut Merge<u64>) -> Shown {
    let (mut delivered, mut gaps) = (Vec::new(), Vec::new());
    while let Some(merged) = merge.next() {
        match merged {
            Merged::Batch(_, number, batch) => {
                assert_eq!(number, batch);
                delivered.push(number);
            }
            Merged::Duplicate(_) => {}
            Merged::Missing { first, batches, .. } => gaps.push((first, batches)),
        }
    }
    (delivered, gaps)
}

#[test]
fn a_stream_that_moved_waits_for_the_other_broker() {
    let now = Instant::now();
    let mut merge = merge(2, false, now);
    for number in [0, 1, 4, 5] {
        put(&mut merge, 0, number, now);
    }
    merge.decide(now + 2 * GAP_TIMEOUT);
    assert_eq!(drain(&mut merge), (vec![0, 1], vec![]));
    for number in [1, 2, 3] {
        put(&mut merge, 1, number, now);
    }
    assert_eq!(drain(&mut merge), (vec![2, 3, 4, 5], vec![]));
    assert!(!merge.is_waiting());
}

#[test]
fn a_gap_is_certain_once_every_other_broker_has_caught_up_after_it() {
    let now = Instant::now();
    let mut merge = merge(3, false, now);
    merge.on_caught_up(1, now);
    put(&mut merge, 0, 0, now);
    put(&mut merge, 0, 2, now);
    // What was said just after may have been sent before.
    merge.on_caught_up(1, now + GRACE / 2);
    merge.on_caught_up(2, now + GRACE);
    merge.decide(now + 2 * GRACE);
    assert_eq!(drain(&mut merge), (vec![0], vec![]));
    merge.on_caught_up(1, now + GRACE);
    merge.decide(now + 2 * GRACE);
    assert_eq!(drain(&mut merge), (vec![2], vec![(1, 1)]));
    // One broker alone has nobody to wait for.
    let mut alone = self::merge(1, false, now);
    put(&mut alone, 0, 5, now);
    put(&mut alone, 0, 7, now);
    alone.decide(now);
    assert_eq!(drain(&mut alone), (vec![5, 7], vec![(6, 1)]));
}

#[test]
fn an_unreachable_broker_is_waited_for_until_the_timeout() {
    let now = Instant::now();
    let mut merge = merge(2, false, now);
    merge.on_disconnected(1, now);
    put(&mut merge, 0, 3, now);
    merge.decide(now + GAP_TIMEOUT - GRACE);
    assert_eq!(drain(&mut merge), (vec![], vec![]));
    merge.on_disconnected(1, now + GRACE);
    merge.decide(now + GAP_TIMEOUT);
    assert_eq!(drain(&mut merge), (vec![3], vec![]));
    // What it has after all comes too late.
    merge.on_delivery(1);
    put(&mut merge, 1, 2, now);
    put(&mut merge, 1, 4, now);
    assert_eq!(drain(&mut merge), (vec![4], vec![]));
}

#[test]
fn a_stream_starts_at_its_lowest_number_or_in_the_middle() {
    let now = Instant::now();
    let mut oldest = merge(2, false, now);
    put(&mut oldest, 0, 7, now);
    put(&mut oldest, 1, 5, now);
    put(&mut oldest, 1, 6, now);
    // Each broker has shown a higher number than the lowest.
    oldest.decide(now);
    assert_eq!(drain(&mut oldest), (vec![5, 6, 7], vec![]));
    let mut end = merge(2, true, now);
    put(&mut end, 0, 7, now);
    put(&mut end, 1, 5, now);
    assert_eq!(drain(&mut end), (vec![7], vec![]));
}

#[test]
fn brokers_that_wait_for_each_other_do_not_wait_forever() {
    let now = Instant::now();
    let mut merge = merge(2, false, now);
    for number in 0..WINDOW / 10 {
        merge.on_batch(place(0, 0, 2 + number), 2 + number, || now);
        merge.on_batch(place(1, 1, 2 + number), 2 + number, || now);
    }
    merge.decide(now + GAP_TIMEOUT / 2);
    assert_eq!(drain(&mut merge).0.len(), 0);
    merge.decide(now + GAP_TIMEOUT);
    assert_eq!(drain(&mut merge).0.len() as u64, WINDOW / 10);
    // The broker whose batches were released can send again.
    merge.on_caught_up(0, now + GAP_TIMEOUT);
    merge.decide(now + GAP_TIMEOUT);
    assert_eq!(drain(&mut merge).0.len() as u64, WINDOW / 10);
    assert!(!merge.is_waiting());
}

#[test]
fn a_broker_that_never_catches_up_shows_it_by_what_arrived_later() {
    let now = Instant::now();
    let mut merge = merge(2, false, now);
    put(&mut merge, 0, 0, now);
    put(&mut merge, 0, 2, now);
    let late = |seconds: u64| Place {
        arrival_unix_ns: seconds * 1_000_000_000,
        ..place(1, 1, seconds)
    };
    merge.on_batch(late(0), 0, || now);
    merge.decide(now);
    assert_eq!(drain(&mut merge).1, []);
    (1..=10).for_each(|second| merge.on_batch(late(second), second, || now));
    merge.decide(now);
    assert_eq!(drain(&mut merge).1, [(1, 1)]);
}

#[test]
fn idle_streams_are_forgotten_beyond_a_limit() {
    let now = Instant::now();
    let mut merge = merge(1, true, now);
    for stream in 0..=MAX_STREAMS as u32 {
        merge.on_batch(place(0, stream, 0), 0, || now);
    }
    assert!(merge.streams.len() <= MAX_STREAMS / 2 + 1);
    assert!(merge.streams.contains_key(&(1, MAX_STREAMS as u32)));
}

/// A batch, and the brokers that have it: none if it is lost.
type Written = (u32, u64, Vec<usize>);

const BROKERS: usize = 3;

/// Batches of streams that move between brokers, in the order in which they are committed.
fn written() -> impl Strategy<Value = Vec<Written>> {
    let brokers = prop_oneof![
        8 => (0..BROKERS).prop_map(|broker| vec![broker]),
        2 => prop::collection::vec(0..BROKERS, 2),
        1 => Just(vec![]),
    ];
    prop::collection::vec((0..3u32, brokers), 0..60).prop_map(|all| {
        let mut next = [0; 3];
        let number = |(stream, mut brokers): (u32, Vec<usize>)| {
            brokers.dedup();
            let number = next[stream as usize];
            next[stream as usize] += 1;
            (stream, number, brokers)
        };
        all.into_iter().map(number).collect()
    })
}

#[derive(Debug, Clone)]
enum Step {
    Commit,
    Read(usize),
    CatchUp(usize),
    Later(u64),
    Lose(usize),
    Return(usize),
}

fn steps(outages: bool) -> impl Strategy<Value = Vec<Step>> {
    let weight = u32::from(outages);
    let step = prop_oneof![
        6 => Just(Step::Commit),
        8 => (0..BROKERS).prop_map(Step::Read),
        2 => (0..BROKERS).prop_map(Step::CatchUp),
        2 => (0..500u64).prop_map(Step::Later),
        weight => (0..BROKERS).prop_map(Step::Lose),
        weight => (0..BROKERS).prop_map(Step::Return),
    ];
    prop::collection::vec(step, 0..300)
}

/// Reads logs while they are written, in this order; returns what each stream delivered, and its gaps.
fn run(written: &[Written], steps: &[Step]) -> [Shown; 3] {
    let mut now = Instant::now();
    let mut merge = merge(BROKERS, false, now);
    let mut logs = [const { Vec::<(u32, u64)>::new() }; BROKERS];
    let mut read = [0; BROKERS];
    let mut lost = [false; BROKERS];
    let mut shown = [const { (Vec::new(), Vec::new()) }; 3];
    let rest = 16 * (2 * written.len() + 20);
    let mut unwritten = written.iter();
    let last = (0..rest).map(|turn| match turn % 8 {
        0 | 4 => Step::Commit,
        1..4 => Step::Read(turn % 8 - 1),
        5..8 if turn < rest / 2 => Step::Return(turn % 8 - 5),
        5..8 => Step::CatchUp(turn % 8 - 5),
        _ => Step::Later(100),
    });
    for (turn, step) in steps.iter().cloned().chain(last).enumerate() {
        now += Duration::from_millis((turn % 3) as u64 * 20);
        match step {
            Step::Commit => {
                for &(stream, number, ref brokers) in unwritten.by_ref().take(1) {
                    brokers
                        .iter()
                        .for_each(|at| logs[*at].push((stream, number)));
                }
            }
            Step::Read(broker) if !lost[broker] => {
                if let Some(&(stream, number)) = logs[broker].get(read[broker]) {
                    read[broker] += 1;
                    merge.on_batch(place(broker, stream, number), number, || now);
                }
            }
            Step::CatchUp(broker) if !lost[broker] && read[broker] == logs[broker].len() => {
                merge.on_caught_up(broker, now);
            }
            Step::Later(milliseconds) => now += Duration::from_millis(milliseconds),
            Step::Lose(broker) => {
                lost[broker] = true;
                merge.on_disconnected(broker, now);
            }
            Step::Return(broker) => {
                lost[broker] = false;
                merge.on_delivery(broker);
            }
            Step::Read(_) | Step::CatchUp(_) => {}
        }
        merge.decide(now);
        while let Some(merged) = merge.next() {
            match merged {
                Merged::Batch((_, stream), number, batch) => {
                    assert_eq!(number, batch);
                    shown[stream as usize].0.push(number);
                }
                Merged::Missing {
                    stream,
                    first,
                    batches,
                } => shown[stream.1 as usize].1.push((first, batches)),
                Merged::Duplicate(_) => {}
            }
        }
    }
    assert!(!merge.is_waiting(), "{merge:?}");
    assert_eq!(
        merge.positions().count(),
        shown.iter().filter(|s| !s.0.is_empty()).count()
    );
    shown
}

proptest! {
    #[test]
    fn what_any_broker_has_is_delivered_once_and_in_order(written in written(), steps in steps(false)) {
        let shown = run(&written, &steps);
        for (stream, (delivered, gaps)) in shown.iter().enumerate() {
            let of_stream = written.iter().filter(|batch| batch.0 as usize == stream);
            let kept: Vec<u64> = of_stream.filter(|batch| !batch.2.is_empty()).map(|batch| batch.1).collect();
            prop_assert_eq!(delivered, &kept);
            let missing = kept.windows(2).filter(|pair| pair[1] > pair[0] + 1);
            let missing: Vec<_> = missing.map(|pair| (pair[0] + 1, pair[1] - pair[0] - 1)).collect();
            prop_assert_eq!(gaps, &missing);
        }
    }

    #[test]
    fn nothing_is_delivered_twice_or_out_of_order_whatever_is_lost(written in written(), steps in steps(true)) {
        for (delivered, gaps) in run(&written, &steps) {
            prop_assert!(delivered.is_sorted_by(|a, b| a < b), "{delivered:?}");
            // Each number between the first and the last is delivered or reported.
            let reported: u64 = gaps.iter().map(|gap| gap.1).sum();
            if let (Some(first), Some(last)) = (delivered.first(), delivered.last()) {
                prop_assert_eq!(delivered.len() as u64 + reported, last - first + 1);
            }
        }
    }
}
