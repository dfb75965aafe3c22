//! Addresses as users write them: where a broker listens, and where publishers find it.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use crossbeam_channel::bounded;
use nix::net::if_::if_nametoindex;
use thiserror::Error;

/// A text that is not a usable address.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is not a valid address: {reason}")]
pub struct AddressError {
    text: String,
    reason: String,
}

impl AddressError {
    /// Why, without the text.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

/// Host and port, parsed but not resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Named {
    /// An IP address, with its interface if it has one.
    Literal(SocketAddr),
    /// A host name.
    Host(String, u16),
    /// No host, or `*`.
    Any(u16),
}

/// The address that a broker listens on: `10.0.0.1:1214`, `[fe80::1%eth0]:1214`, a name of this host,
/// or `:1214` and `*:1214` for all addresses (IPv4 and, if the host has it, IPv6).
///
/// # Errors
/// Why the text is not such an address.
pub fn listen(text: &str) -> Result<SocketAddr, AddressError> {
    match parse(text)? {
        Named::Literal(address) => Ok(canonical(address)),
        Named::Any(port) => {
            let v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            let has_v6 = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok();
            let v4 = SocketAddr::from(([0; 4], port));
            Ok(if has_v6 { v6 } else { v4 })
        }
        Named::Host(host, port) => {
            let found = (host.as_str(), port).to_socket_addrs();
            let found: Vec<_> = found
                .map_err(|error| wrong(text, error.to_string()))?
                .collect();
            // A broker listens on one address, and publishers more often use IPv4.
            let v4 = found.iter().find(|address| address.is_ipv4());
            let first = v4.or(found.first()).copied();
            first.ok_or_else(|| wrong(text, "the name has no address"))
        }
    }
}

/// Checks that the text can name a broker: `10.0.0.1:1214`, `[fe80::1%eth0]:1214`, or `name:1214`.
/// Resolves nothing.
///
/// # Errors
/// Why the text is not such an address.
pub fn check_broker(text: &str) -> Result<(), AddressError> {
    broker(text).map(|_| ())
}

/// All addresses of a broker, in the order in which to try them. Waits at most `wait` for the name
/// service. IPv4-mapped addresses are returned as IPv4.
///
/// # Errors
/// Why the text is not such an address, or the error of the name service.
pub fn resolve(text: &str, wait: Duration) -> Result<Vec<SocketAddr>, AddressError> {
    let (host, port) = match broker(text)? {
        Named::Host(host, port) => (host, port),
        Named::Literal(address) => return Ok(vec![canonical(address)]),
        Named::Any(_) => return Err(wrong(text, "it has no host; give host:port")),
    };
    // getaddrinfo(3) takes no deadline.
    let (sender, answer) = bounded(1);
    let look_up = move || {
        let found = (host.as_str(), port).to_socket_addrs();
        // Sending fails if the caller has stopped waiting.
        let _ = sender.send(found.map(Iterator::collect::<Vec<_>>));
    };
    let thread = std::thread::Builder::new().name("resolver".to_owned());
    thread
        .spawn(look_up)
        .map_err(|error| wrong(text, error.to_string()))?;
    let silent = |_| {
        let error = io::Error::from(io::ErrorKind::TimedOut);
        wrong(text, format!("the name service does not answer: {error}"))
    };
    let found = answer.recv_timeout(wait).map_err(silent)?;
    let found = found.map_err(|error| wrong(text, error.to_string()))?;
    let mut addresses: Vec<SocketAddr> = Vec::with_capacity(found.len());
    for address in found.into_iter().map(canonical) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err(wrong(text, "the name has no address"));
    }
    Ok(addresses)
}

/// Converts an IPv4-mapped address (`::ffff:10.0.0.1`) to IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::from((ip, address.port())),
        IpAddr::V6(_) => address,
    }
}

fn broker(text: &str) -> Result<Named, AddressError> {
    let named = parse(text)?;
    match &named {
        Named::Any(_) => Err(wrong(text, "it has no host; give host:port")),
        Named::Literal(address) if address.port() == 0 => Err(wrong(text, "port 0 is not allowed")),
        Named::Host(_, 0) => Err(wrong(text, "port 0 is not allowed")),
        _ => Ok(named),
    }
}

fn parse(text: &str) -> Result<Named, AddressError> {
    let wrong = |reason: &dyn fmt::Display| wrong(text, reason);
    let trimmed = text.trim();
    if trimmed.contains("://") {
        return Err(wrong(&"give host:port, without a scheme"));
    }
    let (host, port) = match trimmed.strip_prefix('[') {
        Some(rest) => {
            let (inside, rest) = rest
                .split_once(']')
                .ok_or_else(|| wrong(&"the closing ] is missing"))?;
            let port = rest.strip_prefix(':');
            (inside, port.filter(|port| !port.is_empty()))
        }
        None => match trimmed.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (trimmed, None),
        },
    };
    let Some(port) = port else {
        let example = match trimmed {
            "" => "host",
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                return Err(wrong(&format!("give host:port, or :{digits}")));
            }
            host => host,
        };
        return Err(wrong(&format!("it has no port; give {example}:1214")));
    };
    let number = port.parse::<u16>().ok();
    let number = number.filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()));
    let port =
        number.ok_or_else(|| wrong(&format!("port {port:?} is not a number from 0 to 65535")))?;
    if trimmed.starts_with('[') || host.contains(':') {
        return v6(host, port)
            .map(Named::Literal)
            .map_err(|reason| wrong(&reason));
    }
    Ok(match host {
        "" | "*" => Named::Any(port),
        host => match host.parse::<IpAddr>() {
            Ok(ip) => Named::Literal((ip, port).into()),
            Err(_) => Named::Host(host.to_owned(), port),
        },
    })
}

/// An IPv6 address, optionally with an interface after `%`, by name or index (RFC 4007 section 11).
fn v6(text: &str, port: u16) -> Result<SocketAddr, String> {
    let (address, zone) = match text.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (text, None),
    };
    let ip: Ipv6Addr = address
        .parse()
        .map_err(|_| format!("{address:?} is not an IPv6 address"))?;
    let scope = match zone {
        None if ip.is_unicast_link_local() => {
            return Err(format!(
                "{ip} is a link-local address and needs an interface, as in [{ip}%eth0]:{port}"
            ));
        }
        None => 0,
        Some(zone) => match zone.parse() {
            Ok(number) if number > 0 => number,
            _ => if_nametoindex(zone).map_err(|_| {
                format!("interface {zone:?} does not exist (ip link lists interfaces)")
            })?,
        },
    };
    // Addresses with a wider scope do not depend on the interface.
    let scope = if ip.is_unicast_link_local() || ip.is_multicast() {
        scope
    } else {
        0
    };
    Ok(SocketAddrV6::new(ip, port, 0, scope).into())
}

fn wrong(text: &str, reason: impl fmt::Display) -> AddressError {
    AddressError {
        text: text.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WAIT: Duration = Duration::from_secs(60);

    #[test]
    fn listen_addresses_have_several_forms() {
        for (text, address) in [
            ("10.0.0.1:1214", "10.0.0.1:1214"),
            (" 10.0.0.1:1214 ", "10.0.0.1:1214"),
            ("0.0.0.0:0", "0.0.0.0:0"),
            ("[::]:1214", "[::]:1214"),
            ("[fd00::1]:1214", "[fd00::1]:1214"),
            ("fd00::1:1214", "[fd00::1]:1214"),
            ("[fe80::1%1]:1214", "[fe80::1%1]:1214"),
            ("[fe80::1%lo]:1214", "[fe80::1%1]:1214"),
            ("fe80::1%lo:1214", "[fe80::1%1]:1214"),
            ("[fd00::1%lo]:1214", "[fd00::1]:1214"),
            ("[::ffff:10.0.0.1]:1214", "10.0.0.1:1214"),
        ] {
            assert_eq!(listen(text), Ok(address.parse().unwrap()), "{text}");
        }
        for text in [":1214", "*:1214"] {
            let address = listen(text).unwrap();
            assert!(address.ip().is_unspecified() && address.port() == 1214);
        }
        let address = listen("localhost:1214").unwrap();
        assert!(address.ip().is_loopback() && address.port() == 1214);
    }

    proptest! {
        /// Any text either is an address, or gives an error that says why not; and the program can
        /// parse what it prints.
        #[test]
        fn any_text_can_be_looked_at(text in ".{0,40}|[\\[\\]:%.*0-9a-f]{0,40}", octets: [u8; 16], port: u16) {
            if let Err(error) = parse(&text) {
                prop_assert!(!error.reason().is_empty());
            }
            let v4 = IpAddr::from([octets[0], octets[1], octets[2], octets[3]]);
            for ip in [v4, IpAddr::from(octets)] {
                let address = SocketAddr::new(ip, port);
                let scoped = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
                if !scoped {
                    prop_assert_eq!(parse(&address.to_string()), Ok(Named::Literal(address)));
                }
            }
        }
    }

    #[test]
    fn invalid_addresses_are_explained() {
        for (text, words) in [
            ("", "no port; give host:1214"),
            ("1214", "give host:port, or :1214"),
            ("10.0.0.1", "no port; give 10.0.0.1:1214"),
            ("[fd00::1]", "no port"),
            ("[fd00::1]:", "no port"),
            ("[fd00::1]1214", "no port"),
            ("[fd00::1:1214", "closing ] is missing"),
            ("[10.0.0.1]:1214", "not an IPv6 address"),
            ("[fe80::1]:1214", "[fe80::1%eth0]:1214"),
            (
                "[fe80::1%no-such]:1214",
                "interface \"no-such\" does not exist",
            ),
            ("[fe80::1%0]:1214", "interface \"0\" does not exist"),
            ("[fe80::1%]:1214", "interface \"\" does not exist"),
            ("10.0.0.1:http", "port \"http\" is not a number"),
            ("10.0.0.1:+1", "port \"+1\" is not a number"),
            ("10.0.0.1:65536", "port \"65536\" is not a number"),
            ("tcp://10.0.0.1:1214", "without a scheme"),
        ] {
            for error in [listen(text).unwrap_err(), check_broker(text).unwrap_err()] {
                assert!(error.to_string().contains(words), "{text}: {error}");
            }
        }
        for text in [":1214", "*:1214", "10.0.0.1:0", "host:0"] {
            let error = resolve(text, WAIT).unwrap_err();
            assert_eq!(check_broker(text).unwrap_err(), error);
        }
    }

    #[test]
    fn addresses_are_unique_and_ipv4_ones_canonical() {
        let of = |text| resolve(text, WAIT).unwrap();
        assert_eq!(of("[::ffff:10.0.0.1]:7"), ["10.0.0.1:7".parse().unwrap()]);
        assert_eq!(of("[fe80::1%lo]:7"), ["[fe80::1%1]:7".parse().unwrap()]);
        let found = of("localhost:7");
        assert!(!found.is_empty() && found.iter().all(|address| address.ip().is_loopback()));
        let error = resolve("no-such-host.invalid:7", WAIT).unwrap_err();
        assert!(
            error.to_string().contains("no-such-host.invalid"),
            "{error}"
        );
    }
}
