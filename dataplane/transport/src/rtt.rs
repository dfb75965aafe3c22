//! Round-trip time as RFC 9002 section 5 estimates it.

use super::time::Nanos;

/// Assumed before the first sample.
const INITIAL: Nanos = Nanos::from_millis(10);
/// Finest time that a timer is set to: RFC 9002's kGranularity is 1 ms, for networks of another age.
const GRANULARITY: Nanos = Nanos::from_micros(100);

/// Smoothed round-trip time and its variation.
#[derive(Debug, Clone, Copy)]
pub struct Rtt {
    samples: u64,
    latest: Nanos,
    min: Nanos,
    smoothed: Nanos,
    rttvar: Nanos,
}

impl Default for Rtt {
    fn default() -> Self {
        Self {
            samples: 0,
            latest: INITIAL,
            min: INITIAL,
            smoothed: INITIAL,
            rttvar: INITIAL / 2,
        }
    }
}

impl Rtt {
    /// Takes a sample: the time from sending to the ACK, of which the peer says that it waited
    /// `delay`.
    pub fn sample(&mut self, elapsed: Nanos, delay: Nanos) {
        let elapsed = elapsed.max(Nanos::ONE);
        self.min = if self.samples == 0 {
            elapsed
        } else {
            self.min.min(elapsed)
        };
        // A peer that exaggerates its delay cannot make the path faster than it ever was.
        let adjusted = if elapsed >= self.min + delay {
            elapsed - delay
        } else {
            elapsed
        };
        if self.samples == 0 {
            self.smoothed = adjusted;
            self.rttvar = adjusted / 2;
        } else {
            let deviation = self.smoothed.abs_diff(adjusted);
            self.rttvar = (3 * self.rttvar + deviation) / 4;
            self.smoothed = (7 * self.smoothed + adjusted) / 8;
        }
        self.latest = adjusted;
        self.samples += 1;
    }

    /// Whether there has been a sample.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.samples > 0
    }

    /// Smoothed.
    #[must_use]
    pub fn smoothed(&self) -> Nanos {
        self.smoothed
    }

    /// Of the last sample.
    #[must_use]
    pub fn latest(&self) -> Nanos {
        self.latest
    }

    /// Least ever.
    #[must_use]
    pub fn min(&self) -> Nanos {
        self.min
    }

    /// Time without an ACK after which something is lost: RFC 9002 section 6.2.1, before backoff.
    #[must_use]
    pub fn probe_timeout(&self, max_delay: Nanos) -> Nanos {
        self.smoothed + (4 * self.rttvar).max(GRANULARITY) + max_delay
    }

    /// A packet sent this long before one that was acked is lost: RFC 9002 section 6.1.2.
    #[must_use]
    pub fn loss_delay(&self) -> Nanos {
        let longest = self.smoothed.max(self.latest);
        (longest + longest / 8).max(GRANULARITY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = Nanos::from_millis(1);

    #[test]
    fn it_follows_the_samples() {
        let mut rtt = Rtt::default();
        assert!(!rtt.is_known());
        rtt.sample(MS, Nanos::ZERO);
        assert_eq!((rtt.smoothed(), rtt.min(), rtt.latest()), (MS, MS, MS));
        assert_eq!(rtt.probe_timeout(Nanos::ZERO), 3 * MS);
        for _ in 0..200 {
            rtt.sample(2 * MS, MS / 2);
        }
        assert!(rtt.smoothed().abs_diff(3 * MS / 2) < MS / 100);
        assert_eq!(rtt.min(), MS);
        assert!(rtt.probe_timeout(Nanos::from_nanos(25)) < 17 * MS / 10);
    }

    #[test]
    fn a_claimed_delay_does_not_go_below_the_least() {
        let mut rtt = Rtt::default();
        rtt.sample(MS, 9 * MS / 10);
        assert_eq!(rtt.smoothed(), MS);
        rtt.sample(11 * MS / 10, Nanos::from_micros(u32::MAX.into()));
        assert_eq!(rtt.latest(), 11 * MS / 10);
    }
}
