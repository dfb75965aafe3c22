//! Where a stream's ACKs go: to the publisher's host only, whatever packets claim.

use std::net::IpAddr;

use penstock_transport::Timestamp;
use penstock_xsk::frame::{Datagram, FrameTemplate};

/// A datagram that arrived, and on which socket.
#[derive(Clone, Copy)]
pub(super) struct Arrival<'a> {
    /// Index of the socket in the worker.
    pub(super) socket: usize,
    /// Its first buffer, which has all headers.
    pub(super) frame: &'a [u8],
    pub(super) datagram: &'a Datagram,
    pub(super) now: Timestamp,
}

/// Destination of a stream's ACKs, learned from its packets.
///
/// Anyone can open a stream and send its packets with a spoofed source address; ACKs are larger than such
/// packets (RFC 9000 section 8). So ACKs go only to the peer of the control connection; only its port is
/// learned from packets.
#[derive(Debug)]
pub(super) struct AckRoute {
    /// Headers of an ACK, known once a packet arrived from the publisher's host.
    template: Option<FrameTemplate>,
    /// Index of the socket on which that packet arrived.
    socket: usize,
    /// Peer of the control connection, whose address is validated.
    host: IpAddr,
    /// Source of the newest packet, if it differs from the one before.
    candidate: Option<FrameTemplate>,
}

impl AckRoute {
    pub(super) fn new(host: IpAddr, socket: usize) -> Self {
        Self {
            template: None,
            socket,
            host: host.to_canonical(),
            candidate: None,
        }
    }

    /// Index of the socket that sends the ACKs.
    pub(super) fn socket(&self) -> usize {
        self.socket
    }

    /// Headers of an ACK; none before a packet arrived from the publisher's host.
    pub(super) fn template(&self) -> Option<&FrameTemplate> {
        self.template.as_ref()
    }

    /// Whether a packet came from the destination of the ACKs.
    pub(super) fn matches_sender(&self, frame: &[u8], datagram: &Datagram) -> bool {
        let template = self.template.as_ref();
        template.is_some_and(|template| template.matches_sender(frame, datagram))
    }

    /// Notes that the newest packet came from the destination of the ACKs, over this socket.
    pub(super) fn confirm(&mut self, socket: usize) {
        self.socket = socket;
        self.candidate = None;
    }

    /// Records the source of the newest packet. Returns false if it came from a host other than the
    /// publisher's: the packet is placed, but not acknowledged.
    ///
    /// The UDP port may change when a NAT drops its mapping. ACKs follow after the second packet in a row
    /// from the new port: the checksum does not cover addresses, so one damaged packet must not
    /// redirect them. Packets repeated from elsewhere do not redirect them either, because they are not
    /// the newest (RFC 9000 section 9.3).
    pub(super) fn update_source(&mut self, arrival: Arrival<'_>) -> bool {
        let Arrival {
            socket,
            frame,
            datagram,
            ..
        } = arrival;
        if self.matches_sender(frame, datagram) {
            self.confirm(socket);
            return true;
        }
        let source = FrameTemplate::reply_template(frame, datagram);
        if source.peer().ip() != self.host {
            return false;
        }
        self.socket = socket;
        let is_second = self.candidate.as_ref() == Some(&source);
        match &self.template {
            Some(_) if !is_second => self.candidate = Some(source),
            _ => {
                self.candidate = None;
                self.template = Some(source);
            }
        }
        true
    }
}
