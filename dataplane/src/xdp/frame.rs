//! Ethernet frames around datagrams: taking one apart, and the headers of an answer to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;
const MAX_VLAN_TAGS: usize = 2;
const IPV4: usize = 20;
const IPV6: usize = 40;
const UDP: usize = 8;
const UDP_PROTOCOL: u8 = 17;
/// Longest headers of an answer: two VLAN tags, IPv6, UDP.
const MAX_HEADERS: usize = ETHERNET + MAX_VLAN_TAGS * VLAN_TAG + IPV6 + UDP;
/// RFC 791 and RFC 8200: what Linux sends by default.
const HOP_LIMIT: u8 = 64;

/// A datagram inside a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Datagram {
    /// Where its payload starts in the frame.
    pub(super) start: usize,
    /// Bytes of its payload; a frame may be longer, padded to Ethernet's minimum.
    pub(super) len: usize,
    /// Offset of the IP header, and whether it is IPv6.
    ip: usize,
    v6: bool,
}

/// Takes a frame apart. `frame` is what lies in the first buffer, at least all headers; `total` is
/// the length of the whole. The XDP program lets only UDP through, but it is not trusted here.
pub(super) fn parse(frame: &[u8], total: usize) -> Option<Datagram> {
    let mut at = ETHERNET;
    let mut protocol = u16_at(frame, at - 2)?;
    for _ in 0..MAX_VLAN_TAGS {
        if protocol != 0x8100 && protocol != 0x88a8 {
            break;
        }
        at += VLAN_TAG;
        protocol = u16_at(frame, at - 2)?;
    }
    let ip = at;
    let v6 = protocol == 0x86dd;
    let is_udp = match protocol {
        0x0800 => {
            at += usize::from(frame.get(ip)? & 0x0f) * 4;
            *frame.get(ip + 9)? == UDP_PROTOCOL && at >= ip + IPV4
        }
        0x86dd => {
            at += IPV6;
            *frame.get(ip + 6)? == UDP_PROTOCOL
        }
        _ => return None,
    };
    let len = usize::from(u16_at(frame, at + 4)?).checked_sub(UDP)?;
    let start = at + UDP;
    let fits = is_udp && start <= frame.len() && start + len <= total;
    fits.then_some(Datagram { start, len, ip, v6 })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// The headers that take a datagram back to where another came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReturnPath {
    headers: [u8; MAX_HEADERS],
    len: usize,
    ip: usize,
    v6: bool,
}

impl ReturnPath {
    /// Back to the sender of `datagram`: addresses and ports are swapped, so no lookup is needed.
    pub(super) fn of(frame: &[u8], datagram: &Datagram) -> Self {
        let Datagram { ip, v6, .. } = *datagram;
        let udp = datagram.start - UDP;
        let header = if v6 { IPV6 } else { IPV4 };
        let mut headers = [0; MAX_HEADERS];
        headers[..6].copy_from_slice(&frame[6..12]);
        headers[6..12].copy_from_slice(&frame[..6]);
        headers[12..ip].copy_from_slice(&frame[12..ip]);
        let (source, destination, width) = addresses(v6);
        let out = &mut headers[ip..];
        let from = &frame[ip..];
        out[source..source + width].copy_from_slice(&from[destination..destination + width]);
        out[destination..destination + width].copy_from_slice(&from[source..source + width]);
        if v6 {
            out[0] = 0x60;
            (out[6], out[7]) = (UDP_PROTOCOL, HOP_LIMIT);
        } else {
            out[0] = 0x45;
            // Don't fragment: an answer is never too large.
            out[6] = 0x40;
            (out[8], out[9]) = (HOP_LIMIT, UDP_PROTOCOL);
        }
        out[header..header + 2].copy_from_slice(&frame[udp + 2..udp + 4]);
        out[header + 2..header + 4].copy_from_slice(&frame[udp..udp + 2]);
        Self {
            headers,
            len: ip + header + UDP,
            ip,
            v6,
        }
    }

    /// Bytes of the headers.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where the datagrams go.
    pub(super) fn peer(&self) -> SocketAddr {
        let ip = &self.headers[self.ip..];
        let address = if self.v6 {
            let bytes: [u8; 16] = ip[24..40].try_into().expect("sixteen bytes");
            IpAddr::V6(Ipv6Addr::from(bytes))
        } else {
            IpAddr::V4(Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19]))
        };
        let udp = self.len - UDP;
        let port = u16::from_be_bytes([self.headers[udp + 2], self.headers[udp + 3]]);
        SocketAddr::new(address, port)
    }

    /// Whether a datagram came from where this leads. Looked at for every packet: nothing is built.
    pub(super) fn leads_back(&self, frame: &[u8], datagram: &Datagram) -> bool {
        let Datagram { ip, v6, start, .. } = *datagram;
        if (ip, v6) != (self.ip, self.v6) {
            return false;
        }
        let (source, destination, width) = addresses(v6);
        let (back, back_udp, udp) = (&self.headers, self.len - UDP, start - UDP);
        let swapped =
            |from: usize, to: usize, len: usize| frame[from..from + len] == back[to..to + len];
        swapped(udp, back_udp + 2, 2)
            && swapped(udp + 2, back_udp, 2)
            && swapped(ip + source, ip + destination, width)
            && swapped(ip + destination, ip + source, width)
            && swapped(6, 0, 6)
            && swapped(0, 6, 6)
            && swapped(12, 12, ip - 12)
    }

    /// Puts the headers before a payload that lies in `frame` behind [`Self::len`] bytes.
    pub(super) fn write(&self, frame: &mut [u8], payload_len: usize) {
        frame[..self.len].copy_from_slice(&self.headers[..self.len]);
        let udp = self.len - UDP;
        let udp_len = ((UDP + payload_len) as u16).to_be_bytes();
        frame[udp + 4..udp + 6].copy_from_slice(&udp_len);
        let ip = self.ip;
        if self.v6 {
            frame[ip + 4..ip + 6].copy_from_slice(&udp_len);
        } else {
            let total = (IPV4 + UDP + payload_len) as u16;
            frame[ip + 2..ip + 4].copy_from_slice(&total.to_be_bytes());
            let sum = !folded(sum(&frame[ip..ip + IPV4], 0));
            frame[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        }
        let addresses = if self.v6 {
            &frame[ip + 8..ip + 40]
        } else {
            &frame[ip + 12..ip + 20]
        };
        let pseudo = sum(
            addresses,
            u32::from(UDP_PROTOCOL) + (UDP + payload_len) as u32,
        );
        let whole = sum(&frame[udp..udp + UDP + payload_len], pseudo);
        // RFC 768: a sum of zero is sent as all ones, for zero means that there is none.
        let checksum = match !folded(whole) {
            0 => 0xffff,
            checksum => checksum,
        };
        frame[udp + 6..udp + 8].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// Offsets of source and destination address in an IP header, and their width.
fn addresses(v6: bool) -> (usize, usize, usize) {
    if v6 { (8, 24, 16) } else { (12, 16, 4) }
}

/// One's complement sum of 16-bit words (RFC 1071).
fn sum(bytes: &[u8], start: u32) -> u32 {
    let (words, rest) = bytes.as_chunks::<2>();
    let words = words
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)));
    let last = rest.first().map_or(0, |byte| u32::from(*byte) << 8);
    start + words.sum::<u32>() + last
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// A frame as a publisher's kernel sends it, without checksums.
    fn frame(tags: usize, v6: bool, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![1; 6];
        frame.extend([2; 6]);
        for _ in 0..tags {
            frame.extend([0x81, 0x00, 0, 5]);
        }
        let len = (UDP + payload.len()) as u16;
        if v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(len.to_be_bytes());
            frame.extend([17, 64]);
            frame.extend([3; 16]);
            frame.extend([4; 16]);
        } else {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend((20 + len).to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        frame.extend(40_000u16.to_be_bytes());
        frame.extend(1214u16.to_be_bytes());
        frame.extend(len.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(payload);
        frame
    }

    /// Whether the byte belongs to an IP address or a port.
    fn is_address(at: usize, datagram: &Datagram) -> bool {
        let (source, destination, width) = addresses(datagram.v6);
        let first = datagram.ip + source;
        (first..datagram.ip + destination + width).contains(&at)
            || (datagram.start - UDP..datagram.start - 4).contains(&at)
    }

    #[test]
    fn an_answer_goes_back_to_where_the_datagram_came_from() {
        for (tags, v6) in [(0, false), (1, false), (2, true), (0, true)] {
            let frame = frame(tags, v6, b"question");
            let datagram = parse(&frame, frame.len()).unwrap();
            assert_eq!(&frame[datagram.start..][..datagram.len], b"question");
            let path = ReturnPath::of(&frame, &datagram);
            assert_eq!(path.peer().port(), 40_000);
            assert!(path.leads_back(&frame, &datagram));
            // Whatever of the addresses is another: it leads elsewhere.
            for at in (0..datagram.start - 4).filter(|at| *at < 14 || is_address(*at, &datagram)) {
                let mut other = frame.clone();
                other[at] ^= 1;
                let same = path.leads_back(&other, &datagram);
                assert_eq!(same, path == ReturnPath::of(&other, &datagram), "byte {at}");
                assert!(!same, "byte {at}");
            }
            let mut answer = vec![0; path.len()];
            answer.extend(b"answer!");
            path.write(&mut answer, 7);
            assert_eq!(answer[..6], [2; 6]);
            let parsed = parse(&answer, answer.len()).unwrap();
            assert_eq!(&answer[parsed.start..][..parsed.len], b"answer!");
            assert!(ReturnPath::of(&answer, &parsed).peer().port() == 1214);
            // The sums of a header, and of a datagram with its pseudo header, are all ones.
            let (ip, udp) = (parsed.ip, path.len() - UDP);
            let addresses = if v6 {
                ip + 8..ip + 40
            } else {
                assert_eq!(folded(sum(&answer[ip..udp], 0)), 0xffff);
                ip + 12..ip + 20
            };
            let pseudo = sum(&answer[addresses], 17 + 15);
            assert_eq!(folded(sum(&answer[udp..], pseudo)), 0xffff);
        }
    }

    #[test]
    fn padding_is_left_out_and_claims_beyond_the_frame_are_refused() {
        let mut padded = frame(0, false, b"x");
        padded.resize(60, 0);
        assert_eq!(parse(&padded, 60).unwrap().len, 1);
        let mut cut = frame(0, false, &[0; 100]);
        cut.pop();
        assert_eq!(parse(&cut, cut.len()), None);
        // The rest lies in further buffers.
        assert_eq!(parse(&cut, cut.len() + 1).unwrap().len, 100);
    }

    proptest! {
        #[test]
        fn arbitrary_frames_never_panic(bytes in vec(any::<u8>(), 0..120), kind in 0..4) {
            let mut bytes = bytes;
            if bytes.len() > 14 {
                let kind = [[0x08, 0x00], [0x86, 0xdd], [0x81, 0x00], [1, 1]][kind as usize];
                bytes[12..14].copy_from_slice(&kind);
            }
            if let Some(datagram) = parse(&bytes, bytes.len()) {
                let path = ReturnPath::of(&bytes, &datagram);
                let mut answer = vec![0; path.len() + 3];
                path.write(&mut answer, 3);
            }
        }
    }
}
