//! What the kernel does with packets to a broker: which interface they leave through, and to which
//! hardware address. Asked with rtnetlink(7), which needs no privilege.

use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{DefaultNla, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::{LinkAttribute, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteVia};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr as Port};

/// An alternative name of an interface (linux/if_link.h); the kernel also finds an ordinary name under
/// this attribute.
const IFLA_ALT_IFNAME: u16 = 53;

/// A hardware address of Ethernet.
pub(crate) type Mac = [u8; 6];

/// The first leg of the way to a broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    /// Interface's name and index.
    pub(crate) interface: String,
    pub(crate) index: u32,
    /// Its hardware address; none if it is no Ethernet interface.
    pub(crate) mac: Option<Mac>,
    /// The broker's host, or the router on the way to it.
    pub(crate) next_hop: IpAddr,
    /// The kernel would put packets into other packets.
    pub(crate) encapsulates: bool,
}

/// Where the kernel is asked.
#[derive(Debug)]
pub(crate) struct Kernel {
    socket: Socket,
}

impl Kernel {
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&Port::new(0, 0))?;
        Ok(Self { socket })
    }

    /// The way of packets from one address to another.
    pub(crate) fn route(&self, from: SocketAddr, to: SocketAddr) -> io::Result<Route> {
        let mut question = RouteMessage::default();
        question.header.address_family = family(to.ip());
        question.header.destination_prefix_length = width(to.ip());
        question.header.source_prefix_length = width(from.ip());
        question.attributes = vec![
            RouteAttribute::Destination(to.ip().into()),
            RouteAttribute::Source(from.ip().into()),
        ];
        // A link-local address means nothing without its interface.
        if let SocketAddr::V6(to) = to
            && to.scope_id() != 0
        {
            question.attributes.push(RouteAttribute::Oif(to.scope_id()));
        }
        let answer = self.ask(RouteNetlinkMessage::GetRoute(question))?;
        let RouteNetlinkMessage::NewRoute(route) = answer else {
            return Err(unexpected());
        };
        let (mut index, mut next_hop, mut encapsulates) = (None, to.ip(), false);
        for attribute in route.attributes {
            match attribute {
                RouteAttribute::Oif(interface) => index = Some(interface),
                RouteAttribute::Gateway(RouteAddress::Inet(router))
                | RouteAttribute::Via(RouteVia::Inet(router)) => next_hop = router.into(),
                RouteAttribute::Gateway(RouteAddress::Inet6(router))
                | RouteAttribute::Via(RouteVia::Inet6(router)) => next_hop = router.into(),
                RouteAttribute::EncapType(_) => encapsulates = true,
                _ => {}
            }
        }
        let index = index.ok_or_else(|| io::Error::from_raw_os_error(libc::EHOSTUNREACH))?;
        let (interface, mac) = self.link(index)?;
        Ok(Route {
            interface,
            index,
            mac,
            next_hop,
            encapsulates,
        })
    }

    /// The index of an interface by any of its names.
    pub(crate) fn index_of(&self, name: &str) -> io::Result<u32> {
        let mut question = LinkMessage::default();
        let bytes = [name.as_bytes(), &[0]].concat();
        let name = DefaultNla::new(IFLA_ALT_IFNAME, bytes);
        question.attributes.push(LinkAttribute::Other(name));
        match self.ask(RouteNetlinkMessage::GetLink(question))? {
            RouteNetlinkMessage::NewLink(link) => Ok(link.header.index),
            _ => Err(unexpected()),
        }
    }

    /// Name of an interface, and its hardware address.
    fn link(&self, index: u32) -> io::Result<(String, Option<Mac>)> {
        let mut question = LinkMessage::default();
        question.header.index = index;
        let answer = self.ask(RouteNetlinkMessage::GetLink(question))?;
        let RouteNetlinkMessage::NewLink(link) = answer else {
            return Err(unexpected());
        };
        let (mut name, mut mac) = (String::new(), None);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name = text,
                LinkAttribute::Address(bytes) => mac = bytes.try_into().ok(),
                _ => {}
            }
        }
        let is_ethernet = link.header.link_layer_type == LinkLayerType::Ether;
        Ok((name, mac.filter(|_| is_ethernet)))
    }

    /// Hardware address of the next hop, if the kernel has found it out.
    pub(crate) fn neighbour(&self, route: &Route) -> io::Result<Option<Mac>> {
        let mut question = NeighbourMessage::default();
        question.header.family = family(route.next_hop);
        question.header.ifindex = route.index;
        question.attributes = vec![NeighbourAttribute::Destination(route.next_hop.into())];
        let answer = match self.ask(RouteNetlinkMessage::GetNeighbour(question)) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            answer => answer?,
        };
        let RouteNetlinkMessage::NewNeighbour(neighbour) = answer else {
            return Err(unexpected());
        };
        let state = neighbour.header.state;
        if matches!(state, NeighbourState::Incomplete | NeighbourState::Failed) {
            return Ok(None);
        }
        let mut attributes = neighbour.attributes.into_iter();
        Ok(attributes.find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => bytes.try_into().ok(),
            _ => None,
        }))
    }

    fn ask(&self, question: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        let mut message = NetlinkMessage::from(question);
        message.header.flags = NLM_F_REQUEST;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (bytes, _) = self.socket.recv_from_full()?;
        let answer = NetlinkMessage::deserialize(&bytes).map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::InnerMessage(answer) => Ok(answer),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(unexpected()),
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn width(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn unexpected() -> io::Error {
    io::Error::other("the kernel answers something else over rtnetlink")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_to_this_host_leave_through_lo_which_is_no_ethernet() {
        let kernel = Kernel::open().unwrap();
        let to = "127.0.0.1:1214".parse().unwrap();
        let route = kernel.route("127.0.0.1:1".parse().unwrap(), to).unwrap();
        assert_eq!((route.interface.as_str(), route.mac), ("lo", None));
        assert_eq!(route.next_hop, to.ip());
        assert!(!route.encapsulates);
        assert_eq!(kernel.index_of("lo").unwrap(), route.index);
        for wrong in ["no-such-iface", &"x".repeat(40)] {
            assert!(kernel.index_of(wrong).is_err());
        }
        // Nobody resolves addresses there.
        assert_eq!(kernel.neighbour(&route).unwrap(), None);
    }

    #[test]
    fn an_answer_that_is_an_error_is_one() {
        let kernel = Kernel::open().unwrap();
        let error = kernel.link(u32::MAX >> 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
