//! Addresses and names of brokers: names with several addresses, IPv6 with an interface, ways to write them.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_e2e::bed::{BROKER, Bed, program};
use penstock_e2e::commands::paths;
use penstock_e2e::{Broker, Case, cases, eventually};
use penstock_testbed::netns::BROKER_END;
use serde_json::Value;

use crate::XDP;

/// Far less than the publisher's timeout, which trying one address after the other would take.
const SOON: Duration = Duration::from_secs(60);
const TIMEOUT: &str = "600";
const MESSAGES: u64 = 1024;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        a_name_whose_first_address_drops_packets,
        a_name_of_two_brokers_leads_a_session_to_one,
        link_local_addresses_by_the_interfaces_name_and_number,
        ways_to_write_where_to_listen,
        mode_auto_without_an_interface_warns_and_names_some,
    ]
}

/// A publisher whose hosts(5) are these.
fn publisher(bed: &Bed, hosts: Option<&str>, arguments: &[&str]) -> Result<std::process::Command> {
    let Some(hosts) = hosts else {
        return Ok(bed.publisher(arguments));
    };
    let path = bed.file("hosts");
    fs::write(&path, hosts)?;
    // `ip netns exec` has given the shell a mount namespace of its own.
    let script = r#"mount --bind "$0" /etc/hosts && exec "$@""#;
    let mut command = bed.in_publisher_ns("sh", &["-c", script]);
    command.arg(path).arg(program("publisher")).args(arguments);
    Ok(command)
}

/// Everything is acknowledged over that path.
fn goes_to(
    bed: &Bed,
    hosts: Option<&str>,
    brokers: &str,
    path: &str,
    options: &[&str],
) -> Result<Value> {
    #[rustfmt::skip]
    let first = [
        "--brokers", brokers, "--mode", path, "--synthetic", "--total-size", "1MiB",
        "--timeout", TIMEOUT, "--format", "json"];
    let mut command = publisher(bed, hosts, &[&first, options].concat())?;
    let mut publisher = bed.background("publisher", &mut command)?;
    let ended = publisher.wait_for(SOON)?.success();
    let report = ended.with_context(|| format!("to {brokers}"))?.json()?;
    assert_eq!(report["messages_acked"], MESSAGES, "to {brokers}");
    assert_eq!(paths(&report), path, "to {brokers}");
    Ok(report)
}

/// Trying one address after the other would take ten minutes.
fn a_name_whose_first_address_drops_packets(bed: &Bed) -> Result<()> {
    // That address belongs to a neighbour that never answers.
    bed.publisher_ip(&["addr", "add", "fd99::1/64", "dev", "b0", "nodad"])?;
    #[rustfmt::skip]
    bed.publisher_ip(&["neigh", "add", "fd99::9", "lladdr", "02:00:00:00:00:99", "dev", "b0"])?;
    let hosts = Some("fd99::9 swallowing\n10.214.0.2 swallowing\n");
    let broker = bed.start_broker(&XDP)?;
    for path in ["tcp", "xdp"] {
        goes_to(bed, hosts, "swallowing:1214", path, &[])?;
    }
    broker.stop()?;
    Ok(())
}

/// All streams of a session reach the broker that knows it.
fn a_name_of_two_brokers_leads_a_session_to_one(bed: &Bed) -> Result<()> {
    bed.broker_ip(&["addr", "add", "10.214.0.3/24", "dev", BROKER_END])?;
    let first = bed.start_broker(&["--listen", BROKER])?;
    let second = bed.broker(&["--listen", "10.214.0.3:1214"]);
    let second = second.buffer_dir(bed.buffers().join("second")).start()?;
    // The name service decides which of them is first.
    let hosts = Some("10.214.0.2 both\n10.214.0.3 both\n");
    let streams = ["--threads-per-broker", "8"];
    goes_to(bed, hosts, "both:1214", "tcp", &streams)?;
    // Both write their report to the same file.
    let messages = |broker: Broker| -> Result<u64> {
        let topics = broker.stop()?.report["topics"].take();
        let topics = topics.as_array().context("topics")?.clone();
        Ok(topics
            .iter()
            .filter_map(|topic| topic["messages"].as_u64())
            .sum())
    };
    let mut messages = [messages(first)?, messages(second)?];
    messages.sort_unstable();
    assert_eq!(messages, [0, MESSAGES]);
    Ok(())
}

fn link_local_addresses_by_the_interfaces_name_and_number(bed: &Bed) -> Result<()> {
    // Nobody can bind to one before the kernel has looked for another host that has it (RFC 4862, 5.4).
    let tentative = ["-6", "-o", "addr", "show", "tentative"];
    eventually("addresses that are not tentative", || {
        let both = [bed.broker_ip(&tentative), bed.publisher_ip(&tentative)];
        both.iter()
            .all(|shown| matches!(shown, Ok(shown) if shown.is_empty()))
    });
    let scope = [
        "-6", "-o", "addr", "show", "dev", BROKER_END, "scope", "link",
    ];
    let address = bed.broker_ip(&scope)?;
    let address = address.split_whitespace().nth(3).context("an address")?;
    let address = address.split('/').next().unwrap_or_default();
    let index = bed.publisher_ip(&["-o", "link", "show", "b0"])?;
    let index = index.split(':').next().unwrap_or_default();
    let listen = format!("[{address}%{BROKER_END}]:1214");
    let broker = bed.start_broker(&[&XDP[..], &["--listen", &listen]].concat())?;
    for path in ["tcp", "xdp"] {
        for zone in ["b0", index] {
            goes_to(bed, None, &format!("[{address}%{zone}]:1214"), path, &[])?;
        }
    }
    let by_name = format!("[{address}%b0]:1214");
    goes_to(bed, None, &by_name, "xdp", &["--tx", "af_xdp"])?;
    let without = format!("[{address}]:1214");
    let mut publisher = bed.publisher(&["--brokers", &without, "--synthetic"]);
    let message = "is a link-local address and needs an interface";
    bed.refuses(message, &mut publisher);
    broker.stop()?;
    Ok(())
}

fn ways_to_write_where_to_listen(bed: &Bed) -> Result<()> {
    let mapped = "[::ffff:10.214.0.2]:1214";
    for listen in [":1214", "*:1214", "[::]:1214", mapped] {
        let broker = bed.start_broker(&[&XDP[..], &["--listen", listen]].concat())?;
        for address in [BROKER, mapped] {
            goes_to(bed, None, address, "xdp", &[]).context(listen)?;
        }
        broker.stop()?;
    }
    let local = bed.broker(&[&XDP[..], &["--listen", "localhost:1214"]].concat());
    local.refuses("listen 127.0.0.1 accepts publishers on this host only.*use --mode tcp");
    Ok(())
}

/// The XDP program is on no interface unless --iface gives one.
fn mode_auto_without_an_interface_warns_and_names_some(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&["--mode", "auto"])?;
    broker.assert_said("WARN.*serving over tcp only.*--iface eth0");
    assert_eq!(bed.programs_attached()?, 0);
    broker.stop()?;
    Ok(())
}
