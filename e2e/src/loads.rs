//! TCP servers and clients that are slow in a chosen way, for causes that a diagnosis must name. Each is a
//! process of its own, because a diagnosis observes processes: the test's program executes itself.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, ExitCode};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::time::{ClockId, clock_gettime};
use penstock_testbed::running::inside;
use socket2::{Domain, Socket, Type};

/// First argument of a test's program that is to be a load; its settings follow.
const ROLE: &str = "--as-load";
/// A load whose test was killed ends after this time.
const LIFETIME: Duration = Duration::from_secs(60);
/// Name of the processes.
pub const NAME: &std::ffi::CStr = c"e2e-load";

/// What a load does.
#[derive(Debug, Clone, Copy)]
pub enum Load {
    /// Accepts and reads.
    Serve(Serve),
    /// Connects and sends.
    Send(Send),
    /// Uses a core.
    Spin,
}

/// A server that reads what it gets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serve {
    /// Where it listens.
    pub port: u16,
    /// Bytes of a read; 0 for 64 KiB.
    pub bytes: usize,
    /// Pause after each, microseconds.
    pub pause_us: u64,
    /// CPU time that it uses after each, microseconds.
    pub spin_us: u64,
    /// Two threads read in turn: neither is busy, both together are.
    pub relay: bool,
    /// `SO_RCVBUF` of the listener, unless 0.
    pub rcvbuf: usize,
    /// `SO_RCVBUF` of accepted sockets, unless 0.
    pub accepted_rcvbuf: usize,
    /// `TCP_WINDOW_CLAMP` of the listener, unless 0.
    pub clamp: i32,
    /// Connections that may wait, for a server that never accepts; 0 for one that does.
    pub backlog: i32,
}

/// A client that sends 64 KiB at a time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Send {
    /// Where to.
    pub port: u16,
    /// `SO_SNDBUF`, unless 0.
    pub sndbuf: usize,
    /// Bytes to send before it stays connected and sends nothing; 0 to send until the end.
    pub total: usize,
    /// Bytes of a write; 0 for 64 KiB.
    pub bytes: usize,
    /// Publishes to a NATS server.
    pub nats: bool,
}

impl Load {
    /// The command that runs it in a namespace; `address` is the server's.
    pub fn command(&self, namespace: &str, address: &str) -> Result<Command> {
        let own = std::env::current_exe().context("cannot tell where this program is")?;
        let mut command = inside(namespace, &own);
        command.args([ROLE, address]);
        match *self {
            Self::Serve(serve) => command.arg("serve").args(serve.words()),
            Self::Send(send) => command.arg("send").args(send.words()),
            Self::Spin => command.arg("spin"),
        };
        Ok(command)
    }
}

impl Serve {
    fn words(self) -> [String; 9] {
        let flag = usize::from(self.relay);
        [
            self.port.to_string(),
            self.bytes.to_string(),
            self.pause_us.to_string(),
            self.spin_us.to_string(),
            flag.to_string(),
            self.rcvbuf.to_string(),
            self.accepted_rcvbuf.to_string(),
            self.clamp.to_string(),
            self.backlog.to_string(),
        ]
    }

    fn from_words(words: &mut Words) -> Result<Self> {
        Ok(Self {
            port: words.number()?,
            bytes: words.number()?,
            pause_us: words.number()?,
            spin_us: words.number()?,
            relay: words.number::<u8>()? == 1,
            rcvbuf: words.number()?,
            accepted_rcvbuf: words.number()?,
            clamp: words.number()?,
            backlog: words.number()?,
        })
    }

    fn run(self) -> Result<()> {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        listener.set_reuse_address(true)?;
        if self.rcvbuf > 0 {
            listener.set_recv_buffer_size(self.rcvbuf)?;
        }
        let address: SocketAddr = (Ipv4Addr::UNSPECIFIED, self.port).into();
        listener.bind(&address.into())?;
        if self.clamp > 0 {
            clamp_window(&listener, self.clamp)?;
        }
        if self.backlog > 0 {
            listener.listen(self.backlog)?;
            loop {
                thread::park();
            }
        }
        listener.listen(128)?;
        loop {
            let (connection, _) = listener.accept()?;
            if self.accepted_rcvbuf > 0 {
                connection.set_recv_buffer_size(self.accepted_rcvbuf)?;
            }
            self.read_in_background(connection.into())?;
        }
    }

    fn read_in_background(self, connection: TcpStream) -> Result<()> {
        if self.relay {
            // A turn in both directions: the first reader begins.
            let (first, second) = (sync_channel(1), sync_channel(1));
            first.0.send(()).expect("there is room for one");
            let other = connection.try_clone()?;
            let turns = Some((second.1, first.0));
            thread::spawn(move || self.read(other, turns));
            thread::spawn(move || self.read(connection, Some((first.1, second.0))));
        } else {
            thread::spawn(move || self.read(connection, None));
        }
        Ok(())
    }

    /// Reads until the other end closes.
    fn read(self, mut connection: TcpStream, turns: Option<(Receiver<()>, SyncSender<()>)>) {
        let mut buffer = vec![0; or_64_kib(self.bytes)];
        loop {
            if turns.as_ref().is_some_and(|(mine, _)| mine.recv().is_err()) {
                return;
            }
            let read = connection.read(&mut buffer);
            use_cpu(Duration::from_micros(self.spin_us));
            if turns
                .as_ref()
                .is_some_and(|(_, others)| others.send(()).is_err())
            {
                return;
            }
            if !matches!(read, Ok(1..)) {
                return;
            }
            if self.pause_us > 0 {
                thread::sleep(Duration::from_micros(self.pause_us));
            }
        }
    }
}

impl Send {
    fn words(self) -> [String; 5] {
        [
            self.port.to_string(),
            self.sndbuf.to_string(),
            self.total.to_string(),
            self.bytes.to_string(),
            usize::from(self.nats).to_string(),
        ]
    }

    fn from_words(words: &mut Words) -> Result<Self> {
        Ok(Self {
            port: words.number()?,
            sndbuf: words.number()?,
            total: words.number()?,
            bytes: words.number()?,
            nats: words.number::<u8>()? == 1,
        })
    }

    fn run(self, address: Ipv4Addr) -> Result<()> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        if self.sndbuf > 0 {
            socket.set_send_buffer_size(self.sndbuf)?;
        }
        let address: SocketAddr = SocketAddrV4::new(address, self.port).into();
        socket.connect(&address.into())?;
        let mut connection = TcpStream::from(socket);
        let mut data = vec![0; or_64_kib(self.bytes)];
        if self.nats {
            connection.write_all(b"CONNECT {\"verbose\":false}\r\n")?;
            let mut publish = format!("PUB load {}\r\n", data.len()).into_bytes();
            publish.append(&mut data);
            publish.extend_from_slice(b"\r\n");
            data = publish;
        }
        let mut sent = 0;
        while self.total == 0 || sent < self.total {
            if connection.write_all(&data).is_err() {
                return Ok(());
            }
            sent += data.len();
        }
        loop {
            thread::park();
        }
    }
}

fn clamp_window(socket: &Socket, bytes: i32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<i32>()).expect("four");
    // SAFETY: the option is an int, which lives on this stack until the call returns.
    let code = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_WINDOW_CLAMP,
            (&raw const bytes).cast(),
            length,
        )
    };
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn or_64_kib(bytes: usize) -> usize {
    if bytes == 0 { 64 << 10 } else { bytes }
}

/// Uses so much CPU time of this thread.
fn use_cpu(time: Duration) {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    let Ok(start) = now() else { return };
    while now().is_ok_and(|now| now < start + time) {}
}

/// Words of a command line.
struct Words(std::env::Args);

impl Words {
    fn next(&mut self) -> Result<String> {
        self.0.next().context("a word is missing")
    }

    fn number<T: std::str::FromStr>(&mut self) -> Result<T> {
        let word = self.next()?;
        word.parse()
            .ok()
            .with_context(|| format!("not a number: {word}"))
    }
}

/// Runs a load, if this process was started as one.
pub fn run_as_load() -> Option<ExitCode> {
    let mut words = Words(std::env::args());
    words.0.next();
    if words.0.next()? != ROLE {
        return None;
    }
    match run(&mut words) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            crate::say(&format!("{error:#}"));
            Some(ExitCode::FAILURE)
        }
    }
}

fn run(words: &mut Words) -> Result<()> {
    prctl::set_name(NAME)
        .map_err(io::Error::from)
        .context("cannot set the name")?;
    let seconds = u32::try_from(LIFETIME.as_secs()).expect("a minute");
    nix::unistd::alarm::set(seconds);
    let address: Ipv4Addr = words.next()?.parse().context("not an address")?;
    match words.next()?.as_str() {
        "serve" => Serve::from_words(words)?.run(),
        "send" => Send::from_words(words)?.run(address),
        "spin" => loop {
            std::hint::spin_loop();
        },
        other => bail!("no load is called {other}"),
    }
}
