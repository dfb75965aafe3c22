//! What a worker counts, and which packets it times.

use penstock_runtime::profile::Tick;

use crate::session::stats::{PathStage, WorkerStats};
use crate::xdp::stats::XdpStats;

/// The worker times one packet in this number. It is odd, so that the timed packets do not always have the same
/// position in a burst.
const SAMPLE_EVERY: u64 = 61;

/// Counters and stage timers of a worker.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    pub(super) stats: WorkerStats,
    pub(super) xdp: XdpStats,
    first_packet: Option<Tick>,
    pub(super) last_commit: Option<Tick>,
    /// Packets until the next timed one.
    until_sample: u64,
}

impl Metrics {
    /// The start time of a packet, if it is one of those that are timed.
    pub(super) fn sample(&mut self) -> Option<Tick> {
        if self.until_sample > 0 {
            self.until_sample -= 1;
            return None;
        }
        self.until_sample = SAMPLE_EVERY - 1;
        Some(self.stats.stages.now())
    }

    /// Credits the stages with a timed packet, which stands for all since the timed one before.
    pub(super) fn credit_sample(&mut self, start: Tick, parsed: Tick) {
        self.first_packet.get_or_insert(start);
        let stages = &mut self.stats.stages;
        let end = stages.now();
        let (header, payload) = (parsed.ticks_since(start), end.ticks_since(parsed));
        stages.credit(PathStage::DrainHeader, header * SAMPLE_EVERY, SAMPLE_EVERY);
        stages.credit(
            PathStage::DrainPayloadToBuffer,
            payload * SAMPLE_EVERY,
            SAMPLE_EVERY,
        );
    }

    /// The counters with the time between the first packet and the last commit.
    pub(super) fn sum_up(&self) -> (WorkerStats, XdpStats) {
        let mut stats = self.stats.clone();
        if let (Some(first), Some(last)) = (self.first_packet, self.last_commit) {
            stats.active_ns = stats.stages.nanos_between(first, last);
        }
        (stats, self.xdp)
    }
}
