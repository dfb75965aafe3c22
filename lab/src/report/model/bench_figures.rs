//! Names of the figures of a benchmark's contenders.

use super::bench::{BenchCase, BenchContender};

pub const PAYLOAD: &str = "payload_mb_per_s";
pub const MESSAGES: &str = "messages_per_s";
pub const HOST_CPU: &str = "host_cpu_s_per_gb";
pub const BROKER_CPU: &str = "broker_cpu_s_per_gb";
pub const PUBLISHER_CPU: &str = "publisher_cpu_s_per_gb";
pub const P50: &str = "ack_latency_us_p50";
pub const P99: &str = "ack_latency_us_p99";
pub const HOST_BUSY: &str = "host_busy";
pub const PUBLISHER_CORES: &str = "publisher_cores";
pub const BROKER_CORES: &str = "broker_cores";
pub const OTHER_CORES: &str = "other_cores";
pub const SENDING_HOST: &str = "sending_host_cpu_s_per_gb";
pub const RECEIVING_HOST: &str = "receiving_host_cpu_s_per_gb";
pub const WITHOUT_CONVERSION: &str = "receiving_host_without_conversion_cpu_s_per_gb";
pub const PROBE_OVERHEAD: &str = "probe_overhead";
pub const IDLE_STREAM: &str = "idle_stream_bytes";

/// The contender of a kind whose mode moves most.
pub fn best<'a>(case: &'a BenchCase, kind: &str) -> Option<&'a BenchContender> {
    let of_kind = case.contenders.iter().filter(|c| c.kind == kind);
    let moved = |contender: &&BenchContender| contender.median(PAYLOAD).unwrap_or(-1.0);
    of_kind.max_by(|a, b| moved(a).total_cmp(&moved(b)))
}
