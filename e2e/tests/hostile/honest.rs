//! The honest side: a broker, a publisher that must get everything through, and what the broker may use.

use std::collections::HashSet;

use anyhow::Result;
use penstock_e2e::Broker;
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::broker::Stopped;
use serde_json::Value;

/// Options of the broker.
pub const XDP: [&str; 8] = [
    "--mode",
    "xdp",
    "--iface",
    "eth0",
    "--ring-size",
    "64MiB",
    "--topic",
    "penstock",
];
/// Bytes that each publisher sends.
const TOTAL: &str = "512MiB";
/// Messages in them.
const MESSAGES: u64 = 512 * 1024;
/// What a broker may need more than before: connections, what is kept of those that ended.
const GROWTH: u64 = 8 << 20;

/// Starts the broker with further options.
pub fn start_broker(bed: &Bed, further: &[&str]) -> Result<Broker> {
    bed.start_broker(&[&XDP, further].concat())
}

/// An honest publisher gets everything through, and stays on its path.
pub fn publish(bed: &Bed, mode: &str) -> Result<Value> {
    let report = bed.publish(&["--brokers", BROKER, "--mode", mode, "--total-size", TOTAL])?;
    assert_eq!(report["messages_acked"], MESSAGES);
    // A flood on two cores may silence the path for so long that the stream is opened anew.
    assert_eq!(report["brokers"][0]["streams"][0]["path"], mode);
    Ok(report)
}

/// A figure of the process's memory in its status file, bytes.
pub fn memory(broker: &Broker, field: &str) -> u64 {
    let field = broker.status_field(field);
    let kib = field
        .split_whitespace()
        .next()
        .and_then(|kib| kib.parse::<u64>().ok());
    kib.expect("kibibytes") * 1024
}

/// The broker's resident memory has hardly grown.
#[track_caller]
pub fn assert_grew_little(broker: &Broker, before: u64) {
    let now = memory(broker, "VmRSS");
    assert!(
        now.saturating_sub(before) <= GROWTH,
        "grew from {before} to {now} bytes"
    );
}

/// Stops the broker; its log holds nothing but what these publishers sent.
pub fn stop_in_order(bed: &Bed, broker: Broker, published: &[&Value]) -> Result<Stopped> {
    let stopped = broker.stop()?;
    let mut read = bed.subscriber(&["--verify", "--allow-loss", "--stat", "--format", "json"]);
    let read = bed.run("subscriber", read.arg("--path").arg(bed.log_of("penstock")))?;
    let read = read.success()?.json()?;
    let honest: HashSet<_> = published
        .iter()
        .map(|report| &report["brokers"][0]["session"])
        .collect();
    for stream in read["streams"].as_array().expect("streams") {
        assert!(
            honest.contains(&stream["session"]),
            "a foreign stream in the log: {stream}"
        );
    }
    let topics = stopped.report["topics"].as_array().expect("topics");
    let messages: u64 = topics
        .iter()
        .filter_map(|topic| topic["messages"].as_u64())
        .sum();
    assert_eq!(messages, published.len() as u64 * MESSAGES);
    Ok(stopped)
}
