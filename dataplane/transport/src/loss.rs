//! When a packet counts as lost (RFC 9002 section 6.1), and how that adapts to a path that reorders.

use super::rtt::Rtt;
use super::time::{Nanos, Timestamp};

/// A packet is lost once this many later ones arrived (RFC 9002 section 6.1.1); the number grows
/// where the network reorders.
pub(super) const PACKET_THRESHOLD: u64 = 3;
const MAX_PACKET_THRESHOLD: u64 = 512;
/// Largest share of a round trip that reordering may take beyond a whole one, eighths.
const MAX_TIME_THRESHOLD: u64 = 16;

/// Loss detection of one stream.
#[derive(Debug)]
pub(super) struct LossDetection {
    pub(super) packet_threshold: u64,
    /// Eighths of a round trip that reordering may take beyond a whole one.
    time_threshold: u64,
    /// When the next packet counts as lost, unless it is acknowledged before.
    loss_time: Option<Timestamp>,
}

impl LossDetection {
    pub(super) fn new() -> Self {
        Self {
            packet_threshold: PACKET_THRESHOLD,
            time_threshold: 1,
            loss_time: None,
        }
    }

    /// When the next packet counts as lost, unless it is acknowledged before.
    pub(super) fn loss_time(&self) -> Option<Timestamp> {
        self.loss_time
    }

    /// A lost packet arrived after all, `behind` packets late: tolerates more reordering.
    pub(super) fn on_spurious_loss(&mut self, behind: u64) {
        self.packet_threshold = self.packet_threshold.max(behind).min(MAX_PACKET_THRESHOLD);
        self.time_threshold = (self.time_threshold + 1).min(MAX_TIME_THRESHOLD);
    }

    /// Starts a pass over all packets in flight. Returns the time after which each of them is lost.
    pub(super) fn start_pass(&mut self, rtt: &Rtt) -> Nanos {
        self.loss_time = None;
        rtt.loss_delay() / 9 * (8 + self.time_threshold)
    }

    /// Whether a packet is lost that `later` packets overtook; if not, it sets the timer for it.
    pub(super) fn is_lost(
        &mut self,
        now: Timestamp,
        later: u64,
        sent_at: Timestamp,
        delay: Nanos,
    ) -> bool {
        let lost_at = sent_at + delay;
        if later >= self.packet_threshold || lost_at <= now {
            return true;
        }
        let next = self.loss_time.map_or(lost_at, |next| next.min(lost_at));
        self.loss_time = Some(next);
        false
    }
}
