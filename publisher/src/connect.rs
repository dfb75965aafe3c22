//! Opening one stream: the connection and the handshake.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use penstock_dataplane::auth::PacketKeys;
use penstock_dataplane::wire::handshake::{Offer, Path, Request, check_topic};
use socket2::{SockRef, TcpKeepalive};

use crate::link::Target;
use crate::opening::Opening;
use crate::sending::Sending;
use crate::tx_queues::TxQueues;
use crate::udp::Datagrams;
use crate::{Config, Error};

/// `TCP_NOTSENT_LOWAT`, bytes: what waits in the kernel beyond what the window lets go. Autotuning
/// would let megabytes queue there, which the receiver then finds fallen out of the CPU's cache;
/// window and bandwidth-delay product are not limited by it.
const UNSENT: u32 = 16 << 10;

/// `TCP_KEEPIDLE` and `TCP_KEEPINTVL`: how soon a connection over which nothing comes is asked
/// whether it still exists (RFC 9293 3.8.4). A broker's host that lost its power, or whose reset was
/// lost, says nothing by itself, and a publisher that waits for an ack says nothing either.
const KEEPALIVE: Duration = Duration::from_secs(1);
/// Largest `TCP_KEEPCNT` (tcp(7); `MAX_TCP_KEEPCNT` in include/net/tcp.h).
const MAX_PROBES: u64 = 127;

/// Looks a broker's address up.
pub(crate) fn resolve(broker: &str) -> Result<Vec<SocketAddr>, Error> {
    let bad = |reason: String| Error::Address {
        broker: broker.to_owned(),
        reason,
    };
    let addresses: Vec<_> = broker
        .to_socket_addrs()
        .map_err(|e| bad(e.to_string()))?
        .collect();
    if addresses.is_empty() {
        Err(bad("no address".to_owned()))
    } else {
        Ok(addresses)
    }
}

/// A stream that the broker has opened.
pub(crate) struct Opened {
    pub(crate) socket: TcpStream,
    pub(crate) offer: Offer,
    /// Of its packets, if they are authenticated.
    pub(crate) keys: Option<PacketKeys>,
    /// For the payload, over xdp.
    pub(crate) datagrams: Option<(Datagrams, Sending)>,
}

/// Connects and opens a stream, or goes on with one of which so many batches were acked; waits so
/// long for the connection, and for each answer over it.
pub(crate) fn open_stream(
    config: &Config,
    target: &Target,
    tx_queues: &Arc<TxQueues>,
    resume_from: Option<u64>,
    path: Path,
    wait: Duration,
) -> Result<Opened, Error> {
    check_topic(config.topic.as_bytes())?;
    let broker = &target.broker;
    let connect = |source| Error::Connect {
        broker: broker.to_owned(),
        source,
    };
    let socket = connect_any(&resolve(broker)?, wait).map_err(connect)?;
    prepare(&socket, config, wait).map_err(connect)?;
    let datagrams = match path {
        Path::Tcp => None,
        Path::Xdp => {
            let ends = socket
                .local_addr()
                .and_then(|own| Ok((own, socket.peer_addr()?)));
            let (own, address) = ends.map_err(connect)?;
            let datagrams = Datagrams::connect(own, address).map_err(connect)?;
            let sending = Sending::open(config, target, &datagrams, tx_queues)?;
            Some((datagrams, sending))
        }
    };
    let max_datagram = match &datagrams {
        None => 0,
        Some((datagrams, sending)) => sending.max_datagram(datagrams).map_err(connect)?,
    };
    let request = Request {
        session: target.session,
        stream: target.number,
        streams: config.threads_per_broker,
        ack: config.ack,
        order: config.order,
        max_payload: u32::try_from(config.batch_size).unwrap_or(u32::MAX),
        path,
        resume_from,
        max_datagram,
    };
    let opening = Opening {
        broker,
        socket: &socket,
    };
    let (offer, keys) = opening.ask(config, &request)?;
    socket.set_nonblocking(true).map_err(connect)?;
    Ok(Opened {
        socket,
        offer,
        keys,
        datagrams,
    })
}

fn connect_any(addresses: &[SocketAddr], timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::other("no address");
    for address in addresses {
        match TcpStream::connect_timeout(address, timeout) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn prepare(socket: &TcpStream, config: &Config, wait: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let options = SockRef::from(socket);
    options.set_tcp_notsent_lowat(UNSENT)?;
    // A host that does not answer at all gets as long as the settings say, ten seconds at least.
    let probes = config.timeout.as_secs().clamp(10, MAX_PROBES) as u32;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE)
        .with_retries(probes);
    options.set_tcp_keepalive(&keepalive)?;
    socket.set_read_timeout(Some(wait))?;
    socket.set_write_timeout(Some(wait))?;
    match config.sndbuf {
        Some(bytes) => options.set_send_buffer_size(bytes),
        None => Ok(()),
    }
}
