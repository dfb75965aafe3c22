//! Waits for what another program brings about.

use std::thread;
use std::time::{Duration, Instant};

/// Time limit: what is waited for takes milliseconds, on a busy machine seconds.
const LIMIT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not within 60 seconds.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for: {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// Waits until `read` returns `wanted`.
///
/// # Panics
/// If it does not within 60 seconds.
#[track_caller]
pub fn becomes<T: PartialEq + std::fmt::Debug>(what: &str, wanted: T, mut read: impl FnMut() -> T) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let now = read();
        if now == wanted {
            return;
        }
        let late = Instant::now() >= deadline;
        assert!(
            !late,
            "{what} is {now:?} after {LIMIT:?}, wanted {wanted:?}"
        );
        thread::sleep(POLL_INTERVAL);
    }
}
