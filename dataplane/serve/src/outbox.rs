//! Deliveries queued for one subscriber: headers and copied batches, then at most one batch from the log's file.

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::sendfile::sendfile64;
use penstock_auth::PacketKeys;
use penstock_log::Span;
use penstock_wire::delivery::{Delivery, DeliveryHeader};
use penstock_wire::reply::Fault;
use socket2::SockRef;
use zerocopy::IntoBytes;

/// Bytes after which no more deliveries are collected before they are sent.
const COLLECT: usize = 64 << 10;
/// Capacity that an empty outbox keeps, bytes; a large batch may need more for a while.
const KEPT: usize = 2 * COLLECT;

/// Deliveries of one connection that are not sent yet. Bounded: [`COLLECT`] and one batch.
#[derive(Debug)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    /// Number of these bytes that were sent.
    at: usize,
    /// Payload that is sent after them.
    from_file: Option<FilePart>,
    /// Keys for the tags of deliveries, if they carry tags, and the number of deliveries with a tag so far.
    keys: Option<Arc<PacketKeys>>,
    sealed: u64,
    /// Bytes that were ever queued.
    total: u64,
}

/// Payload in the log's file.
#[derive(Debug)]
struct FilePart {
    offset: i64,
    left: usize,
}

impl Outbox {
    /// An empty queue; deliveries carry tags if there are keys.
    pub(crate) fn new(keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            bytes: Vec::new(),
            at: 0,
            from_file: None,
            keys,
            sealed: 0,
            total: 0,
        }
    }

    /// Whether all payload must be copied to compute its tags.
    pub(crate) fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Bytes that were queued since the connection was opened.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Bytes of memory beyond [`KEPT`].
    pub(crate) fn held(&self) -> usize {
        self.bytes.capacity().saturating_sub(KEPT)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.at == self.bytes.len() && self.from_file.is_none()
    }

    /// Whether it is time to send.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes.len() - self.at >= COLLECT || self.from_file.is_some()
    }

    /// Queues a delivery, with the payload of a batch.
    pub(crate) fn push(&mut self, delivery: &Delivery, payload: &[u8]) {
        let header = DeliveryHeader::new(delivery);
        self.append(header.as_bytes(), payload);
    }

    /// Queues a batch whose payload is sent from the log's file.
    pub(crate) fn push_from_file(&mut self, delivery: &Delivery, span: &Span) {
        self.push(delivery, &[]);
        let left = span.descriptor.payload_len as usize;
        self.total += left as u64;
        self.from_file = Some(FilePart {
            offset: span.file_offset as i64,
            left,
        });
    }

    /// Queues an error, which is the last delivery of a connection.
    pub(crate) fn push_error(&mut self, fault: Fault, text: &str) {
        let error = DeliveryHeader::error(fault, text);
        let (header, text) = error.split_at(penstock_wire::delivery::DELIVERY_LEN);
        self.append(header, text);
    }

    fn append(&mut self, header: &[u8], payload: &[u8]) {
        debug_assert!(self.from_file.is_none(), "payload from the file comes last");
        let before = self.bytes.len();
        self.bytes.extend_from_slice(header);
        if let Some(keys) = &self.keys {
            self.bytes
                .extend_from_slice(&keys.seal_reply(self.sealed, &[header, payload]));
            self.sealed += 1;
        }
        self.bytes.extend_from_slice(payload);
        self.total += (self.bytes.len() - before) as u64;
    }

    /// Sends as much as possible without waiting; returns `true` when nothing is left.
    ///
    /// # Errors
    /// If the connection is lost; [`io::ErrorKind::UnexpectedEof`] if the file has been truncated.
    pub(crate) fn flush(&mut self, socket: &TcpStream, file: &File) -> io::Result<bool> {
        while self.at < self.bytes.len() {
            match self.send_bytes(socket) {
                Ok(sent) => self.at += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        while let Some(part) = &mut self.from_file {
            let sent = sendfile64(socket, file.as_fd(), Some(&mut part.offset), part.left);
            match sent {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(sent) => part.left -= sent,
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if part.left == 0 {
                self.from_file = None;
            }
        }
        self.at = 0;
        self.bytes.clear();
        self.bytes.shrink_to(KEPT);
        Ok(true)
    }

    /// `MSG_MORE` (send(2)), so that the kernel puts the header and the payload from the file into the same packets.
    fn send_bytes(&self, socket: &TcpStream) -> io::Result<usize> {
        let rest = &self.bytes[self.at..];
        let flags = match self.from_file {
            Some(_) => libc::MSG_MORE,
            None => 0,
        };
        SockRef::from(socket).send_with_flags(rest, flags)
    }
}
