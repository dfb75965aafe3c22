//! What the streams of a publisher know about its brokers: where each was last reached, whether it is lost, and
//! when to look whether it is back. Time is an argument; only locks are taken here, and none on the hot path.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use penstock_runtime::poison::lock;

use crate::Config;
use crate::stream::connect::Location;
use crate::stream::connection::StreamId;

/// Time that streams stay away from a broker after it was lost for the first time.
const FIRST_ABSENCE: Duration = Duration::from_millis(500);
/// Longest time that streams stay away from a broker that is lost again and again.
const MAX_ABSENCE: Duration = Duration::from_secs(60);
/// A broker that is lost within this time after its return stays avoided twice as long as before.
const STEADY_AFTER: Duration = Duration::from_secs(60);
/// Longest interval between two probes of a lost broker.
const MAX_PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// The brokers of a publisher, in the order of its settings.
#[derive(Debug)]
pub(crate) struct Brokers(Vec<Broker>);

#[derive(Debug)]
struct Broker {
    address: String,
    location: Location,
    health: Mutex<Health>,
}

impl Brokers {
    pub(crate) fn new(config: &Config) -> Self {
        let broker = |address: &String| Broker {
            address: address.clone(),
            location: Location::default(),
            health: Mutex::default(),
        };
        Self(config.brokers.iter().map(broker).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn address(&self, broker: usize) -> &str {
        &self.0[broker].address
    }

    /// A stream, as it is called at this broker.
    pub(crate) fn stream_at(&self, broker: usize, session: u64, number: u32) -> StreamId {
        let Broker {
            address, location, ..
        } = &self.0[broker];
        StreamId {
            broker: address.clone(),
            session,
            number,
            location: location.clone(),
        }
    }

    /// Uses what is known about a broker.
    pub(crate) fn health<T>(&self, broker: usize, then: impl FnOnce(&mut Health) -> T) -> T {
        then(&mut lock(&self.0[broker].health))
    }

    /// The brokers that a stream tries, in this order, once its connection is lost: first its home and the
    /// one that it uses, then the others; those that are lost come last.
    pub(crate) fn candidates(
        &self,
        stream: &StreamId,
        home: usize,
        current: usize,
        now: Instant,
    ) -> Vec<usize> {
        let mut order = vec![home];
        if current != home {
            order.push(current);
        }
        let others = substitutes(self.len(), home, stream.session, stream.number);
        order.extend(others.filter(|other| *other != current));
        let is_avoided = |broker: &usize| self.health(*broker, |health| health.is_avoided(now));
        let (avoided, mut candidates): (Vec<_>, Vec<_>) = order.into_iter().partition(is_avoided);
        candidates.extend(avoided);
        candidates
    }
}

/// The other brokers, in the order in which a stream tries them when its home is lost. Consecutive streams of a
/// session begin with different ones, and so do sessions, which are random: the streams of a lost broker are
/// spread evenly over the others.
fn substitutes(
    brokers: usize,
    home: usize,
    session: u64,
    stream: u32,
) -> impl Iterator<Item = usize> {
    let others = brokers.saturating_sub(1);
    let count = others.max(1) as u64;
    let first = ((session % count + u64::from(stream)) % count) as usize;
    (0..others).map(move |offset| (home + 1 + (first + offset) % others) % brokers)
}

/// What is known about one broker.
#[derive(Debug)]
pub(crate) struct Health {
    state: State,
    /// How long streams stay away after the last loss.
    absence: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Streams use it; since its return, if it was lost before.
    Up { since: Option<Instant> },
    /// It is lost; no stream tries it before the next probe.
    Lost {
        next_probe: Instant,
        interval: Duration,
        is_probed: bool,
    },
    /// It was lost, and accepts connections again.
    Answers,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            state: State::Up { since: None },
            absence: FIRST_ABSENCE,
        }
    }
}

impl Health {
    /// A stream could not be opened there; says whether that was not known yet. The pause before the next
    /// attempt grows while the broker comes and goes.
    pub(crate) fn on_lost(&mut self, now: Instant) -> bool {
        let is_flapping = match self.state {
            State::Lost { .. } => return false,
            State::Answers => true,
            State::Up { since } => {
                since.is_some_and(|since| now.saturating_duration_since(since) < STEADY_AFTER)
            }
        };
        self.absence = match is_flapping {
            true => (2 * self.absence).min(MAX_ABSENCE),
            false => FIRST_ABSENCE,
        };
        self.state = State::Lost {
            next_probe: now + self.absence,
            interval: FIRST_ABSENCE,
            is_probed: false,
        };
        true
    }

    /// A stream was opened there; says whether the broker had been lost.
    pub(crate) fn on_accepted(&mut self, now: Instant) -> bool {
        let was_lost = !matches!(self.state, State::Up { .. });
        if was_lost {
            self.state = State::Up { since: Some(now) };
        }
        was_lost
    }

    /// Whether streams should try other brokers first.
    pub(crate) fn is_avoided(&self, now: Instant) -> bool {
        matches!(self.state, State::Lost { next_probe, .. } if now < next_probe)
    }

    /// Whether the caller is to probe it now, and then to call [`Self::on_probed`].
    pub(crate) fn begin_probe(&mut self, now: Instant) -> bool {
        match &mut self.state {
            State::Lost {
                next_probe,
                is_probed,
                ..
            } if !*is_probed && now >= *next_probe => {
                *is_probed = true;
                true
            }
            _ => false,
        }
    }

    /// What the probe found.
    pub(crate) fn on_probed(&mut self, now: Instant, does_answer: bool) {
        let State::Lost { interval, .. } = self.state else {
            return;
        };
        self.state = match does_answer {
            true => State::Answers,
            false => {
                let interval = (2 * interval).min(MAX_PROBE_INTERVAL);
                State::Lost {
                    next_probe: now + interval,
                    interval,
                    is_probed: false,
                }
            }
        };
    }

    /// Whether a stream may try to return.
    pub(crate) fn does_answer(&self) -> bool {
        !matches!(self.state, State::Lost { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn brokers(count: usize) -> Brokers {
        let names = (0..count).map(|number| format!("b{number}:1214"));
        Brokers::new(&Config::new(names, "t"))
    }

    #[test]
    fn a_lost_broker_loads_the_others_evenly() {
        for (count, home, session) in [(4, 0, 0), (4, 2, u64::MAX), (2, 1, 7), (7, 3, 12345)] {
            let others = count - 1;
            let mut load = vec![0; count];
            for stream in 0..6 * others as u32 {
                let order: Vec<_> = substitutes(count, home, session, stream).collect();
                let mut sorted = order.clone();
                sorted.sort_unstable();
                let all: Vec<_> = (0..count).filter(|broker| *broker != home).collect();
                assert_eq!(sorted, all, "each of the others once");
                load[order[0]] += 1;
            }
            load.remove(home);
            assert!(load.iter().all(|streams| *streams == 6), "{load:?}");
        }
        // One stream each of many publishers, whose sessions are random.
        let mut rng = 0x9e37_79b9_7f4a_7c15_u64;
        let mut load = [0; 4];
        for _ in 0..3000 {
            rng ^= rng << 13;
            rng ^= rng >> 7;
            rng ^= rng << 17;
            load[substitutes(4, 1, rng, 0).next().unwrap()] += 1;
        }
        assert!(load[1] == 0 && [0, 2, 3].iter().all(|other| load[*other] > 850));
        assert_eq!(substitutes(1, 0, 5, 5).count(), 0);
    }

    #[test]
    fn a_stream_tries_its_home_first_and_lost_brokers_last() {
        let brokers = brokers(4);
        let now = Instant::now();
        let stream = brokers.stream_at(1, 0, 0);
        let order = |current, now| brokers.candidates(&stream, 1, current, now);
        assert_eq!(order(1, now), [1, 2, 3, 0]);
        assert_eq!(order(3, now), [1, 3, 2, 0]);
        brokers.health(1, |health| health.on_lost(now));
        assert_eq!(order(1, now), [2, 3, 0, 1]);
        brokers.health(2, |health| health.on_lost(now));
        assert_eq!(order(1, now), [3, 0, 1, 2]);
        // After a while they may be back.
        assert_eq!(order(1, now + 500 * MS), [1, 2, 3, 0]);
    }

    #[test]
    fn a_lost_broker_is_probed_by_one_stream_at_a_time_and_ever_less_often() {
        let mut health = Health::default();
        let start = Instant::now();
        assert!(!health.begin_probe(start) && health.does_answer());
        assert!(health.on_lost(start));
        assert!(!health.on_lost(start) && !health.does_answer());
        let mut now = start;
        for interval in [500, 1000, 2000, 4000, 5000, 5000] {
            assert!(!health.begin_probe(now + (interval - 1) * MS));
            now += interval * MS;
            assert!(health.begin_probe(now));
            assert!(!health.begin_probe(now), "another stream does");
            health.on_probed(now, false);
        }
        assert!(health.begin_probe(now + 5000 * MS));
        health.on_probed(now + 5000 * MS, true);
        assert!(health.does_answer() && !health.is_avoided(now));
        assert!(health.on_accepted(now) && !health.on_accepted(now));
    }

    #[test]
    fn streams_stay_away_longer_from_a_broker_that_comes_and_goes() {
        let mut health = Health::default();
        let mut now = Instant::now();
        let mut absences = Vec::new();
        let mut lose = |health: &mut Health, now: &mut Instant| {
            assert!(health.on_lost(*now));
            let lost = *now;
            while !health.begin_probe(*now) {
                *now += 100 * MS;
            }
            health.on_probed(*now, true);
            absences.push((*now - lost).as_millis());
        };
        for _ in 0..9 {
            lose(&mut health, &mut now);
            health.on_accepted(now);
            now += 1000 * MS;
        }
        // It answers, but refuses the stream.
        lose(&mut health, &mut now);
        lose(&mut health, &mut now);
        health.on_accepted(now);
        now += STEADY_AFTER;
        lose(&mut health, &mut now);
        let growing = [500, 1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000];
        assert_eq!(absences[..9], growing);
        assert_eq!(absences[9..], [60000, 60000, 500]);
    }
}
