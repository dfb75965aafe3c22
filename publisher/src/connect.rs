//! Opening one stream: the connection and the handshake.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use penstock_dataplane::wire::MAGIC;
use penstock_dataplane::wire::handshake::{
    Answer, Hello, Offer, Path, Request, WELCOME_LEN, Welcome, check_topic,
};
use socket2::SockRef;
use zerocopy::{FromBytes, IntoBytes};

use crate::link::Target;
use crate::sending::Sending;
use crate::tx_queues::TxQueues;
use crate::udp::Datagrams;
use crate::{Config, Error};

/// `TCP_NOTSENT_LOWAT`, bytes: what waits in the kernel beyond what the window lets go. Autotuning
/// would let megabytes queue there, which the receiver then finds fallen out of the CPU's cache;
/// window and bandwidth-delay product are not limited by it.
const UNSENT: u32 = 16 << 10;

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
    /// For the payload, over xdp.
    pub(crate) datagrams: Option<(Datagrams, Sending)>,
}

/// Connects and opens a stream, or goes on with one of which so many batches were acked.
pub(crate) fn open_stream(
    config: &Config,
    target: &Target,
    tx_queues: &Arc<TxQueues>,
    resume_from: Option<u64>,
    path: Path,
) -> Result<Opened, Error> {
    check_topic(config.topic.as_bytes())?;
    let broker = &target.broker;
    let connect = |source| Error::Connect {
        broker: broker.to_owned(),
        source,
    };
    let socket = connect_any(&resolve(broker)?, config.timeout).map_err(connect)?;
    prepare(&socket, config).map_err(connect)?;
    let datagrams = match path {
        Path::Tcp => None,
        Path::Xdp => {
            let address = socket.peer_addr().map_err(connect)?;
            let datagrams = Datagrams::connect(address).map_err(connect)?;
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
    let mut hello = Hello::new(&request, config.topic.len()).as_bytes().to_vec();
    hello.extend_from_slice(config.topic.as_bytes());
    (&socket).write_all(&hello).map_err(connect)?;
    let stranger = |source| Error::NotABroker {
        broker: broker.to_owned(),
        source,
    };
    let mut bytes = [0; WELCOME_LEN];
    // The first bytes tell a stranger, who may not say as much as a broker does.
    let (first, rest) = bytes.split_at_mut(MAGIC.len());
    let read = |part: &mut [u8]| {
        let read = (&socket).read_exact(part);
        read.map_err(|e| connect(explain_silence(e)))
    };
    read(first)?;
    Welcome::check_magic(first).map_err(stranger)?;
    read(rest)?;
    let welcome = Welcome::read_from_bytes(&bytes).expect("a welcome is plain bytes");
    let answer = welcome.parse().map_err(stranger)?;
    match answer {
        Answer::Accepted(offer) => {
            socket.set_nonblocking(true).map_err(connect)?;
            Ok(Opened {
                socket,
                offer,
                datagrams,
            })
        }
        Answer::Refused { code, text_len } => {
            let mut text = vec![0; text_len];
            (&socket).read_exact(&mut text).map_err(connect)?;
            let text = String::from_utf8_lossy(&text).into_owned();
            Err(Error::Refused {
                broker: broker.to_owned(),
                code,
                text,
            })
        }
    }
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

fn prepare(socket: &TcpStream, config: &Config) -> io::Result<()> {
    socket.set_nodelay(true)?;
    SockRef::from(socket).set_tcp_notsent_lowat(UNSENT)?;
    socket.set_read_timeout(Some(config.timeout))?;
    socket.set_write_timeout(Some(config.timeout))?;
    match config.sndbuf {
        Some(bytes) => SockRef::from(socket).set_send_buffer_size(bytes),
        None => Ok(()),
    }
}

fn explain_silence(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(
            io::ErrorKind::TimedOut,
            "the connection opened, but no answer to the handshake came",
        ),
        io::ErrorKind::UnexpectedEof => io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the peer closed the connection without an answer; it may be no Penstock broker",
        ),
        _ => error,
    }
}
