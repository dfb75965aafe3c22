//! The answer to a handshake: an admitted stream goes to a worker, a refused one learns why.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use penstock_auth::{PacketKeys, generate};
use penstock_wire::handshake::{DatagramOffer, Offer, Path, Refusal, Welcome};
use tracing::{debug, info, warn};
use zerocopy::IntoBytes;

use super::Acceptor;
use super::pending_handshake::PendingHandshake;
use crate::session::FIRST_CREDIT;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::admission::{Admission, Admit};
use crate::session::buffers::{EffectiveBuffers, rmem_max};
use crate::session::stats::Counters;
use crate::session::stream_filter::FilterEntry;

impl<A: Admit> Acceptor<A> {
    /// Answers an admitted stream, and passes it to the path of its payload.
    pub(super) fn hand_over(&mut self, key: usize, admission: Admission) {
        let Some(PendingHandshake {
            socket,
            peer,
            buffers,
            mut handshake,
            ..
        }) = self.take(key)
        else {
            return;
        };
        let has_packet_auth = self.packet_auth || handshake.wants_packet_auth();
        let entry = self.filter_entry(&admission);
        let secret = has_packet_auth.then(generate).transpose();
        let (entry, secret) = match (entry, secret) {
            (Ok(entry), Ok(secret)) => (entry, secret),
            (Err(error), _) | (_, Err(error)) => {
                warn!(%peer, %error, "no random numbers; a connection is dropped");
                return;
            }
        };
        let offer = self.offer(&admission, entry.as_ref());
        let packets = secret.as_deref().copied().unwrap_or_default();
        let welcome = handshake.seal(Welcome::accept(offer).as_bytes().to_vec(), packets);
        // A new socket has room for these few bytes; one without is dropped.
        if !matches!((&socket).write(&welcome), Ok(n) if n == welcome.len()) {
            Counters::count(&self.shared.counters.handshake_closed);
            return;
        }
        Counters::count(&self.shared.counters.streams_opened);
        if self.shared.lines.allows() {
            let key = handshake.grant().map(|grant| grant.name.as_str());
            log_socket(peer, &admission, key, &buffers);
        }
        let accepted = AcceptedStream {
            socket,
            peer,
            buffers,
            admission,
            keys: secret.map(|secret| Arc::new(PacketKeys::new(&secret))),
        };
        self.queue(accepted, entry);
    }

    /// An entry in the filter of the xdp path, for a stream over that path.
    fn filter_entry(&self, admission: &Admission) -> Result<Option<FilterEntry>, getrandom::Error> {
        let path = self.datagrams.as_ref();
        let path = path.filter(|_| admission.path == Path::Xdp);
        path.map(|path| path.pending_streams.allow(admission.stream as u16))
            .transpose()
    }

    fn offer(&self, admission: &Admission, entry: Option<&FilterEntry>) -> Offer {
        let path = self.datagrams.as_ref().zip(entry);
        Offer {
            session: admission.session,
            max_payload: admission.max_payload,
            committed: admission.lease.committed(),
            datagrams: path.map(|(path, entry)| DatagramOffer {
                key: entry.stream().key,
                credit: FIRST_CREDIT,
                max_datagram: admission.max_datagram.min(path.max_datagram),
            }),
        }
    }

    fn queue(&self, accepted: AcceptedStream, entry: Option<FilterEntry>) {
        if let Some((path, entry)) = self.datagrams.as_ref().zip(entry) {
            return path.pending_streams.insert(entry, accepted);
        }
        let least = self.workers.iter().min_by_key(|worker| worker.load());
        let worker = least.expect("a broker has at least one worker");
        let peer = accepted.peer;
        if let Err(error) = worker.push(accepted) {
            warn!(%peer, %error, "cannot queue a connection");
        }
    }

    /// Refuses a stream; the log may get another text than the peer.
    pub(super) fn reject(
        &mut self,
        key: usize,
        refusal: Option<Refusal>,
        text: &str,
        logged: &str,
    ) {
        let Some(mut pending) = self.take(key) else {
            return;
        };
        let counters = &self.shared.counters;
        let Some(refusal) = refusal else {
            Counters::count(&counters.garbage);
            debug!(peer = %pending.peer, "dropped: {logged}");
            return;
        };
        Counters::count(&counters.streams_refused);
        match refusal {
            Refusal::Authentication => Counters::count(&counters.unauthenticated),
            Refusal::Permission => Counters::count(&counters.not_permitted),
            _ => {}
        }
        if self.shared.lines.allows() {
            info!(peer = %pending.peer, "stream refused: {logged}");
        }
        let answer = pending
            .handshake
            .seal(Welcome::refuse(refusal, text), [0; 32]);
        // Best effort: a peer that does not read its refusal sees the connection close.
        let _ = (&pending.socket).write(&answer);
    }
}

/// Logs one line per payload socket with its effective buffer sizes.
fn log_socket(
    peer: SocketAddr,
    admission: &Admission,
    key: Option<&str>,
    buffers: &EffectiveBuffers,
) {
    info!(
        %peer,
        topic = admission.topic,
        key,
        path = admission.path.name(),
        stream = admission.stream,
        rcvbuf_requested = buffers.rcvbuf_requested,
        rcvbuf_effective = buffers.rcvbuf_effective,
        rcvbuf_capped_by_rmem_max = buffers.rcvbuf_capped.then(rmem_max).flatten(),
        sndbuf_requested = buffers.sndbuf_requested,
        sndbuf_effective = buffers.sndbuf_effective,
        window_scale = buffers.window_scale,
        rcv_ssthresh = buffers.rcv_ssthresh_first,
        rcv_space = buffers.rcv_space_first,
        "payload socket"
    );
}
