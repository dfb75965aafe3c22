//! How large a datagram gets through: DPLPMTUD (RFC 8899), sizes being bytes of UDP payload.

use super::time::{Nanos, Timestamp};

/// The smallest size that every path must carry (RFC 9000 section 14).
pub const BASE_PLPMTU: u32 = 1200;
/// The search ends once it could gain less than this.
const MIN_STEP: u32 = 32;
/// Number of lost probes after which their size counts as too large.
const MAX_PROBES: u8 = 3;
/// After this time, a path that took less may take more (RFC 8899 section 5.1.1).
const PMTU_RAISE_TIMER: Nanos = Nanos::from_secs(600);
/// After a black hole the path is left alone for this time.
const BLACK_HOLE_PAUSE: Nanos = Nanos::from_secs(1);

/// Large packets lost in a row, none of them arriving for this many probe timeouts, that mean that the
/// path takes only smaller ones (RFC 8899 section 4.3): a full queue can lose as many at a time.
const BLACK_HOLE_LOSSES: u32 = 8;
const BLACK_HOLE_PTOS: u64 = 2;

/// The search for the largest datagram that arrives.
#[derive(Debug, Clone)]
pub struct PathMtu {
    current: u32,
    /// What both ends' interfaces allow.
    ceiling: u32,
    /// Less than this is still to be tried.
    too_large: u32,
    probe_count: u8,
    /// Size of the probe that is on its way.
    probing: Option<u32>,
    next_at: Timestamp,
    /// Packets larger than [`BASE_PLPMTU`] that were lost in a row.
    large_lost: u32,
    /// When the first of them was.
    large_lost_since: Timestamp,
}

impl PathMtu {
    /// Starts with what surely works, and looks for up to `ceiling`.
    #[must_use]
    pub fn new(ceiling: u32) -> Self {
        Self {
            current: BASE_PLPMTU.min(ceiling),
            ceiling,
            too_large: ceiling + 1,
            probe_count: 0,
            probing: None,
            next_at: Timestamp::ZERO,
            large_lost: 0,
            large_lost_since: Timestamp::ZERO,
        }
    }

    /// Size of a full datagram.
    #[must_use]
    pub fn current(&self) -> u32 {
        self.current
    }

    /// Size of the probe that is to be sent now.
    #[must_use]
    pub fn next_probe(&self, now: Timestamp) -> Option<u32> {
        let idle = self.probing.is_none() && now >= self.next_at;
        if !idle || self.current >= self.ceiling {
            return None;
        }
        // Most often the whole is possible: that is tried first.
        let candidate = if self.too_large > self.ceiling {
            self.ceiling
        } else {
            u32::midpoint(self.current, self.too_large)
        };
        Some(candidate)
    }

    /// When [`Self::next_probe`] may have something, if ever.
    #[must_use]
    pub fn next_at(&self) -> Option<Timestamp> {
        (self.probing.is_none() && self.current < self.ceiling).then_some(self.next_at)
    }

    /// A probe of this size was sent.
    pub fn on_sent(&mut self, size: u32) {
        self.probing = Some(size);
    }

    /// A probe arrived.
    pub fn on_acked(&mut self, now: Timestamp, size: u32) {
        self.probing = None;
        self.probe_count = 0;
        if size > self.current && size <= self.ceiling {
            self.current = size;
            self.rest_if_close(now);
        }
    }

    /// A probe is lost, or could not be sent at all (`surely`).
    pub fn on_lost(&mut self, now: Timestamp, size: u32, surely: bool) {
        self.probing = None;
        self.probe_count += 1;
        if surely || self.probe_count >= MAX_PROBES {
            self.probe_count = 0;
            self.too_large = self.too_large.min(size);
            self.rest_if_close(now);
        }
    }

    /// A packet of this size was acknowledged.
    pub fn on_packet_acked(&mut self, size: u32) {
        if size > BASE_PLPMTU {
            self.large_lost = 0;
        }
    }

    /// A packet of this size, which is no probe, is lost.
    pub fn on_packet_lost(&mut self, now: Timestamp, size: u32) {
        if size > BASE_PLPMTU {
            if self.large_lost == 0 {
                self.large_lost_since = now;
            }
            self.large_lost += 1;
        }
    }

    /// Whether large packets seem to get through no more.
    #[must_use]
    pub fn is_black_hole(&self, now: Timestamp, pto: Nanos) -> bool {
        let shortest = BLACK_HOLE_PTOS * pto;
        self.large_lost >= BLACK_HOLE_LOSSES && now - self.large_lost_since >= shortest
    }

    /// Full datagrams get through no more. Returns whether they become smaller by that.
    pub fn on_black_hole(&mut self, now: Timestamp) -> bool {
        self.large_lost = 0;
        let smaller = self.current > BASE_PLPMTU;
        self.current = self.current.min(BASE_PLPMTU);
        self.too_large = self.ceiling + 1;
        self.probing = None;
        self.probe_count = 0;
        self.next_at = now + BLACK_HOLE_PAUSE;
        smaller
    }

    /// Ends the search for some time once it can gain little.
    fn rest_if_close(&mut self, now: Timestamp) {
        if self.current + MIN_STEP >= self.too_large {
            self.too_large = self.ceiling + 1;
            self.next_at = now + PMTU_RAISE_TIMER;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp::ZERO;

    /// Probes until the search rests; returns how many probes it took.
    fn search(mtu: &mut PathMtu, fits: u32) -> u32 {
        let mut probes = 0;
        while let Some(size) = mtu.next_probe(START) {
            probes += 1;
            assert!(probes < 100, "the search does not end");
            mtu.on_sent(size);
            assert_eq!(mtu.next_probe(START), None, "one at a time");
            if size <= fits {
                mtu.on_acked(START, size);
            } else {
                mtu.on_lost(START, size, false);
            }
        }
        probes
    }

    #[test]
    fn the_ceiling_is_tried_first() {
        let mut mtu = PathMtu::new(8972);
        assert_eq!(mtu.current(), BASE_PLPMTU);
        assert_eq!(search(&mut mtu, 9000), 1);
        assert_eq!(mtu.current(), 8972);
        assert_eq!(mtu.next_at(), None);
    }

    #[test]
    fn a_smaller_path_is_found_by_halves() {
        for fits in [1200, 1201, 1472, 4000, 8900] {
            let mut mtu = PathMtu::new(8972);
            search(&mut mtu, fits);
            assert!(
                mtu.current() <= fits && mtu.current() + MIN_STEP >= fits,
                "{fits}"
            );
            assert_eq!(mtu.next_at(), Some(START + PMTU_RAISE_TIMER));
        }
    }

    #[test]
    fn a_black_hole_leads_back_to_what_surely_works() {
        let mut mtu = PathMtu::new(8972);
        search(&mut mtu, 9000);
        assert!(mtu.on_black_hole(START));
        assert_eq!((mtu.current(), mtu.next_probe(START)), (BASE_PLPMTU, None));
        assert!(!mtu.on_black_hole(START));
        assert_eq!(mtu.next_probe(START + BLACK_HOLE_PAUSE), Some(8972));
    }

    #[test]
    fn a_path_that_takes_less_than_usual_is_served() {
        let mtu = PathMtu::new(1000);
        assert_eq!((mtu.current(), mtu.next_probe(START)), (1000, None));
    }

    #[test]
    fn what_the_interface_refuses_is_not_tried_again() {
        let mut mtu = PathMtu::new(8972);
        mtu.on_sent(8972);
        mtu.on_lost(START, 8972, true);
        assert!(mtu.next_probe(START).is_some_and(|size| size < 8972));
    }
}
