//! The program in the kernel, on packets made here and on interfaces of a namespace of its own.
//!
//! All of it needs root; `scripts/test.sh` runs it where it may.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::{fs, io, thread};

use crate::attached::{check, index_of};
use crate::faults::run;
use crate::{Attached, Calls, Config, Error, Mode, Outcomes, Steering, attached, worker_of};

const PASS: u32 = 2;
const REDIRECT: u32 = 4;
const MAGIC: [u8; 4] = *b"PNSD";
const PORT: u16 = 1214;
const V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const KEY: u64 = 0x0123_4567_89ab_cdef;
const DROP: u32 = 1;

fn config(sockets_per_queue: u32) -> Config {
    Config {
        addresses: vec![V4.into(), V6.into()],
        port: PORT,
        magic: MAGIC,
        queues: 1,
        sockets_per_queue,
        streams: 4,
    }
}

/// An AF_XDP socket that is bound to nothing: enough for the map.
fn socket() -> OwnedFd {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "AF_XDP: {}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn verdict(steering: &Steering, packet: &[u8]) -> u32 {
    run(steering.program(), packet).expect("the kernel runs the program")
}

/// A packet, part by part.
#[derive(Clone)]
pub(crate) struct Packet {
    pub(crate) tags: Vec<[u8; 2]>,
    pub(crate) to: IpAddr,
    pub(crate) ip_options: usize,
    pub(crate) next_header: u8,
    pub(crate) fragment: [u8; 2],
    pub(crate) port: u16,
    pub(crate) payload: Vec<u8>,
}

impl Packet {
    pub(crate) fn payload_to(to: IpAddr) -> Self {
        let payload = [&MAGIC[..], &[0; 4], &KEY.to_le_bytes(), &[0; 80]].concat();
        Self {
            tags: Vec::new(),
            to,
            ip_options: 0,
            next_header: 17,
            fragment: [0x40, 0],
            port: PORT,
            payload,
        }
    }

    /// Bytes of the packet before the UDP payload.
    pub(crate) fn headers(&self) -> usize {
        self.bytes().len() - self.payload.len()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![2; 12];
        for tag in &self.tags {
            bytes.extend([tag[0], tag[1], 0, 7]);
        }
        match self.to {
            IpAddr::V4(to) => {
                bytes.extend([0x08, 0x00, 0x45 + self.ip_options as u8, 0]);
                let len = 28 + 4 * self.ip_options + self.payload.len();
                bytes.extend((len as u16).to_be_bytes());
                bytes.extend([
                    0,
                    1,
                    self.fragment[0],
                    self.fragment[1],
                    64,
                    self.next_header,
                ]);
                bytes.extend([0, 0, 10, 0, 0, 1]);
                bytes.extend(to.octets());
                bytes.extend(vec![1; 4 * self.ip_options]);
            }
            IpAddr::V6(to) => {
                bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([self.next_header, 64]);
                bytes.extend(Ipv6Addr::LOCALHOST.octets());
                bytes.extend(to.octets());
            }
        }
        bytes.extend([0x30, 0x39]);
        bytes.extend(self.port.to_be_bytes());
        bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(&self.payload);
        bytes
    }
}

fn loaded() -> (Steering, OwnedFd) {
    let steering = Steering::load(&config(1)).expect("the program loads");
    let socket = socket();
    steering.insert(0, 0, socket.as_fd()).unwrap();
    assert!(steering.streams().unwrap().admit(KEY));
    (steering, socket)
}

/// The verdict, and the one outcome that was counted for it.
fn judged(steering: &Steering, packet: &[u8]) -> (u32, Outcomes) {
    let before = steering.outcomes().unwrap();
    let verdict = verdict(steering, packet);
    let after = steering.outcomes().unwrap();
    let since = |count: fn(&Outcomes) -> u64| count(&after) - count(&before);
    let counted = Outcomes {
        steered: since(|o| o.steered),
        no_socket: since(|o| o.no_socket),
        unknown_stream: since(|o| o.unknown_stream),
        not_ip: since(|o| o.not_ip),
        not_udp: since(|o| o.not_udp),
        fragment: since(|o| o.fragment),
        other_port: since(|o| o.other_port),
        other_address: since(|o| o.other_address),
        not_payload: since(|o| o.not_payload),
        malformed: since(|o| o.malformed),
    };
    (verdict, counted)
}

macro_rules! assert_judged {
    ($steering:expr, $packet:expr, $verdict:expr, $outcome:ident) => {
        let wanted = Outcomes {
            $outcome: 1,
            ..Outcomes::default()
        };
        assert_eq!(judged($steering, &$packet), ($verdict, wanted));
    };
}

#[test]
#[ignore = "needs root"]
fn payload_of_every_encapsulation_is_steered() {
    let (steering, _socket) = loaded();
    for to in [V4.into(), V6.into()] {
        for tags in [vec![], vec![[0x81, 0]], vec![[0x88, 0xa8], [0x81, 0]]] {
            for ip_options in [0, 1, 10] {
                let packet = Packet {
                    tags: tags.clone(),
                    ip_options: if to == IpAddr::V6(V6) { 0 } else { ip_options },
                    ..Packet::payload_to(to)
                };
                assert_judged!(&steering, packet.bytes(), REDIRECT, steered);
            }
        }
    }
    // Larger than a page: it comes in several buffers.
    let mut jumbo = Packet::payload_to(V4.into());
    jumbo.payload.resize(8900, 0);
    assert_judged!(&steering, jumbo.bytes(), REDIRECT, steered);
}

#[test]
#[ignore = "needs root"]
fn what_is_no_payload_goes_on_to_the_kernel_and_is_counted() {
    let (steering, _socket) = loaded();
    let v4 = Packet::payload_to(V4.into());
    let v6 = Packet::payload_to(V6.into());
    let mut arp = v4.bytes();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_judged!(&steering, arp, PASS, not_ip);
    let three_tags = Packet {
        tags: vec![[0x81, 0]; 3],
        ..v4.clone()
    };
    assert_judged!(&steering, three_tags.bytes(), PASS, not_ip);
    for ip in [&v4, &v6] {
        for next_header in [6, 1, 58, 0] {
            let packet = Packet {
                next_header,
                ..ip.clone()
            };
            assert_judged!(&steering, packet.bytes(), PASS, not_udp);
        }
        let elsewhere = Packet {
            port: PORT + 1,
            ..ip.clone()
        };
        assert_judged!(&steering, elsewhere.bytes(), PASS, other_port);
        let mut strange = ip.clone();
        strange.payload[0] ^= 1;
        assert_judged!(&steering, strange.bytes(), PASS, not_payload);
        let mut version = ip.bytes();
        version[14] = (version[14] & 0x0f) | 0x50;
        assert_judged!(&steering, version, PASS, malformed);
    }
    let mut short_header = v4.bytes();
    short_header[14] = 0x44;
    assert_judged!(&steering, short_header, PASS, malformed);
    // The first, a middle and the last fragment.
    for fragment in [[0x20, 0], [0x20, 100], [0, 200]] {
        let packet = Packet {
            fragment,
            ..v4.clone()
        };
        assert_judged!(&steering, packet.bytes(), PASS, fragment);
    }
    let packet = Packet {
        next_header: 44,
        ..v6
    };
    assert_judged!(&steering, packet.bytes(), PASS, fragment);
    for to in [
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3)),
        Ipv6Addr::LOCALHOST.into(),
    ] {
        assert_judged!(
            &steering,
            Packet::payload_to(to).bytes(),
            PASS,
            other_address
        );
    }
}

#[test]
#[ignore = "needs root"]
fn packets_of_streams_that_there_are_not_are_dropped() {
    let (steering, _socket) = loaded();
    let streams = steering.streams().unwrap();
    let with_key = |key: u64| {
        let mut packet = Packet::payload_to(V4.into());
        packet.payload[8..16].copy_from_slice(&key.to_le_bytes());
        packet.bytes()
    };
    // No key at all; others that have the place of one, or a place where there is none.
    for bit in 0..64 {
        assert_judged!(&steering, with_key(KEY ^ 1 << bit), DROP, unknown_stream);
    }
    for key in 0..32 {
        assert_judged!(&steering, with_key(key), DROP, unknown_stream);
    }
    let neighbour = KEY + 1;
    assert!(streams.admit(neighbour));
    assert!(!streams.admit(KEY ^ 1 << 63), "its place is taken");
    assert!(!streams.admit(0));
    for key in [KEY, neighbour] {
        assert_judged!(&steering, with_key(key), REDIRECT, steered);
    }
    streams.dismiss(KEY);
    assert_judged!(&steering, with_key(KEY), DROP, unknown_stream);
    assert_judged!(&steering, with_key(neighbour), REDIRECT, steered);
    assert!(streams.admit(KEY ^ 1 << 63), "its place is free");
    // Nobody else's packets are looked at.
    let mut foreign = Packet::payload_to(V4.into());
    foreign.port = PORT + 1;
    foreign.payload[8..16].fill(0);
    assert_judged!(&steering, foreign.bytes(), PASS, other_port);
}

#[test]
#[ignore = "needs root"]
fn streams_are_admitted_without_any_capability() {
    let (steering, _socket) = loaded();
    let streams = steering.streams().unwrap();
    let key = KEY + 1;
    let without = thread::spawn(move || {
        give_up_capabilities();
        assert!(streams.admit(key));
        streams.dismiss(KEY);
    });
    without.join().unwrap();
    let mut packet = Packet::payload_to(V4.into());
    assert_judged!(&steering, packet.bytes(), DROP, unknown_stream);
    packet.payload[8..16].copy_from_slice(&key.to_le_bytes());
    assert_judged!(&steering, packet.bytes(), REDIRECT, steered);
}

/// This thread is an ordinary user from now on.
fn give_up_capabilities() {
    // SAFETY: takes numbers only; the raw call concerns this thread alone.
    let code = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
    assert_eq!(code, 0);
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
}

#[test]
#[ignore = "needs root"]
fn a_packet_that_is_cut_short_anywhere_goes_on_to_the_kernel() {
    let (steering, _socket) = loaded();
    // What the program looks at of the UDP payload.
    const LOOKED_AT: usize = 18;
    for to in [V4.into(), V6.into()] {
        for tags in [vec![], vec![[0x81, 0]], vec![[0x88, 0xa8], [0x81, 0]]] {
            let packet = Packet {
                tags,
                ..Packet::payload_to(to)
            };
            let bytes = packet.bytes();
            let needed = packet.headers() + LOOKED_AT;
            // The kernel takes no shorter packet than an Ethernet header.
            for len in 14..=bytes.len() {
                let wanted = if len < needed { PASS } else { REDIRECT };
                assert_eq!(verdict(&steering, &bytes[..len]), wanted, "{len} bytes");
            }
        }
    }
}

#[test]
#[ignore = "needs root"]
fn streams_are_shared_out_over_the_sockets_of_a_queue() {
    const WORKERS: u32 = 3;
    let socket = socket();
    // With one socket only, just its streams are redirected.
    for worker in 0..WORKERS {
        let steering = Steering::load(&config(WORKERS)).unwrap();
        steering.insert(0, worker, socket.as_fd()).unwrap();
        assert!(steering.streams().unwrap().admit(KEY));
        let mut mine = 0;
        for stream in 0..200u16 {
            let mut packet = Packet::payload_to(V4.into());
            packet.payload[16..18].copy_from_slice(&stream.to_le_bytes());
            let wanted = worker_of(KEY, stream, WORKERS) == worker;
            mine += u32::from(wanted);
            let (verdict, counted) = judged(&steering, &packet.bytes());
            assert_eq!(verdict, if wanted { REDIRECT } else { PASS });
            assert_eq!(counted.no_socket, u64::from(!wanted));
        }
        assert!(
            (30..=110).contains(&mine),
            "worker {worker} has {mine} of 200"
        );
    }
}

#[test]
#[ignore = "needs root"]
fn limits_are_told() {
    let addresses = (0..=crate::MAX_ADDRESSES as u8).map(|n| IpAddr::V4([10, 1, 1, n].into()));
    let too_many = Config {
        addresses: addresses.collect(),
        ..config(1)
    };
    assert!(matches!(
        Steering::load(&too_many),
        Err(Error::Addresses {
            count: 65,
            most: 64
        })
    ));
    let (steering, _socket) = loaded();
    assert!(matches!(
        steering.insert(1, 0, socket().as_fd()),
        Err(Error::Map { .. })
    ));
}

/// The last queue of the largest NICs, and the last of many workers.
#[test]
#[ignore = "needs root"]
fn every_queue_that_is_asked_for_has_room_for_its_sockets() {
    for (queues, workers) in [(129, 8), (1, 256), (4096, 3)] {
        let steering = Steering::load(&Config {
            queues,
            ..config(workers)
        })
        .unwrap();
        let last = steering.insert(queues - 1, workers - 1, socket().as_fd());
        last.unwrap_or_else(|error| panic!("{queues} × {workers}: {error}"));
    }
}

#[test]
#[ignore = "needs root"]
fn addresses_come_and_go_without_any_capability() {
    let (steering, _socket) = loaded();
    let addresses = steering.addresses().unwrap();
    let number = |n: u8| IpAddr::V4(Ipv4Addr::new(10, 0, 1, n));
    let to = |address| Packet::payload_to(address).bytes();
    thread::spawn(move || {
        give_up_capabilities();
        // Adding addresses after the first, in the middle, and up to the maximum.
        assert!(addresses.set(&[V4.into(), number(1), V6.into(), number(2)]));
        assert_judged!(&steering, to(number(1)), REDIRECT, steered);
        assert_judged!(&steering, to(number(2)), REDIRECT, steered);
        assert!(addresses.set(&[number(2), V6.into()]));
        for (address, redirected) in [
            (V4.into(), false),
            (number(1), false),
            (number(2), true),
            (V6.into(), true),
        ] {
            let wanted = if redirected { REDIRECT } else { PASS };
            assert_eq!(verdict(&steering, &to(address)), wanted, "{address}");
        }
        let many: Vec<_> = (0..64).map(number).collect();
        assert!(addresses.set(&many));
        assert!(
            many.iter()
                .all(|address| verdict(&steering, &to(*address)) == REDIRECT)
        );
        assert_judged!(&steering, to(number(64)), PASS, other_address);
        // One more has no room; the others keep their slots.
        let too_many: Vec<_> = (0..65).map(number).collect();
        assert!(!addresses.set(&too_many));
        assert_judged!(&steering, to(number(63)), REDIRECT, steered);
        // A mapped address counts as IPv4, and a free slot matches no packet.
        let mapped = Ipv4Addr::new(10, 0, 0, 2).to_ipv6_mapped();
        assert!(addresses.set(&[number(9), mapped.into()]));
        assert_judged!(&steering, to(V4.into()), REDIRECT, steered);
        assert_judged!(
            &steering,
            to(Ipv6Addr::UNSPECIFIED.into()),
            PASS,
            other_address
        );
        assert!(addresses.set(&[]));
        assert_judged!(&steering, to(V4.into()), PASS, other_address);
        assert_judged!(
            &steering,
            to(Ipv6Addr::UNSPECIFIED.into()),
            PASS,
            other_address
        );
    })
    .join()
    .unwrap();
}

/// Runs in a network namespace of its own, which goes with the thread.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let inside = move || {
        // SAFETY: takes a number only; concerns this thread alone.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        test();
    };
    thread::spawn(inside).join().unwrap();
}

/// `ip` with these arguments.
pub(crate) fn ip(arguments: &str) {
    let made = Command::new("ip").args(arguments.split(' ')).status();
    assert!(made.unwrap().success(), "ip {arguments}");
}

/// With a pair of interfaces, a0 and a1.
fn with_pair(test: impl FnOnce() + Send + 'static) {
    in_namespace(|| {
        ip("link add a0 type veth peer name a1");
        test();
    });
}

/// An XDP program that is not ours.
fn foreign() -> OwnedFd {
    let instruction = |code, imm| libbpf_sys::bpf_insn {
        code,
        imm,
        ..Default::default()
    };
    // r0 = XDP_PASS; exit
    let instructions = [instruction(0xb7, PASS as i32), instruction(0x95, 0)];
    let (name, licence): (&CStr, &CStr) = (c"foreign", c"GPL");
    // SAFETY: all pointers are to what outlives the call; the count is that of the instructions.
    let fd = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_XDP,
            name.as_ptr(),
            licence.as_ptr(),
            instructions.as_ptr(),
            instructions.len() as libbpf_sys::size_t,
            std::ptr::null_mut(),
        )
    };
    check(fd).unwrap();
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn attach_by_netlink(program: &OwnedFd, interface: &str) {
    let index = index_of(interface).unwrap();
    // SAFETY: the descriptor is open; no options are given.
    let code =
        unsafe { libbpf_sys::bpf_xdp_attach(index, program.as_raw_fd(), 0, std::ptr::null()) };
    check(code).unwrap();
}

fn load() -> Steering {
    Steering::load(&config(1)).unwrap()
}

#[test]
#[ignore = "needs root"]
fn the_program_comes_in_each_mode_and_goes_with_its_owner() {
    with_pair(|| {
        for (asked, got) in [
            (Mode::Auto, Mode::Native),
            (Mode::Native, Mode::Native),
            (Mode::Generic, Mode::Generic),
        ] {
            let mut steering = load();
            let told = steering.attach("a0", asked, false).unwrap();
            assert_eq!(told.mode, got);
            assert_eq!(told.name, "penstock_steer");
            assert_eq!(attached("a0").unwrap(), Some(told));
            drop(steering);
            assert_eq!(attached("a0").unwrap(), None);
        }
        let error = load().attach("nowhere", Mode::Auto, false).unwrap_err();
        assert!(matches!(error, Error::NoInterface { .. }), "{error}");
        // The loopback interface has no native XDP.
        let error = load().attach("lo", Mode::Native, false).unwrap_err();
        assert!(error.to_string().contains("--xdp-mode generic"), "{error}");
    });
}

#[test]
#[ignore = "needs root"]
fn a_second_broker_is_told_of_the_first() {
    with_pair(|| {
        let mut first = load();
        let Attached { id, .. } = first.attach("a0", Mode::Auto, false).unwrap();
        let error = load().attach("a0", Mode::Auto, false).unwrap_err();
        assert!(
            matches!(&error, Error::OtherBroker { id: told, .. } if *told == id),
            "{error}"
        );
        // Neither harmed the first.
        assert_eq!(attached("a0").unwrap().unwrap().id, id);
        let mut second = load();
        second.attach("a0", Mode::Auto, true).unwrap();
        assert_ne!(attached("a0").unwrap().unwrap().id, id);
        // The first's link is empty by now: its end takes nothing off.
        drop(first);
        assert!(attached("a0").unwrap().is_some());
    });
}

#[test]
#[ignore = "needs root"]
fn a_foreign_program_stays_unless_forced() {
    with_pair(|| {
        let program = foreign();
        attach_by_netlink(&program, "a0");
        let found = attached("a0").unwrap().unwrap();
        assert_eq!(found.name, "foreign");
        let mut steering = load();
        let error = steering.attach("a0", Mode::Auto, false).unwrap_err();
        assert!(matches!(&error, Error::Occupied { .. }), "{error}");
        assert!(error.to_string().contains("--force"), "{error}");
        assert_eq!(attached("a0").unwrap(), Some(found));
        let ours = steering.attach("a0", Mode::Auto, true).unwrap();
        assert_eq!(ours.name, "penstock_steer");
    });
}

#[test]
#[ignore = "loads a program into the kernel: needs root"]
fn calls_of_this_process_are_counted_by_thread_and_number() {
    let calls = Calls::count(std::process::id()).unwrap();
    let thread = thread::spawn(|| {
        let mut ends = [0; 2];
        // SAFETY: the call writes two descriptors; all below take them and memory of their size.
        unsafe {
            assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
            let mut bytes = [7_u8; 100];
            for _ in 0..5 {
                assert_eq!(libc::write(ends[1], bytes.as_ptr().cast(), 100), 100);
                assert_eq!(libc::read(ends[0], bytes.as_mut_ptr().cast(), 100), 100);
            }
            assert_eq!(libc::read(-1, bytes.as_mut_ptr().cast(), 100), -1);
            libc::close(ends[0]);
            libc::close(ends[1]);
            libc::gettid() as u32
        }
    })
    .join()
    .unwrap();
    let sums = calls.finish().unwrap();
    let of = |number: i64| {
        let mut found = sums
            .iter()
            .filter(|sum| sum.thread == thread && i64::from(sum.number) == number);
        *found.next().expect("the thread made this call")
    };
    let (read, write) = (of(libc::SYS_read), of(libc::SYS_write));
    assert_eq!((read.count, read.failed, read.result), (6, 1, 500));
    assert_eq!((write.count, write.failed, write.result), (5, 0, 500));
    assert!(read.ns > 0);
}
