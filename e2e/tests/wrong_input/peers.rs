//! Peers that break the protocol at a chosen point, alone and beside a well-behaved publisher: each is
//! counted, and nothing is lost or leaked.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::Result;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use penstock_e2e::attacker::{Attack, Attacker, hello, request};
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::broker::Stopped;
use penstock_e2e::{Broker, Case, cases, skip};
use penstock_wire::batch::Header;
use penstock_wire::handshake::{Path, Request};
use socket2::SockRef;
use zerocopy::IntoBytes;

const RING: [&str; 2] = ["--ring-size", "64MiB"];
/// More than the ring, so that space that leaked would be missed.
const AFTER: &str = "256MiB";
const MESSAGES: u64 = 256 * 1024;
/// Bytes of a batch that a peer claims.
const PAYLOAD: u32 = 1 << 20;
/// Connections that send nothing.
const IDLE: u64 = 10_000;
/// Descriptors of this process for everything else.
const OTHER_FILES: u64 = 256;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        a_message_larger_than_a_segment,
        half_a_hello,
        half_a_batch_header,
        a_close_in_mid_batch_leaks_no_space,
        claims_that_cannot_be,
        garbage_on_the_port,
        another_protocol_version,
        ten_thousand_connections_that_send_nothing,
    ]
}

/// A well-behaved publisher gets everything through.
fn publish_all(bed: &Bed) -> Result<()> {
    let report = bed.publish(&[
        "--brokers",
        BROKER,
        "--total-size",
        AFTER,
        "--message-size",
        "1KiB",
    ])?;
    assert_eq!(report["messages_acked"], MESSAGES);
    Ok(())
}

/// Stops the broker; its log must hold exactly this number of messages, with valid checksums.
fn stop_with(bed: &Bed, broker: Broker, messages: u64) -> Result<Stopped> {
    let stopped = broker.stop()?;
    let topics = stopped.report["topics"].as_array().expect("topics");
    let topic = topics
        .iter()
        .find(|topic| topic["topic"] == "penstock")
        .expect("the topic");
    assert_eq!(topic["messages"], messages);
    #[rustfmt::skip]
    let mut read = bed.subscriber(&[
        "--from", "start", "--verify", "--output", "none", "--stat", "--format", "json"]);
    bed.run("subscriber", read.arg("--path").arg(bed.log_of("penstock")))?
        .success()?;
    Ok(stopped)
}

/// The broker's report counts at least this number of these events together.
#[track_caller]
fn assert_counted(stopped: &Stopped, wanted: u64, counters: &[&str]) {
    let count = |counter: &&str| stopped.count(&format!("/counters/{counter}"));
    let sum: u64 = counters.iter().map(count).sum();
    assert!(
        sum >= wanted,
        "{sum} of {counters:?}: {}",
        stopped.report["counters"]
    );
}

/// Misbehaviour of this number of connections, alone and beside a publisher.
fn survives(bed: &Bed, count: u64, act: fn(u64) -> Result<()>, counters: &[&str]) -> Result<()> {
    let broker = bed.start_broker(&RING)?;
    let all = move || (0..count).try_for_each(act);
    Attack::run(bed, move |_| all())?;
    let attack = Attack::start(bed, move |_| all())?;
    publish_all(bed)?;
    attack.join()?;
    let stopped = stop_with(bed, broker, MESSAGES)?;
    assert_counted(&stopped, 2 * count, counters);
    Ok(())
}

fn a_message_larger_than_a_segment(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[&RING[..], &["--segment-size", "1MiB"]].concat())?;
    #[rustfmt::skip]
    let mut large = bed.publisher(&[
        "--brokers", BROKER, "--message-size", "8MiB", "--batch-size", "256KiB", "--total-size", "32MiB"]);
    bed.refuses("message|batch|larger|segment", &mut large);
    publish_all(bed)?;
    stop_with(bed, broker, MESSAGES)?;
    Ok(())
}

fn connect() -> Result<TcpStream> {
    Attacker::at_the_publishers_address().connect()
}

/// A stream that the broker has accepted.
fn open() -> Result<TcpStream> {
    let large = Request {
        max_payload: PAYLOAD,
        ..request(Path::Tcp)
    };
    Ok(Attacker::at_the_publishers_address().open(&large)?.0)
}

fn honest_hello() -> Vec<u8> {
    hello(&request(Path::Tcp), b"penstock")
}

/// The header of a batch, with a checksum that fits nothing.
fn header(len: u32, messages: u32) -> Vec<u8> {
    Header::for_batch(0, messages, len, 0xDEAD_BEEF)
        .as_bytes()
        .to_vec()
}

/// Closes with FIN, or with RST.
fn close(connection: TcpStream, number: u64) -> Result<()> {
    if number % 2 == 1 {
        SockRef::from(&connection).set_linger(Some(std::time::Duration::ZERO))?;
    }
    drop(connection);
    Ok(())
}

/// Waits until the broker closes; a broker that keeps such a connection is at fault.
fn drain(mut connection: TcpStream) -> Result<()> {
    connection.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
    let mut buffer = [0; 65_536];
    loop {
        match connection.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn half_a_hello(bed: &Bed) -> Result<()> {
    let act = |number| {
        let length = 1 + usize::try_from(number % 47)?;
        Ok(connect()?.write_all(&honest_hello()[..length])?)
    };
    survives(bed, 100, act, &["handshake_closed"])
}

fn half_a_batch_header(bed: &Bed) -> Result<()> {
    let act = |number| {
        let length = 1 + usize::try_from(number % 23)?;
        let mut connection = open()?;
        connection.write_all(&header(PAYLOAD, 1)[..length])?;
        close(connection, number)
    };
    survives(bed, 100, act, &["streams_cut"])
}

/// Peers claim 1 MiB, send part of it, and go away.
fn a_close_in_mid_batch_leaks_no_space(bed: &Bed) -> Result<()> {
    let act = |number| {
        let part = usize::try_from(number * 4099 % u64::from(PAYLOAD))?;
        let mut connection = open()?;
        connection.write_all(&header(PAYLOAD, 1))?;
        connection.write_all(&vec![b'x'; part])?;
        close(connection, number)
    };
    survives(bed, 200, act, &["streams_cut"])
}

/// A batch of almost 4 GiB, or with more messages than bytes.
fn claims_that_cannot_be(bed: &Bed) -> Result<()> {
    let act = |number| {
        let mut connection = open()?;
        let claim = if number % 2 == 1 {
            header(0xFFFF_FFF0, 1)
        } else {
            header(8, 1 << 31)
        };
        connection.write_all(&claim)?;
        drain(connection)
    };
    survives(bed, 20, act, &["protocol_errors"])
}

fn garbage_on_the_port(bed: &Bed) -> Result<()> {
    let act = |number| {
        let mut garbage = vec![0; 1 + usize::try_from(number * 997 % 100_000)?];
        fastrand::Rng::with_seed(number).fill(&mut garbage);
        let mut connection = connect()?;
        // The broker may have closed by now.
        let _ = connection.write_all(&garbage);
        drain(connection)
    };
    survives(bed, 100, act, &["garbage", "handshake_closed"])
}

fn another_protocol_version(bed: &Bed) -> Result<()> {
    let act = |number| {
        let mut hello = honest_hello();
        hello[4..6].copy_from_slice(&u16::try_from(2 + number)?.to_le_bytes());
        let mut connection = connect()?;
        connection.write_all(&hello)?;
        drain(connection)
    };
    survives(bed, 20, act, &["streams_refused"])
}

fn ten_thousand_connections_that_send_nothing(bed: &Bed) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let count = IDLE.min(hard.saturating_sub(OTHER_FILES));
    let broker = bed.start_broker(&RING)?;
    let attack = Attack::start_and_wait(bed, move |conduct| {
        let connections = (0..count).map(|_| connect());
        let connections = connections.collect::<Result<Vec<_>>>()?;
        conduct.ready();
        while !conduct.is_over() {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(connections.len() as u64)
    })?;
    publish_all(bed)?;
    assert_eq!(attack.end()?, count, "connections open");
    publish_all(bed)?;
    let stopped = stop_with(bed, broker, 2 * MESSAGES)?;
    let ends = [
        "handshake_timeouts",
        "handshake_evictions",
        "handshake_closed",
    ];
    assert_counted(&stopped, count, &ends);
    if count < IDLE {
        let reason =
            format!("passed with {count} connections: the limit of {hard} files forbids {IDLE}");
        return Err(skip(&reason));
    }
    Ok(())
}
