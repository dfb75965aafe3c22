//! What runs by chance are drawn from.

use std::time::Duration;

use fastrand::Rng;

/// A time between the two, in seconds.
pub fn seconds(rng: &mut Rng, least: f64, most: f64) -> Duration {
    Duration::from_secs_f64(least + rng.f64() * (most - least))
}
