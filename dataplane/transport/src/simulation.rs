//! Hours of bad networks in seconds: both ends over simulated links, from a seed.
//!
//! Every packet is written and read as bytes. A failure names its seed; `PENSTOCK_SEED=n cargo test
//! -p penstock-ingest simulation` runs that one alone, `PENSTOCK_SEEDS=n` sets how many are run.

mod schedules;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use fastrand::Rng;
use penstock_wire::batch;
use penstock_wire::packet::{Content, DATA_LEN, Data, Feedback, MAX_ACK_LEN, StreamKey, split};
use zerocopy::IntoBytes;

use super::receiver::{Limits, Receiver};
use super::sender::{Outgoing, Sender, SenderConfig};
use super::time::{Nanos, Timestamp};

const US: Nanos = Nanos::from_micros(1);
const MS: Nanos = Nanos::from_millis(1);
const SECOND: Nanos = Nanos::from_secs(1);
const START: Timestamp = Timestamp::ZERO;
/// A broker acks what has come in this time with one packet.
const ACK_AFTER: Nanos = Nanos::from_micros(20);
/// Seeds of each scenario by default.
const SEEDS: u64 = 400;

/// What a link does to packets.
#[derive(Debug, Clone, Default)]
struct Faults {
    loss: f64,
    /// Chance that a burst of losses begins with a packet, and its longest duration.
    burst: (f64, Nanos),
    reorder: f64,
    /// Most that a packet is held back when it is reordered.
    hold: Nanos,
    duplicate: f64,
    corrupt: f64,
    jitter: Nanos,
    /// Datagrams larger than this vanish, from a moment on.
    largest: Option<(Timestamp, usize)>,
    /// Nothing gets through from here on.
    dies_at: Option<Timestamp>,
}

/// One direction of a path. Packets of several streams share its rate and its queue.
#[derive(Debug)]
struct Link {
    delay: Nanos,
    /// Nanoseconds per byte.
    pace: f64,
    /// Bytes that may wait; more are dropped.
    queue: u64,
    faults: Faults,
    free_at: Timestamp,
    burst_until: Timestamp,
}

impl Link {
    fn new(delay: Nanos, bytes_per_second: u64, queue: u64, faults: Faults) -> Self {
        Self {
            delay,
            pace: 1e9 / bytes_per_second as f64,
            queue,
            faults,
            free_at: START,
            burst_until: START,
        }
    }

    /// When copies of the packet come out at the other end, and what they look like.
    fn carry(&mut self, now: Timestamp, packet: &[u8], rng: &mut Rng) -> Vec<(Timestamp, Vec<u8>)> {
        let waiting = (self.free_at - now).as_nanos() as f64 / self.pace;
        if waiting + packet.len() as f64 > self.queue as f64 {
            return Vec::new();
        }
        let sending = Nanos::from_nanos((packet.len() as f64 * self.pace) as u64);
        self.free_at = self.free_at.max(now) + sending;
        let faults = &self.faults;
        let too_large = faults
            .largest
            .is_some_and(|(from, most)| now >= from && packet.len() > most);
        if too_large || faults.dies_at.is_some_and(|at| now >= at) {
            return Vec::new();
        }
        if rng.f64() < faults.burst.0 {
            self.burst_until = now + up_to(rng, faults.burst.1);
        }
        if now < self.burst_until {
            return Vec::new();
        }
        let copies = 1 + u32::from(rng.f64() < faults.duplicate);
        let mut arrivals = Vec::new();
        for _ in 0..copies {
            if rng.f64() < faults.loss {
                continue;
            }
            let mut at = self.free_at + self.delay + up_to(rng, faults.jitter);
            if rng.f64() < faults.reorder {
                at += up_to(rng, faults.hold);
            }
            let mut bytes = packet.to_vec();
            if rng.f64() < faults.corrupt {
                let at = rng.usize(0..bytes.len());
                bytes[at] ^= 1 << rng.u8(0..8);
            }
            arrivals.push((at, bytes));
        }
        arrivals
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    ToBroker(usize, Vec<u8>),
    ToPublisher(usize, Vec<u8>),
    /// The broker acks.
    Ack(usize),
    /// The publisher checks its timers.
    Wake(usize),
    /// A fault of the schedule begins.
    Strike(usize),
    /// It ends.
    Pass(usize),
    /// Publishers that lost their connections open others.
    Reopen,
}

/// One end of the path, and its faults.
#[derive(Debug, Default)]
struct End {
    /// It does nothing until then; packets wait.
    asleep_until: Timestamp,
    waiting: usize,
    /// What its clock is ahead of the world's.
    ahead: Nanos,
}

/// Packets that wait for an end that is asleep; more are dropped.
const BACKLOG: usize = 1024;

/// One stream, and what is known about it from outside.
struct Flow {
    key: StreamKey,
    sender: Sender,
    receiver: Receiver<Vec<u8>>,
    /// Payload of every batch, by number.
    batches: Vec<Vec<u8>>,
    /// Position in the stream where each batch starts, counted as the sender does.
    positions: Vec<u64>,
    pushed: usize,
    /// The sender's first batch.
    first: usize,
    /// Batches that the publisher keeps uncommitted.
    in_flight: usize,
    /// Credit that the broker has ever given.
    granted: u64,
    delivered: u64,
    ack_scheduled: bool,
    finished_at: Option<Timestamp>,
    /// Longest time without a packet before the end.
    quiet: Nanos,
    spoke_at: Timestamp,
}

impl Flow {
    fn new(
        number: usize,
        batches: Vec<Vec<u8>>,
        window: u64,
        datagram: u32,
        in_flight: usize,
    ) -> Self {
        let mut flow = Self {
            key: StreamKey {
                key: 0,
                stream: number as u16,
            },
            sender: Sender::new(&sender_config(0, window, datagram), START),
            receiver: Receiver::new(StreamKey { key: 0, stream: 0 }, 0, limits(window), START),
            batches,
            positions: Vec::new(),
            pushed: 0,
            first: 0,
            in_flight,
            granted: 0,
            delivered: 0,
            ack_scheduled: false,
            finished_at: None,
            quiet: Nanos::ZERO,
            spoke_at: START,
        };
        flow.open([START; 2], number as u64 + 1, window, datagram);
        flow
    }

    /// A connection of the stream, after the first or another; times are those of publisher and
    /// broker.
    fn open(&mut self, [now, brokers]: [Timestamp; 2], key: u64, window: u64, datagram: u32) {
        self.key.key = key;
        self.first = self.receiver.committed() as usize;
        let first = self.first as u64;
        self.sender = Sender::new(&sender_config(first, window, datagram), now);
        self.receiver = Receiver::new(self.key, first, limits(window), brokers);
        self.positions.clear();
        self.pushed = self.first;
        self.granted = window;
        self.spoke_at = now;
    }

    fn is_done(&self) -> bool {
        self.sender.committed() == self.batches.len() as u64
    }

    fn fill(&mut self) {
        while self.pushed < self.batches.len() && self.sender.uncommitted() < self.in_flight {
            let payload = &self.batches[self.pushed];
            let position = match self.positions.last() {
                Some(last) => last + self.batches[self.pushed - 1].len() as u64,
                None => 0,
            };
            let seq = self.pushed as u64;
            let checksum = batch::checksum(seq, 1, payload);
            let given = self.sender.push(payload.len() as u32, 1, checksum);
            assert_eq!(given, seq);
            self.positions.push(position);
            self.pushed += 1;
        }
    }

    /// Everything that the sender has to say now, as datagrams.
    fn transmit(&mut self, now: Timestamp) -> Vec<Vec<u8>> {
        let mut datagrams = Vec::new();
        while let Some(transmit) = self.sender.poll_transmit(now) {
            let datagram = match transmit.what {
                Outgoing::Payload { chunk, len } => {
                    let seq = chunk.batch.seq as usize;
                    let end = self.positions[seq - self.first] + u64::from(chunk.offset + len);
                    assert!(
                        end <= self.granted,
                        "credit exceeded: {end} > {}",
                        self.granted
                    );
                    let from = chunk.offset as usize;
                    let payload = &self.batches[seq][from..from + len as usize];
                    let header =
                        Data::payload(self.key, transmit.packet, &chunk, transmit.pause, payload);
                    [header.as_bytes(), payload].concat()
                }
                Outgoing::Ping { padding } => {
                    let padding = vec![0; padding as usize];
                    let header = Data::ping(self.key, transmit.packet, &padding);
                    [header.as_bytes(), &padding].concat()
                }
            };
            datagrams.push(datagram);
            assert!(datagrams.len() < 100_000, "the sender does not stop");
        }
        if !datagrams.is_empty() {
            if !self.is_done() {
                self.quiet = self.quiet.max(now - self.spoke_at);
            }
            self.spoke_at = now;
        }
        datagrams
    }

    /// A datagram reaches the broker.
    fn receive(&mut self, now: Timestamp, datagram: &[u8]) {
        let Ok((header, rest)) = split(datagram) else {
            return;
        };
        let Ok(received) = header.parse(&[rest]) else {
            return;
        };
        if received.stream != self.key {
            return;
        }
        let Content::Payload(chunk) = received.content else {
            self.receiver.arrived(now, received.packet);
            return;
        };
        let len = rest.len() as u32;
        let Ok(offer) = self.receiver.offer(received.packet, &chunk, len) else {
            return;
        };
        let mut packet = offer.or_open(|| vec![0; chunk.batch.len as usize]);
        let from = chunk.offset as usize;
        packet.placement()[from..from + rest.len()].copy_from_slice(rest);
        packet.placed(now);
        while let Some((info, payload)) = self.receiver.next_complete() {
            let wanted = &self.batches[info.seq as usize];
            assert_eq!(self.receiver.committed(), info.seq + 1, "out of order");
            assert!(payload == *wanted, "batch {} is damaged", info.seq);
            assert_eq!(info.checksum, batch::checksum(info.seq, 1, wanted));
            self.delivered += payload.len() as u64;
        }
    }
}

/// A span of up to `most`.
fn up_to(rng: &mut Rng, most: Nanos) -> Nanos {
    Nanos::from_nanos(rng.u64(0..=most.as_nanos()))
}

/// A span shorter than `end`.
fn below(rng: &mut Rng, end: Nanos) -> Nanos {
    between(rng, Nanos::ZERO, end)
}

/// A span from `start`, shorter than `end`.
fn between(rng: &mut Rng, start: Nanos, end: Nanos) -> Nanos {
    Nanos::from_nanos(rng.u64(start.as_nanos()..end.as_nanos()))
}

fn sender_config(first_batch: u64, credit: u64, max_datagram: u32) -> SenderConfig {
    SenderConfig {
        first_batch,
        credit,
        max_datagram,
        min_in_flight: 1 << 20,
        phase: Nanos::ZERO,
    }
}

fn limits(window: u64) -> Limits {
    Limits {
        max_payload: 1 << 20,
        window,
    }
}

/// Streams between publishers and one broker, over one path.
struct World {
    now: Timestamp,
    rng: Rng,
    forth: Link,
    back: Link,
    flows: Vec<Flow>,
    events: BinaryHeap<Reverse<(Timestamp, u64, Event)>>,
    count: u64,
    wakes: Vec<Timestamp>,
    publisher: End,
    broker: End,
    schedule: Vec<schedules::Strike>,
    /// There is no broker until then.
    gone_until: Timestamp,
    connections: u64,
}

impl World {
    fn new(rng: Rng, forth: Link, back: Link, flows: Vec<Flow>) -> Self {
        let mut world = Self {
            now: START,
            rng,
            forth,
            back,
            wakes: vec![Timestamp::MAX; flows.len()],
            flows,
            events: BinaryHeap::new(),
            count: 0,
            publisher: End::default(),
            broker: End::default(),
            schedule: Vec::new(),
            gone_until: START,
            connections: 0,
        };
        for number in 0..world.flows.len() {
            world.drive(number);
        }
        world
    }

    fn at(&mut self, time: Timestamp, event: Event) {
        self.count += 1;
        self.events.push(Reverse((time, self.count, event)));
    }

    /// Lets a publisher send, and sees to it that it is woken in time.
    fn drive(&mut self, number: usize) {
        let now = self.now;
        let ahead = self.publisher.ahead;
        let flow = &mut self.flows[number];
        flow.fill();
        for datagram in flow.transmit(now + ahead) {
            for (at, bytes) in self.forth.carry(now, &datagram, &mut self.rng) {
                self.at(at, Event::ToBroker(number, bytes));
            }
        }
        let flow = &mut self.flows[number];
        if flow.is_done() {
            flow.finished_at.get_or_insert(now);
            return;
        }
        let wake = flow.sender.next_timeout() - ahead;
        let wake = wake.max(now + US);
        if wake < self.wakes[number] || self.wakes[number] <= now {
            self.wakes[number] = wake;
            self.at(wake, Event::Wake(number));
        }
    }

    fn step(&mut self) -> bool {
        let Some(Reverse((time, _, event))) = self.events.pop() else {
            return false;
        };
        self.now = self.now.max(time);
        let now = self.now;
        let Some(event) = self.unless_asleep(event) else {
            return true;
        };
        let (publishers, brokers) = (now + self.publisher.ahead, now + self.broker.ahead);
        match event {
            Event::ToBroker(..) if now < self.gone_until => {}
            Event::Strike(number) => self.strike(number),
            Event::Pass(number) => self.pass(number),
            Event::Reopen => self.reopen(),
            Event::ToBroker(number, datagram) => {
                let flow = &mut self.flows[number];
                flow.receive(brokers, &datagram);
                if flow.receiver.owes_ack() && !flow.ack_scheduled {
                    flow.ack_scheduled = true;
                    self.at(now + ACK_AFTER, Event::Ack(number));
                }
            }
            Event::Ack(number) => {
                let flow = &mut self.flows[number];
                flow.ack_scheduled = false;
                if now < self.gone_until {
                    return true;
                }
                let mut feedback = Feedback::new(flow.key);
                flow.receiver.feedback(brokers, false, &mut feedback);
                flow.granted = flow.granted.max(feedback.credit);
                let mut packet = [0; MAX_ACK_LEN];
                let len = feedback.write(&mut packet);
                for (at, bytes) in self.back.carry(now, &packet[..len], &mut self.rng) {
                    self.at(at, Event::ToPublisher(number, bytes));
                }
            }
            Event::ToPublisher(number, datagram) => {
                let flow = &mut self.flows[number];
                let mut feedback = Feedback::new(flow.key);
                if feedback.read(&datagram).is_ok() && feedback.stream == flow.key {
                    flow.sender
                        .on_feedback(publishers, &feedback)
                        .expect("an honest broker");
                    // A publisher that believes more than is there has lost it.
                    assert!(flow.sender.committed() <= flow.receiver.committed());
                }
                assert!(flow.sender.memory() < 50_000, "memory grows");
                self.drive(number);
            }
            Event::Wake(number) => {
                if self.wakes[number] <= now {
                    self.wakes[number] = Timestamp::MAX;
                    self.flows[number].sender.on_timeout(publishers);
                    self.drive(number);
                }
            }
        }
        true
    }

    /// Until every stream is done; panics after so much simulated time.
    fn finish(&mut self, limit: Timestamp) {
        while !self.flows.iter().all(Flow::is_done) {
            assert!(self.step(), "nothing happens any more");
            assert!(
                self.now < limit,
                "not done after {}: {}",
                limit,
                self.describe()
            );
        }
    }

    fn run_until(&mut self, time: Timestamp) {
        while self.now < time && self.step() {}
        self.now = self.now.max(time);
    }

    fn describe(&self) -> String {
        let flows = self.flows.iter().map(|flow| {
            format!(
                "{} of {} batches, {:?}",
                flow.sender.committed(),
                flow.batches.len(),
                flow.sender.stats()
            )
        });
        flows.collect::<Vec<_>>().join("; ")
    }
}

fn batches(rng: &mut Rng, count: usize, largest: usize) -> Vec<Vec<u8>> {
    let batch = |_| {
        let len = if rng.bool() {
            largest
        } else {
            rng.usize(4..=largest)
        };
        let mut payload = vec![0; len];
        rng.fill(&mut payload);
        payload
    };
    (0..count).map(batch).collect()
}

/// Runs a scenario for this many seeds by default; prints the one that failed.
fn seeds(count: u64, scenario: impl Fn(Rng)) {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let range = match number("PENSTOCK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PENSTOCK_SEEDS").unwrap_or(count),
    };
    for seed in range {
        let run = AssertUnwindSafe(|| scenario(Rng::with_seed(seed)));
        if let Err(panic) = catch_unwind(run) {
            #[allow(clippy::disallowed_macros, reason = "a test says which seed fails")]
            let () = eprintln!("failed with PENSTOCK_SEED={seed}");
            resume_unwind(panic);
        }
    }
}

/// One stream over a path with these faults both ways; the time limit is for the worst seed.
fn deliver(mut rng: Rng, faults: &Faults, limit: Nanos) -> World {
    let delay = [10 * US, 100 * US, 5 * MS, 50 * MS][rng.usize(0..4)];
    let rate = [10_000_000, 100_000_000, 1_000_000_000][rng.usize(0..3)];
    let queue = rng.u64(30_000..1_000_000);
    let forth = Link::new(delay, rate, queue, faults.clone());
    let back = Link::new(delay, rate, queue, faults.clone());
    let count = rng.usize(1..40);
    let largest = [100, 5_000, 65_536][rng.usize(0..3)];
    let batches = batches(&mut rng, count, largest);
    let window = rng.u64(20_000..500_000);
    let datagram = [1000, 1472, 8972][rng.usize(0..3)];
    let in_flight = rng.usize(1..64);
    let flow = Flow::new(1, batches, window, datagram, in_flight);
    let mut world = World::new(rng, forth, back, vec![flow]);
    world.finish(START + limit);
    let longest = world.flows[0].quiet;
    // The longest timer, and the time for an answer.
    assert!(longest < 2 * SECOND + 4 * delay, "silent for {longest}");
    world
}

#[test]
fn simulation_of_a_good_path() {
    seeds(SEEDS, |rng| {
        let world = deliver(rng, &Faults::default(), 60 * SECOND);
        let stats = world.flows[0].sender.stats();
        assert!(stats.spurious <= stats.lost);
    });
}

#[test]
fn simulation_of_loss_up_to_30_percent() {
    seeds(SEEDS, |mut rng| {
        let faults = Faults {
            loss: rng.f64() * 0.3,
            ..Faults::default()
        };
        deliver(rng, &faults, 600 * SECOND);
    });
}

#[test]
fn simulation_of_bursts_of_loss() {
    seeds(SEEDS, |mut rng| {
        let faults = Faults {
            burst: (rng.f64() * 0.02, below(&mut rng, 30 * MS)),
            ..Faults::default()
        };
        deliver(rng, &faults, 600 * SECOND);
    });
}

#[test]
fn simulation_of_reordering_duplication_and_jitter() {
    seeds(SEEDS, |mut rng| {
        let faults = Faults {
            reorder: rng.f64() * 0.5,
            hold: between(&mut rng, Nanos::ONE, 20 * MS),
            duplicate: rng.f64() * 0.3,
            jitter: below(&mut rng, 5 * MS),
            ..Faults::default()
        };
        deliver(rng, &faults, 600 * SECOND);
    });
}

#[test]
fn simulation_of_everything_at_once_with_corruption() {
    seeds(SEEDS, |mut rng| {
        let faults = Faults {
            loss: rng.f64() * 0.1,
            burst: (rng.f64() * 0.005, 5 * MS),
            reorder: rng.f64() * 0.2,
            hold: between(&mut rng, Nanos::ONE, 5 * MS),
            duplicate: rng.f64() * 0.1,
            corrupt: rng.f64() * 0.1,
            jitter: below(&mut rng, MS),
            ..Faults::default()
        };
        deliver(rng, &faults, 600 * SECOND);
    });
}

#[test]
fn simulation_of_paths_that_take_less_than_was_said() {
    seeds(SEEDS, |mut rng| {
        let from = if rng.bool() {
            START
        } else {
            START + below(&mut rng, 200 * MS)
        };
        let faults = Faults {
            largest: Some((from, rng.usize(1200..9000))),
            loss: if rng.bool() { 0.0 } else { 0.02 },
            ..Faults::default()
        };
        deliver(rng, &faults, 600 * SECOND);
    });
}

#[test]
fn simulation_of_a_path_that_dies_and_a_stream_that_goes_on_elsewhere() {
    seeds(SEEDS, |mut rng| {
        let dies_at = Some(START + below(&mut rng, 20 * MS));
        let (forth, back) = match rng.u8(0..3) {
            0 => (dies_at, None),
            1 => (None, dies_at),
            _ => (dies_at, dies_at),
        };
        let link = |dies_at| {
            let faults = Faults {
                dies_at,
                loss: 0.01,
                ..Faults::default()
            };
            Link::new(100 * US, 100_000_000, 300_000, faults)
        };
        // More than fits through before.
        let batches = batches(&mut rng, 200, 65_536);
        let flow = Flow::new(1, batches, 200_000, 1472, 16);
        let mut world = World::new(rng, link(forth), link(back), vec![flow]);
        world.run_until(START + 2 * SECOND);
        let flow = &mut world.flows[0];
        assert!(!flow.is_done());
        // What the publisher believes is true, and it has noticed that nothing comes.
        assert!(flow.sender.committed() <= flow.receiver.committed());
        assert!(world.now - flow.sender.last_feedback_at() > SECOND);
        let before = flow.sender.stats().packets;
        world.run_until(START + 12 * SECOND);
        let sent = world.flows[0].sender.stats().packets - before;
        assert!(
            (5..60).contains(&sent),
            "{sent} packets in 10 s into a dead path"
        );
        // The same stream over a path that works, where the broker left off.
        let now = world.now;
        world.forth = Link::new(100 * US, 100_000_000, 300_000, Faults::default());
        world.back = Link::new(100 * US, 100_000_000, 300_000, Faults::default());
        world.flows[0].open([now; 2], 77, 200_000, 1472);
        world.wakes[0] = Timestamp::MAX;
        world.drive(0);
        world.finish(now + 60 * SECOND);
        let total: usize = world.flows[0].batches.iter().map(Vec::len).sum();
        assert_eq!(
            world.flows[0].delivered, total as u64,
            "a batch was delivered twice"
        );
    });
}

#[test]
fn simulation_of_publishers_that_share_a_path() {
    seeds(SEEDS, |mut rng| {
        // Fewer seeds: each is many packets.
        if rng.u8(0..8) != 0 {
            return;
        }
        let count = rng.usize(2..6);
        let delay = [100 * US, MS, 10 * MS][rng.usize(0..3)];
        let rate = 25_000_000;
        let queue = (rate * 2 * delay / SECOND).max(100_000) * rng.u64(1..3);
        let payload = vec![vec![7; 60_000]; 4000];
        let flows = (0..count)
            .map(|number| Flow::new(number, payload.clone(), 8_000_000, 1472, 200))
            .collect();
        let link = || Link::new(delay, rate, queue, Faults::default());
        let mut world = World::new(rng, link(), link(), flows);
        world.run_until(START + SECOND);
        let before: Vec<_> = world.flows.iter().map(|flow| flow.delivered).collect();
        world.run_until(START + 4 * SECOND);
        let shares: Vec<f64> = world
            .flows
            .iter()
            .zip(before)
            .map(|(flow, before)| (flow.delivered - before) as f64)
            .collect();
        let sum: f64 = shares.iter().sum();
        // Jain's index: 1 when all have the same, 1/n when one has all.
        let jain = sum * sum / (count as f64 * shares.iter().map(|s| s * s).sum::<f64>());
        assert!(jain > 0.8, "unfair: {jain:.2}, {shares:?}");
        let used = sum / (3.0 * rate as f64);
        assert!(used > 0.7, "only {used:.2} of the path is used");
    });
}

#[test]
fn simulation_of_a_stream_without_end_stays_small() {
    let mut rng = Rng::with_seed(1);
    let batches = batches(&mut rng, 3000, 30_000);
    let faults = Faults {
        loss: 0.01,
        ..Faults::default()
    };
    let link = || Link::new(100 * US, 200_000_000, 300_000, faults.clone());
    let flow = Flow::new(1, batches, 400_000, 1472, 32);
    let mut world = World::new(rng, link(), link(), vec![flow]);
    world.finish(START + 600 * SECOND);
    let flow = &world.flows[0];
    assert!(flow.sender.memory() < 5000, "{}", flow.sender.memory());
    assert!(flow.sender.segment() as usize + DATA_LEN == 1472);
}
