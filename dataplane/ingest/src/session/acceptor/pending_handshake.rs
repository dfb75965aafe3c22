//! A connection from accept to the end of its handshake.

use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use penstock_wire::handshake::Request;

use crate::session::admission::Asked;
use crate::session::buffers::EffectiveBuffers;
use crate::session::handshake::ServerHandshake;
use crate::session::peer::{Host, Tenant};
use crate::session::permits::StreamPermit;

/// A connection that has not finished its handshake.
#[derive(Debug)]
pub(super) struct PendingHandshake {
    pub(super) socket: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) buffers: EffectiveBuffers,
    pub(super) handshake: ServerHandshake,
    pub(super) deadline: Instant,
    /// Distinguishes it from a later one with the same key.
    pub(super) number: u64,
    /// Its request, while its topic is being opened.
    pub(super) waiting: Option<Waiting>,
    /// Whether it waits for its topic, and so counts as a stream, not as a pending handshake.
    pub(super) has_waited: bool,
}

/// A stream that may be opened as soon as its topic is open.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) topic: String,
    pub(super) request: Request,
    pub(super) permit: StreamPermit,
}

impl PendingHandshake {
    pub(super) fn asks<'a>(&'a self, topic: &'a str, request: &'a Request) -> Asked<'a> {
        let key = self.handshake.grant().map(|grant| &grant.key);
        let own = self.socket.local_addr().map(|own| own.ip().to_canonical());
        let from = self.peer.ip().to_canonical();
        Asked {
            topic,
            request,
            tenant: Tenant {
                host: Host::of(self.peer),
                key: key.map(|key| *key.id()),
            },
            key,
            // The kernel drops packets from outside that carry a source address of this host
            // (`accept_local` in Documentation/networking/ip-sysctl.rst).
            is_local: from.is_loopback() || own.is_ok_and(|own| own == from),
        }
    }
}

/// The tenant that a connection counts for during its handshake.
pub(super) fn tenant_of(peer: SocketAddr) -> Tenant {
    Tenant {
        host: Host::of(peer),
        key: None,
    }
}

/// Whether a connection has not said yet what it wants.
pub(super) fn is_pending(handshakes: &[Option<PendingHandshake>], key: usize, number: u64) -> bool {
    let pending = handshakes[key].as_ref();
    pending.is_some_and(|pending| pending.number == number && !pending.has_waited)
}
