//! The probe timeout (PTO, RFC 9002 section 6.2), and signs of life of a stream that has nothing to send.

use super::rtt::Rtt;
use super::time::{Nanos, Timestamp};

/// Longest time that the broker waits before it acks.
const MAX_ACK_DELAY: Nanos = Nanos::from_millis(1);
/// Longest time between probes of a silent path.
pub(super) const MAX_PTO: Nanos = Nanos::from_secs(1);
/// A busy machine may be silent for this long.
const MIN_PTO: Nanos = Nanos::from_millis(5);
/// Time after which an idle stream sends a ping.
pub(super) const KEEP_ALIVE_INTERVAL: Nanos = Nanos::from_secs(1);
/// Timeouts in a row that are counted.
const MAX_COUNT: u32 = 32;
/// Doublings of the timeout.
const MAX_BACKOFF: u32 = 20;

/// What a stream waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WaitsFor {
    /// Acknowledgements of packets in flight.
    Acks,
    /// Credit, or the commit of batches that arrived.
    Progress,
    /// Something to send.
    Batches,
}

/// The probe timer of one stream.
#[derive(Debug)]
pub(super) struct ProbeTimer {
    /// Probe timeouts in a row.
    pto_count: u32,
    /// Pings in a row while nothing was in flight and nothing changed.
    idle_count: u32,
    /// Probes that go out whatever the window says.
    probes: u8,
    last_sent: Timestamp,
    last_feedback_at: Timestamp,
}

impl ProbeTimer {
    pub(super) fn new(now: Timestamp) -> Self {
        Self {
            pto_count: 0,
            idle_count: 0,
            probes: 0,
            last_sent: now,
            last_feedback_at: now,
        }
    }

    /// Time without an acknowledgement after which the path is probed, before backoff.
    pub(super) fn pto(rtt: &Rtt) -> Nanos {
        rtt.probe_timeout(MAX_ACK_DELAY).max(MIN_PTO)
    }

    /// When the timer expires.
    pub(super) fn deadline(&self, rtt: &Rtt, waits_for: WaitsFor) -> Timestamp {
        let pto = Self::pto(rtt);
        let backed_off = |count: u32| (pto * (1 << count.min(MAX_BACKOFF))).min(MAX_PTO);
        let timeout = match waits_for {
            WaitsFor::Acks => backed_off(self.pto_count),
            WaitsFor::Progress => backed_off(self.idle_count),
            WaitsFor::Batches => KEEP_ALIVE_INTERVAL,
        };
        self.last_sent.max(self.last_feedback_at) + timeout
    }

    /// The timer expired with packets in flight: two probes. Returns how often in a row.
    pub(super) fn on_pto(&mut self) -> u32 {
        self.pto_count = (self.pto_count + 1).min(MAX_COUNT);
        self.probes = 2;
        self.pto_count
    }

    /// The timer expired with nothing in flight: one probe.
    pub(super) fn on_idle(&mut self) {
        self.idle_count = (self.idle_count + 1).min(MAX_COUNT);
        self.probes = 1;
    }

    /// Sends a probe in any case.
    pub(super) fn probe_now(&mut self) {
        self.probes = 1;
    }

    /// Takes a probe that is to be sent. Returns how many are left after it.
    pub(super) fn take_probe(&mut self) -> Option<u8> {
        self.probes = self.probes.checked_sub(1)?;
        Some(self.probes)
    }

    pub(super) fn on_sent(&mut self, now: Timestamp) {
        self.last_sent = now;
    }

    pub(super) fn on_feedback(&mut self, now: Timestamp) {
        self.last_feedback_at = now;
    }

    /// A packet was acknowledged for the first time.
    pub(super) fn on_ack(&mut self) {
        self.pto_count = 0;
    }

    /// The broker committed batches, or gave credit.
    pub(super) fn on_progress(&mut self) {
        self.idle_count = 0;
    }

    /// When the broker's last feedback arrived, or the stream began.
    pub(super) fn last_feedback_at(&self) -> Timestamp {
        self.last_feedback_at
    }
}
