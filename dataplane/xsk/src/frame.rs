//! Ethernet frames around datagrams: the parser, and the headers of frames that are sent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;
const MAX_VLAN_TAGS: usize = 2;
const IPV4: usize = 20;
const IPV6: usize = 40;
const UDP: usize = 8;
const UDP_PROTOCOL: u8 = 17;
const IPV4_PROTOCOL: u16 = 0x0800;
const IPV6_PROTOCOL: u16 = 0x86dd;
/// Longest headers of an answer: two VLAN tags, IPv6, UDP.
pub const MAX_HEADERS: usize = ETHERNET + MAX_VLAN_TAGS * VLAN_TAG + IPV6 + UDP;
/// RFC 791 and RFC 8200: what Linux sends by default.
const HOP_LIMIT: u8 = 64;

/// A datagram inside a frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Where its payload starts in the frame.
    pub start: usize,
    /// Bytes of its payload; a frame may be longer, padded to Ethernet's minimum.
    pub len: usize,
    /// Offset of the IP header, and whether it is IPv6.
    ip: usize,
    v6: bool,
}

/// Parses a frame. `frame` is the content of the first buffer, with at least all headers; `total` is
/// the length of the whole frame. The XDP program redirects only UDP, but this parser does not rely on it.
#[inline]
pub fn parse(frame: &[u8], total: usize) -> Option<Datagram> {
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
    let v6 = protocol == IPV6_PROTOCOL;
    let is_udp = match protocol {
        IPV4_PROTOCOL => {
            at += usize::from(frame.get(ip)? & 0x0f) * 4;
            *frame.get(ip + 9)? == UDP_PROTOCOL && at >= ip + IPV4
        }
        IPV6_PROTOCOL => {
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

/// One end of a datagram's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// Hardware address: of the host, or of the router on the way to it.
    pub mac: [u8; 6],
    /// IP address and UDP port.
    pub address: SocketAddr,
}

/// The headers of all datagrams to one destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameTemplate {
    bytes: [u8; MAX_HEADERS],
    len: usize,
    ip: usize,
    v6: bool,
    /// Whether the datagrams carry a UDP checksum.
    has_checksum: bool,
}

impl FrameTemplate {
    /// From one end to another.
    ///
    /// Over IPv4 the datagrams have no UDP checksum, which RFC 768 allows: the CRC32C of each packet
    /// covers more, and a second sum over all payload would cost what this path saves. IPv6 requires
    /// one (RFC 8200 section 8.1).
    ///
    /// # Panics
    /// If one address is of IPv4 and the other of IPv6.
    #[must_use]
    pub fn new(from: &Endpoint, to: &Endpoint) -> Self {
        let v6 = to.address.is_ipv6();
        let mut headers = Self::empty(ETHERNET, v6);
        let bytes = &mut headers.bytes;
        bytes[..6].copy_from_slice(&to.mac);
        bytes[6..12].copy_from_slice(&from.mac);
        let protocol = if v6 { IPV6_PROTOCOL } else { IPV4_PROTOCOL };
        bytes[12..14].copy_from_slice(&protocol.to_be_bytes());
        let (source, destination, width) = addresses(v6);
        let out = &mut bytes[ETHERNET..];
        match (from.address.ip(), to.address.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                out[source..source + width].copy_from_slice(&from.octets());
                out[destination..destination + width].copy_from_slice(&to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                out[source..source + width].copy_from_slice(&from.octets());
                out[destination..destination + width].copy_from_slice(&to.octets());
            }
            _ => panic!("both ends must use the same IP version"),
        }
        let udp = headers.len - UDP;
        headers.bytes[udp..udp + 2].copy_from_slice(&from.address.port().to_be_bytes());
        headers.bytes[udp + 2..udp + 4].copy_from_slice(&to.address.port().to_be_bytes());
        headers.has_checksum = v6;
        headers
    }

    /// Headers of a reply to the sender of `datagram`: addresses and ports are swapped, so no lookup is
    /// needed.
    pub fn reply_template(frame: &[u8], datagram: &Datagram) -> Self {
        let Datagram { ip, v6, .. } = *datagram;
        let mut headers = Self::empty(ip, v6);
        let bytes = &mut headers.bytes;
        bytes[..6].copy_from_slice(&frame[6..12]);
        bytes[6..12].copy_from_slice(&frame[..6]);
        bytes[12..ip].copy_from_slice(&frame[12..ip]);
        let (source, destination, width) = addresses(v6);
        let out = &mut bytes[ip..];
        let from = &frame[ip..];
        out[source..source + width].copy_from_slice(&from[destination..destination + width]);
        out[destination..destination + width].copy_from_slice(&from[source..source + width]);
        let (udp, from_udp) = (headers.len - UDP, datagram.start - UDP);
        headers.bytes[udp..udp + 2].copy_from_slice(&frame[from_udp + 2..from_udp + 4]);
        headers.bytes[udp + 2..udp + 4].copy_from_slice(&frame[from_udp..from_udp + 2]);
        headers
    }

    /// Headers without addresses; the IP header is at `ip`.
    fn empty(ip: usize, v6: bool) -> Self {
        let mut bytes = [0; MAX_HEADERS];
        let out = &mut bytes[ip..];
        if v6 {
            out[0] = 0x60;
            (out[6], out[7]) = (UDP_PROTOCOL, HOP_LIMIT);
        } else {
            out[0] = 0x45;
            // Don't fragment: a datagram that exceeds the path MTU must get lost.
            out[6] = 0x40;
            (out[8], out[9]) = (HOP_LIMIT, UDP_PROTOCOL);
        }
        Self {
            bytes,
            len: ip + if v6 { IPV6 } else { IPV4 } + UDP,
            ip,
            v6,
            has_checksum: true,
        }
    }

    /// Bytes of the headers.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "they are never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Destination of the datagrams.
    pub fn peer(&self) -> SocketAddr {
        let ip = &self.bytes[self.ip..];
        let address = if self.v6 {
            let bytes: [u8; 16] = ip[24..40].try_into().expect("sixteen bytes");
            IpAddr::V6(Ipv6Addr::from(bytes))
        } else {
            IpAddr::V4(Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19]))
        };
        let udp = self.len - UDP;
        let port = u16::from_be_bytes([self.bytes[udp + 2], self.bytes[udp + 3]]);
        SocketAddr::new(address, port)
    }

    /// Whether a datagram came from the destination of this template. Runs for every packet, so it
    /// builds no headers.
    #[inline]
    pub fn matches_sender(&self, frame: &[u8], datagram: &Datagram) -> bool {
        let Datagram { ip, v6, start, .. } = *datagram;
        if (ip, v6) != (self.ip, self.v6) {
            return false;
        }
        let own = &self.bytes;
        // The lengths are constants, so that each comparison uses registers.
        let of_ip = match v6 {
            false => is_swapped::<4>(frame, own, ip + 12, ip + 16),
            true => is_swapped::<16>(frame, own, ip + 8, ip + 24),
        };
        let (udp, own_udp) = (start - UDP, self.len - UDP);
        of_ip
            && is_same::<2>(frame, udp, own, own_udp + 2)
            && is_same::<2>(frame, udp + 2, own, own_udp)
            && is_swapped::<6>(frame, own, 0, 6)
            && is_same::<2>(frame, 12, own, 12)
            && (ip == ETHERNET || frame[ETHERNET..ip] == own[ETHERNET..ip])
    }

    /// Writes the headers of a datagram to the start of `frame`. The payload only determines lengths and
    /// checksum; all its parts but the last have an even length.
    pub fn write(&self, frame: &mut [u8], payload: &[&[u8]]) {
        frame[..self.len].copy_from_slice(&self.bytes[..self.len]);
        let (ip, udp) = (self.ip, self.len - UDP);
        let len = UDP + payload.iter().map(|part| part.len()).sum::<usize>();
        let udp_len = (len as u16).to_be_bytes();
        frame[udp + 4..udp + 6].copy_from_slice(&udp_len);
        if self.v6 {
            frame[ip + 4..ip + 6].copy_from_slice(&udp_len);
        } else {
            let total = (IPV4 + len) as u16;
            frame[ip + 2..ip + 4].copy_from_slice(&total.to_be_bytes());
            let sum = !folded(sum(&frame[ip..ip + IPV4], 0));
            frame[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        }
        if self.has_checksum {
            let checksum = self.checksum(frame, len, payload);
            frame[udp + 6..udp + 8].copy_from_slice(&checksum.to_be_bytes());
        }
    }

    /// The UDP checksum of a datagram of `len` bytes, whose headers are in `frame`.
    fn checksum(&self, frame: &[u8], len: usize, payload: &[&[u8]]) -> u16 {
        let (source, destination, width) = addresses(self.v6);
        let addresses = &frame[self.ip..][source..destination + width];
        let pseudo = sum(addresses, u32::from(UDP_PROTOCOL) + len as u32);
        let header = sum(&frame[self.len - UDP..self.len], pseudo);
        let whole = payload
            .iter()
            .fold(header, |so_far, part| sum(part, so_far));
        // RFC 768: a sum of zero is sent as all ones, because zero means "no checksum".
        match !folded(whole) {
            0 => 0xffff,
            checksum => checksum,
        }
    }
}

/// Whether the two fields of `N` bytes at `first` and `second` in `one` are those in `other`, swapped.
fn is_swapped<const N: usize>(one: &[u8], other: &[u8], first: usize, second: usize) -> bool {
    is_same::<N>(one, first, other, second) && is_same::<N>(one, second, other, first)
}

fn is_same<const N: usize>(one: &[u8], at: usize, other: &[u8], other_at: usize) -> bool {
    let field = |bytes: &[u8], at| -> [u8; N] { bytes[at..at + N].try_into().expect("N bytes") };
    field(one, at) == field(other, other_at)
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
    fn a_reply_goes_to_the_sender_of_the_datagram() {
        for (tags, v6) in [(0, false), (1, false), (2, true), (0, true)] {
            let frame = frame(tags, v6, b"question");
            let datagram = parse(&frame, frame.len()).unwrap();
            assert_eq!(&frame[datagram.start..][..datagram.len], b"question");
            let path = FrameTemplate::reply_template(&frame, &datagram);
            assert_eq!(path.peer().port(), 40_000);
            assert!(path.matches_sender(&frame, &datagram));
            // A change of any address byte is noticed.
            for at in (0..datagram.start - 4).filter(|at| *at < 14 || is_address(*at, &datagram)) {
                let mut other = frame.clone();
                other[at] ^= 1;
                let same = path.matches_sender(&other, &datagram);
                assert_eq!(
                    same,
                    path == FrameTemplate::reply_template(&other, &datagram),
                    "byte {at}"
                );
                assert!(!same, "byte {at}");
            }
            let mut answer = vec![0; path.len()];
            path.write(&mut answer, &[b"answer!"]);
            answer.extend(b"answer!");
            assert_eq!(answer[..6], [2; 6]);
            let parsed = parse(&answer, answer.len()).unwrap();
            assert_eq!(&answer[parsed.start..][..parsed.len], b"answer!");
            assert!(
                FrameTemplate::reply_template(&answer, &parsed)
                    .peer()
                    .port()
                    == 1214
            );
            check_sums(&answer, true);
        }
    }

    /// The sums of a header, and of a datagram with its pseudo header, are all ones.
    fn check_sums(frame: &[u8], has_checksum: bool) {
        let Datagram { start, len, ip, v6 } = parse(frame, frame.len()).unwrap();
        let udp = start - UDP;
        if !v6 {
            assert_eq!(folded(sum(&frame[ip..udp], 0)), 0xffff);
        }
        if has_checksum {
            let (source, destination, width) = addresses(v6);
            let addresses = &frame[ip + source..ip + destination + width];
            let pseudo = sum(addresses, 17 + (UDP + len) as u32);
            assert_eq!(folded(sum(&frame[udp..start + len], pseudo)), 0xffff);
        } else {
            assert_eq!(frame[udp + 6..start], [0, 0]);
        }
    }

    fn ends(v6: bool) -> (Endpoint, Endpoint) {
        let address = |text: &str| text.parse().unwrap();
        let (from, to) = match v6 {
            false => (address("10.0.0.1:40000"), address("10.0.0.2:1214")),
            true => (address("[fd00::1]:40000"), address("[fd00::2]:1214")),
        };
        let end = |mac, address| Endpoint {
            mac: [mac; 6],
            address,
        };
        (end(1, from), end(2, to))
    }

    #[test]
    fn a_datagram_carries_the_addresses_of_both_ends() {
        for (v6, ip) in [(false, IPV4), (true, IPV6)] {
            let (from, to) = ends(v6);
            let headers = FrameTemplate::new(&from, &to);
            assert_eq!(headers.len(), ETHERNET + ip + UDP);
            assert_eq!(headers.peer(), to.address);
            for payload in [&b""[..], b"even", b"odd"] {
                let mut frame = vec![0; headers.len()];
                headers.write(&mut frame, &[b"head", payload]);
                frame.extend_from_slice(b"head");
                frame.extend_from_slice(payload);
                assert_eq!(frame[..12], [[2; 6], [1; 6]].concat());
                let datagram = parse(&frame, frame.len()).unwrap();
                let got = &frame[datagram.start..][..datagram.len];
                assert_eq!(got, [b"head", payload].concat());
                let reply = FrameTemplate::reply_template(&frame, &datagram);
                assert_eq!(reply.peer(), from.address);
                assert_eq!(reply.bytes[..12], [[1; 6], [2; 6]].concat());
                // Only IPv4 allows datagrams without a checksum.
                check_sums(&frame, v6);
            }
        }
    }

    #[test]
    fn a_checksum_of_zero_is_sent_as_all_ones() {
        let (from, to) = ends(true);
        let headers = FrameTemplate::new(&from, &to);
        let mut frame = vec![0; headers.len()];
        headers.write(&mut frame, &[&[0, 0]]);
        let udp = headers.len() - UDP;
        // This payload makes the sum zero.
        let rest = [frame[udp + 6], frame[udp + 7]];
        headers.write(&mut frame, &[&rest]);
        assert_eq!(frame[udp + 6..udp + 8], [0xff, 0xff]);
        frame.extend_from_slice(&rest);
        check_sums(&frame, true);
    }

    #[test]
    #[should_panic(expected = "the same IP version")]
    fn endpoints_of_different_families_panic() {
        let ((from, _), (_, to)) = (ends(false), ends(true));
        let _ = FrameTemplate::new(&from, &to);
    }

    #[test]
    fn padding_is_ignored_and_a_length_beyond_the_frame_is_refused() {
        let mut padded = frame(0, false, b"x");
        padded.resize(60, 0);
        assert_eq!(parse(&padded, 60).unwrap().len, 1);
        let mut cut = frame(0, false, &[0; 100]);
        cut.pop();
        assert_eq!(parse(&cut, cut.len()), None);
        // The rest is in further buffers.
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
                let path = FrameTemplate::reply_template(&bytes, &datagram);
                let mut answer = vec![0; path.len()];
                path.write(&mut answer, &[&[0; 3]]);
            }
        }
    }
}
