//! Peers that claim what cannot be, or more than their share, or to be somebody else.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recvfrom,
    sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use penstock_e2e::bed::Bed;
use penstock_e2e::{Case, cases, say};
use penstock_wire::batch::Header;
use penstock_wire::handshake::{Path, Request};
use penstock_wire::packet::ACK_MAGIC;
use zerocopy::IntoBytes;

use crate::flood::udp_payload;
use crate::honest::{assert_grew_little, memory, publish, start_broker, stop_in_order};
use penstock_e2e::attacker::{
    Attack, Attacker, Conduct, HOSTS, Part, add_addresses, hello, host, packet, ping, refusal,
    request,
};

/// How often a pair of packets is sent before its ACK must have come.
const ATTEMPTS: usize = 5;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        impossible_claims_are_refused,
        memory_for_claims_of_many_hosts_is_bounded,
        no_host_gets_acks_for_packets_with_its_forged_address,
    ]
}

fn impossible_claims_are_refused(bed: &Bed) -> Result<()> {
    add_addresses(bed)?;
    let broker = start_broker(bed, &[])?;
    let alone = publish(bed, "xdp")?;
    let before = memory(&broker, "VmRSS");
    let codes = Attack::run(bed, |_| refused_hellos())?;
    let wanted = [
        ("another folder", 3),
        ("batches", 4),
        ("no streams", 2),
        ("stream", 2),
        ("streams", 2),
        ("topic", 3),
    ];
    let wanted = wanted.map(|(what, code)| (what, Some(code)));
    assert_eq!(codes, BTreeMap::from(wanted));
    Attack::run(bed, |_| refused_packets(500))?;
    let later = publish(bed, "xdp")?;
    assert_grew_little(&broker, before);
    let stopped = stop_in_order(bed, broker, &[&alone, &later])?;
    // Three kinds break a limit of the stream, three contradict themselves; a few are within the credit.
    let xdp = &stopped.report["xdp"];
    assert!(stopped.count("/xdp/refused") >= 1000, "{xdp}");
    assert!(stopped.count("/xdp/corrupt") >= 1000, "{xdp}");
    Ok(())
}

/// Hellos that claim what cannot be, and the code of each refusal.
fn refused_hellos() -> Result<BTreeMap<&'static str, Option<u16>>> {
    let honest = request(Path::Tcp);
    let of = |streams, stream| {
        hello(
            &Request {
                streams,
                stream,
                ..honest.clone()
            },
            b"penstock",
        )
    };
    let resumed = Request {
        session: 7,
        resume_from: Some(u64::MAX - 1),
        ..honest.clone()
    };
    let mut long = hello(&honest, b"penstock");
    // The length of the topic.
    long[6..8].copy_from_slice(&u16::MAX.to_le_bytes());
    let wrong = [
        ("no streams", of(0, 0)),
        ("streams", of(1025, 0)),
        ("stream", of(u32::MAX, u32::MAX)),
        ("batches", hello(&resumed, b"penstock")),
        ("topic", long),
        ("another folder", hello(&honest, b"../../etc/passwd")),
    ];
    let mut codes = BTreeMap::new();
    for (what, hello) in wrong {
        let mut connection = Attacker::new().connect()?;
        connection.write_all(&hello)?;
        codes.insert(what, refusal(&mut connection)?);
    }
    Ok(codes)
}

/// Packets of its own stream that claim what cannot be.
fn refused_packets(count: u64) -> Result<()> {
    let attacker = Attacker::new();
    let large = Request {
        max_payload: u32::MAX,
        ..request(Path::Xdp)
    };
    let (_connection, offer) = attacker.open(&large)?;
    let key = offer.datagrams.context("a stream over xdp")?.key;
    let datagrams = attacker.datagrams()?;
    let part = [0; 100];
    for round in 0..count {
        let number = 8 * round;
        let packets = [
            // Almost 4 GiB; far beyond the first; as many messages as bytes; bytes outside of the batch.
            packet(key, number, Part::of(0, 0xFFFF_FFF0).at(0xFFFF_FF00), &part),
            packet(key, number + 1, Part::of(1 << 61, 200), &part),
            packet(
                key,
                number + 2,
                Part {
                    messages: u32::MAX,
                    ..Part::of(2, 200)
                },
                &part,
            ),
            packet(key, number + 3, Part::of(3, 50), &part),
            // A batch for each packet, the largest there is: more and more room, if credit were not kept to.
            packet(key, number + 4, Part::of(4 + round, 1 << 20), &part),
            packet(key, (1 << 62) + round, Part::of(4, 200), &part),
        ];
        for each in packets {
            datagrams.send(&each)?;
        }
        thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// Twelve hosts claim and send as much as the broker accepts, over both paths at once: they reach the
/// bound in docs/operations.md, and it holds.
fn memory_for_claims_of_many_hosts_is_bounded(bed: &Bed) -> Result<()> {
    add_addresses(bed)?;
    let broker = start_broker(bed, &["--segment-size", "16MiB"])?;
    let alone = publish(bed, "xdp")?;
    // Anonymous memory only: the ring is a file.
    let anonymous = || memory(&broker, "RssAnon");
    let before = anonymous();
    let attack = Attack::start_and_wait(bed, |conduct| hoard(20, conduct))?;
    let mut most = anonymous();
    let over_xdp = publish(bed, "xdp")?;
    most = most.max(anonymous());
    let over_tcp = publish(bed, "tcp")?;
    most = most.max(anonymous());
    let streams = attack.end()?;
    say(&format!(
        "hoarded: anonymous memory: {before} before, {most} at most, with {streams} streams"
    ));
    let bound = (32 << 20) + streams * (24 << 10) + (4 << 20);
    assert!(
        most - before <= bound,
        "{} bytes are more than {bound}",
        most - before
    );
    assert!(
        most - before >= 20 << 20,
        "only {} bytes were taken",
        most - before
    );
    stop_in_order(bed, broker, &[&alone, &over_xdp, &over_tcp])?;
    Ok(())
}

/// From each of the hosts, over both paths: streams with batches of the largest size that are not sent, or
/// nearly all of one; with as much of each as the broker takes. Returns the number of streams.
fn hoard(count: u64, conduct: &Conduct) -> Result<u64> {
    let mut kept = Vec::new();
    for number in HOSTS {
        let attacker = Attacker {
            own: host(number),
            ..Attacker::new()
        };
        let datagrams = attacker.datagrams()?;
        for _ in 0..count {
            let (mut over_tcp, offer) = attacker.open(&request(Path::Tcp))?;
            let largest = offer.max_payload;
            over_tcp.write_all(Header::for_batch(0, 1, largest, 0).as_bytes())?;
            over_tcp.set_nonblocking(true)?;
            match over_tcp.write(&vec![0; 512 << 10]) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
                _ => {}
            }
            let large = Request {
                max_payload: largest,
                ..request(Path::Xdp)
            };
            let (over_xdp, offer) = attacker.open(&large)?;
            let key = offer.datagrams.context("a stream over xdp")?.key;
            // A byte for each page, of which a receiver may take a piece of memory. And as many batches
            // as may be open, of which each lacks a byte.
            let pages = (0..3).flat_map(|seq| (0..60).map(move |page| (seq, page << 12)));
            let pages = pages.map(|(seq, offset)| Part::of(seq, offer.max_payload).at(offset));
            let parts = pages.chain((3..200).map(|seq| Part::of(seq, 6)));
            for (number, part) in (0..).step_by(2).zip(parts) {
                datagrams.send(&packet(key, number, part, b"x"))?;
            }
            kept.push((over_tcp, over_xdp));
        }
    }
    conduct.ready();
    while !conduct.is_over() {
        thread::sleep(Duration::from_millis(50));
    }
    Ok(2 * kept.len() as u64)
}

/// A host that opens a stream cannot make the broker send ACKs to other hosts.
fn no_host_gets_acks_for_packets_with_its_forged_address(bed: &Bed) -> Result<()> {
    add_addresses(bed)?;
    let broker = start_broker(bed, &[])?;
    let (own, victim) = Attack::run(bed, |_| reflect(200))?;
    assert_eq!(
        (own, victim),
        (200, 0),
        "ACKs for its own address, and for another"
    );
    let stopped = broker.stop()?;
    // Overtaken packets are not checked as strictly.
    let foreign = stopped.count("/xdp/foreign_source");
    assert!(foreign >= 100, "from another host: {foreign}");
    Ok(())
}

/// Packets of its own stream, first with the source address of somebody else, then from itself: pings with
/// gaps, each of which asks for a large ACK. Returns how many ACKs went to it, and to somebody else.
fn reflect(count: u64) -> Result<(u64, u64)> {
    let victim = host(HOSTS.start);
    let attacker = Attacker::new();
    let none = SockFlag::empty();
    let tap = socket(
        AddressFamily::Packet,
        SockType::Datagram,
        none,
        SockProtocol::EthAll,
    )?;
    setsockopt(&tap, sockopt::ReceiveTimeout, &TimeVal::new(2, 0))?;
    let raw = socket(AddressFamily::Inet, SockType::Raw, none, SockProtocol::Raw)?;
    let (_connection, offer) = attacker.open(&request(Path::Xdp))?;
    let key = offer.datagrams.context("a stream over xdp")?.key;
    let (mut own, mut victims, mut numbers) = (0, 0, (0..).step_by(2));
    for _ in 0..count {
        // The answer to the second is the sign that the first was seen. A packet may be lost.
        for _ in 0..ATTEMPTS {
            for (source, number) in [victim, attacker.own].into_iter().zip(&mut numbers) {
                let packet = ip_packet(source, &attacker, &ping(key, number))?;
                let to = SockaddrIn::new(10, 214, 0, 2, 0);
                sendto(as_fd(&raw), &packet, &to, MsgFlags::empty())?;
            }
            match acks_until_own(&tap, attacker.own, victim)? {
                (true, others) => {
                    (own, victims) = (own + 1, victims + others);
                    break;
                }
                (false, others) => victims += others,
            }
        }
    }
    Ok((own, victims))
}

/// Whether an ACK to its own address comes, and how many come to the other until then.
fn acks_until_own(tap: &impl AsRawFd, own: Ipv4Addr, victim: Ipv4Addr) -> Result<(bool, u64)> {
    let mut victims = 0;
    while let Some(to) = next_ack(tap)? {
        if to == own {
            return Ok((true, victims));
        }
        victims += u64::from(to == victim);
    }
    Ok((false, victims))
}

fn as_fd(fd: &impl AsRawFd) -> std::os::fd::RawFd {
    fd.as_raw_fd()
}

/// Where the next ACK that arrives is sent to; `None` if none comes for a while.
fn next_ack(tap: &impl AsRawFd) -> Result<Option<Ipv4Addr>> {
    let mut buffer = [0; 65_536];
    for _ in 0..1_000_000 {
        let (read, from) = match recvfrom::<LinkAddr>(as_fd(tap), &mut buffer) {
            Err(Errno::EAGAIN) => return Ok(None),
            received => received.context("cannot watch for ACKs")?,
        };
        let ip = &buffer[..read];
        let is_outgoing = from.is_some_and(|from| packet_type(&from) == libc::PACKET_OUTGOING);
        let payload = udp_payload(ip).unwrap_or_default();
        if !is_outgoing && payload.starts_with(&ACK_MAGIC) {
            let to: [u8; 4] = ip[16..20].try_into()?;
            return Ok(Some(to.into()));
        }
    }
    bail!("too many other packets")
}

fn packet_type(address: &LinkAddr) -> u8 {
    let address: &libc::sockaddr_ll = address.as_ref();
    address.sll_pkttype
}

/// An IP packet to the broker with any source address; the kernel fills in its checksum.
fn ip_packet(source: Ipv4Addr, attacker: &Attacker, payload: &[u8]) -> Result<Vec<u8>> {
    let std::net::IpAddr::V4(broker) = attacker.broker.ip() else {
        bail!("an address of version 4");
    };
    let udp_len = u16::try_from(8 + payload.len())?;
    let mut packet = vec![0x45, 0];
    packet.extend((20 + udp_len).to_be_bytes());
    // No fragments; 64 hops.
    packet.extend([0, 0, 0x40, 0, 64, u8::try_from(libc::IPPROTO_UDP)?, 0, 0]);
    packet.extend(source.octets());
    packet.extend(broker.octets());
    packet.extend(5353_u16.to_be_bytes());
    packet.extend(attacker.broker.port().to_be_bytes());
    packet.extend(udp_len.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    Ok(packet)
}
