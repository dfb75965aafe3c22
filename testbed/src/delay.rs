//! `--delay`: delays packets to the brokers, like a long line.
//!
//! In the emulation namespace a packet socket receives the packets of each link. Its ring holds them until
//! they are due. With segmentation offload a packet has up to 64 KiB here, and is segmented afterwards if the
//! broker's side has no offload.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use fastrand::Rng;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send, setsockopt, sockopt};
use nix::sys::time::{TimeSpec, TimeVal, TimeValLike};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Maximum delay: the packets of a longer one would not fit in the queue.
const MAX_DELAY: Duration = Duration::from_millis(200);
/// Size of the queue, bytes, including the kernel's overhead per packet.
const QUEUE_BYTES: usize = 128 << 20;
/// Maximum packet: virtio-net header, Ethernet header and 64 KiB of IP.
const PACKET_BYTES: usize = 68 << 10;
/// Interval at which an idle thread checks whether it should stop.
const STOP_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Delay of the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delay {
    /// Minimum delay.
    minimum: Duration,
    /// Maximum random addition; packets stay in order.
    jitter: Duration,
}

impl Delay {
    /// Minimum delay of each packet, µs.
    pub fn micros(self) -> u64 {
        self.minimum.as_micros() as u64
    }

    fn draw(self, rng: &mut Rng) -> Duration {
        self.minimum + self.jitter.mul_f64(rng.f64())
    }
}

/// Why a delay is invalid.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("not a delay from 100us to {} ms, such as 10ms, 500us or, with jitter, 10ms+5ms", MAX_DELAY.as_millis())]
pub struct InvalidDelay;

impl FromStr for Delay {
    type Err = InvalidDelay;

    fn from_str(text: &str) -> Result<Self, InvalidDelay> {
        let (minimum, jitter) = match text.split_once('+') {
            Some((minimum, jitter)) => (time(minimum)?, time(jitter)?),
            None => (time(text)?, Duration::ZERO),
        };
        let possible = minimum >= Duration::from_micros(100) && minimum + jitter <= MAX_DELAY;
        possible
            .then_some(Self { minimum, jitter })
            .ok_or(InvalidDelay)
    }
}

fn time(text: &str) -> Result<Duration, InvalidDelay> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1000),
        None => (text.strip_suffix("us").ok_or(InvalidDelay)?, 1),
    };
    let number: u32 = number.parse().map_err(|_| InvalidDelay)?;
    Ok(Duration::from_micros(u64::from(number) * unit))
}

/// Report of the delay lines.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DelayReport {
    /// Addition to the round-trip time.
    pub delay_us: u64,
    /// One for each broker.
    pub links: Vec<DelayLineCount>,
}

/// One delay line.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct DelayLineCount {
    /// The broker that it leads to.
    pub broker: usize,
    /// Packets, of up to 64 KiB with offload.
    pub packets: u64,
    /// Packets dropped because the queue was full.
    pub dropped: u64,
}

/// Forwards packets from one interface to another of its namespace.
#[derive(Debug)]
pub struct DelayLine {
    broker: usize,
    input: OwnedFd,
    output: OwnedFd,
    delay: Delay,
}

impl DelayLine {
    /// Opens the delay line to a broker, between two interfaces of this thread's namespace.
    pub fn open(broker: usize, input: &str, output: &str, delay: Delay) -> Result<Self> {
        let receiver = packet_socket(input, libc::ETH_P_ALL as u16)?;
        let what = "cannot set up a packet socket";
        option(&receiver, libc::PACKET_IGNORE_OUTGOING, 1).context(what)?;
        setsockopt(&receiver, sockopt::RcvBufForce, &QUEUE_BYTES).context(what)?;
        setsockopt(&receiver, sockopt::ReceiveTimestampns, &true).context(what)?;
        let timeout = TimeVal::microseconds(STOP_CHECK_INTERVAL.as_micros() as i64);
        setsockopt(&receiver, sockopt::ReceiveTimeout, &timeout).context(what)?;
        Ok(Self {
            broker,
            input: receiver,
            // Protocol 0: it receives nothing.
            output: packet_socket(output, 0)?,
            delay,
        })
    }

    /// Forwards packets until `stop` is set.
    pub fn run(&self, stop: &AtomicBool) -> Result<DelayLineCount> {
        let mut packet = vec![0; PACKET_BYTES];
        let mut control = nix::cmsg_space!(TimeSpec);
        let mut rng = Rng::with_seed(self.broker as u64);
        let mut count = DelayLineCount {
            broker: self.broker,
            ..DelayLineCount::default()
        };
        while !stop.load(Ordering::Relaxed) {
            let Some((len, arrived)) = self.receive(&mut packet, &mut control)? else {
                continue;
            };
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            if let Some(rest) = (arrived + self.delay.draw(&mut rng)).checked_sub(now) {
                thread::sleep(rest);
            }
            match send(self.output.as_raw_fd(), &packet[..len], MsgFlags::empty()) {
                Ok(_) => count.packets += 1,
                Err(_) => count.dropped += 1,
            }
        }
        count.dropped += u64::from(self.dropped()?);
        Ok(count)
    }

    /// Receives a packet and its arrival time, unless none arrives soon.
    fn receive(&self, packet: &mut [u8], control: &mut [u8]) -> Result<Option<(usize, Duration)>> {
        let mut parts = [IoSliceMut::new(packet)];
        let fd = self.input.as_raw_fd();
        let received = match recvmsg::<()>(fd, &mut parts, Some(control), MsgFlags::empty()) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(error) => return Err(error).context("cannot receive packets to delay"),
        };
        let arrived = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
            _ => None,
        });
        let arrived = arrived.context("the kernel does not say when a packet arrived")?;
        Ok(Some((received.bytes, arrived)))
    }

    /// Packets dropped because the queue was full.
    fn dropped(&self) -> io::Result<u32> {
        let mut stats = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut len = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the value is the option's struct, whose address and size are given.
        let code = unsafe {
            libc::getsockopt(
                self.input.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut len,
            )
        };
        check(code).map(|()| stats.tp_drops)
    }
}

/// Opens a packet socket on an interface, with a virtio-net header before each packet.
fn packet_socket(interface: &str, protocol: u16) -> Result<OwnedFd> {
    let what = || format!("cannot open a packet socket on {interface}");
    let index = if_nametoindex(interface).with_context(what)?;
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    check(fd).with_context(what)?;
    // SAFETY: the descriptor is new, and only this function has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    option(&socket, libc::PACKET_VNET_HDR, 1).with_context(what)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address outlives the call, and its size is given.
    let code = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    check(code).with_context(what)?;
    Ok(socket)
}

fn option(socket: &OwnedFd, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the option's value is an int, whose address and size are given.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    })
}

fn check(code: libc::c_int) -> io::Result<()> {
    if code < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_have_a_unit_and_bounds() {
        let parsed = |text: &str| {
            text.parse()
                .map(|delay: Delay| [delay.minimum, delay.jitter])
        };
        let micros = |times: [u64; 2]| Ok(times.map(Duration::from_micros));
        assert_eq!(parsed("10ms"), micros([10_000, 0]));
        assert_eq!(parsed("500us"), micros([500, 0]));
        assert_eq!(parsed("10ms+500us"), micros([10_000, 500]));
        for wrong in [
            "10",
            "ms",
            "0ms",
            "201ms",
            "-1ms",
            "1s",
            "1.5ms",
            "99us",
            "10ms+",
            "+1ms",
            "1ms+1",
            "190ms+11ms",
        ] {
            assert_eq!(parsed(wrong), Err(InvalidDelay), "{wrong}");
        }
    }

    #[test]
    fn jitter_makes_a_delay_longer_by_chance() {
        let delay: Delay = "1ms+2ms".parse().unwrap();
        let mut rng = Rng::with_seed(1);
        let drawn: Vec<_> = (0..1000).map(|_| delay.draw(&mut rng)).collect();
        let between = Duration::from_millis(1)..=Duration::from_millis(3);
        assert!(drawn.iter().all(|time| between.contains(time)));
        let half = Duration::from_millis(2);
        assert!(drawn.iter().any(|time| *time < half) && drawn.iter().any(|time| *time > half));
    }
}
