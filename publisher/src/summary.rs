//! What a publisher did; the shape of `penstock-publisher --format json`.

use penstock_runtime::profile::{Stage, StageReport};
use serde::Serialize;

use crate::AckLatency;

/// Stages of a batch in the publisher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PublishStage {
    /// Copying messages into the batch, and its checksum. Measured on every 16th message.
    BufferWrite,
    /// Handing the batch to the kernel, and waiting until it takes it.
    SendPayload,
    /// Waiting for acks, with the window full or the stream at its end.
    WaitAck,
}

impl Stage for PublishStage {
    const ALL: &'static [Self] = &[Self::BufferWrite, Self::SendPayload, Self::WaitAck];

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        match self {
            Self::BufferWrite => "BufferWrite",
            Self::SendPayload => "SendPayload",
            Self::WaitAck => "WaitAck",
        }
    }
}

/// What a whole publisher did.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Messages handed to [`crate::Publisher::publish`].
    pub messages_sent: u64,
    /// Messages whose ack came; at ack level 0, those confirmed at the end of their stream.
    pub messages_acked: u64,
    /// Batches sent.
    pub batches: u64,
    /// Message bytes sent, without framing.
    pub payload_bytes: u64,
    /// First message to last ack, seconds.
    pub seconds: f64,
    /// Message bytes per second, in units of 10^6.
    pub bandwidth_mb_per_s: f64,
    /// Time from a batch being sealed to its ack, over all streams; none at ack level 0.
    pub ack_latency_us: Option<AckLatency>,
    /// Times that streams continued at another broker because theirs was lost.
    pub reroutes: u64,
    /// Times that streams returned to the broker that they belong to.
    pub returns: u64,
    /// Longest time from the last sign of life of a lost broker, while acks were due, to the detection of its
    /// loss, milliseconds.
    pub detection_ms: Option<f64>,
    /// Longest time from the detection of a loss to the first ack of another broker, milliseconds.
    pub recovery_ms: Option<f64>,
    /// Time per stage; percentages are of the time that all stages took.
    pub stages: Vec<StageReport>,
    /// Each broker.
    pub brokers: Vec<BrokerSummary>,
}

/// What went to one broker.
#[derive(Debug, Clone, Serialize)]
pub struct BrokerSummary {
    /// The broker, as it was given.
    pub address: String,
    /// Session key, hexadecimal; it names the session in the broker's log, and in the logs of other brokers
    /// that took its streams over.
    pub session: String,
    /// Each stream.
    pub streams: Vec<StreamSummary>,
}

/// What went through one stream.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StreamSummary {
    /// Number of the stream in its session.
    pub stream: u32,
    /// Messages sent.
    pub messages: u64,
    /// Messages acked.
    pub messages_acked: u64,
    /// Batches sent.
    pub batches: u64,
    /// Message bytes, without framing.
    pub payload_bytes: u64,
    /// SHA-256 over every message followed by one newline, in order, if asked for.
    pub sha256: Option<String>,
    /// Path at the end: tcp or xdp.
    pub path: &'static str,
    /// How datagrams left at the end, over xdp: udp or af_xdp.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx: Option<&'static str>,
    /// Times that the stream went on over another connection.
    pub moves: u64,
    /// Times that it continued at another broker because the one that it used was lost.
    pub reroutes: u64,
    /// Times that it returned to the broker that it belongs to.
    pub returns: u64,
    /// As in [`Summary::detection_ms`].
    pub detection_ms: Option<f64>,
    /// As in [`Summary::recovery_ms`].
    pub recovery_ms: Option<f64>,
    /// The broker at the end, if it is another one than the stream belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// What it took over xdp.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<TransportSummary>,
}

/// What a stream's packets did, over xdp.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct TransportSummary {
    /// Packets sent.
    pub packets: u64,
    /// System calls that sent them.
    pub send_calls: u64,
    /// Packets that carried again what was declared lost, or probed a silent path.
    pub retransmits: u64,
    /// Packets declared lost.
    pub lost: u64,
    /// Of these, packets that came after all.
    pub spurious: u64,
    /// Times that nothing came for a whole probe timeout.
    pub probe_timeouts: u64,
    /// Times that the broker's credit was all that held the stream back.
    pub credit_stalls: u64,
    /// Times that full packets had to become smaller.
    pub black_holes: u64,
    /// Smoothed round-trip time at the end, microseconds.
    pub rtt_us: f64,
    /// Payload bytes of a full packet at the end.
    pub datagram: u64,
}
