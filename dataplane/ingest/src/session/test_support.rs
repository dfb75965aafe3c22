//! What several tests of this crate need.

use std::net::{Ipv6Addr, SocketAddr};

use super::buffers::{RcvbufOn, RequestedBuffers};
use super::peer::{Host, Tenant};

/// The tenant with this host number, and with a key of this byte.
pub(crate) fn tenant(host: u8, key: Option<u8>) -> Tenant {
    Tenant {
        host: Host::of(SocketAddr::from(([10, 0, 0, host], 1))),
        key: key.map(|key| [key; 16]),
    }
}

/// The tenant of an IPv6 subnet, without a key.
pub(crate) fn network(site: u16, subnet: u16) -> Tenant {
    let address = Ipv6Addr::new(0x2001, 0xdb8, site, subnet, 0, 0, 0, 1);
    Tenant {
        host: Host::of(SocketAddr::from((address, 1))),
        key: None,
    }
}

/// Small socket buffers.
pub(crate) fn small_buffers() -> RequestedBuffers {
    RequestedBuffers {
        rcvbuf: 1 << 16,
        sndbuf: 1 << 16,
        rcvbuf_on: RcvbufOn::None,
        force: false,
    }
}
