//! Random values of fault runs.

use std::time::Duration;

use fastrand::Rng;

/// A random duration between two numbers of seconds.
pub fn seconds_between(rng: &mut Rng, least: f64, most: f64) -> Duration {
    Duration::from_secs_f64(least + rng.f64() * (most - least))
}
