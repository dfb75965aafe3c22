//! The tcp path by schedules at random: a publisher whose connections are cut at any byte, chopped,
//! held up and reset on their way to a broker that is killed now and then.
//!
//! Threads and the kernel's timing are as they come, but a failure names the seed of what befell whom:
//! `PENSTOCK_SEED=n cargo test -p penstock-broker schedules` runs that one alone, `PENSTOCK_SEEDS=n`
//! sets how many are run.

use std::collections::BTreeMap;
use std::env;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use penstock_log::{Reader, Start};
use penstock_publisher::{Config, Publisher};
use penstock_wire::message::Messages;
use socket2::SockRef;

use super::{Broker, Buffers};

/// Schedules, unless told otherwise; `scripts/test.sh` runs a thousand.
const SCHEDULES: u64 = 100;
/// Run at once; they wait most of the time.
const AT_ONCE: usize = 16;
const TOPIC: &str = "t";
/// Longest message beside its number.
const LONGEST: usize = 1500;
/// How long a publisher tries: longer than all faults last.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What befalls one direction of a connection.
#[derive(Debug, Clone, Copy)]
struct Way {
    /// Most bytes that come at once.
    chop: usize,
    /// So many bytes get through.
    until: u64,
    /// Before that, after so many bytes, nothing does for a while.
    pause: (u64, Duration),
}

/// How a connection ends when one of its directions does.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Close,
    Reset,
    /// The broker is killed, and another one takes up its log.
    Kill,
}

/// What befalls a connection.
#[derive(Debug, Clone, Copy)]
struct Fate {
    forth: Way,
    back: Way,
    cut: Cut,
}

impl Way {
    fn draw(rng: &mut Rng, most: u64) -> Self {
        Self {
            chop: [1, 7, 100, 65_536][rng.usize(..4)],
            until: if rng.u8(..4) > 0 {
                rng.u64(..most)
            } else {
                u64::MAX
            },
            pause: (rng.u64(..most), Duration::from_millis(rng.u64(..20))),
        }
    }
}

impl Fate {
    /// Forth come all payload, back acks only.
    fn draw(rng: &mut Rng, payload: u64) -> Self {
        Self {
            forth: Way::draw(rng, payload),
            back: Way::draw(rng, 2000),
            cut: [Cut::Close, Cut::Reset, Cut::Reset, Cut::Kill][rng.usize(..4)],
        }
    }

    /// Nothing.
    fn good() -> Self {
        let way = Way {
            chop: 65_536,
            until: u64::MAX,
            pause: (u64::MAX, Duration::ZERO),
        };
        Self {
            forth: way,
            back: way,
            cut: Cut::Close,
        }
    }
}

/// Brokers on one log, one after the other.
struct Host {
    buffers: Buffers,
    broker: Mutex<Option<Broker>>,
    kills: AtomicU64,
}

impl Host {
    /// The ring holds all of a schedule.
    const FLAGS: [&str; 8] = [
        "--ring-size",
        "2MiB",
        "--index-slots",
        "4096",
        "--max-connections",
        "64",
        "--topic",
        TOPIC,
    ];

    fn new() -> Self {
        let buffers = Buffers::new();
        let broker = buffers.start(&Self::FLAGS);
        Self {
            buffers,
            broker: Mutex::new(Some(broker)),
            kills: AtomicU64::new(0),
        }
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let address = self
            .broker
            .lock()
            .unwrap()
            .as_ref()
            .map(|broker| broker.address);
        TcpStream::connect(address.ok_or(io::ErrorKind::ConnectionRefused)?)
    }

    fn kill(&self) {
        let mut broker = self.broker.lock().unwrap();
        broker.take().expect("there is a broker").kill();
        *broker = Some(self.buffers.start(&Self::FLAGS));
        self.kills.fetch_add(1, Ordering::Relaxed);
    }
}

/// Stands between publisher and broker.
struct Path {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

impl Path {
    /// The first connections meet these fates, those after them a good path.
    fn open(host: &Arc<Host>, fates: Vec<Fate>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let (host, is_over) = (Arc::clone(host), Arc::clone(&over));
        let thread = thread::spawn(move || {
            let mut fates = fates.into_iter();
            let mut connections = 0;
            let mut carriers = Vec::new();
            for publisher in listener.incoming() {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                connections += 1;
                let fate = fates.next().unwrap_or_else(Fate::good);
                let (publisher, host) = (publisher.unwrap(), Arc::clone(&host));
                carriers.push(thread::spawn(move || carry(&publisher, &host, fate)));
            }
            carriers
                .into_iter()
                .for_each(|carrier| carrier.join().unwrap());
            connections
        });
        Self {
            address,
            over,
            thread,
        }
    }

    /// Returns how many connections there were.
    fn close(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        TcpStream::connect(self.address).unwrap();
        self.thread.join().unwrap()
    }
}

/// Carries bytes both ways until one of them ends.
fn carry(publisher: &TcpStream, host: &Host, fate: Fate) {
    let Ok(broker) = host.connect() else {
        return;
    };
    let ends = [publisher, &broker];
    ends.iter().for_each(|end| end.set_nodelay(true).unwrap());
    let killed = AtomicBool::new(false);
    let cut = |was_cut| {
        if was_cut && matches!(fate.cut, Cut::Reset) {
            for end in ends {
                // Closing it then resets it; that it is gone already is as good.
                let _ = SockRef::from(end).set_linger(Some(Duration::ZERO));
            }
        }
        if was_cut && matches!(fate.cut, Cut::Kill) && !killed.swap(true, Ordering::Relaxed) {
            host.kill();
        }
        for end in ends {
            let _ = end.shutdown(Shutdown::Both);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| cut(pump(publisher, &broker, fate.forth)));
        cut(pump(&broker, publisher, fate.back));
    });
}

/// Carries bytes one way; whether it was cut, and did not end by itself.
fn pump(mut from: &TcpStream, mut to: &TcpStream, way: Way) -> bool {
    let (mut carried, mut paused) = (0, false);
    let mut bytes = vec![0; way.chop];
    loop {
        let room = (way.until - carried).min(way.chop as u64) as usize;
        if room == 0 {
            return true;
        }
        if carried >= way.pause.0 && !paused {
            paused = true;
            thread::sleep(way.pause.1);
        }
        match from.read(&mut bytes[..room]) {
            Ok(0) | Err(_) => return false,
            Ok(got) if to.write_all(&bytes[..got]).is_err() => return false,
            Ok(got) => carried += got as u64,
        }
    }
}

/// Message `number` of a schedule.
fn message(seed: u64, number: usize) -> Vec<u8> {
    let mut rng = Rng::with_seed(seed.wrapping_mul(1_000_003).wrapping_add(number as u64));
    let mut message = (number as u64).to_le_bytes().to_vec();
    let filler = rng.usize(..LONGEST);
    message.extend(std::iter::repeat_with(|| rng.u8(..)).take(filler));
    message
}

/// Looks through the log: every message is one that was sent, once, in its stream's order, and the
/// batches of a stream are numbered without a gap. Returns which messages are there.
fn check(host: &Host, seed: u64, sent: usize) -> Vec<bool> {
    let mut reader = Reader::open(&host.buffers.log(TOPIC), Start::Oldest).unwrap();
    let mut there = vec![false; sent];
    let mut streams: BTreeMap<(u64, u32), (u64, usize)> = BTreeMap::new();
    while let Some(batch) = reader.next().unwrap() {
        batch.verify().unwrap();
        let (seq, next) = streams.entry((batch.session, batch.stream)).or_default();
        assert_eq!(
            batch.batch_seq, *seq,
            "batches are lost, doubled or out of order"
        );
        *seq += 1;
        for found in Messages::new(batch.payload) {
            let found = found.unwrap();
            let number = u64::from_le_bytes(found[..8].try_into().unwrap()) as usize;
            assert!(
                number < sent && found == message(seed, number),
                "a message is torn"
            );
            assert!(!there[number], "message {number} is doubled");
            assert!(number >= *next, "message {number} is out of order");
            (*next, there[number]) = (number + 1, true);
        }
    }
    there
}

/// What came of a schedule.
#[derive(Debug, Default)]
struct Outcome {
    messages: u64,
    connections: u64,
    kills: u64,
}

fn schedule(seed: u64) -> Outcome {
    let mut rng = Rng::with_seed(seed);
    let messages = rng.usize(20..300);
    let payload = (messages * LONGEST / 2) as u64;
    let fates = (0..rng.usize(1..=6))
        .map(|_| Fate::draw(&mut rng, payload))
        .collect();
    let host = Arc::new(Host::new());
    let path = Path::open(&host, fates);
    let config = Config {
        threads_per_broker: rng.u32(1..=3),
        batch_size: [64, 1000, 4096, 16_384][rng.usize(..4)],
        in_flight: rng.usize(1..32),
        linger: Duration::from_millis(1),
        timeout: TIMEOUT,
        ..Config::new([path.address.to_string()], TOPIC)
    };
    let began = Instant::now();
    // Who does not get through at first comes again: nothing is published before.
    let mut publisher = loop {
        match Publisher::connect(config.clone()) {
            Ok(publisher) => break publisher,
            Err(error) => assert!(began.elapsed() < TIMEOUT, "{error}"),
        }
    };
    let flushes_at = rng.usize(..messages);
    let gives_up_at = (rng.u8(..4) == 0).then(|| rng.usize(..messages));
    let mut acked = messages;
    for number in 0..messages {
        publisher.publish(&message(seed, number)).unwrap();
        if number == flushes_at {
            publisher.flush().unwrap();
            let there = check(&host, seed, messages);
            assert!(
                there[..=number].iter().all(|there| *there),
                "lost though flushed"
            );
        }
        if gives_up_at == Some(number) {
            acked = publisher.progress().messages_acked() as usize;
            break;
        }
    }
    if gives_up_at.is_some() {
        drop(publisher);
    } else {
        let summary = publisher.close().unwrap();
        assert_eq!(summary.messages_acked, messages as u64);
    }
    let connections = path.close();
    let there = check(&host, seed, messages);
    // Of several streams it is not known which messages are the acked ones.
    let first = if config.threads_per_broker == 1 || gives_up_at.is_none() {
        acked
    } else {
        0
    };
    assert!(
        there[..first].iter().all(|there| *there),
        "lost though acked"
    );
    let count = there.iter().filter(|there| **there).count();
    assert!(count >= acked, "{count} messages there, {acked} acked");
    Outcome {
        messages: count as u64,
        connections,
        kills: host.kills.load(Ordering::Relaxed),
    }
}

#[test]
fn schedules_of_cuts_and_kills_lose_and_double_nothing() {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seeds = match number("PENSTOCK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PENSTOCK_SEEDS").unwrap_or(SCHEDULES),
    };
    let next = AtomicU64::new(seeds.start);
    let sum = Mutex::new(Outcome::default());
    thread::scope(|scope| {
        let worker = || {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds.end {
                    return;
                }
                match catch_unwind(AssertUnwindSafe(|| schedule(seed))) {
                    Ok(outcome) => {
                        let mut sum = sum.lock().unwrap();
                        sum.messages += outcome.messages;
                        sum.connections += outcome.connections;
                        sum.kills += outcome.kills;
                    }
                    Err(_) => panic!("failed with PENSTOCK_SEED={seed}"),
                }
            }
        };
        for _ in 0..AT_ONCE {
            scope.spawn(worker);
        }
    });
    let sum = sum.into_inner().unwrap();
    let schedules = seeds.end - seeds.start;
    #[allow(clippy::disallowed_macros, reason = "a test says what it did")]
    let () = println!("{schedules} schedules: {sum:?}");
    assert!(
        sum.connections > schedules || schedules == 1,
        "nothing was cut: {sum:?}"
    );
}
