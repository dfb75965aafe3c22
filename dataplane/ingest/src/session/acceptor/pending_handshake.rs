//! A connection from accept to the end of its handshake.

use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use penstock_wire::handshake::Request;
use slab::Slab;

use crate::session::admission::StreamRequest;
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
    /// See [`HandshakeId::number`].
    pub(super) number: u64,
    /// What it is for, while its topic is being opened.
    pub(super) waiting: Option<Admissible>,
    /// Whether it has waited for its topic, and so counts as a stream, not as a pending handshake.
    pub(super) has_waited: bool,
}

/// A connection with a permit, which is served as soon as its topic is open.
#[derive(Debug)]
pub(super) enum Admissible {
    Stream(AdmissibleStream),
    Subscriber(AdmissibleSubscriber),
}

impl Admissible {
    pub(super) fn permit(&self) -> &StreamPermit {
        match self {
            Self::Stream(stream) => &stream.permit,
            Self::Subscriber(subscriber) => &subscriber.permit,
        }
    }
}

/// A subscriber with a permit.
#[derive(Debug)]
pub(super) struct AdmissibleSubscriber {
    pub(super) topic: String,
    pub(super) permit: StreamPermit,
}

/// A stream with a permit.
#[derive(Debug)]
pub(super) struct AdmissibleStream {
    pub(super) topic: String,
    pub(super) request: Request,
    pub(super) permit: StreamPermit,
}

impl PendingHandshake {
    /// The tenant that the connection counts for once it is admitted.
    pub(super) fn tenant(&self) -> Tenant {
        Tenant {
            host: Host::of(self.peer),
            key: self.handshake.grant().map(|grant| *grant.key.id()),
        }
    }

    /// The stream that the publisher requests.
    pub(super) fn stream_request<'a>(
        &'a self,
        topic: &'a str,
        request: &'a Request,
    ) -> StreamRequest<'a> {
        let own = self.socket.local_addr().map(|own| own.ip().to_canonical());
        let from = self.peer.ip().to_canonical();
        StreamRequest {
            topic,
            request,
            tenant: self.tenant(),
            key: self.handshake.grant().map(|grant| &grant.key),
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

/// Names a connection, also after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HandshakeId {
    pub(super) key: usize,
    /// Distinguishes it from other connections with the same key.
    pub(super) number: u64,
}

impl HandshakeId {
    /// The connection, if its handshake has not ended.
    pub(super) fn get(self, handshakes: &Slab<PendingHandshake>) -> Option<&PendingHandshake> {
        let pending = handshakes.get(self.key)?;
        (pending.number == self.number).then_some(pending)
    }

    /// Whether the publisher has not requested a stream yet.
    pub(super) fn is_pending(self, handshakes: &Slab<PendingHandshake>) -> bool {
        self.get(handshakes)
            .is_some_and(|pending| !pending.has_waited)
    }
}
