//! Questions to the driver (`SIOCETHTOOL`, linux/ethtool.h). Nothing is changed here.
//!
//! The crates for this lack receive hashing and rules, which ethtool's netlink family lacks as well.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use zerocopy::IntoBytes;

const GDRVINFO: u32 = 0x03;
const GRINGPARAM: u32 = 0x10;
const GSTRINGS: u32 = 0x1b;
const GSTATS: u32 = 0x1d;
const GRXFH: u32 = 0x29;
const GRXCLSRLCNT: u32 = 0x2e;
const GRXCLSRULE: u32 = 0x2f;
const GRXCLSRLALL: u32 = 0x30;
const GSSET_INFO: u32 = 0x37;
const GRXFHINDIR: u32 = 0x38;
const GFEATURES: u32 = 0x3a;
const GCHANNELS: u32 = 0x3c;
/// Kinds of flows.
pub(crate) const UDP_V4_FLOW: u32 = 0x02;
pub(crate) const UDP_V6_FLOW: u32 = 0x06;
/// Sets of names: of the driver's counters, and of features.
const COUNTERS: u32 = 1;
const FEATURES: u32 = 4;
/// Words of a name.
const NAME: usize = 8;
/// Words of `struct ethtool_drvinfo`.
const DRVINFO: usize = 49;
/// Words of `struct ethtool_rxnfc`, and where its parts lie.
const RXNFC: usize = 48;
const FLOW_TYPE: usize = 4;
const QUEUE: std::ops::Range<usize> = 42..44;
const LOCATION: usize = 44;
const RULES: usize = 46;
const LOCATIONS: usize = 47;
/// Bytes of it that say what a packet must be like, and which bits of that count.
const MASK: std::ops::Range<usize> = 92..144;
const FROM_VALUE_TO_MASK: usize = 72;
/// More words than any driver's table or list of features has.
const MANY: u32 = 4096;

/// A rule of the driver: UDP packets to a port go to a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Over IPv6, else IPv4.
    pub v6: bool,
    /// The port.
    pub port: u16,
    /// The receive queue.
    pub queue: u32,
}

impl Rule {
    /// Any other rule is none.
    fn of(words: &[u32; RXNFC]) -> Option<Self> {
        let (v6, port) = match words[FLOW_TYPE] {
            UDP_V4_FLOW => (false, 30),
            UDP_V6_FLOW => (true, 54),
            _ => return None,
        };
        let bytes = words.as_bytes();
        let mask = port + FROM_VALUE_TO_MASK..port + FROM_VALUE_TO_MASK + 2;
        let counts = |at| if mask.contains(&at) { 0xff } else { 0 };
        let is_port_alone = MASK.into_iter().all(|at| bytes[at] == counts(at));
        let mut queue = 0u64;
        queue
            .as_mut_bytes()
            .copy_from_slice(words[QUEUE].as_bytes());
        // Beyond that it is a virtual function's, or dropped.
        let queue = u32::try_from(queue).ok()?;
        is_port_alone.then(|| Self {
            v6,
            port: u16::from_be_bytes([bytes[port], bytes[port + 1]]),
            queue,
        })
    }
}

/// Asks about one interface. Drivers that do not know an answer give `EOPNOTSUPP`.
#[derive(Debug)]
pub(crate) struct Ethtool {
    socket: UnixDatagram,
    request: libc::ifreq,
}

impl Ethtool {
    pub(crate) fn of(interface: &str) -> io::Result<Self> {
        // SAFETY: all of its fields are numbers, or pointers that are not followed while they are 0.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays 0.
        if interface.len() >= request.ifr_name.len() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *to = from as libc::c_char;
        }
        Ok(Self {
            // Any socket will do; this one needs no network.
            socket: UnixDatagram::unbound()?,
            request,
        })
    }

    /// Flags of the interface (`IFF_UP` and others, netdevice(7)).
    pub(crate) fn flags(&self) -> io::Result<i32> {
        let mut request = self.request;
        // SAFETY: SIOCGIFFLAGS reads and writes one ifreq, which this is.
        let code = unsafe {
            libc::ioctl(
                self.socket.as_raw_fd(),
                libc::SIOCGIFFLAGS as _,
                &raw mut request,
            )
        };
        match code {
            // SAFETY: the kernel has filled in this field.
            0 => Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags })),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The driver's name.
    pub(crate) fn name(&self) -> io::Result<String> {
        let mut words = [0; DRVINFO];
        words[0] = GDRVINFO;
        self.ask(&mut words)?;
        Ok(text(words[1..1 + NAME].as_bytes()))
    }

    /// Numbers of channels: `max_rx, max_tx, max_other, max_combined`, then as many present ones.
    pub(crate) fn channels(&self) -> io::Result<[u32; 8]> {
        self.eight(GCHANNELS)
    }

    /// Ring sizes: `rx, rx_mini, rx_jumbo, tx` at most, then as many present ones.
    pub(crate) fn rings(&self) -> io::Result<[u32; 8]> {
        self.eight(GRINGPARAM)
    }

    /// Receive queue by hash value.
    pub(crate) fn indirection(&self) -> io::Result<Vec<u32>> {
        let mut words = vec![GRXFHINDIR, 0];
        self.ask(&mut words)?;
        let len = words[1].min(MANY) as usize;
        words.resize(2 + len, 0);
        self.ask(&mut words)?;
        Ok(words.split_off(2))
    }

    /// What a flow's hash is made of, as bits (`RXH_`).
    pub(crate) fn flow_hash(&self, flow: u32) -> io::Result<u64> {
        let mut words = [0; RXNFC];
        words[..2].copy_from_slice(&[GRXFH, flow]);
        self.ask(&mut words)?;
        let mut bits = 0u64;
        bits.as_mut_bytes().copy_from_slice(words[2..4].as_bytes());
        Ok(bits)
    }

    /// Rules that send UDP packets to a port to one queue; an error where the driver has no rules.
    pub(crate) fn rules(&self) -> io::Result<Vec<Rule>> {
        let mut words = [0; RXNFC];
        words[0] = GRXCLSRLCNT;
        self.ask(&mut words)?;
        let count = words[RULES].min(MANY);
        let mut all = vec![0; LOCATIONS + count as usize + 1];
        all[0] = GRXCLSRLALL;
        all[RULES] = count;
        self.ask(&mut all)?;
        let places = &all[LOCATIONS..LOCATIONS + count.min(all[RULES]) as usize];
        let rules = places.iter().filter_map(|place| {
            let mut words = [0; RXNFC];
            words[0] = GRXCLSRULE;
            words[LOCATION] = *place;
            // It may have been removed just now.
            self.ask(&mut words).ok()?;
            Rule::of(&words)
        });
        Ok(rules.collect())
    }

    /// Each feature's name, whether it is on, and whether it can be changed.
    pub(crate) fn features(&self) -> io::Result<Vec<(String, bool, bool)>> {
        let names = self.names(FEATURES)?;
        let blocks = names.len().div_ceil(32);
        let mut states = vec![0; 2 + 4 * blocks];
        states[..2].copy_from_slice(&[GFEATURES, blocks as u32]);
        self.ask(&mut states)?;
        let features = names.into_iter().enumerate().map(|(number, name)| {
            let (block, bit) = (2 + 4 * (number / 32), 1 << (number % 32));
            // Masks: available, requested, active, never changed.
            let is = |mask: usize| states[block + mask] & bit != 0;
            (name, is(2), is(0) && !is(3))
        });
        Ok(features.collect())
    }

    /// The driver's own counters, by name.
    pub(crate) fn counters(&self) -> io::Result<Vec<(String, u64)>> {
        let names = self.names(COUNTERS)?;
        // The kernel writes as many as there are then: more, if queues have just been added.
        let mut words = vec![0; 2 + 2 * (names.len() + MANY as usize)];
        words[..2].copy_from_slice(&[GSTATS, names.len() as u32]);
        self.ask(&mut words)?;
        let values = words[2..].chunks_exact(2).map(|pair| {
            let mut value = 0u64;
            value.as_mut_bytes().copy_from_slice(pair.as_bytes());
            value
        });
        Ok(names.into_iter().zip(values).collect())
    }

    /// A set of names.
    fn names(&self, set: u32) -> io::Result<Vec<String>> {
        let mut wanted = [0u32; 2];
        wanted
            .as_mut_bytes()
            .copy_from_slice((1u64 << set).as_bytes());
        let mut count = [GSSET_INFO, 0, wanted[0], wanted[1], 0];
        self.ask(&mut count)?;
        let count = count[4].min(MANY) as usize;
        let mut names = vec![0; 3 + count * NAME];
        names[..3].copy_from_slice(&[GSTRINGS, set, count as u32]);
        self.ask(&mut names)?;
        let names = names[3..].chunks_exact(NAME);
        Ok(names.map(|name| text(name.as_bytes())).collect())
    }

    fn eight(&self, command: u32) -> io::Result<[u32; 8]> {
        let mut words = [0; 9];
        words[0] = command;
        self.ask(&mut words)?;
        Ok(std::array::from_fn(|index| words[index + 1]))
    }

    /// Every command's struct begins with its number, and those with an array say how long it is.
    fn ask(&self, words: &mut [u32]) -> io::Result<()> {
        let mut request = self.request;
        request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
        // SAFETY: the kernel reads and writes the struct of the command in the first word. Each
        // caller's words are as many as that struct has; where it ends in an array, the kernel
        // writes no more elements than the struct says, for which there is room.
        let code = unsafe {
            libc::ioctl(
                self.socket.as_raw_fd(),
                libc::SIOCETHTOOL as _,
                &raw mut request,
            )
        };
        match code {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `ethtool -N eth1 flow-type udp4 dst-port 1214 action 3` makes it, or with udp6.
    fn words(v6: bool) -> [u32; RXNFC] {
        let mut words = [0u32; RXNFC];
        words[FLOW_TYPE] = if v6 { UDP_V6_FLOW } else { UDP_V4_FLOW };
        let at = if v6 { 54 } else { 30 };
        let bytes = words.as_mut_bytes();
        bytes[at..at + 2].copy_from_slice(&1214u16.to_be_bytes());
        bytes[at + 72..at + 74].copy_from_slice(&[0xff; 2]);
        bytes[168..176].copy_from_slice(&3u64.to_ne_bytes());
        words
    }

    #[test]
    fn rules_for_a_port_are_told_from_others() {
        for v6 in [false, true] {
            let rule = Rule {
                v6,
                port: 1214,
                queue: 3,
            };
            assert_eq!(Rule::of(&words(v6)), Some(rule));
        }
        let mut of_one_sender = words(false);
        of_one_sender[23] = u32::MAX;
        assert_eq!(Rule::of(&of_one_sender), None);
        let mut tcp = words(false);
        tcp[FLOW_TYPE] = 1;
        assert_eq!(Rule::of(&tcp), None);
        let mut dropped = words(false);
        dropped[QUEUE].fill(u32::MAX);
        assert_eq!(Rule::of(&dropped), None);
    }
}
