//! Kinds of interfaces, and names for them.

use anyhow::{Context, Result};
use penstock_e2e::bed::{Bed, program};
use penstock_e2e::commands::assert_no_crash;
use penstock_e2e::second_link::SecondLink;
use penstock_e2e::{Case, cases, eventually};
use penstock_testbed::netns::handle_path;
use serde_json::Value;

use crate::bench::{assert_quiet, deferred, publish, says, xdp};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        interfaces_that_cannot_serve_are_refused_and_carriers_reported,
        the_namespaces_own_interface_is_used_whatever_sys_shows,
        an_alternative_name_and_a_new_name,
        bridges_ports_and_interfaces_without_ethernet,
        an_mtu_above_what_buffers_take,
    ]
}

fn interfaces_that_cannot_serve_are_refused_and_carriers_reported(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    bed.broker_ip(&["link", "set", "eth1", "down"])?;
    bed.broker(&xdp(&[]))
        .refuses("eth1 is down; ip link set dev eth1 up");
    let missing = ["--mode", "xdp", "--iface", "eth9"];
    bed.broker(&missing).refuses("no interface eth9 here");
    bed.broker(&missing)
        .with(&["--configure-nic"])
        .refuses("no interface eth9 here");
    bed.broker(&["--mode", "xdp", "--iface", "lo", "--xdp-mode", "native"])
        .refuses("driver has no native XDP: use --xdp-mode generic");
    // The other end is off.
    bed.broker_ip(&["link", "set", "eth1", "up"])?;
    bed.publisher_ip(&["link", "set", "m0", "down"])?;
    let shown = || bed.broker_ip(&["-o", "link", "show", "dev", "eth1"]);
    eventually("no carrier", || {
        shown().is_ok_and(|link| link.contains("NO-CARRIER"))
    });
    let broker = bed.start_broker(&xdp(&[]))?;
    broker.assert_said("eth1: no carrier");
    bed.publisher_ip(&["link", "set", "m0", "up"])?;
    says(&broker, "eth1 is up");
    assert_quiet(&broker.log(), "eth1 has no carrier");
    publish(bed, "xdp", &[])?;
    broker.stop()?;
    Ok(())
}

/// The broker reads and changes its own namespace's interface, although /sys belongs to another one.
fn the_namespaces_own_interface_is_used_whatever_sys_shows(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    let namespace = handle_path(bed.broker_ns());
    let mut command = std::process::Command::new("nsenter");
    command
        .arg(format!("--net={}", namespace.display()))
        .arg(program("broker"));
    command.args(xdp(&["--busy-poll", "64", "--create-topics", "any"]));
    command.arg("--buffer-dir").arg(bed.buffer_dir());
    let broker = bed.background("nsenter", &mut command)?;
    eventually("ready", || {
        broker.stdout().contains("penstock-broker ready")
    });
    assert_eq!(deferred(bed), "2 200000");
    publish(bed, "xdp", &[])?;
    broker.signal(libc::SIGTERM);
    let ended = broker.wait()?.success()?;
    assert_no_crash(&ended.said());
    assert_eq!(deferred(bed), "0 0");
    Ok(())
}

/// The broker reverts a change on the interface that it changed, even if that was renamed.
fn an_alternative_name_and_a_new_name(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    let name = "payload-network-of-rack-12";
    bed.broker_ip(&["link", "property", "add", "dev", "eth1", "altname", name])?;
    let broker = bed.start_broker(&["--mode", "xdp", "--iface", name, "--busy-poll", "64"])?;
    publish(bed, "xdp", &[])?;
    bed.broker_ip(&["link", "set", "eth1", "name", "uplink7"])?;
    says(&broker, "eth1 was renamed to uplink7");
    publish(bed, "xdp", &["--topic", "later"])?;
    broker.stop()?;
    let deferred = bed.broker_shell("cat /sys/class/net/uplink7/napi_defer_hard_irqs")?;
    assert_eq!(deferred, "0");
    Ok(())
}

/// Interfaces with ports run in generic mode; ports and interfaces without Ethernet are refused, by
/// doctor too.
fn bridges_ports_and_interfaces_without_ethernet(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    bed.broker_ip(&["addr", "flush", "dev", "eth1"])?;
    bed.broker_ip(&["link", "add", "br1", "type", "bridge"])?;
    bed.broker_ip(&["link", "set", "eth1", "master", "br1"])?;
    bed.broker_ip(&["addr", "add", "10.215.0.2/24", "dev", "br1"])?;
    bed.broker_ip(&["link", "set", "br1", "up"])?;
    bed.broker(&xdp(&[]))
        .refuses("eth1 is a port of br1.*use --iface br1");
    bed.broker(&["--mode", "xdp", "--iface", "br1", "--xdp-mode", "native"])
        .refuses("br1 runs the program in generic mode only");
    let doctor = |iface| bed.in_broker_ns(program("lab"), &["doctor", "--iface", iface]);
    bed.refuses("eth1 is a port of br1", &mut doctor("eth1"));
    let broker = bed.start_broker(&["--mode", "xdp", "--iface", "br1"])?;
    broker.assert_said("br1 runs the program in generic mode");
    publish(bed, "xdp", &[])?;
    broker.stop()?;
    bed.broker_shell(
        "test -c /dev/net/tun || { mkdir -p /dev/net; mknod /dev/net/tun c 10 200; }",
    )?;
    bed.broker_ip(&["tuntap", "add", "mode", "tun", "tun1"])?;
    bed.broker_ip(&["link", "set", "tun1", "up"])?;
    let without_ethernet = "tun1 carries no Ethernet frames";
    bed.broker(&["--mode", "xdp", "--iface", "tun1"])
        .refuses(without_ethernet);
    bed.refuses(without_ethernet, &mut doctor("tun1"));
    Ok(())
}

/// 18 frames of a page take every packet that the interface does.
fn an_mtu_above_what_buffers_take(bed: &Bed) -> Result<()> {
    bed.add_link(SecondLink {
        mtu: 60000,
        ..SecondLink::default()
    })?;
    for mode in ["native", "generic"] {
        let broker = bed.start_broker(&xdp(&["--xdp-mode", mode]))?;
        let report = publish(bed, "xdp", &[])?;
        let datagram = &report["brokers"][0]["streams"][0]["transport"]["datagram"];
        let datagram = Value::as_f64(datagram).context("the size of a datagram")?;
        assert!(
            datagram > 50_000.0,
            "datagrams of {datagram} bytes in mode {mode}"
        );
        broker.stop()?;
    }
    Ok(())
}
