//! Draws the processes of a run, with rate, duration and fault. The same seed draws the same script, though
//! not the same interleaving.

use fastrand::Rng;

use penstock_testbed::processes::{ProcessFault, Publisher, Reader};
use penstock_testbed::random::seconds_between;
use penstock_testbed::settings::Mode;

/// Longest stop of a process: well below the silence after which a broker ends a stream.
const LONGEST_STOP: f64 = 2.0;

/// Draws a publisher.
pub fn publisher(rng: &mut Rng, brokers: usize) -> Publisher {
    let fault = match rng.u32(..10) {
        0..2 => ProcessFault::Killed(seconds_between(rng, 0.2, 3.0)),
        2..4 => ProcessFault::Stopped(
            seconds_between(rng, 0.2, 2.0),
            seconds_between(rng, 0.1, LONGEST_STOP),
        ),
        _ => ProcessFault::None,
    };
    Publisher {
        broker: rng.usize(..brokers),
        mode: *rng
            .choice([Mode::Tcp, Mode::Xdp, Mode::Auto].iter())
            .expect("there are some"),
        // The lines of a killed publisher can be checked only if it had one stream.
        streams: match fault {
            ProcessFault::Killed(_) => 1,
            _ => rng.u32(1..=3),
        },
        rate: rng.u64(1_000_000..8_000_000),
        batch: 1 << rng.u32(11..=16),
        fault,
    }
}

/// Draws a reader.
pub fn reader(rng: &mut Rng, brokers: usize) -> Reader {
    let fault = match rng.u32(..10) {
        0..2 => ProcessFault::Killed(seconds_between(rng, 0.2, 3.0)),
        2..4 => ProcessFault::Stopped(
            seconds_between(rng, 0.2, 2.0),
            seconds_between(rng, 0.1, LONGEST_STOP),
        ),
        _ => ProcessFault::None,
    };
    let registered = rng.bool();
    Reader {
        broker: rng.usize(..brokers),
        registered,
        from_start: !registered && rng.bool(),
        lifetime: seconds_between(rng, 1.0, 6.0),
        fault,
    }
}

/// Draws faults for all links, in the syntax of `--faults`.
pub fn fault_rotation(rng: &mut Rng) -> String {
    let mut share = |most: f64| rng.f64() * most;
    format!(
        "protocol=both,loss={:.2}%,reorder={:.2}%,duplicate={:.2}%,corrupt={:.2}%,truncate={:.2}%",
        share(1.0),
        share(1.0),
        share(1.0),
        share(0.2),
        share(0.1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_testbed::faults::FaultPlan;

    #[test]
    fn a_seed_repeats_the_script() {
        let draw = |seed| {
            let mut rng = Rng::with_seed(seed);
            (0..50)
                .map(|_| {
                    (
                        publisher(&mut rng, 2),
                        reader(&mut rng, 2),
                        fault_rotation(&mut rng),
                    )
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn everything_happens_and_weather_can_be_had() {
        let mut rng = Rng::with_seed(3);
        let drawn: Vec<_> = (0..500).map(|_| publisher(&mut rng, 2)).collect();
        for mode in [Mode::Tcp, Mode::Xdp, Mode::Auto] {
            let mut killed = drawn
                .iter()
                .filter(|p| matches!(p.fault, ProcessFault::Killed(_)));
            assert!(killed.any(|publisher| publisher.mode == mode));
        }
        let killed = |p: &&Publisher| matches!(p.fault, ProcessFault::Killed(_));
        assert!(
            drawn
                .iter()
                .filter(killed)
                .all(|publisher| publisher.streams == 1)
        );
        for _ in 0..50 {
            fault_rotation(&mut rng).parse::<FaultPlan>().unwrap();
        }
    }
}
