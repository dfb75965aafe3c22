//! TCP limits of the route to a host (ip-route(8)), from rtnetlink(7).

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteMetric};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// The limits of a route; most routes have none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Maximum window to offer, bytes.
    pub window: Option<u32>,
    /// Maximum congestion window, packets; it counts only if locked.
    pub cwnd: Option<u32>,
}

/// Bit of RTAX_CWND in RTAX_LOCK (include/uapi/linux/rtnetlink.h).
const LOCKS_CWND: u32 = 1 << 7;

/// Queries the calling thread's namespace.
pub fn limits(to: IpAddr) -> io::Result<Limits> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&question(to), 0)?;
    let (bytes, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::deserialize(&bytes).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
            Ok(limits_of(&route.attributes))
        }
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn question(to: IpAddr) -> Vec<u8> {
    let mut route = RouteMessage::default();
    (
        route.header.address_family,
        route.header.destination_prefix_length,
    ) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    route.attributes = vec![RouteAttribute::Destination(to.into())];
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(route));
    message.header.flags = NLM_F_REQUEST;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn limits_of(attributes: &[RouteAttribute]) -> Limits {
    let metrics = attributes.iter().filter_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => Some(metrics),
        _ => None,
    });
    let mut limits = Limits::default();
    let (mut cwnd, mut locks) = (None, 0);
    for metric in metrics.flatten() {
        match metric {
            RouteMetric::Window(bytes) => limits.window = Some(*bytes),
            RouteMetric::Cwnd(packets) => cwnd = Some(*packets),
            RouteMetric::Lock(which) => locks = *which,
            _ => {}
        }
    }
    limits.cwnd = cwnd.filter(|_| locks & LOCKS_CWND != 0);
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_locked_congestion_window_is_a_limit() {
        let route = |metrics| limits_of(&[RouteAttribute::Metrics(metrics)]);
        let free = route(vec![RouteMetric::Window(16_384), RouteMetric::Cwnd(9)]);
        assert_eq!((free.window, free.cwnd), (Some(16_384), None));
        let locked = route(vec![RouteMetric::Lock(LOCKS_CWND), RouteMetric::Cwnd(9)]);
        assert_eq!((locked.window, locked.cwnd), (None, Some(9)));
    }

    #[test]
    fn the_route_to_this_host_sets_no_limit() {
        assert_eq!(
            limits("127.0.0.1".parse().unwrap()).unwrap(),
            Limits::default()
        );
    }
}
