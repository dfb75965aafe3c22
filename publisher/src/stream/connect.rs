//! Opens one stream: the connection and the handshake.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use penstock_auth::PacketKeys;
use penstock_client::{ClientHandshake, happy_eyeballs};
use penstock_runtime::address::{canonical, resolve};
use penstock_runtime::poison::lock;
use penstock_wire::handshake::{Offer, Path, Purpose, Request, check_topic};
use socket2::{SockRef, TcpKeepalive};

use crate::net::tx_queues::TxQueues;
use crate::net::udp::Datagrams;
use crate::stream::connection::StreamId;
use crate::stream::datagram_tx::DatagramTx;
use crate::{Config, Error};

/// `TCP_NOTSENT_LOWAT`, bytes: what waits in the kernel beyond what the window lets go. Autotuning
/// would let megabytes queue there, which the receiver then finds fallen out of the CPU's cache;
/// window and bandwidth-delay product are not limited by it. It is that of all streams together: what
/// a call writes besides, so that packets are full.
const UNSENT: u32 = 64 << 10;
/// Of each of many streams, at least.
const MIN_UNSENT: u32 = 16 << 10;

/// `TCP_KEEPIDLE` and `TCP_KEEPINTVL`: how soon a connection over which nothing comes is asked
/// whether it still exists (RFC 9293 3.8.4). A broker's host that lost its power, or whose reset was
/// lost, says nothing by itself, and a publisher that waits for an ack says nothing either.
const KEEPALIVE: Duration = Duration::from_secs(1);
/// Largest `TCP_KEEPCNT` (tcp(7); `MAX_TCP_KEEPCNT` in include/net/tcp.h).
const MAX_PROBES: u64 = 127;

/// How long a broker may take to accept a connection, at least, if others can take its streams.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// The address that a broker was last reached at. A name may resolve to several brokers, but only one
/// of them knows the session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Location(Arc<Mutex<Option<SocketAddr>>>);

impl Location {
    fn get(&self) -> Option<SocketAddr> {
        *lock(&self.0)
    }

    fn set(&self, address: SocketAddr) {
        *lock(&self.0) = Some(address);
    }
}

/// The addresses to try: all addresses of the broker's name, with the last one used first. For another
/// stream of an existing session only that one.
fn addresses(target: &StreamId, resumes: bool, wait: Duration) -> Result<Vec<SocketAddr>, Error> {
    let last = target.location.get();
    let found = match last {
        Some(last) if !resumes && target.session != 0 => return Ok(vec![last]),
        _ => resolve(&target.broker, wait),
    };
    let found = found.map_err(|error| Error::Address {
        broker: target.broker.clone(),
        reason: error.reason().to_owned(),
    });
    match (last, found) {
        (None, found) => found,
        // The name service may be down along with the broker.
        (Some(last), Err(_)) => Ok(vec![last]),
        (Some(last), Ok(mut found)) => {
            found.retain(|address| *address != last);
            found.insert(0, last);
            Ok(found)
        }
    }
}

/// A stream that the broker has opened.
pub(crate) struct Opened {
    pub(crate) socket: TcpStream,
    pub(crate) offer: Offer,
    /// Keys of packets and frames, if they are authenticated.
    pub(crate) keys: Option<Arc<PacketKeys>>,
    /// For the payload, over xdp.
    pub(crate) datagrams: Option<(Datagrams, DatagramTx)>,
}

/// Connects and opens a stream, or goes on with one of which so many batches were acked; waits so
/// long for the connection, and for each answer over it.
pub(crate) fn open_stream(
    config: &Config,
    target: &StreamId,
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
    let addresses = addresses(target, resume_from.is_some(), wait)?;
    // After the lookup: a name service that is down must not take the time of a broker whose address is known.
    let deadline = Instant::now() + wait;
    // If other brokers can take the stream, it does not wait as long for a host that does not answer at all.
    let connect_wait = match config.reroutes() {
        true => wait.min(config.connect_timeout.max(CONNECT_TIMEOUT)),
        false => wait,
    };
    let socket = happy_eyeballs::connect(&addresses, connect_wait).map_err(connect)?;
    prepare(&socket, config, wait).map_err(connect)?;
    let datagrams = match path {
        Path::Tcp => None,
        Path::Xdp => {
            let ends = socket
                .local_addr()
                .and_then(|own| Ok((own, socket.peer_addr()?)));
            let (own, address) = ends.map_err(connect)?;
            let datagrams = Datagrams::connect(own, address).map_err(connect)?;
            let sending = DatagramTx::open(config, target, &datagrams, tx_queues)?;
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
    let handshake = ClientHandshake {
        socket: &socket,
        deadline,
        topic: &config.topic,
        key: config.key.as_ref(),
        packet_auth: config.packet_auth,
    };
    let (offer, keys) = handshake
        .ask(&Purpose::Publish(request))
        .map_err(|error| Error::handshake(broker, error))?;
    socket.set_nonblocking(true).map_err(connect)?;
    target
        .location
        .set(canonical(socket.peer_addr().map_err(connect)?));
    Ok(Opened {
        socket,
        offer,
        keys: keys.map(Arc::new),
        datagrams,
    })
}

/// Whether a broker accepts connections.
pub(crate) fn does_answer(target: &StreamId, wait: Duration) -> bool {
    let Ok(addresses) = addresses(target, true, wait) else {
        return false;
    };
    happy_eyeballs::connect(&addresses, wait).is_ok()
}

fn prepare(socket: &TcpStream, config: &Config, wait: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let options = SockRef::from(socket);
    let streams = config.brokers.len() as u32 * config.threads_per_broker;
    options.set_tcp_notsent_lowat((UNSENT / streams.max(1)).max(MIN_UNSENT))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_a_session_go_where_it_was_opened() {
        let target = |broker: &str, session| StreamId {
            broker: broker.to_owned(),
            session,
            number: 1,
            location: Location::default(),
        };
        let of = |target: &StreamId, resumes| addresses(target, resumes, Duration::from_secs(60));
        let first = target("127.0.0.1:7", 0);
        let [own, other] = ["127.0.0.1:7", "127.0.0.9:7"].map(|text| text.parse().unwrap());
        assert_eq!(of(&first, false).unwrap(), [own]);
        // The name now resolves to another address, or to none.
        let next = target("127.0.0.1:7", 5);
        next.location.set(other);
        assert_eq!(of(&next, false).unwrap(), [other]);
        assert_eq!(of(&next, true).unwrap(), [other, own]);
        let gone = target("no-such-host.invalid:7", 5);
        gone.location.set(other);
        assert_eq!(of(&gone, true).unwrap(), [other]);
        next.location.set(own);
        assert_eq!(of(&next, true).unwrap(), [own]);
    }
}
