//! Spreads packets over the round trip, so that they do not overflow a queue on the path.

use super::congestion::Congestion;
use super::rtt::Rtt;

/// Bytes that may go out back to back.
const MAX_BURST: u64 = 64 << 10;

/// Pacing of one stream.
#[derive(Debug)]
pub(super) struct Pacer {
    next_send_time: u64,
}

impl Pacer {
    pub(super) fn new(now: u64) -> Self {
        Self {
            next_send_time: now,
        }
    }

    /// When the next packet may go out.
    pub(super) fn next_send_time(&self) -> u64 {
        self.next_send_time
    }

    /// Charges for a sent packet of this many bytes.
    pub(super) fn on_sent(&mut self, now: u64, size: u32, congestion: &Congestion, rtt: &Rtt) {
        let burst = congestion.pace(MAX_BURST, rtt);
        let time = congestion.pace(u64::from(size), rtt);
        self.next_send_time = self.next_send_time.max(now.saturating_sub(burst)) + time;
    }
}
