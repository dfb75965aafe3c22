//! Sending past the kernel's network stack, through an AF_XDP socket with a transmit queue to itself.
//!
//! Packets bear the addresses of the stream's UDP socket, so ACKs come to that one, as ever. The kernel
//! is asked for route and hardware addresses, and gets some packets to send itself, so that it goes on
//! looking after them.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;

use penstock_transport::{Nanos, Timestamp};
use penstock_xsk::{Endpoint, FrameTemplate, XskTxConfig, XskTxSocket};
use thiserror::Error;
use tracing::{debug, info};

use crate::net::route::{Kernel, Mac, Route};
use crate::net::tx_queues::{Lease, TxQueues};
use crate::net::udp::Datagrams;

/// How often route and hardware addresses are looked up, and how often while no answers
/// come.
const ROUTE_CHECK_INTERVAL: Nanos = Nanos::from_secs(5);
const ROUTE_CHECK_INTERVAL_WHEN_QUIET: Nanos = Nanos::from_millis(200);

/// Why packets cannot be sent with AF_XDP.
#[derive(Debug, Error)]
pub enum TransmitError {
    /// The kernel does not say how packets leave.
    #[error("cannot ask the kernel for the route: {0}")]
    Route(io::Error),
    /// The interface that was named does not exist.
    #[error("there is no interface {0:?} (ip link lists interfaces)")]
    NoInterface(String),
    /// Packets leave through another interface than the one that was named.
    #[error(
        "the route to it goes through {actual}, not through {wanted}: leave --tx-iface out, or change the route"
    )]
    OtherInterface {
        /// The one that was named.
        wanted: String,
        /// The one of the route.
        actual: String,
    },
    /// The interface has no hardware addresses.
    #[error("the route to it goes through {0}, which is not an Ethernet interface: use --tx udp")]
    NotEthernet(String),
    /// Packets are to be wrapped on their way.
    #[error(
        "the route to it goes through a tunnel on {0}, which only the kernel fills: use --tx udp"
    )]
    Tunnel(String),
    /// Other streams have all the queues.
    #[error(
        "other streams have transmit queues {queues:?} of {interface}, and each needs one: name more, such as --tx-queue 0-3, or open fewer streams"
    )]
    NoQueue {
        /// The interface.
        interface: String,
        /// The queues that streams may take.
        queues: Vec<u32>,
    },
    /// There is no socket.
    #[error(transparent)]
    Socket(#[from] penstock_xsk::Error),
    /// Nobody answers to the next hop's address.
    #[error(
        "the kernel has no hardware address for {next_hop} on {interface} (ip neigh shows them)"
    )]
    Neighbour {
        /// The interface.
        interface: String,
        /// The broker's host, or the router on the way to it.
        next_hop: std::net::IpAddr,
    },
    /// The socket takes packets, which do not arrive.
    #[error(
        "packets through transmit queue {queue} of {interface} are not answered, though the UDP socket's are: is it a queue that sends (ethtool -l)? Over veth one worker of the broker must serve all of its queues (--workers 1)"
    )]
    Unanswered {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
}

impl TransmitError {
    /// Whether the same attempt may succeed a little later.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Route(_) | Self::Neighbour { .. } | Self::Unanswered { .. }
        )
    }
}

/// A stream's AF_XDP socket.
pub(crate) struct AfXdp {
    port: XskTxSocket,
    /// Let go of once the socket is closed.
    lease: Lease,
    kernel: Kernel,
    route: Route,
    from: SocketAddr,
    to: SocketAddr,
    headers: FrameTemplate,
    /// The next hop's hardware address, once it is known.
    next_hop: Option<Mac>,
    /// When it was looked up last, on the stream's clock.
    looked: Timestamp,
    /// What is sent next goes through the kernel.
    through_kernel: bool,
}

impl AfXdp {
    /// Opens a socket for what `datagrams` would send, on the first free one of `queues`.
    pub(crate) fn open(
        datagrams: &Datagrams,
        interface: Option<&str>,
        queues: &[u32],
        taken: &Arc<TxQueues>,
    ) -> Result<Self, TransmitError> {
        let ends = datagrams.ends().and_then(|(from, to)| {
            let largest = datagrams.max_datagram()?;
            Ok((from, to, largest as usize))
        });
        let (from, to, max_datagram) = ends.map_err(TransmitError::Route)?;
        let kernel = Kernel::open().map_err(TransmitError::Route)?;
        let (route, mac) = look_up(&kernel, from, to, interface)?;
        let lease = taken.take(route.index, queues).ok_or_else(|| {
            let interface = route.interface.clone();
            let queues = queues.to_vec();
            TransmitError::NoQueue { interface, queues }
        })?;
        let headers = headers(mac, from, [0; 6], to);
        let port = XskTxSocket::open(&XskTxConfig {
            interface: route.interface.clone(),
            queue: lease.queue,
            largest: headers.len() + max_datagram,
        })?;
        info!(
            interface = route.interface,
            queue = lease.queue,
            largest = port.largest(),
            "AF_XDP transmit socket open"
        );
        Ok(Self {
            port,
            lease,
            kernel,
            route,
            from,
            to,
            headers,
            next_hop: None,
            looked: Timestamp::ZERO,
            through_kernel: false,
        })
    }

    /// Largest UDP payload that goes into a packet.
    pub(crate) fn max_datagram(&self) -> usize {
        self.port.largest() - self.headers.len()
    }

    /// Whether it is known where packets are to go; before, they go through the kernel.
    pub(crate) fn is_ready(&self) -> bool {
        self.next_hop.is_some()
    }

    /// System calls made to send.
    pub(crate) fn calls(&self) -> u64 {
        self.port.stats().kicks
    }

    /// Looks up where packets are to go. What the kernel does not know any more, or does not say, stays
    /// as it was; a route through another interface is an error.
    pub(crate) fn look(&mut self) -> Result<(), TransmitError> {
        // Whatever the present name of its interface is.
        let looked = look_up(&self.kernel, self.from, self.to, None);
        let (route, mac) = match looked {
            Err(TransmitError::Route(error)) => {
                debug!("cannot ask the kernel for the route: {error}");
                return Ok(());
            }
            looked => looked?,
        };
        if route.index != self.route.index {
            return Err(TransmitError::OtherInterface {
                wanted: self.route.interface.clone(),
                actual: route.interface,
            });
        }
        let next_hop = self.kernel.neighbour(&route).unwrap_or_default();
        self.route = route;
        self.next_hop = next_hop.or(self.next_hop);
        if let Some(next_hop) = self.next_hop {
            self.headers = headers(mac, self.from, next_hop, self.to);
        }
        Ok(())
    }

    /// Looks again if it is time for it, which is earlier while no answers come; `now` counts
    /// from the stream's start.
    pub(crate) fn look_again(&mut self, now: Timestamp, quiet: bool) -> Result<(), TransmitError> {
        let every = match quiet {
            true => ROUTE_CHECK_INTERVAL_WHEN_QUIET,
            false => ROUTE_CHECK_INTERVAL,
        };
        if now - self.looked < every {
            return Ok(());
        }
        self.looked = now;
        self.through_kernel = true;
        self.look()
    }

    /// Sends packets, each in two parts.
    pub(crate) fn send(
        &mut self,
        datagrams: &mut Datagrams,
        packets: &[[IoSlice<'_>; 2]],
    ) -> io::Result<()> {
        if self.through_kernel || !self.is_ready() {
            self.through_kernel = false;
            return datagrams.send(packets);
        }
        for [header, payload] in packets {
            // One that is dropped is lost like any other.
            self.port.send(&self.headers, [header, payload])?;
        }
        self.port.flush()
    }

    pub(crate) fn unresolved(&self) -> TransmitError {
        TransmitError::Neighbour {
            interface: self.route.interface.clone(),
            next_hop: self.route.next_hop,
        }
    }

    pub(crate) fn unanswered(&self) -> TransmitError {
        TransmitError::Unanswered {
            interface: self.route.interface.clone(),
            queue: self.lease.queue,
        }
    }
}

/// The route to a broker, and the hardware address that packets to it come from.
fn look_up(
    kernel: &Kernel,
    from: SocketAddr,
    to: SocketAddr,
    wanted: Option<&str>,
) -> Result<(Route, Mac), TransmitError> {
    let route = kernel.route(from, to).map_err(TransmitError::Route)?;
    if let Some(wanted) = wanted {
        match kernel.index_of(wanted) {
            Ok(index) if index == route.index => {}
            Ok(_) => {
                return Err(TransmitError::OtherInterface {
                    wanted: wanted.to_owned(),
                    actual: route.interface,
                });
            }
            Err(_) => return Err(TransmitError::NoInterface(wanted.to_owned())),
        }
    }
    match route.mac {
        None => Err(TransmitError::NotEthernet(route.interface)),
        Some(_) if route.encapsulates => Err(TransmitError::Tunnel(route.interface)),
        Some(mac) => Ok((route, mac)),
    }
}

fn headers(mac: Mac, from: SocketAddr, next_hop: Mac, to: SocketAddr) -> FrameTemplate {
    let end = |mac, address| Endpoint { mac, address };
    FrameTemplate::new(&end(mac, from), &end(next_hop, to))
}
