//! Faults that come and go, by schedules at random: of the path, and of either end.

use super::*;

/// When faults begin, and how long they last at most.
const BEGIN: Nanos = Nanos::from_secs(2);
const LONGEST: Nanos = SECOND;
/// Schedules by default.
const SCHEDULES: u64 = 1000;

/// One fault.
#[derive(Debug, Clone)]
pub(super) struct Strike {
    at: Timestamp,
    lasts: Nanos,
    what: What,
}

/// A kind of fault, of the path or of an end.
#[derive(Debug, Clone)]
enum What {
    /// The path, forth and back.
    Path {
        faults: Faults,
        ways: [bool; 2],
    },
    /// The path takes so much longer.
    Delay(Nanos),
    PublisherSleeps,
    BrokerSleeps,
    /// The broker is killed; another one has the log, and a clock of its own.
    Restart {
        ahead: Nanos,
    },
    /// A clock jumps.
    PublisherJumps(Nanos),
    BrokerJumps(Nanos),
}

impl Strike {
    fn draw(rng: &mut Rng) -> Self {
        let what = match rng.u8(..12) {
            0..6 => What::Path {
                faults: faults(rng),
                ways: [[true, true], [true, false], [false, true]][rng.usize(..3)],
            },
            6 => What::Delay(below(rng, 100 * MS)),
            7 => What::PublisherSleeps,
            8 => What::BrokerSleeps,
            9 => What::Restart {
                ahead: below(rng, 1000 * SECOND),
            },
            10 => What::PublisherJumps(below(rng, 100 * SECOND)),
            _ => What::BrokerJumps(below(rng, 100 * SECOND)),
        };
        Self {
            at: START + below(rng, BEGIN),
            lasts: below(rng, LONGEST),
            what,
        }
    }
}

/// One or two faults of a path at once; one in four is that it is down.
fn faults(rng: &mut Rng) -> Faults {
    let mut faults = Faults::default();
    for _ in 0..rng.u8(1..=2) {
        match rng.u8(..8) {
            0 | 1 => faults.loss = 1.0,
            2 => faults.loss = rng.f64() * 0.5,
            3 => faults.burst = (rng.f64() * 0.05, below(rng, 100 * MS)),
            4 => {
                (faults.reorder, faults.hold) = (rng.f64() * 0.5, between(rng, Nanos::ONE, 20 * MS))
            }
            5 => faults.duplicate = rng.f64() * 0.5,
            6 => faults.corrupt = rng.f64() * 0.3,
            // Also less than a packet must be: nothing gets through then.
            _ => faults.largest = Some((START, rng.usize(400..9000))),
        }
    }
    faults
}

impl World {
    fn follow(&mut self, schedule: Vec<Strike>) {
        for (number, strike) in schedule.iter().enumerate() {
            self.at(strike.at, Event::Strike(number));
            self.at(strike.at + strike.lasts, Event::Pass(number));
        }
        self.schedule = schedule;
    }

    /// The event, unless it is of an end that is asleep: then it comes later, if there is room.
    pub(super) fn unless_asleep(&mut self, event: Event) -> Option<Event> {
        let end = match event {
            Event::ToBroker(..) | Event::Ack(_) => &mut self.broker,
            Event::ToPublisher(..) | Event::Wake(_) | Event::Reopen => &mut self.publisher,
            Event::Strike(_) | Event::Pass(_) => return Some(event),
        };
        if self.now >= end.asleep_until {
            end.waiting = 0;
            return Some(event);
        }
        let is_packet = matches!(event, Event::ToBroker(..) | Event::ToPublisher(..));
        if is_packet && end.waiting == BACKLOG {
            return None;
        }
        end.waiting += usize::from(is_packet);
        let until = end.asleep_until;
        self.at(until, event);
        None
    }

    pub(super) fn strike(&mut self, number: usize) {
        let Strike { lasts, what, .. } = self.schedule[number].clone();
        let until = self.now + lasts;
        match what {
            What::Path { faults, ways } => {
                for (way, link) in ways.into_iter().zip([&mut self.forth, &mut self.back]) {
                    if way {
                        link.faults = faults.clone();
                    }
                }
            }
            What::Delay(more) => {
                self.forth.delay += more;
                self.back.delay += more;
            }
            What::PublisherSleeps => sleep(&mut self.publisher, until),
            What::BrokerSleeps => sleep(&mut self.broker, until),
            What::Restart { ahead } => {
                self.gone_until = self.gone_until.max(until);
                self.broker = End {
                    ahead,
                    ..End::default()
                };
                self.at(until, Event::Reopen);
            }
            What::PublisherJumps(ahead) => {
                self.publisher.ahead += ahead;
                for number in 0..self.flows.len() {
                    self.wakes[number] = self.now;
                    self.at(self.now, Event::Wake(number));
                }
            }
            What::BrokerJumps(ahead) => self.broker.ahead += ahead,
        }
    }

    pub(super) fn pass(&mut self, number: usize) {
        match self.schedule[number].what {
            What::Path { .. } => {
                self.forth.faults = Faults::default();
                self.back.faults = Faults::default();
            }
            What::Delay(more) => {
                self.forth.delay -= more;
                self.back.delay -= more;
            }
            _ => {}
        }
    }

    pub(super) fn reopen(&mut self) {
        // It was killed again meanwhile.
        if self.now < self.gone_until {
            return;
        }
        let now = [
            self.now + self.publisher.ahead,
            self.now + self.broker.ahead,
        ];
        for number in 0..self.flows.len() {
            if self.flows[number].is_done() {
                continue;
            }
            self.connections += 1;
            let window = self.rng.u64(20_000..500_000);
            let datagram = [1000, 1472, 8972][self.rng.usize(..3)];
            // Above all first ones.
            let key = 1000 + self.connections;
            self.flows[number].open(now, key, window, datagram);
            self.wakes[number] = Timestamp::MAX;
            self.drive(number);
        }
    }
}

fn sleep(end: &mut End, until: Timestamp) {
    end.asleep_until = end.asleep_until.max(until);
}

#[test]
fn simulation_of_fault_schedules() {
    seeds(SCHEDULES, |mut rng| {
        let delay = [10 * US, 500 * US, 10 * MS][rng.usize(..3)];
        // For a second or two.
        let rate = rng.u64(100_000..1_000_000);
        let queue = rng.u64(30_000..300_000);
        let flows = (0..rng.usize(1..=3)).map(|number| {
            let count = rng.usize(5..60);
            let largest = [2_000, 20_000, 65_536][rng.usize(..3)];
            let batches = batches(&mut rng, count, largest);
            let window = rng.u64(20_000..500_000);
            let datagram = [1000, 1472, 8972][rng.usize(..3)];
            Flow::new(number, batches, window, datagram, rng.usize(1..32))
        });
        let flows: Vec<_> = flows.collect();
        let schedule = (0..rng.usize(1..=8))
            .map(|_| Strike::draw(&mut rng))
            .collect();
        let link = || Link::new(delay, rate, queue, Faults::default());
        let mut world = World::new(rng, link(), link(), flows);
        world.follow(schedule);
        world.finish(START + 600 * SECOND);
        for flow in &world.flows {
            let total: usize = flow.batches.iter().map(Vec::len).sum();
            assert_eq!(
                flow.delivered, total as u64,
                "a batch came twice, or not at all"
            );
        }
    });
}
