//! Packets of one size over and over, as many with one call as it takes.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use penstock_e2e::bed::Bed;
use penstock_e2e::broker::Stopped;
use penstock_e2e::{Case, cases, say};
use penstock_wire::packet::DATA_MAGIC;
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use crate::honest::{assert_grew_little, memory, publish, start_broker, stop_in_order};
use penstock_e2e::attacker::{Attack, Attacker, Conduct, Part, add_addresses, packet};

/// A flood lasts so long at least, and no longer than that.
const AT_LEAST: Duration = Duration::from_secs(8);
const AT_MOST: Duration = Duration::from_secs(120);
/// Most segments of one call, and most bytes.
const SEGMENTS: usize = 64;
const LARGEST_BURST: usize = 65_000;
/// Where the checksum of a packet begins, and what it covers.
const CHECKSUM: usize = 4;
const COVERED: usize = 8;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        packets_of_unknown_streams,
        the_same_packets_to_a_closed_port,
        damaged_packets,
        repeated_packets,
    ]
}

/// What was sent.
#[derive(Debug, Clone, Copy)]
struct Sent {
    packets: u64,
    duration: Duration,
    size: usize,
}

/// The XDP program drops them: no worker sees one. What was sent again for the honest stream may pass the
/// program before its stream ends, and reach the worker after it.
fn packets_of_unknown_streams(bed: &Bed) -> Result<()> {
    let counted = ["/xdp/outcomes/unknown_stream"];
    let stopped = beneath(bed, Attacker::new(), |_| Ok(guessed()), &counted)?;
    let seen = stopped.count("/xdp/unknown_stream");
    assert!(seen <= 100, "seen by workers: {seen}");
    Ok(())
}

/// For comparison: the same packets to a port that nobody serves.
fn the_same_packets_to_a_closed_port(bed: &Bed) -> Result<()> {
    let counted = ["/xdp/outcomes/other_port"];
    beneath(bed, Attacker::to_port(1300), |_| Ok(guessed()), &counted)?;
    Ok(())
}

/// These have the key of an honest stream, so a worker must look at them; when it has ended, no more.
fn damaged_packets(bed: &Bed) -> Result<()> {
    let counted = ["/xdp/corrupt", "/xdp/outcomes/unknown_stream"];
    let stopped = beneath(bed, Attacker::new(), damaged, &counted)?;
    let seen = stopped.count("/xdp/corrupt");
    assert!(seen >= 1000, "seen by workers: {seen}");
    Ok(())
}

fn repeated_packets(bed: &Bed) -> Result<()> {
    let counted = ["/xdp/duplicates", "/xdp/outcomes/unknown_stream"];
    let stopped = beneath(bed, Attacker::new(), overheard, &counted)?;
    let seen = stopped.count("/xdp/duplicates");
    assert!(seen >= 1000, "seen by workers: {seen}");
    Ok(())
}

/// An honest publisher alone, then beneath a flood whose packets these counters count.
fn beneath(
    bed: &Bed,
    attacker: Attacker,
    packets: impl FnOnce(&Conduct) -> Result<Vec<Vec<u8>>> + Send + 'static,
    counted: &[&str],
) -> Result<Stopped> {
    add_addresses(bed)?;
    let broker = start_broker(bed, &[])?;
    let alone = publish(bed, "xdp")?;
    let before = memory(&broker, "VmRSS");
    let flood = Attack::start_and_wait(bed, move |conduct| {
        let packets = packets(conduct)?;
        flood(attacker, &packets, conduct)
    })?;
    let disturbed = publish(bed, "xdp")?;
    let sent = flood.end()?;
    assert_grew_little(&broker, before);
    let stopped = stop_in_order(bed, broker, &[&alone, &disturbed])?;
    // What the receive queue had no room for is dropped; of the rest each is counted.
    let came: u64 = counted.iter().map(|counter| stopped.count(counter)).sum();
    assert!(
        came >= sent.packets / 20,
        "counted {came} of {sent:?}: {}",
        stopped.report["xdp"]
    );
    let speed = |report: &Value| report["bandwidth_mb_per_s"].as_f64().unwrap_or_default();
    say(&format!(
        "{}: alone {:.0} MB/s, beneath {:.0} MB/s; {:.0} packets/s of {} bytes were sent, {} % came through",
        bed.test(),
        speed(&alone),
        speed(&disturbed),
        sent.packets as f64 / sent.duration.as_secs_f64(),
        sent.size,
        came * 100 / sent.packets.max(1),
    ));
    Ok(stopped)
}

fn flood(attacker: Attacker, packets: &[Vec<u8>], conduct: &Conduct) -> Result<Sent> {
    let size = packets[0].len();
    assert!(packets.iter().all(|packet| packet.len() == size));
    let step = SEGMENTS.min(LARGEST_BURST / size);
    let bursts: Vec<Vec<u8>> = packets.chunks(step).map(<[_]>::concat).collect();
    let socket = attacker.datagrams()?;
    let segment = i32::try_from(size).context("the size of a packet")?;
    setsockopt(&socket, UdpGsoSegment, &segment)?;
    conduct.ready();
    let (start, mut sent) = (Instant::now(), 0);
    let goes_on = || match start.elapsed() {
        elapsed if conduct.is_over() => elapsed < AT_LEAST,
        elapsed => elapsed < AT_MOST,
    };
    while goes_on() {
        for burst in &bursts {
            sent += send(&socket, burst)? / size as u64;
        }
    }
    Ok(Sent {
        packets: sent,
        duration: start.elapsed(),
        size,
    })
}

/// Bytes that were sent; none if the queue is full or the last answer was that nobody listens.
fn send(socket: &UdpSocket, burst: &[u8]) -> io::Result<u64> {
    match socket.send(burst) {
        Ok(sent) => Ok(sent as u64),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionRefused => Ok(0),
            _ => Err(error),
        },
    }
}

/// Good packets of streams that it can only guess.
fn guessed() -> Vec<Vec<u8>> {
    let mut rng = fastrand::Rng::with_seed(1);
    let packets = 0..20 * SEGMENTS as u64;
    packets
        .map(|number| packet(rng.u64(..), number, Part::of(number, 1 << 16), &[0; 64]))
        .collect()
}

/// What was seen of an honest publisher, with a checksum that fits nothing.
fn damaged(conduct: &Conduct) -> Result<Vec<Vec<u8>>> {
    let mut rng = fastrand::Rng::with_seed(2);
    let mut packets = overheard(conduct)?;
    for packet in &mut packets {
        rng.fill(&mut packet[CHECKSUM..COVERED]);
    }
    Ok(packets)
}

/// Packets of an honest publisher, all of one size; it is ready when it listens.
fn overheard(conduct: &Conduct) -> Result<Vec<Vec<u8>>> {
    let all = i32::from(u16::try_from(libc::ETH_P_ALL)?.to_be());
    let mut tap = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(all)))?;
    tap.set_read_timeout(Some(Duration::from_secs(10)))?;
    conduct.ready();
    let mut seen: HashMap<usize, Vec<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; 65_536];
    loop {
        let read = tap.read(&mut buffer).context("nothing is sent")?;
        let Some(payload) =
            udp_payload(&buffer[..read]).filter(|load| load.starts_with(&DATA_MAGIC))
        else {
            continue;
        };
        let packets = seen.entry(payload.len()).or_default();
        packets.push(payload.to_vec());
        if packets.len() == 4 * SEGMENTS {
            return Ok(std::mem::take(packets));
        }
    }
}

/// What a UDP datagram carries, of an IPv4 packet.
pub fn udp_payload(ip: &[u8]) -> Option<&[u8]> {
    let first = *ip.first()?;
    if first >> 4 != 4 || i32::from(*ip.get(9)?) != libc::IPPROTO_UDP {
        return None;
    }
    let datagram = ip.get(usize::from(first & 15) * 4..)?;
    let length = u16::from_be_bytes([*datagram.get(4)?, *datagram.get(5)?]);
    datagram.get(8..usize::from(length))
}
