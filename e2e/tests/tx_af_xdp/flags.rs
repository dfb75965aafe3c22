//! Queues, interfaces and privileges of the publisher.

use std::process::Command;

use anyhow::Result;
use penstock_e2e::bed::{BROKER, Bed, program};
use penstock_e2e::commands::command;
use penstock_e2e::{Case, cases, skip};

use crate::{TX, XDP, assert_sent_over, ways};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        a_transmit_queue_for_each_stream,
        a_queue_that_does_not_send,
        wrong_flags,
        a_queue_that_another_socket_has,
        net_raw_is_what_it_needs_and_all,
    ]
}

/// A publisher of 8 MiB to the broker.
fn publisher(bed: &Bed, starter: &[&str], arguments: &[&str]) -> Command {
    let mut command = match starter.split_first() {
        None => bed.publisher(&[]),
        Some((first, others)) => {
            let mut command = bed.in_publisher_ns(first, others);
            command.arg(program("publisher"));
            command
        }
    };
    command
        .args([
            "--brokers",
            BROKER,
            "--total-size",
            "8MiB",
            "--format",
            "json",
        ])
        .args(arguments);
    command
}

/// `--mode xdp --tx af_xdp` and further options.
fn tx<'a>(further: &[&'a str]) -> Vec<&'a str> {
    [&TX[..], further].concat()
}

/// `--mode auto --tx af_xdp` and further options.
fn auto<'a>(further: &[&'a str]) -> Vec<&'a str> {
    [&["--mode", "auto", "--tx", "af_xdp"], further].concat()
}

fn set_queues(bed: &Bed, namespace: &str, device: &str, receive: &str, send: &str) -> Result<()> {
    #[rustfmt::skip]
    let mut ethtool = command("ip", &[
        "netns", "exec", namespace, "ethtool", "-L", device, "rx", receive, "tx", send]);
    if !bed.run("ethtool", &mut ethtool)?.status.success() {
        return Err(skip("veth has no second queue here"));
    }
    Ok(())
}

/// The queue of a veth that packets come to is the one that they left through: through the UDP socket,
/// another; so one worker serves both.
fn a_transmit_queue_for_each_stream(bed: &Bed) -> Result<()> {
    set_queues(bed, bed.broker_ns(), "eth0", "2", "2")?;
    set_queues(bed, bed.publisher_ns(), "b0", "2", "2")?;
    let broker = bed.start_broker(&[&XDP[..], &["--workers", "1"]].concat())?;
    let two = ["--threads-per-broker", "2"];
    let mut both = publisher(bed, &[], &tx(&[&two[..], &["--tx-queue", "0-1"]].concat()));
    assert_sent_over(
        &bed.run("publisher", &mut both)?.success()?.json()?,
        "af_xdp",
        8192,
    );
    let one_for_two = r"transmit queues \[0\] of b0, and each needs one";
    bed.refuses(one_for_two, &mut publisher(bed, &[], &tx(&two)));
    let ended = bed
        .run("publisher", &mut publisher(bed, &[], &auto(&two)))?
        .success()?;
    assert_eq!(ways(&ended.json()?), ["xdp af_xdp", "xdp udp"]);
    penstock_e2e::commands::assert_says(&ended.stderr, "UDP socket: .*each needs one");
    broker.stop()?;
    Ok(())
}

/// A queue can be bound to that receives only; the kernel takes no packets from it, and says nothing.
fn a_queue_that_does_not_send(bed: &Bed) -> Result<()> {
    set_queues(bed, bed.publisher_ns(), "b0", "2", "1")?;
    let broker = bed.start_broker(&XDP)?;
    let second = ["--tx-queue", "1"];
    bed.refuses(
        "queue 1 of b0 are not answered",
        &mut publisher(bed, &[], &tx(&second)),
    );
    let ended = bed
        .run("publisher", &mut publisher(bed, &[], &auto(&second)))?
        .success()?;
    assert_sent_over(&ended.json()?, "udp", 8192);
    broker.stop()?;
    Ok(())
}

fn wrong_flags(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&XDP)?;
    let refuses = |regex: &str, arguments: &[&str]| {
        bed.refuses(regex, &mut publisher(bed, &[], arguments));
    };
    refuses("no interface \"nosuch0\"", &tx(&["--tx-iface", "nosuch0"]));
    refuses(
        "goes through b0, not through lo",
        &tx(&["--tx-iface", "lo"]),
    );
    refuses("b0 queue 9: .*no such queue", &tx(&["--tx-queue", "9"]));
    refuses("needs --mode xdp or auto", &["--tx", "af_xdp"]);
    #[rustfmt::skip]
    let local = tx(&["--brokers", "127.0.0.1:1214", "--total-size", "1MiB"]);
    let mut local = bed.in_broker_ns(program("publisher"), &local);
    bed.refuses("lo, which is not an Ethernet", &mut local);
    broker.stop()?;
    Ok(())
}

fn a_queue_that_another_socket_has(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&XDP)?;
    #[rustfmt::skip]
    let first = bed.start_numbered(&tx(&["--brokers", BROKER, "--rate", "100KB"]))?;
    bed.until_messages("penstock", 1);
    let mut second = publisher(bed, &[], &TX);
    bed.refuses("another AF_XDP socket has the queue", &mut second);
    first.publisher().signal(libc::SIGINT);
    first.ends()?;
    let ended = bed
        .run("publisher", &mut publisher(bed, &[], &TX))?
        .success()?;
    assert_sent_over(&ended.json()?, "af_xdp", 8192);
    broker.stop()?;
    Ok(())
}

/// Without it, `--mode auto` uses UDP.
fn net_raw_is_what_it_needs_and_all(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&XDP)?;
    let without = ["setpriv", "--bounding-set", "-net_raw"];
    bed.refuses("needs CAP_NET_RAW", &mut publisher(bed, &without, &TX));
    let ended = bed
        .run("publisher", &mut publisher(bed, &without, &auto(&[])))?
        .success()?;
    assert_sent_over(&ended.json()?, "udp", 8192);
    let why = "through the UDP socket: .*CAP_NET_RAW";
    penstock_e2e::commands::assert_says(&ended.stderr, why);
    // That is all, with the usual limit of locked memory.
    let only = |limit| {
        [
            "prlimit",
            limit,
            "setpriv",
            "--bounding-set",
            "-all,+net_raw",
        ]
    };
    let usual = only("--memlock=8388608:8388608");
    let ended = bed
        .run("publisher", &mut publisher(bed, &usual, &TX))?
        .success()?;
    assert_sent_over(&ended.json()?, "af_xdp", 8192);
    let small = only("--memlock=65536:65536");
    bed.refuses("limit of locked memory", &mut publisher(bed, &small, &TX));
    broker.stop()?;
    Ok(())
}
