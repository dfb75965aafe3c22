//! Handshakes that are refused, left unfinished, or whose stream is not used.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::{Case, cases};
use penstock_wire::handshake::{Path, Request};

use crate::honest::{assert_grew_little, memory, publish, start_broker, stop_in_order};
use penstock_e2e::attacker::{Attack, Attacker, add_addresses, closes, hello, refusal, request};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        refused_handshakes_are_counted_and_logged_at_a_limited_rate,
        half_and_slow_handshakes_are_bounded_and_given_up,
        unused_streams_are_bounded_and_given_up,
    ]
}

/// More refusals than lines may be written about; those that come later are only counted.
fn refused_handshakes_are_counted_and_logged_at_a_limited_rate(bed: &Bed) -> Result<()> {
    add_addresses(bed)?;
    let broker = start_broker(bed, &[])?;
    let alone = publish(bed, "xdp")?;
    let before = memory(&broker, "VmRSS");
    let refused = Attack::run(bed, |_| {
        let mut refused = 0;
        for session in 1..=5000 {
            // There is no such session.
            let unknown = Request {
                session,
                ..request(Path::Tcp)
            };
            let mut connection = Attacker::new().connect()?;
            connection.write_all(&hello(&unknown, b"penstock"))?;
            refused += usize::from(refusal(&mut connection)? == Some(4));
        }
        Ok(refused)
    })?;
    assert_eq!(refused, 5000);
    let later = publish(bed, "xdp")?;
    assert_grew_little(&broker, before);
    let stopped = stop_in_order(bed, broker, &[&alone, &later])?;
    assert_eq!(stopped.count("/counters/streams_refused"), 5000);
    let lines = stopped
        .log
        .lines()
        .filter(|line| line.contains("stream refused"))
        .count();
    assert!(
        lines < 4000,
        "{lines} lines were written about 5000 refusals"
    );
    Ok(())
}

fn half_and_slow_handshakes_are_bounded_and_given_up(bed: &Bed) -> Result<()> {
    add_addresses(bed)?;
    let broker = start_broker(bed, &["--max-handshakes", "64", "--handshake-timeout", "1"])?;
    let alone = publish(bed, "xdp")?;
    let before = memory(&broker, "VmRSS");
    let attack = Attack::start(bed, |_| unanswered(500))?;
    let disturbed = publish(bed, "xdp")?;
    assert_eq!(attack.join()?, 500, "closed");
    assert_eq!(Attack::run(bed, |_| slow(50))?, 50, "slow ones closed");
    assert_grew_little(&broker, before);
    let stopped = stop_in_order(bed, broker, &[&alone, &disturbed])?;
    let counters = &stopped.report["counters"];
    assert!(
        stopped.count("/counters/handshake_evictions") >= 300,
        "{counters}"
    );
    assert!(
        stopped.count("/counters/handshake_timeouts") >= 50,
        "{counters}"
    );
    Ok(())
}

/// Half hellos, all open at once, until the broker closes them. Returns how many it closed.
fn unanswered(count: usize) -> Result<usize> {
    let attacker = Attacker::new();
    let connections = (0..count).map(|_| attacker.connect());
    let mut connections = connections.collect::<Result<Vec<_>>>()?;
    let hello = hello(&request(Path::Tcp), b"penstock");
    for (number, connection) in connections.iter_mut().enumerate() {
        // The broker may have had to make room.
        let _ = connection.write_all(&hello[..number % 48]);
    }
    Ok(connections
        .iter_mut()
        .filter_map(|connection| closes(connection).then_some(()))
        .count())
}

/// Hellos byte by byte: each byte within a timeout that starts anew with each, none within one that does
/// not. Returns how many the broker closed.
fn slow(count: usize) -> Result<usize> {
    let attacker = Attacker::new();
    let connections = (0..count).map(|_| attacker.connect());
    let mut open = connections.collect::<Result<Vec<TcpStream>>>()?;
    for byte in hello(&request(Path::Tcp), b"penstock") {
        open.retain_mut(|connection| connection.write_all(&[byte]).is_ok());
        thread::sleep(Duration::from_millis(100));
    }
    open.retain_mut(|connection| !closes(connection));
    Ok(count - open.len())
}

/// Streams that no publisher uses: a host has its share of them, and its oldest give way to the next
/// ones. Meanwhile another host publishes.
fn unused_streams_are_bounded_and_given_up(bed: &Bed) -> Result<()> {
    add_addresses(bed)?;
    let broker = start_broker(bed, &["--max-connections", "100"])?;
    let alone = publish(bed, "xdp")?;
    let before = memory(&broker, "VmRSS");
    let attack = Attack::start_and_wait(bed, |conduct| {
        let attacker = Attacker::new();
        let connections = (0..150).map(|_| attacker.connect());
        let mut connections = connections.collect::<Result<Vec<_>>>()?;
        let hello = hello(&request(Path::Xdp), b"penstock");
        for connection in &mut connections {
            connection.write_all(&hello)?;
        }
        let mut opened = Vec::new();
        for mut connection in connections {
            if refusal(&mut connection)? == Some(0) {
                opened.push(connection);
            }
        }
        conduct.ready();
        let count = opened.len();
        let mut closed = 0;
        for mut connection in opened {
            // The broker gives them up after 10 s.
            connection.set_read_timeout(Some(Duration::from_secs(20)))?;
            closed += usize::from(closes(&mut connection));
        }
        Ok((count, closed))
    })?;
    let disturbed = publish(bed, "xdp")?;
    let (opened, closed) = attack.join()?;
    assert!(opened >= 50, "opened: {opened}");
    assert_eq!(closed, opened, "closed");
    assert_grew_little(&broker, before);
    let stopped = stop_in_order(bed, broker, &[&alone, &disturbed])?;
    let counters = &stopped.report["counters"];
    assert!(
        stopped.count("/counters/stream_evictions") >= 1,
        "{counters}"
    );
    Ok(())
}
