//! iperf3 as the yardstick: one server and one client run on the testbed's links.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytesize::ByteSize;
use serde::Deserialize;

use penstock_process::interrupt::Interrupt;
use penstock_testbed::command;
use penstock_testbed::running::{Running, inside, output_of};

/// What the server prints once it accepts connections.
const LISTENING: &str = "Server listening";
const READY_LIMIT: Duration = Duration::from_secs(10);

/// The part of `iperf3 -J` that counts.
#[derive(Debug, Deserialize)]
struct Output {
    error: Option<String>,
    end: Option<End>,
}

#[derive(Debug, Default, Deserialize)]
struct End {
    sum_received: Option<Sum>,
}

#[derive(Debug, Deserialize)]
struct Sum {
    bits_per_second: f64,
}

/// How much a run moves.
#[derive(Debug, Clone, Copy)]
pub enum Amount {
    Bytes(ByteSize),
    Seconds(u32),
}

/// The installed version, or how to install it.
pub fn version() -> Result<String> {
    let text = command::run(&["iperf3", "--version"])
        .context("iperf3 is what is compared with, but cannot be run")?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// One run of `streams` connections; payload MB/s at the receiver.
pub fn measure(
    server_namespace: &str,
    client_namespace: &str,
    server: Ipv4Addr,
    streams: u32,
    amount: Amount,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<f64> {
    let program = Path::new("iperf3");
    let mut command = inside(server_namespace, program);
    // -1: one client, then it ends by itself.
    command
        .args(["-s", "-1", "--forceflush"])
        .stdin(Stdio::null());
    let log = folder.join("iperf3-server.log");
    let mut running = Running::start("iperf3 server", &mut command, None, &log)?;
    running.wait_for_line(LISTENING, READY_LIMIT, interrupt)?;
    let mut client = inside(client_namespace, program);
    let (server, streams) = (server.to_string(), streams.to_string());
    client.args(["-c", &server, "-P", &streams, "-J"]);
    match amount {
        Amount::Bytes(size) => client.args(["-n", &size.as_u64().to_string()]),
        Amount::Seconds(seconds) => client.args(["-t", &seconds.to_string()]),
    };
    let log = folder.join("iperf3-client.log");
    let text = output_of("iperf3", &mut client, &log, interrupt)?;
    received_mb_per_s(&text)
}

/// Payload MB/s (10^6 bytes) that the receiver counted, from `iperf3 -J`.
pub fn received_mb_per_s(json: &str) -> Result<f64> {
    let output: Output = serde_json::from_str(json).context("cannot understand iperf3 -J")?;
    if let Some(error) = output.error {
        return Err(anyhow!("iperf3: {error}"));
    }
    let received = output.end.and_then(|end| end.sum_received);
    let received = received.context("iperf3 reported no end.sum_received")?;
    Ok(received.bits_per_second / 8e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_figure_counts() {
        let json = r#"{"start":{"version":"iperf 3.12"},"intervals":[],"end":{"streams":[],
            "sum_sent":{"bits_per_second":9.6e9},
            "sum_received":{"start":0,"end":1.5,"bytes":1500000000,"bits_per_second":8e9}}}"#;
        assert_eq!(received_mb_per_s(json).unwrap(), 1000.0);
    }

    #[test]
    fn its_errors_are_passed_on() {
        let json = r#"{"start":{},"intervals":[],"end":{},"error":"unable to connect to server"}"#;
        let error = received_mb_per_s(json).unwrap_err().to_string();
        assert!(error.contains("unable to connect"), "{error}");
        assert!(received_mb_per_s(r#"{"end":{}}"#).is_err());
        assert!(received_mb_per_s("iperf3: no").is_err());
    }
}
