//! What the tests share: the state of `eth1`, and publishers that send to it.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::{matches, paths};
use penstock_e2e::second_link::SECOND_BROKER;
use penstock_e2e::wait::becomes;
use penstock_e2e::{Broker, eventually};
use penstock_testbed::netns::handle_path;
use serde_json::Value;

/// A broker on the second link.
pub const XDP: [&str; 4] = ["--mode", "xdp", "--iface", "eth1"];

/// `XDP` and further options.
pub fn xdp<'a>(further: &[&'a str]) -> Vec<&'a str> {
    [&XDP[..], further].concat()
}

/// Receive queues of `eth1`.
pub fn queues(bed: &Bed) -> usize {
    let names = bed.broker_shell("ls -d /sys/class/net/eth1/queues/rx-*");
    names.expect("the interface is there").lines().count()
}

/// Deferred hard interrupts and the timeout of `eth1`.
pub fn deferred(bed: &Bed) -> String {
    let script = "cat /sys/class/net/eth1/napi_defer_hard_irqs /sys/class/net/eth1/gro_flush_timeout | xargs";
    bed.broker_shell(script).expect("the interface is there")
}

/// Processes that wait to revert the broker's changes.
pub fn restorers(broker: &Broker) -> Vec<u32> {
    let children = format!("/proc/{0}/task/{0}/children", broker.pid());
    let children = std::fs::read_to_string(children).unwrap_or_default();
    let pids = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    let is_restorer = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line)
            .replace('\0', " ")
            .contains("--restore-nic eth1")
    };
    pids.filter(is_restorer).collect()
}

/// The only one.
pub fn restorer(broker: &Broker) -> u32 {
    let found = restorers(broker);
    assert_eq!(found.len(), 1, "processes that revert changes: {found:?}");
    found[0]
}

/// The file that tells how to revert changes of `eth1`, if there is one.
pub fn has_notes(bed: &Bed) -> bool {
    let metadata = std::fs::metadata(handle_path(bed.broker_ns())).expect("a namespace");
    PathBuf::from(format!("/run/penstock/nic-{}-eth1.json", metadata.ino())).exists()
}

/// Settings go back to what they were, and the notes with them.
pub fn assert_deferred_becomes(bed: &Bed, wanted: &str) {
    becomes("deferred interrupts", wanted.to_owned(), || deferred(bed));
}

/// 8 MiB get through to the second link, over this path.
pub fn publish(bed: &Bed, path: &str, arguments: &[&str]) -> Result<Value> {
    publish_to(bed, SECOND_BROKER, path, arguments)
}

pub fn publish_to(bed: &Bed, to: &str, path: &str, arguments: &[&str]) -> Result<Value> {
    let fixed = ["--brokers", to, "--mode", "auto", "--total-size", "8MiB"];
    let report = bed.publish(&[&fixed, arguments].concat())?;
    assert_eq!(report["messages_acked"], 8192);
    assert_eq!(paths(&report), path);
    Ok(report)
}

/// Waits until the broker's log says something like this.
#[track_caller]
pub fn says(broker: &Broker, regex: &str) {
    eventually(regex, || broker.has_said(regex));
}

/// No line of a log is like this, but for the advice to use keys.
#[track_caller]
pub fn assert_quiet(log: &str, regex: &str) {
    let said = log
        .lines()
        .filter(|line| !line.contains("--auth-keys") && matches(line, regex));
    assert_eq!(said.count(), 0, "the log need not say this: {log}");
}

/// `broker --restore-nic eth1`, which must succeed; returns what it said.
pub fn restore(bed: &Bed) -> Result<String> {
    let mut command = bed.broker(&["--restore-nic", "eth1"]).command_without_dir();
    let ended = bed.run("restore", &mut command)?;
    Ok(ended.success().context("--restore-nic")?.said())
}
