//! A peer that speaks the protocol, on penstock-wire: its threads run in
//! the publisher's namespace and have addresses of their own there.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::bed::Bed;
use anyhow::{Context, Result, anyhow, bail};
use penstock_testbed::netns;
use penstock_wire::handshake::{
    AckLevel, Answer, Hello, Offer, OrderLevel, Path, Request, WELCOME_LEN, Welcome,
};
use penstock_wire::packet::{BatchInfo, Chunk, Data, StreamKey};
use socket2::{Domain, Socket, Type};
use zerocopy::{FromBytes, IntoBytes};

/// The attacker's address.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 214, 0, 66);
/// Addresses of further hosts.
pub const HOSTS: std::ops::Range<u8> = 100..112;
/// Time for the broker to answer or to close.
const PATIENCE: Duration = Duration::from_secs(10);

/// One of the further hosts.
#[must_use]
pub fn host(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 214, 0, number)
}

/// Gives the attackers their addresses.
pub fn add_addresses(bed: &Bed) -> Result<()> {
    let addresses = HOSTS.map(host).chain([ADDRESS]);
    for address in addresses {
        bed.publisher_ip(&["addr", "add", &format!("{address}/24"), "dev", "b0"])?;
    }
    Ok(())
}

/// Where it attacks from, and whom.
#[derive(Debug, Clone, Copy)]
pub struct Attacker {
    /// Its address; unspecified for that of the publisher's end.
    pub own: Ipv4Addr,
    /// The broker.
    pub broker: SocketAddr,
}

impl Default for Attacker {
    fn default() -> Self {
        Self::new()
    }
}

impl Attacker {
    /// From its own address to a port of the broker's host.
    #[must_use]
    pub fn to_port(port: u16) -> Self {
        Self {
            own: ADDRESS,
            broker: (Ipv4Addr::new(10, 214, 0, 2), port).into(),
        }
    }

    /// From its own address to the broker.
    #[must_use]
    pub fn new() -> Self {
        Self::to_port(1214)
    }

    /// From the publisher's address to the broker.
    #[must_use]
    pub fn at_the_publishers_address() -> Self {
        Self {
            own: Ipv4Addr::UNSPECIFIED,
            ..Self::new()
        }
    }

    /// A connection, with a time limit for answers.
    pub fn connect(&self) -> Result<TcpStream> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((self.own, 0)).into())?;
        socket
            .connect_timeout(&self.broker.into(), PATIENCE)
            .context("cannot connect")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket.into())
    }

    /// A socket for datagrams to the broker.
    pub fn datagrams(&self) -> Result<UdpSocket> {
        let socket = UdpSocket::bind((self.own, 0))?;
        socket.connect(self.broker)?;
        Ok(socket)
    }

    /// An open stream: its connection and the broker's offer.
    pub fn open(&self, request: &Request) -> Result<(TcpStream, Offer)> {
        let mut connection = self.connect()?;
        connection.write_all(&hello(request, b"penstock"))?;
        match answer(&mut connection)? {
            Some(Answer::Accepted(offer)) => Ok((connection, offer)),
            other => bail!("the stream was not opened: {other:?}"),
        }
    }
}

/// A request over a path, as an honest publisher makes it.
pub fn request(path: Path) -> Request {
    Request {
        session: 0,
        stream: 0,
        streams: 1,
        ack: AckLevel::Committed,
        order: OrderLevel::PerStream,
        max_payload: 1 << 16,
        path,
        resume_from: None,
        max_datagram: if path == Path::Xdp { 1472 } else { 0 },
    }
}

/// All bytes of a Hello.
pub fn hello(request: &Request, topic: &[u8]) -> Vec<u8> {
    [Hello::new(request, topic.len()).as_bytes(), topic].concat()
}

/// The broker's answer; `None` if it closes.
pub fn answer(connection: &mut TcpStream) -> Result<Option<Answer>> {
    let mut welcome = [0; WELCOME_LEN];
    match connection.read_exact(&mut welcome) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error).context("no answer"),
    }
    let welcome = Welcome::ref_from_bytes(&welcome).map_err(|_| anyhow!("a Welcome's length"))?;
    Ok(Some(welcome.parse()?))
}

/// The code of a refusal, 0 for none; `None` if the broker closes.
pub fn refusal(connection: &mut TcpStream) -> Result<Option<u16>> {
    Ok(answer(connection)?.map(|answer| match answer {
        Answer::Accepted(_) => 0,
        Answer::Refused { code, .. } => code,
    }))
}

/// Whether the broker closes, whatever it says before.
pub fn closes(connection: &mut TcpStream) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match connection.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => {
                return !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            }
        }
    }
}

/// A part of a batch that need not exist.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Sequence number of the batch.
    pub seq: u64,
    /// Its length.
    pub len: u32,
    /// Where the part begins.
    pub offset: u32,
    /// Messages in the batch.
    pub messages: u32,
}

impl Part {
    /// The beginning of a batch of one message.
    #[must_use]
    pub fn of(seq: u64, len: u32) -> Self {
        Self {
            seq,
            len,
            offset: 0,
            messages: 1,
        }
    }

    /// Another part of it.
    #[must_use]
    pub fn at(self, offset: u32) -> Self {
        Self { offset, ..self }
    }
}

/// A DATA packet with a checksum that is right.
pub fn packet(key: u64, number: u64, part: Part, payload: &[u8]) -> Vec<u8> {
    let chunk = Chunk {
        batch: BatchInfo {
            seq: part.seq,
            len: part.len,
            messages: part.messages,
            checksum: 0,
        },
        offset: part.offset,
    };
    let data = Data::payload(stream(key), number, &chunk, None, payload);
    [data.as_bytes(), payload].concat()
}

/// A packet that only asks for an ACK.
pub fn ping(key: u64, number: u64) -> Vec<u8> {
    Data::ping(stream(key), number, &[]).as_bytes().to_vec()
}

fn stream(key: u64) -> StreamKey {
    StreamKey { key, stream: 0 }
}

/// An attack on a thread of its own, until it is ended.
#[derive(Debug)]
pub struct Attack<T> {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<T>>>,
}

/// What an attack that goes on must know.
#[derive(Debug)]
pub struct Conduct {
    end: Arc<AtomicBool>,
    ready: Sender<()>,
}

impl Conduct {
    /// Says that the attack is about to begin.
    pub fn ready(&self) {
        // After the first time, nobody listens.
        let _ = self.ready.send(());
    }

    /// Whether it is to end.
    pub fn is_over(&self) -> bool {
        self.end.load(Ordering::Relaxed)
    }
}

impl<T: Send + 'static> Attack<T> {
    /// Starts it in the publisher's namespace.
    pub fn start(
        bed: &Bed,
        act: impl FnOnce(&Conduct) -> Result<T> + Send + 'static,
    ) -> Result<Self> {
        let (attack, _) = Self::begin(bed, act)?;
        Ok(attack)
    }

    /// Starts it, and waits until it is about to begin.
    pub fn start_and_wait(
        bed: &Bed,
        act: impl FnOnce(&Conduct) -> Result<T> + Send + 'static,
    ) -> Result<Self> {
        let (attack, ready) = Self::begin(bed, act)?;
        if ready.recv_timeout(PATIENCE * 6).is_err() {
            attack.end()?;
            bail!("the attack did not begin");
        }
        Ok(attack)
    }

    fn begin(
        bed: &Bed,
        act: impl FnOnce(&Conduct) -> Result<T> + Send + 'static,
    ) -> Result<(Self, Receiver<()>)> {
        let namespace = bed.publisher_ns().to_owned();
        let end = Arc::new(AtomicBool::new(false));
        let (ready, begun) = channel();
        let conduct = Conduct {
            end: Arc::clone(&end),
            ready,
        };
        let thread = thread::Builder::new().name("attacker".to_owned());
        let thread = thread.spawn(move || {
            netns::enter(&namespace)?;
            act(&conduct)
        })?;
        Ok((
            Self {
                end,
                thread: Some(thread),
            },
            begun,
        ))
    }

    /// Ends it and returns what it did.
    pub fn end(mut self) -> Result<T> {
        self.end.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("it ends once");
        thread
            .join()
            .map_err(|_| anyhow!("the attacker panicked"))?
    }

    /// Runs one that ends by itself.
    pub fn run(bed: &Bed, act: impl FnOnce(&Conduct) -> Result<T> + Send + 'static) -> Result<T> {
        Self::start(bed, act)?.join()
    }

    /// Waits until it ends by itself.
    pub fn join(mut self) -> Result<T> {
        let thread = self.thread.take().expect("it ends once");
        thread
            .join()
            .map_err(|_| anyhow!("the attacker panicked"))?
    }
}

impl<T> Drop for Attack<T> {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The test has failed already.
            let _ = thread.join();
        }
    }
}
