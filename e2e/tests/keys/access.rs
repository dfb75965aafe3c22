//! Who gets in, and whose packets count.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::thread;

use anyhow::{Result, anyhow};
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::lab::{assert_verified, brokers};
use penstock_e2e::{Case, cases};
use penstock_testbed::netns;

use crate::bench::{Keys, XDP, counter, make_key};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        the_right_key_gets_in_over_tcp,
        the_right_key_gets_in_over_xdp,
        the_broker_requires_authenticated_packets,
        frames_over_tcp_are_authenticated,
        frames_are_authenticated_when_falling_back,
        the_publisher_requires_authenticated_packets,
        authenticated_packets_past_the_publishers_kernel,
        authenticated_packets_over_a_bad_link,
        keys_with_a_fallback_to_tcp,
        a_broker_without_keys_says_so,
        strangers_are_counted_and_disturb_nobody,
    ]
}

/// Others are refused, with the reason that they may know.
fn keys_in_force(bed: &Bed, mode: &str, broker: &[&str]) -> Result<()> {
    let keys = Keys::make(bed)?;
    let broker = bed.start_broker(&[&["--auth-keys", &keys.file], broker].concat())?;
    keys.gets_through(mode, &["--mode", mode])?;
    keys.refuses("with a key only: use --auth-key", &["--mode", mode]);
    let us = ["--mode", mode, "--auth-key", &keys.us];
    keys.refuses("key us may not publish to topic \"penstock\"", &us);
    let other = make_key(bed, "other")?;
    let said = keys.refuses(
        "does not accept the key",
        &["--mode", mode, "--auth-key", &other],
    );
    // Its own path has no such word in it.
    let told = said
        .replace(&other, "")
        .replace(&bed.folder().display().to_string(), "");
    assert!(
        !told.contains("eu"),
        "a stranger learns of another key: {said}"
    );
    keys.publishes(&[&us[..], &["--topic", "audit"]].concat())?;
    let stopped = broker.stop()?;
    keys.assert_same_lines();
    assert_eq!(counter(&stopped, "unauthenticated"), 2);
    assert_eq!(counter(&stopped, "not_permitted"), 1);
    assert!(
        !stopped.log.contains("everybody"),
        "a broker with keys says that it has none"
    );
    assert!(
        !stopped.log.contains("anyone who can reach"),
        "a broker with keys says that it has none"
    );
    Ok(())
}

fn the_right_key_gets_in_over_tcp(bed: &Bed) -> Result<()> {
    keys_in_force(bed, "tcp", &[])
}

fn the_right_key_gets_in_over_xdp(bed: &Bed) -> Result<()> {
    keys_in_force(bed, "xdp", &XDP)
}

/// Every packet with a tag.
fn the_broker_requires_authenticated_packets(bed: &Bed) -> Result<()> {
    keys_in_force(bed, "xdp", &[&XDP[..], &["--packet-auth"]].concat())
}

/// Over tcp each frame carries a tag; a publisher that does not ask for tags does what the broker
/// requires.
fn frames_over_tcp_are_authenticated(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    let broker = bed.start_broker(&["--auth-keys", &keys.file, "--packet-auth"])?;
    keys.gets_through("tcp", &[])?;
    broker.stop()?;
    keys.assert_same_lines();
    fs::remove_dir_all(bed.buffer_dir())?;
    let broker = bed.start_broker(&["--auth-keys", &keys.file])?;
    keys.gets_through("tcp", &["--packet-auth", "--threads-per-broker", "2"])?;
    broker.stop()?;
    Ok(())
}

/// Also when no datagram gets through.
fn frames_are_authenticated_when_falling_back(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    #[rustfmt::skip]
    let broker = bed.start_broker(&[
        "--auth-keys", &keys.file, "--mode", "xdp", "--iface", "lo", "--listen", "0.0.0.0:1214",
        "--packet-auth"])?;
    keys.gets_through("tcp", &["--mode", "auto", "--packet-auth"])?;
    assert_eq!(counter(&broker.stop()?, "forged"), 0);
    Ok(())
}

fn the_publisher_requires_authenticated_packets(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    let broker = bed.start_broker(&[&["--auth-keys", &keys.file], &XDP[..]].concat())?;
    keys.gets_through(
        "xdp",
        &[
            "--mode",
            "xdp",
            "--packet-auth",
            "--threads-per-broker",
            "1",
        ],
    )?;
    broker.stop()?;
    keys.assert_same_lines();
    Ok(())
}

fn authenticated_packets_past_the_publishers_kernel(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    let options = ["--auth-keys", &keys.file, "--packet-auth"];
    let broker = bed.start_broker(&[&options, &XDP[..]].concat())?;
    keys.gets_through("xdp", &["--mode", "xdp", "--tx", "af_xdp"])?;
    broker.stop()?;
    keys.assert_same_lines();
    Ok(())
}

/// Each message arrives once, and damaged ones are noticed.
fn authenticated_packets_over_a_bad_link(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    let broker = format!("--broker-option=--auth-keys={}", keys.file);
    let publisher = format!("--publisher-option=--auth-key={}", keys.eu);
    #[rustfmt::skip]
    let report = bed.lab_throughput(&[
        "--mode", "xdp", "--brokers", "1", "--total-size", "64MiB",
        "--faults", "loss=1%,reorder=1%,corrupt=0.5%,duplicate=1%",
        &broker, "--broker-option=--packet-auth", &publisher])?;
    assert_eq!(report["messages_in_logs"], 65_536);
    assert_verified(&report, 1);
    let corrupt = brokers(&report)[0]["xdp"]["corrupt"].as_u64();
    assert!(corrupt > Some(0), "no damaged packet was noticed");
    Ok(())
}

/// The packets come in on another interface than the broker looks at.
fn keys_with_a_fallback_to_tcp(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    #[rustfmt::skip]
    let broker = bed.start_broker(&[
        "--auth-keys", &keys.file, "--mode", "xdp", "--iface", "lo", "--listen", "0.0.0.0:1214"])?;
    let said = keys.gets_through("tcp", &["--mode", "auto"])?;
    assert!(
        said.contains("payload goes over tcp"),
        "the log does not say why: {said}"
    );
    broker.stop()?;
    keys.assert_same_lines();
    Ok(())
}

/// At the start, and to a publisher that has one.
fn a_broker_without_keys_says_so(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    let warning = "anyone who can reach this address may publish; use --auth-keys";
    let broker = bed.start_broker(&[])?;
    broker.assert_said(warning);
    keys.refuses("started without keys", &["--auth-key", &keys.eu]);
    keys.publishes(&[])?;
    assert_eq!(counter(&broker.stop()?, "unauthenticated"), 1);
    let broker = bed.start_broker(&["--listen", "127.0.0.1:1214"])?;
    assert!(
        !broker.has_said(warning),
        "a warning about a loopback address"
    );
    broker.stop()?;
    Ok(())
}

/// Each is counted, and a publisher is served nevertheless.
fn strangers_are_counted_and_disturb_nobody(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    let broker = bed.start_broker(&["--auth-keys", &keys.file])?;
    let namespace = bed.publisher_ns().to_owned();
    let strangers = thread::spawn(move || -> Result<()> {
        netns::enter(&namespace)?;
        for _ in 0..300 {
            let mut connection = TcpStream::connect(BROKER)?;
            connection.write_all(b"PNSN\x01\0\0\0")?;
            connection.write_all(&[b'0'; 64])?;
            // Until the broker closes.
            let _ = connection.read_to_end(&mut Vec::new());
        }
        Ok(())
    });
    strangers
        .join()
        .map_err(|_| anyhow!("a stranger panicked"))??;
    keys.gets_through("tcp", &[])?;
    assert_eq!(counter(&broker.stop()?, "unauthenticated"), 300);
    keys.assert_same_lines();
    Ok(())
}

/// Lets others read a file.
pub fn expose(path: &str) -> Result<()> {
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o640),
    )?)
}
