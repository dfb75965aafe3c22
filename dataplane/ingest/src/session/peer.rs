//! The part of a peer's identity that the peer cannot choose: the key for limits and shares.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use penstock_auth::KeyId;

/// The host that a peer's packets come from: an IPv4 address, or the /64 of an IPv6 address, because
/// one host can use all 2^64 addresses of its subnet (RFC 4291 section 2.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host(IpAddr);

impl Host {
    /// The host of a peer with this address.
    #[must_use]
    pub fn of(peer: SocketAddr) -> Self {
        Self(match peer.ip().to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
            v4 @ IpAddr::V4(_) => v4,
        })
    }

    /// The site that it belongs to.
    #[must_use]
    pub fn site(&self) -> Site {
        Site(match self.0 {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 80 << 80).into(),
            v4 @ IpAddr::V4(_) => v4,
        })
    }

    /// Whether its site may have other hosts.
    #[must_use]
    pub fn is_of_site(&self) -> bool {
        self.0.is_ipv6()
    }
}

/// Hosts that may belong to one owner: an IPv4 address, or the /48 of an IPv6 address, which is what a site
/// usually gets (RFC 6177 section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site(IpAddr);

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => address.fmt(f),
            IpAddr::V6(address) => write!(f, "{address}/48"),
        }
    }
}

/// Tenants that are limited together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Holders of a key, on any host.
    Key(KeyId),
    /// Hosts of a site, without a key.
    Site(Site),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => address.fmt(f),
            IpAddr::V6(address) => write!(f, "{address}/64"),
        }
    }
}

/// The tenant that the broker charges for what a publisher holds: its host, and its key if it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant {
    /// The host.
    pub host: Host,
    /// The key that the publisher has proven to hold.
    pub key: Option<KeyId>,
}

impl Tenant {
    /// The group that it is limited together with.
    #[must_use]
    pub fn group(&self) -> Group {
        match self.key {
            Some(key) => Group::Key(key),
            None => Group::Site(self.host.site()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_an_ipv4_address_or_an_ipv6_subnet() {
        let host = |address: &str| Host::of(format!("{address}:1").parse().unwrap());
        assert_eq!(host("10.0.0.1"), host("[::ffff:10.0.0.1]"));
        assert_ne!(host("10.0.0.1"), host("10.0.0.2"));
        assert_eq!(host("[2001:db8::1]"), host("[2001:db8::ffff:2]"));
        assert_ne!(host("[2001:db8::1]"), host("[2001:db8:0:1::1]"));
        assert_eq!(host("10.0.0.1").to_string(), "10.0.0.1");
        assert_eq!(host("[2001:db8::1]").to_string(), "2001:db8::/64");
        let site = |address| host(address).site();
        assert_eq!(site("[2001:db8:1:2::3]"), site("[2001:db8:1:ffff::3]"));
        assert_ne!(site("[2001:db8:1:2::3]"), site("[2001:db8:2:2::3]"));
        assert_eq!(site("[2001:db8:1:2::3]").to_string(), "2001:db8:1::/48");
        assert_ne!(site("10.0.0.1"), site("10.0.0.2"));
    }
}
