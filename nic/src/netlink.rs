//! The interfaces and addresses of this network namespace, as reported by rtnetlink(7).
//!
//! A netlink socket belongs to the namespace that it was opened in. /sys/class/net shows the namespace
//! that /sys was mounted in, and getifaddrs(3) uses labels such as eth0:1, so neither is used here.

use std::fmt::Write;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Prop};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// An alternative name of an interface (linux/if_link.h); the kernel also finds an ordinary name under
/// this attribute.
const IFLA_ALT_IFNAME: u16 = 53;
/// Message flag: the dump is inconsistent, because something changed meanwhile.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Number of retries of an inconsistent dump.
const ATTEMPTS: usize = 10;
/// `ARPHRD_ETHER` and `ARPHRD_LOOPBACK` (linux/if_arp.h): packets begin with an Ethernet header.
pub(crate) const ETHERNET: u16 = 1;
pub(crate) const LOOPBACK: u16 = 772;

/// State of an interface's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Packets can come.
    Up,
    /// Switched on, but nothing is at the other end.
    NoCarrier,
    /// Switched off (`ip link set dev ... down`).
    Down,
    /// The interface has been deleted, or moved to another namespace.
    Gone,
}

/// An interface, as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index in this network namespace.
    pub index: u32,
    /// Its name, not an alternative one.
    pub name: String,
    /// Its other names.
    pub alternative_names: Vec<String>,
    /// Its kind, such as `bond`, if it is virtual; `None` for hardware.
    pub kind: Option<String>,
    /// Its hardware type (`ARPHRD_`, linux/if_arp.h).
    pub link_type: u16,
    /// Its master, if it is a port of a bridge, bond, team or VRF.
    pub master: Option<u32>,
    /// Hardware address, in hexadecimal with colons.
    pub address: String,
    /// MTU, bytes.
    pub mtu: u32,
    /// Number of receive queues that the kernel has room for.
    pub rx_queues: u32,
    /// State of its link.
    pub link: Link,
}

impl Interface {
    fn of(message: LinkMessage) -> Option<Self> {
        let flags = message.header.flags;
        let link = match (
            flags.contains(LinkFlags::Up),
            flags.contains(LinkFlags::Running),
        ) {
            (false, _) => Link::Down,
            (_, false) => Link::NoCarrier,
            _ => Link::Up,
        };
        let mut found = Self {
            index: message.header.index,
            name: String::new(),
            alternative_names: Vec::new(),
            kind: None,
            link_type: message.header.link_layer_type.into(),
            master: None,
            address: String::new(),
            mtu: 0,
            rx_queues: 1,
            link,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => found.name = name,
                LinkAttribute::PropList(names) => found.alternative_names = alternative(names),
                LinkAttribute::LinkInfo(infos) => {
                    found.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                LinkAttribute::Controller(master) => found.master = Some(master),
                LinkAttribute::Address(bytes) => found.address = hexadecimal(&bytes),
                LinkAttribute::Mtu(mtu) => found.mtu = mtu,
                LinkAttribute::NumRxQueues(queues) => found.rx_queues = queues,
                _ => {}
            }
        }
        (!found.name.is_empty()).then_some(found)
    }
}

fn alternative(names: Vec<Prop>) -> Vec<String> {
    let names = names.into_iter().filter_map(|name| match name {
        Prop::AltIfName(name) => Some(name),
        _ => None,
    });
    names.collect()
}

fn hexadecimal(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        let colon = if text.is_empty() { "" } else { ":" };
        write!(text, "{colon}{byte:02x}").expect("a string takes everything");
    }
    text
}

/// A socket for requests to the kernel.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // The kernel then restricts a dump to what was requested; before Linux 4.20 it ignored that, so
        // the answers are checked in any case.
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Finds an interface by any of its names; the error is `ENODEV` if there is none.
    pub(crate) fn find(&mut self, name: &str) -> io::Result<Interface> {
        let mut question = LinkMessage::default();
        let bytes = [name.as_bytes(), &[0]].concat();
        let name = DefaultNla::new(IFLA_ALT_IFNAME, bytes);
        question.attributes.push(LinkAttribute::Other(name));
        self.one(question)
    }

    /// Finds an interface by its index; the error is `ENODEV` if there is none.
    pub(crate) fn by_index(&mut self, index: u32) -> io::Result<Interface> {
        let mut question = LinkMessage::default();
        question.header.index = index;
        self.one(question)
    }

    fn one(&mut self, question: LinkMessage) -> io::Result<Interface> {
        let answers = self.ask(RouteNetlinkMessage::GetLink(question), NLM_F_ACK)?;
        links(answers).next().ok_or_else(unexpected)
    }

    /// All interfaces with names in UTF-8.
    pub(crate) fn interfaces(&mut self) -> io::Result<Vec<Interface>> {
        let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
        Ok(links(self.ask(question, NLM_F_DUMP)?).collect())
    }

    /// IP addresses of an interface, whatever their labels.
    pub(crate) fn addresses(&mut self, index: u32) -> io::Result<Vec<Address>> {
        let mut question = AddressMessage::default();
        question.header.family = AddressFamily::Unspec;
        question.header.index = index;
        let answers = self.ask(RouteNetlinkMessage::GetAddress(question), NLM_F_DUMP)?;
        let addresses = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) if message.header.index == index => {
                Address::of(&message)
            }
            _ => None,
        });
        let mut addresses: Vec<_> = addresses.collect();
        addresses.sort_unstable();
        addresses.dedup();
        Ok(addresses)
    }

    fn ask(
        &mut self,
        question: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut message = NetlinkMessage::from(question);
        message.header.flags = NLM_F_REQUEST | flags;
        for _ in 0..ATTEMPTS {
            self.sequence += 1;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let mut bytes = vec![0; message.buffer_len()];
            message.serialize(&mut bytes);
            self.socket.send(&bytes, 0)?;
            if let Some(answers) = self.answers()? {
                return Ok(answers);
            }
        }
        Err(io::Error::other(
            "interfaces change faster than they can be listed",
        ))
    }

    /// All answers to the last request; `None` if something changed meanwhile.
    fn answers(&self) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        let (mut answers, mut whole) = (Vec::new(), true);
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for bytes in messages(&bytes) {
                // A name that is not UTF-8 makes a message unreadable; no user can ask for it either.
                let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) else {
                    continue;
                };
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Done(_) => return Ok(whole.then_some(answers)),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    // The acknowledgement after a single answer.
                    NetlinkPayload::Error(_) => return Ok(Some(answers)),
                    _ => return Err(unexpected()),
                }
            }
        }
    }
}

/// The messages of one datagram (`NLMSG_NEXT`).
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let message = bytes.get(..len).filter(|_| len >= 16)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn links(answers: Vec<RouteNetlinkMessage>) -> impl Iterator<Item = Interface> {
    answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(message) => Interface::of(message),
        _ => None,
    })
}

fn unexpected() -> io::Error {
    io::Error::other("the kernel answers something else over rtnetlink")
}

/// An IP address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Whether it is valid beyond this host, unlike 127.0.0.1.
    pub beyond_host: bool,
}

impl Address {
    fn of(message: &AddressMessage) -> Option<Self> {
        let failed = message.attributes.iter().any(|attribute| {
            matches!(attribute, AddressAttribute::Flags(flags) if flags.contains(AddressFlags::Dadfailed))
        });
        if failed || message.header.flags.contains(AddressHeaderFlags::Dadfailed) {
            return None;
        }
        let (mut local, mut address) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                // On a point-to-point link the other address is the peer's.
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => address = Some(*ip),
                _ => {}
            }
        }
        let ip = local.or(address)?;
        Some(Self {
            ip,
            beyond_host: message.header.scope != AddressScope::Host && !ip.is_loopback(),
        })
    }
}

/// All interfaces of this network namespace.
///
/// # Errors
/// The kernel's error.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    Netlink::open()?.interfaces()
}

/// IP addresses of an interface, by its index.
///
/// # Errors
/// The kernel's error.
pub fn addresses(index: u32) -> io::Result<Vec<Address>> {
    Netlink::open()?.addresses(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_by_name_and_number() {
        let mut netlink = Netlink::open().unwrap();
        let lo = netlink.find("lo").unwrap();
        assert_eq!((lo.name.as_str(), lo.link_type), ("lo", LOOPBACK));
        assert_eq!(lo.address, "00:00:00:00:00:00");
        assert_eq!(netlink.by_index(lo.index).unwrap(), lo);
        assert!(netlink.interfaces().unwrap().contains(&lo));
        for wrong in ["no-such-iface", "", &"x".repeat(500)] {
            assert!(netlink.find(wrong).is_err(), "{wrong}");
        }
        let error = netlink.by_index(u32::MAX >> 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        // An error does not affect the next answer.
        assert_eq!(netlink.find("lo").unwrap(), lo);
    }

    #[test]
    fn a_datagram_is_taken_apart_whatever_its_lengths_say() {
        let message = |len: u32| [&len.to_ne_bytes()[..], &[7; 14]].concat();
        let both = [message(18), vec![0; 2], message(18)].concat();
        assert_eq!(messages(&both).count(), 2);
        for (len, count) in [(0, 0), (15, 0), (16, 1), (18, 1), (19, 0), (u32::MAX, 0)] {
            assert_eq!(messages(&message(len)).count(), count, "{len}");
        }
        assert_eq!(messages(&[]).count(), 0);
    }
}
