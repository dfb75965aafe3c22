//! Spreads packets over the round trip, so that they do not overflow a queue on the path.

use super::congestion::Congestion;
use super::rtt::Rtt;
use super::time::Timestamp;

/// Bytes that may go out back to back.
const MAX_BURST: u64 = 64 << 10;

/// Pacing of one stream.
#[derive(Debug)]
pub(super) struct Pacer {
    next_send_time: Timestamp,
}

impl Pacer {
    pub(super) fn new(now: Timestamp) -> Self {
        Self {
            next_send_time: now,
        }
    }

    /// When the next packet may go out.
    pub(super) fn next_send_time(&self) -> Timestamp {
        self.next_send_time
    }

    /// Charges for a sent packet of this many bytes.
    pub(super) fn on_sent(
        &mut self,
        now: Timestamp,
        size: u32,
        congestion: &Congestion,
        rtt: &Rtt,
    ) {
        let burst = congestion.pace(MAX_BURST, rtt);
        let time = congestion.pace(u64::from(size), rtt);
        self.next_send_time = self.next_send_time.max(now - burst) + time;
    }
}
