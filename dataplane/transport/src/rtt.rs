//! Round-trip time as RFC 9002 section 5 estimates it. All times are nanoseconds.

/// Assumed before the first sample.
const INITIAL: u64 = 10_000_000;
/// Finest time that a timer is set to: RFC 9002's kGranularity is 1 ms, for networks of another age.
const GRANULARITY: u64 = 100_000;

/// Smoothed round-trip time and its variation.
#[derive(Debug, Clone, Copy)]
pub struct Rtt {
    samples: u64,
    latest: u64,
    min: u64,
    smoothed: u64,
    rttvar: u64,
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
    pub fn sample(&mut self, elapsed: u64, delay: u64) {
        let elapsed = elapsed.max(1);
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
    pub fn smoothed(&self) -> u64 {
        self.smoothed
    }

    /// Of the last sample.
    #[must_use]
    pub fn latest(&self) -> u64 {
        self.latest
    }

    /// Least ever.
    #[must_use]
    pub fn min(&self) -> u64 {
        self.min
    }

    /// After so long without an ACK something is lost: RFC 9002 section 6.2.1, before backoff.
    #[must_use]
    pub fn probe_timeout(&self, max_delay: u64) -> u64 {
        self.smoothed + (4 * self.rttvar).max(GRANULARITY) + max_delay
    }

    /// A packet sent so long before one that was acked is lost: RFC 9002 section 6.1.2.
    #[must_use]
    pub fn loss_delay(&self) -> u64 {
        let longest = self.smoothed.max(self.latest);
        (longest + longest / 8).max(GRANULARITY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_samples() {
        let mut rtt = Rtt::default();
        assert!(!rtt.is_known());
        rtt.sample(1_000_000, 0);
        assert_eq!(
            (rtt.smoothed(), rtt.min(), rtt.latest()),
            (1_000_000, 1_000_000, 1_000_000)
        );
        assert_eq!(rtt.probe_timeout(0), 3_000_000);
        for _ in 0..200 {
            rtt.sample(2_000_000, 500_000);
        }
        assert!(rtt.smoothed().abs_diff(1_500_000) < 10_000);
        assert_eq!(rtt.min(), 1_000_000);
        assert!(rtt.probe_timeout(25) < 1_700_000);
    }

    #[test]
    fn a_claimed_delay_does_not_go_below_the_least() {
        let mut rtt = Rtt::default();
        rtt.sample(1_000_000, 900_000);
        assert_eq!(rtt.smoothed(), 1_000_000);
        rtt.sample(1_100_000, u64::from(u32::MAX) * 1000);
        assert_eq!(rtt.latest(), 1_100_000);
    }
}
