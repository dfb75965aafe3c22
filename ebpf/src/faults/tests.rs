//! Packets through the injector: sent into one pair of interfaces, caught at the end of another.
//!
//! All of it needs root; `scripts/test.sh` runs it where it may.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::*;
use crate::tests::{Packet, in_namespace, ip};

const PORT: u16 = 1214;
const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));
const UDP: Treated = Treated {
    port: PORT,
    udp: true,
    tcp: false,
};
const NONE: Faults = Faults::NONE;
/// What `bpf_redirect` answers.
const REDIRECT: u32 = 7;
/// Of no protocol that the injector treats: tells that all before has come through.
const MARKER: [u8; 14] = [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0x88, 0xb5];
const ETHERNET: usize = 14;
const IPV4: usize = 20;

/// A path x0 = x1 -> injector -> y0 = y1.
struct Path {
    injector: Injector,
    into: OwnedFd,
    out: OwnedFd,
}

impl Path {
    fn with(treated: &Treated, faults: &Faults, seed: u64) -> Self {
        for pair in ["x0 x1", "y0 y1"] {
            let (near, far) = pair.split_once(' ').unwrap();
            ip(&format!(
                "link add {near} mtu 9000 type veth peer name {far} mtu 9000"
            ));
            ip(&format!("link set {near} up"));
            ip(&format!("link set {far} up"));
        }
        let mut injector = Injector::load(treated, faults, seed, "y0").unwrap();
        injector.attach("x1").unwrap();
        let path = Self {
            injector,
            into: packet_socket("x0"),
            out: packet_socket("y1"),
        };
        stay_on_this_core();
        // The kernel drops what is sent before the interfaces are in service.
        while path.caught_within(20).is_none() {
            path.send(&MARKER);
        }
        path.through([]);
        path
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: the buffer outlives the call, and its length is given.
        let sent =
            unsafe { libc::send(self.into.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
    }

    /// What comes out within this many milliseconds, if anything.
    fn caught_within(&self, patience: i32) -> Option<Vec<u8>> {
        let mut poll = libc::pollfd {
            fd: self.out.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, which outlives the call.
        if unsafe { libc::poll(&raw mut poll, 1, patience) } == 0 {
            return None;
        }
        let mut frame = vec![0; 10_000];
        let fd = self.out.as_raw_fd();
        // SAFETY: the buffer outlives the call, and its length is given.
        let len = unsafe { libc::recv(fd, frame.as_mut_ptr().cast(), frame.len(), 0) };
        assert!(len > 0, "{}", io::Error::last_os_error());
        frame.truncate(len as usize);
        Some(frame)
    }

    /// What comes out when these frames go in.
    fn through<'a>(&self, frames: impl IntoIterator<Item = &'a Vec<u8>>) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        let mut drain = || loop {
            match self.caught_within(10_000).expect("the marker comes") {
                frame if frame == MARKER => break,
                // The kernel's own multicasts.
                frame if frame[..2] == [0x33, 0x33] => {}
                frame => out.push(frame),
            }
        };
        for (number, frame) in frames.into_iter().enumerate() {
            self.send(frame);
            // No more than the receiving socket holds.
            if number % 16 == 15 {
                self.send(&MARKER);
                drain();
            }
        }
        self.send(&MARKER);
        drain();
        out
    }

    fn events(&self) -> Events {
        self.injector.events().unwrap()
    }
}

/// A raw socket that sends and receives on one interface.
fn packet_socket(interface: &str) -> OwnedFd {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: takes numbers only.
    let fd = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(all),
        )
    };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: zero is a valid value for each of its numbers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = index_of(interface).unwrap();
    // SAFETY: the address outlives the call, and its size is given.
    let code = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    assert_eq!(code, 0, "{}", io::Error::last_os_error());
    socket
}

/// Each core has a queue of its own in the kernel; between two of them packets would overtake.
fn stay_on_this_core() {
    // SAFETY: an empty set is all zeros; the set outlives the call, and its size is given.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu() as usize, &mut set);
        assert_eq!(
            libc::sched_setaffinity(0, size_of_val(&set), &raw const set),
            0
        );
    }
}

/// Datagrams to the port that differ from each other; their number stands in the last bytes.
fn datagrams(count: u32) -> Vec<Vec<u8>> {
    let datagram = |number: u32| {
        let to = if number.is_multiple_of(3) { V6 } else { V4 };
        let mut packet = Packet::payload_to(to);
        let size = [20, 200, 1400, 8800][number as usize % 4];
        packet.payload = vec![number as u8; size];
        packet.payload.extend(number.to_be_bytes());
        packet.bytes()
    };
    (0..count).map(datagram).collect()
}

/// The number of an undamaged datagram.
fn number_of(frame: &[u8]) -> u32 {
    u32::from_be_bytes(*frame.last_chunk().unwrap())
}

fn numbers_of(frames: &[Vec<u8>]) -> Vec<u32> {
    frames.iter().map(|frame| number_of(frame)).collect()
}

#[test]
#[ignore = "needs root"]
fn without_faults_all_goes_through_as_it_is() {
    in_namespace(|| {
        let path = Path::with(&UDP, &NONE, 1);
        let sent = datagrams(100);
        assert!(path.through(&sent) == sent);
        let counted = Events {
            packets: 100,
            ..Events::default()
        };
        assert_eq!(path.events(), counted);
    });
}

#[test]
#[ignore = "needs root"]
fn lost_is_what_is_counted_and_no_more() {
    in_namespace(|| {
        let faults = Faults { loss: 0.3, ..NONE };
        let path = Path::with(&UDP, &faults, 1);
        let sent = datagrams(2000);
        let came = numbers_of(&path.through(&sent));
        assert!(came.is_sorted());
        let Events { packets, lost, .. } = path.events();
        assert_eq!((packets, lost), (2000, 2000 - came.len() as u64));
        assert!((500..=700).contains(&lost), "{lost} of 2000 at 30 %");
    });
}

#[test]
#[ignore = "needs root"]
fn doubles_come_at_once() {
    in_namespace(|| {
        let faults = Faults {
            duplicate: 1.0,
            ..NONE
        };
        let path = Path::with(&UDP, &faults, 1);
        let sent = datagrams(50);
        let doubled: Vec<_> = sent
            .iter()
            .flat_map(|frame| [frame.clone(), frame.clone()])
            .collect();
        assert!(path.through(&sent) == doubled);
        assert_eq!(path.events().duplicated, 50);
    });
}

#[test]
#[ignore = "needs root"]
fn corruption_changes_one_bit_here_or_there() {
    in_namespace(|| {
        let faults = Faults {
            corrupt: 1.0,
            ..NONE
        };
        let path = Path::with(&UDP, &faults, 1);
        let sent = datagrams(400);
        let came = path.through(&sent);
        assert_eq!(came.len(), 400);
        let mut in_headers = 0;
        for (was, is) in sent.iter().zip(&came) {
            let changed: u32 = was.iter().zip(is).map(|(a, b)| (a ^ b).count_ones()).sum();
            assert_eq!((changed, is.len()), (1, was.len()));
            in_headers += u32::from(was[..42] != is[..42]);
        }
        assert!((20..=100).contains(&in_headers), "{in_headers} of 400");
        assert_eq!(path.events().corrupted, 400);
    });
}

#[test]
#[ignore = "needs root"]
fn truncation_leaves_a_beginning() {
    in_namespace(|| {
        let faults = Faults {
            truncate: 1.0,
            ..NONE
        };
        let path = Path::with(&UDP, &faults, 1);
        let sent = datagrams(200);
        let came = path.through(&sent);
        assert_eq!(came.len(), 200);
        for (was, is) in sent.iter().zip(&came) {
            assert!(is.len() < was.len() && is.len() >= ETHERNET + IPV4);
            assert!(was.starts_with(is));
        }
        assert_eq!(path.events().truncated, 200);
    });
}

#[test]
#[ignore = "needs root"]
fn late_packets_come_whole_and_once_and_not_much_later() {
    in_namespace(|| {
        let faults = Faults {
            reorder: 0.2,
            ..NONE
        };
        let path = Path::with(&UDP, &faults, 1);
        let mut sent = datagrams(1000);
        let mut came = path.through(&sent);
        // Those that still wait come with what follows.
        path.injector.set(Protocol::Udp, &NONE).unwrap();
        let rest: Vec<_> = datagrams(1040).split_off(1000);
        came.extend(path.through(&rest));
        sent.extend(rest);
        let Events {
            held,
            let_out,
            not_held,
            ..
        } = path.events();
        assert_eq!(held, let_out);
        assert!((100..=250).contains(&held), "{held} held, {not_held} not");
        let order = numbers_of(&came);
        let mut newest = 0;
        let mut late = 0;
        for &number in &order {
            late += u64::from(number < newest);
            // The largest distance, and those that wait for the same packet.
            assert!(number + 16 + 8 >= newest, "{number} after {newest}");
            newest = newest.max(number);
        }
        // Two neighbours may both wait and keep their order.
        assert!(late <= held && late > held / 2, "{late} late of {held}");
        came.sort_by_key(|frame| number_of(frame));
        assert!(came == sent);
    });
}

#[test]
#[ignore = "needs root"]
fn late_packets_that_nothing_follows_come_in_time() {
    in_namespace(|| {
        let faults = Faults {
            reorder: 1.0,
            ..NONE
        };
        let path = Path::with(&UDP, &faults, 1);
        let sent = datagrams(4);
        assert!(path.through(&sent[..3]).len() <= 1);
        path.injector.set(Protocol::Udp, &NONE).unwrap();
        let mut came = path.through(&sent[3..]);
        while came.len() < 4 {
            path.injector.let_out_overdue().unwrap();
            came.extend(path.through([]));
        }
        came.sort_by_key(|frame| number_of(frame));
        assert!(came == sent);
    });
}

#[test]
#[ignore = "needs root"]
fn all_faults_at_once_add_up() {
    in_namespace(|| {
        let faults = Faults {
            loss: 0.1,
            reorder: 0.1,
            corrupt: 0.1,
            duplicate: 0.1,
            truncate: 0.1,
            largest: 8000,
        };
        let path = Path::with(&UDP, &faults, 1);
        let came = path.through(&datagrams(2000)).len() as u64;
        let e = path.events();
        assert_eq!(e.packets, 2000);
        assert_eq!(e.swallowed, 500);
        let waiting = e.held - e.let_out;
        assert!(waiting <= 8);
        assert_eq!(came, 2000 - e.swallowed - e.lost + e.duplicated - waiting);
        let likely = 50..=250;
        for count in [e.lost, e.held, e.corrupted, e.duplicated, e.truncated] {
            assert!(likely.contains(&count), "{e:?}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn a_black_hole_comes_and_goes() {
    in_namespace(|| {
        let path = Path::with(&UDP, &NONE, 1);
        let sent = datagrams(8);
        let largest = 1000;
        path.injector
            .set(Protocol::Udp, &Faults { largest, ..NONE })
            .unwrap();
        let fits = |frame: &&Vec<u8>| frame.len() <= ETHERNET + largest as usize;
        let small: Vec<_> = sent.iter().filter(fits).cloned().collect();
        assert!(path.through(&sent) == small && small.len() == 4);
        path.injector
            .set(Protocol::Udp, &Faults { largest: 0, ..NONE })
            .unwrap();
        assert!(path.through(&sent).is_empty());
        path.injector.set(Protocol::Udp, &NONE).unwrap();
        assert!(path.through(&sent) == sent);
        assert_eq!(path.events().swallowed, 4 + 8);
    });
}

#[test]
#[ignore = "needs root"]
fn each_protocol_meets_its_own_faults() {
    in_namespace(|| {
        let both = Treated { tcp: true, ..UDP };
        let path = Path::with(&both, &NONE, 1);
        let datagram = Packet::payload_to(V4);
        let tcp = Packet {
            next_header: 6,
            ..datagram.clone()
        };
        let [datagram, tcp] = [datagram.bytes(), tcp.bytes()];
        let through = || path.through(&[datagram.clone(), tcp.clone()]);
        assert!(through() == [datagram.clone(), tcp.clone()]);
        let all_lost = Faults { loss: 1.0, ..NONE };
        path.injector.set(Protocol::Udp, &all_lost).unwrap();
        assert!(through() == [tcp.clone()]);
        path.injector.set(Protocol::Udp, &NONE).unwrap();
        path.injector.set(Protocol::Tcp, &all_lost).unwrap();
        assert!(through() == [datagram.clone()]);
    });
}

#[test]
#[ignore = "needs root"]
fn only_what_is_meant_is_treated() {
    in_namespace(|| {
        let all_lost = Faults { loss: 1.0, ..NONE };
        let path = Path::with(&UDP, &all_lost, 1);
        let datagram = Packet::payload_to(V4);
        let tcp = Packet {
            next_header: 6,
            ..datagram.clone()
        };
        let elsewhere = Packet {
            port: PORT + 1,
            ..datagram.clone()
        };
        let fragment = Packet {
            fragment: [0x20, 0],
            ..datagram.clone()
        };
        // From the port: the way back.
        let mut back = elsewhere.bytes();
        back[34..36].copy_from_slice(&PORT.to_be_bytes());
        let mut arp = datagram.bytes();
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        let untouched = [tcp.bytes(), elsewhere.bytes(), fragment.bytes(), arp];
        assert!(path.through(&untouched) == untouched);
        assert!(path.through(&[datagram.bytes(), back]).is_empty());
        let counted = Events {
            packets: 2,
            lost: 2,
            ..Events::default()
        };
        assert_eq!(path.events(), counted);
    });
    in_namespace(|| {
        let tcp_only = Treated {
            udp: false,
            tcp: true,
            ..UDP
        };
        let path = Path::with(&tcp_only, &Faults { loss: 1.0, ..NONE }, 1);
        let datagram = Packet::payload_to(V4);
        let tcp = Packet {
            next_header: 6,
            ..datagram.clone()
        };
        assert!(path.through(&[datagram.bytes(), tcp.bytes()]) == [datagram.bytes()]);
    });
}

#[test]
#[ignore = "needs root"]
fn a_seed_repeats_its_faults() {
    let outcome = |seed| {
        let (tell, told) = std::sync::mpsc::channel();
        in_namespace(move || {
            let faults = Faults {
                loss: 0.1,
                reorder: 0.1,
                corrupt: 0.1,
                duplicate: 0.1,
                ..NONE
            };
            let path = Path::with(&UDP, &faults, seed);
            tell.send(path.through(&datagrams(300))).unwrap();
        });
        told.recv().unwrap()
    };
    let first = outcome(7);
    assert!(first == outcome(7));
    assert!(first != outcome(8));
}

#[test]
#[ignore = "needs root"]
fn packets_that_are_cut_short_anywhere_do_no_harm() {
    let faults = Faults {
        corrupt: 1.0,
        truncate: 1.0,
        reorder: 0.5,
        ..NONE
    };
    let both = Treated { tcp: true, ..UDP };
    let injector = Injector::load(&both, &faults, 1, "lo").unwrap();
    let mut treated = 0;
    for (to, next_header) in [(V4, 17), (V4, 6), (V6, 17), (V6, 6)] {
        let packet = Packet {
            next_header,
            ..Packet::payload_to(to)
        };
        let bytes = packet.bytes();
        let header = if next_header == 6 { 20 } else { 4 };
        let needed = packet.headers() - 8 + header;
        // The kernel runs no program on a packet without a whole IP header.
        for len in packet.headers() - 8..=bytes.len() {
            run(injector.program(), &bytes[..len]).unwrap();
            treated += u64::from(len >= needed);
            assert_eq!(injector.events().unwrap().packets, treated, "{len} bytes");
        }
    }
    let foreign = vec![0; 100];
    assert_eq!(run(injector.program(), &foreign).unwrap(), REDIRECT);
}

#[test]
#[ignore = "needs root"]
fn the_injector_goes_with_its_owner() {
    in_namespace(|| {
        let Path {
            injector,
            into,
            out,
        } = Path::with(&UDP, &NONE, 1);
        drop(injector);
        let error = Injector::load(&UDP, &NONE, 1, "nowhere").unwrap_err();
        assert!(matches!(error, Error::NoInterface { .. }), "{error}");
        // Nothing carries packets any more, until another injector does.
        let mut injector = Injector::load(&UDP, &NONE, 1, "y0").unwrap();
        let path = Path {
            injector: Injector::load(&UDP, &NONE, 1, "y0").unwrap(),
            into,
            out,
        };
        path.send(&MARKER);
        assert_eq!(
            path.caught_within(100).filter(|frame| frame == &MARKER),
            None
        );
        injector.attach("x1").unwrap();
        assert!(path.through([]).is_empty());
    });
}
