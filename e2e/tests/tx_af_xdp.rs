//! `--tx af_xdp`: contents verified, queues, routes, what is missing and what changes under way.

#[path = "tx_af_xdp/changes.rs"]
mod changes;
#[path = "tx_af_xdp/flags.rs"]
mod flags;
#[path = "tx_af_xdp/workloads.rs"]
mod workloads;

use std::process::ExitCode;

use penstock_e2e::Case;
use serde_json::Value;

/// Options of a broker, and of a publisher.
const XDP: [&str; 4] = ["--mode", "xdp", "--iface", "eth0"];
const TX: [&str; 4] = ["--mode", "xdp", "--tx", "af_xdp"];

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(workloads::cases());
    all.extend(flags::cases());
    all.extend(changes::cases());
    penstock_e2e::run(all.into_iter().map(Case::long))
}

/// How the streams of a publisher's report sent, in order.
fn ways(report: &Value) -> Vec<String> {
    let brokers = report["brokers"].as_array().into_iter().flatten();
    let streams = brokers.flat_map(|broker| broker["streams"].as_array().into_iter().flatten());
    let text = |stream: &Value, field: &str| stream[field].as_str().unwrap_or("none").to_owned();
    streams
        .map(|stream| format!("{} {}", text(stream, "path"), text(stream, "tx")))
        .collect()
}

/// Every stream took the xdp path in this way, and this number of messages was acknowledged.
#[track_caller]
fn assert_sent_over(report: &Value, tx: &str, messages: u64) {
    let ways = ways(report);
    let wanted = format!("xdp {tx}");
    assert!(
        !ways.is_empty() && ways.iter().all(|way| *way == wanted),
        "{ways:?}"
    );
    assert_eq!(report["messages_acked"], messages);
}
