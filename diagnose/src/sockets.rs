//! The TCP sockets of a network namespace, as the kernel tells them over netlink (sock_diag(7)), and
//! whether an application sized their receive buffer.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_MULTIPART, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
pub use netlink_packet_sock_diag::inet::nlas::MemInfo as Memory;
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags,
};
use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddress, protocols::NETLINK_SOCK_DIAG};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use penstock_runtime::tcp_info::TcpInfo;

/// Of `SO_BUF_LOCK`: the receive buffer was set by the application (include/uapi/linux/socket.h).
const SOCK_RCVBUF_LOCK: libc::c_int = 2;
/// `TCP_TIME_WAIT`, `TCP_CLOSE`, `TCP_LISTEN` and `TCP_NEW_SYN_RECV` (include/net/tcp_states.h).
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;
const NEW_SYN_RECV: u8 = 12;
/// How often all sockets of a namespace are listed to find new ones: the kernel goes through its whole
/// table of connections for that, which is sized by the host's memory.
const LIST_EVERY: Duration = Duration::from_secs(1);
/// `INET_DIAG_NOCOOKIE`, twice (include/uapi/linux/inet_diag.h).
const ANY_COOKIE: [u8; 8] = [0xff; 8];
/// With more known sockets than this, listing all of them costs less than a question for each.
const MAX_ASKED: usize = 128;

/// A way to ask one namespace; it stays that namespace's, whichever thread uses it.
#[derive(Debug)]
pub struct Diag(Netlink);

/// One socket at one moment.
#[derive(Debug, Clone)]
pub struct Socket {
    /// Its own address.
    pub local: SocketAddr,
    /// That of its peer.
    pub remote: SocketAddr,
    /// TCP state, as the kernel numbers it.
    pub state: u8,
    /// Its inode.
    pub inode: u32,
    /// Bytes received and not read; of a listener, connections that wait for accept.
    pub recv_q: u32,
    /// Bytes written and not acknowledged; for a listener, its backlog: how many connections may wait.
    pub send_q: u32,
    /// Memory that it uses.
    pub memory: Option<Memory>,
    /// What the kernel knows about its connection.
    pub info: Option<TcpInfo>,
    /// Its congestion control.
    pub congestion: Option<String>,
    /// What the kernel knows it by.
    id: SocketId,
}

impl Socket {
    /// Whether it is a listener.
    pub fn is_listening(&self) -> bool {
        self.state == LISTEN
    }

    fn is_open(&self) -> bool {
        !matches!(self.state, TIME_WAIT | CLOSE | NEW_SYN_RECV)
    }
}

impl Diag {
    /// For the calling thread's namespace.
    pub fn open() -> Result<Self> {
        let mut socket = Netlink::new(NETLINK_SOCK_DIAG)
            .context("the kernel has no sock_diag; modprobe tcp_diag")?;
        socket.bind_auto().context("cannot bind to sock_diag")?;
        socket
            .connect(&NetlinkAddress::new(0, 0))
            .context("cannot reach sock_diag")?;
        Ok(Self(socket))
    }

    /// All TCP sockets that listen or are connected.
    pub fn sockets(&self) -> Result<Vec<Socket>> {
        let closed = StateFlags::TIME_WAIT | StateFlags::CLOSE | StateFlags::SYN_RECV;
        self.list(StateFlags::all() - closed)
    }

    fn list(&self, states: StateFlags) -> Result<Vec<Socket>> {
        let mut sockets = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let every = match family {
                AF_INET => SocketId::new_v4(),
                _ => SocketId::new_v6(),
            };
            let request = request(NLM_F_REQUEST | NLM_F_DUMP, states.clone(), every);
            self.ask(&request, |socket| sockets.push(socket))
                .context("sock_diag does not list the TCP sockets")?;
        }
        Ok(sockets)
    }

    /// One connection; `None` once it is closed. The cookie in its identity is the kernel's alone, so
    /// another connection with the same addresses is never taken for it.
    fn connection(&self, id: &SocketId) -> Result<Option<Socket>> {
        let mut found = None;
        let request = request(NLM_F_REQUEST, StateFlags::all(), id.clone());
        match self.ask(&request, |socket| found = Some(socket)) {
            Ok(()) => Ok(found.filter(Socket::is_open)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => {
                Ok(None)
            }
            Err(error) => Err(error).context("sock_diag does not find a connection"),
        }
    }

    /// The other end of a connection, if it is in this namespace and bound to no interface.
    pub fn other_end(&self, of: &Socket) -> Result<Option<Socket>> {
        let id = SocketId {
            source_port: of.remote.port(),
            destination_port: of.local.port(),
            source_address: of.remote.ip(),
            destination_address: of.local.ip(),
            interface_id: 0,
            cookie: ANY_COOKIE,
        };
        // Where there is no such connection, the kernel answers with the listener on that port.
        let found = self.connection(&id)?;
        Ok(found.filter(|socket| !socket.is_listening()))
    }

    /// The other ends of these connections that are in this namespace, perhaps among other sockets.
    pub fn other_ends(&self, of: &[&Socket]) -> Result<Vec<Socket>> {
        if of.len() > MAX_ASKED {
            return self.sockets();
        }
        let ends = of.iter().map(|socket| self.other_end(socket));
        Ok(ends
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flatten()
            .collect())
    }

    /// Sends one request and takes in its answer: one message, or many up to one that ends them.
    fn ask(&self, request: &[u8], mut take: impl FnMut(Socket)) -> io::Result<()> {
        self.0.send(request, 0)?;
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let is_last = message.header.flags & NLM_F_MULTIPART == 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                        take(socket_path(*response));
                        if is_last {
                            return Ok(());
                        }
                    }
                    _ => {}
                }
                // Messages begin at multiples of four.
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

/// Sockets of one namespace that somebody follows: they are asked for one by one, and all are listed
/// about once a second only, to find new ones.
#[derive(Debug, Default)]
pub struct Followed {
    connections: Vec<SocketId>,
    listeners: Vec<SocketId>,
    listed: Option<Instant>,
}

impl Followed {
    /// Whether it is time to list all sockets: never done, some time ago, or one of those followed has
    /// gone and may have a successor.
    pub fn is_list_due(&self) -> bool {
        self.connections.len() > MAX_ASKED
            || self
                .listed
                .is_none_or(|listed| listed.elapsed() >= LIST_EVERY)
    }

    /// Whether there is none to ask for.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// All sockets if `list`, else those followed that still exist.
    pub fn sample(&mut self, diag: &Diag, list: bool) -> Result<Vec<Socket>> {
        if list {
            self.listed = Some(Instant::now());
            return diag.sockets();
        }
        let mut sockets = Vec::with_capacity(self.connections.len());
        for id in &self.connections {
            match diag.connection(id)? {
                Some(socket) => sockets.push(socket),
                None => self.listed = None,
            }
        }
        if !self.listeners.is_empty() {
            // The kernel keeps listeners apart, in a small table. Asked for one of several on the same
            // port, it would choose one by the hash of the addresses.
            let listeners = diag.list(StateFlags::LISTEN)?;
            let is_known = |socket: &Socket| self.listeners.contains(&socket.id);
            sockets.extend(listeners.into_iter().filter(is_known));
        }
        Ok(sockets)
    }

    /// Follows these from now on, and no others.
    pub fn keep<'a>(&mut self, sockets: impl Iterator<Item = &'a Socket>) {
        self.connections.clear();
        self.listeners.clear();
        for socket in sockets {
            match socket.is_listening() {
                true => self.listeners.push(socket.id.clone()),
                false => self.connections.push(socket.id.clone()),
            }
        }
    }
}

fn request(flags: u16, states: StateFlags, socket_id: SocketId) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let request = InetRequest {
        family: match socket_id.source_address {
            IpAddr::V4(_) => AF_INET,
            IpAddr::V6(_) => AF_INET6,
        },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::INFO | ExtensionFlags::SKMEMINFO | ExtensionFlags::CONG,
        states,
        socket_id,
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn socket_path(response: InetResponse) -> Socket {
    let InetResponse { header, nlas } = response;
    let id = header.socket_id;
    let mut socket = Socket {
        local: SocketAddr::new(plain(id.source_address), id.source_port),
        remote: SocketAddr::new(plain(id.destination_address), id.destination_port),
        state: header.state,
        inode: header.inode,
        recv_q: header.recv_queue,
        send_q: header.send_queue,
        memory: None,
        info: None,
        congestion: None,
        id,
    };
    for nla in nlas {
        match nla {
            Nla::TcpInfo(bytes) => socket.info = Some(TcpInfo::read(&bytes)),
            Nla::MemInfo(memory) => socket.memory = Some(memory),
            Nla::Congestion(name) => socket.congestion = Some(name),
            _ => {}
        }
    }
    socket
}

/// IPv4 over an IPv6 socket is IPv4, as its other end has it.
fn plain(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Facts about the receive buffer that only the socket itself reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceiveBuffer {
    /// Whether the application set its size, which switches autotuning off (`SO_BUF_LOCK`, Linux 5.14).
    pub is_set: bool,
    /// Maximum window to offer, bytes (`TCP_WINDOW_CLAMP`, tcp(7)). It follows the buffer unless the
    /// application or the route sets it.
    pub window_clamp: u32,
}

/// Queries the socket of another process through a duplicated descriptor.
pub fn receive_buffer(pid: u32, inode: u32) -> io::Result<ReceiveBuffer> {
    let number = descriptor_of(pid, inode)?;
    let socket = borrow(pid, number)?;
    let locks = int_option(&socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK)?;
    let clamp = int_option(&socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP)?;
    Ok(ReceiveBuffer {
        is_set: locks & SOCK_RCVBUF_LOCK != 0,
        window_clamp: clamp.cast_unsigned(),
    })
}

fn int_option(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the socket is open; the kernel writes at most `length` bytes to `value`.
    let code = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    match code {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

fn descriptor_of(pid: u32, inode: u32) -> io::Result<RawFd> {
    let wanted = format!("socket:[{inode}]");
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let is_it = fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == &*wanted);
        if is_it && let Some(number) = entry.file_name().to_str().and_then(|n| n.parse().ok()) {
            return Ok(number);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// A descriptor of our own for what another process has open.
fn borrow(pid: u32, number: RawFd) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = pidfd_open(pid.ok_or(Errno::SRCH)?, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    fn inode_of(socket: &impl AsFd) -> u32 {
        let number = socket.as_fd().as_raw_fd();
        let link = fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
        let text = link.to_str().unwrap().to_owned();
        text.trim_start_matches("socket:[")
            .trim_end_matches(']')
            .parse()
            .unwrap()
    }

    fn set(socket: &impl AsFd, level: libc::c_int, option: libc::c_int, bytes: libc::c_int) {
        // SAFETY: the option is one int, and its size is said.
        let code = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                level,
                option,
                (&raw const bytes).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        assert_eq!(code, 0);
    }

    #[test]
    fn both_ends_of_a_connection_are_found_with_their_figures() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        client.write_all(&[1; 1000]).unwrap();
        let sockets = Diag::open().unwrap().sockets().unwrap();
        let of = |inode| sockets.iter().find(|s| s.inode == inode).unwrap();
        assert!(of(inode_of(&listener)).is_listening());
        let (near, far) = (of(inode_of(&server)), of(inode_of(&client)));
        assert_eq!((near.local, near.remote), (far.remote, far.local));
        assert_eq!(near.recv_q, 1000);
        assert_eq!(near.info.unwrap().bytes_received, 1000);
        assert!(near.memory.as_ref().unwrap().receive_queue_max > 0);
        assert!(far.congestion.is_some());
    }

    #[test]
    fn sockets_that_are_followed_are_asked_for_alone_and_known_by_their_cookie() {
        let diag = Diag::open().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let mut followed = Followed::default();
        assert!(followed.is_list_due() && followed.is_empty());
        let wanted = [inode_of(&listener), inode_of(&server)];
        let all = followed.sample(&diag, true).unwrap();
        followed.keep(all.iter().filter(|s| wanted.contains(&s.inode)));
        assert!(!followed.is_list_due() && !followed.is_empty());
        client.write_all(&[1; 1000]).unwrap();
        let known = followed.sample(&diag, false).unwrap();
        let inodes: Vec<u32> = known.iter().map(|socket| socket.inode).collect();
        assert_eq!(inodes, [wanted[1], wanted[0]]);
        assert_eq!(known[0].info.unwrap().bytes_received, 1000);
        assert!(known[0].memory.is_some() && known[1].is_listening());
        let other = diag.other_end(&known[0]).unwrap().unwrap();
        assert_eq!(other.inode, inode_of(&client));
        // No connection, but a listener.
        let mut nobody = other;
        nobody.local.set_port(1);
        assert!(diag.other_end(&nobody).unwrap().is_none());
        let mut id = known[0].id.clone();
        id.cookie[0] ^= 1;
        assert!(diag.connection(&id).unwrap().is_none());
        // The end that is closed first waits for what may still come, without a socket.
        drop(server);
        drop(client);
        let known = followed.sample(&diag, false).unwrap();
        assert!(known.iter().all(Socket::is_listening) && known.len() == 1);
        assert!(followed.is_list_due());
    }

    #[test]
    fn ipv6_connections_are_found_again() {
        let Ok(listener) = TcpListener::bind("[::1]:0") else {
            return;
        };
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let diag = Diag::open().unwrap();
        let mut followed = Followed::default();
        let all = followed.sample(&diag, true).unwrap();
        followed.keep(all.iter().filter(|s| s.inode == inode_of(&client)));
        assert_eq!(followed.sample(&diag, false).unwrap().len(), 1);
    }

    #[test]
    fn a_buffer_that_the_application_sized_is_told_from_one_that_the_kernel_tunes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pid = std::process::id();
        let asked = || receive_buffer(pid, inode_of(&listener)).unwrap();
        assert!(!asked().is_set);
        set(&listener, libc::SOL_SOCKET, libc::SO_RCVBUF, 100_000);
        assert!(asked().is_set);
        set(&listener, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, 20_000);
        assert_eq!(asked().window_clamp, 20_000);
        assert!(receive_buffer(pid, 0).is_err());
    }
}
