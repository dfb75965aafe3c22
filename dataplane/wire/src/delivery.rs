//! Reading a topic over a connection: the subscriber's frames, and the broker's deliveries.
//!
//! A subscriber opens its connection with [`Hello::for_subscriber`](crate::handshake::Hello::for_subscriber). After
//! the Welcome it sends [`Start`] once, then [`Progress`] as it consumes; the broker sends deliveries, each a
//! [`DeliveryHeader`], and behind that of a batch its payload.
//!
//! ```
//! use penstock_wire::batch;
//! use penstock_wire::delivery::{BatchInfo, Delivery, DeliveryHeader, Request, RequestFrame, Start, StartAt};
//!
//! let start = Request::Start(Start { at: StartAt::Oldest, is_registered: true, credit: 1 << 20 });
//! assert_eq!(RequestFrame::new(&start).parse(), Ok(start));
//!
//! let batch = BatchInfo {
//!     index: 41,
//!     session: 0xc0ffee,
//!     stream: 3,
//!     batch_seq: 7,
//!     messages: 1,
//!     payload_len: 9,
//!     checksum: batch::checksum(7, 1, b"\x05\0\0\0hello"),
//!     arrival_unix_ns: 1_700_000_000_000_000_000,
//! };
//! let header = DeliveryHeader::new(&Delivery::Batch(batch));
//! assert_eq!(header.parse(batch::MAX_PAYLOAD), Ok(Delivery::Batch(batch)));
//! ```

use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::text::{MAX_TEXT_LEN, clip};
use super::{crc32c, message};

/// Bytes of a [`RequestFrame`].
pub const REQUEST_LEN: usize = size_of::<RequestFrame>();
/// Bytes of a [`DeliveryHeader`].
pub const DELIVERY_LEN: usize = size_of::<DeliveryHeader>();

const KIND_START: u8 = 16;
const KIND_PROGRESS: u8 = 17;
const KIND_BATCH: u8 = 32;
const KIND_LOST: u8 = 33;
const KIND_DAMAGED: u8 = 34;
const KIND_CAUGHT_UP: u8 = 35;
const KIND_EVICTED: u8 = 36;
const KIND_ERROR: u8 = 37;

const FLAG_REGISTERED: u8 = 1;

/// A frame from subscriber to broker, as it lies on the wire.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RequestFrame {
    kind: u8,
    flags: u8,
    start_at: u8,
    reserved: [u8; 5],
    position: U64,
    credit: U64,
    reserved_too: [u8; 4],
    /// CRC32C over the bytes before it.
    checksum: U32,
}

/// Where a subscriber starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartAt {
    /// 0: at the oldest batch in the log.
    Oldest,
    /// 1: behind the newest batch.
    End,
    /// 2: at the batch with this index.
    Index(u64),
    /// 3: at the oldest batch that arrived at this time or later, nanoseconds since the Unix epoch.
    Time(u64),
}

/// The first frame of a subscriber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// Where to start.
    pub at: StartAt,
    /// Whether a log that blocks when it is full waits for this subscriber.
    pub is_registered: bool,
    /// As [`Progress::credit`].
    pub credit: u64,
}

/// How far a subscriber has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// It needs no batch with a lower index any more. Never falls.
    pub needed_from: u64,
    /// Limit of the bytes that the broker may send after the Welcome, headers and payload, all together. Never
    /// falls. The broker may begin a delivery below the limit that ends beyond it.
    pub credit: u64,
}

/// A frame from subscriber to broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// The first one.
    Start(Start),
    /// Every later one.
    Progress(Progress),
}

/// The header of a delivery, as it lies on the wire.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DeliveryHeader {
    kind: u8,
    reserved: u8,
    code: [u8; 2],
    /// Bytes of payload or text that follow.
    body_len: U32,
    index: U64,
    session: U64,
    batch_seq: U64,
    arrival_unix_ns: U64,
    stream: U32,
    messages: U32,
    batch_checksum: U32,
    reserved_too: [u8; 8],
    /// CRC32C over the bytes before it.
    checksum: U32,
}

/// A batch; its payload follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchInfo {
    /// Position in the broker's log, rising by one.
    pub index: u64,
    /// Session that sent it.
    pub session: u64,
    /// Stream inside the session.
    pub stream: u32,
    /// Position in the stream.
    pub batch_seq: u64,
    /// Number of messages, according to the publisher.
    pub messages: u32,
    /// Payload bytes.
    pub payload_len: u32,
    /// CRC32C that the publisher computed; see [`crate::batch::checksum`].
    pub checksum: u32,
    /// When the broker had received the whole batch, nanoseconds since the Unix epoch.
    pub arrival_unix_ns: u64,
}

/// What a broker delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// A batch.
    Batch(BatchInfo),
    /// Batches were overwritten before the broker could send them.
    Lost {
        /// Index of the batch that comes next.
        next: u64,
        /// Batches lost.
        batches: u64,
        /// Messages lost.
        messages: u64,
    },
    /// The batch's entry in the log's index is damaged; it is skipped.
    Damaged {
        /// Its index.
        index: u64,
    },
    /// The subscriber has everything that is in the log. Sent when that becomes so, and then about once a second
    /// as a sign of life.
    CaughtUp {
        /// Index of the batch that comes next.
        next: u64,
    },
    /// The broker no longer waits for this subscriber, because it read nothing for too long. It goes on like one
    /// that is not registered.
    Evicted,
    /// The broker closes the connection; `text_len` bytes that say why follow.
    Error {
        /// A [`Fault`](crate::reply::Fault) as a number.
        code: u16,
        /// Bytes of text.
        text_len: usize,
    },
}

/// A frame or header that cannot be served.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum InvalidFrame {
    /// The first byte names no known frame, or reserved bytes are not zero.
    #[error("not a frame of this protocol (first byte {0:#04x}): the peer lost its place")]
    Kind(u8),
    /// The checksum does not match.
    #[error("the checksum of a frame's header is wrong: it was changed on the way")]
    Checksum,
    /// A start of unknown kind.
    #[error("start {0} is not supported; supported: 0 (oldest), 1 (end), 2 (index), 3 (time)")]
    StartAt(u8),
    /// A payload of a forbidden length, or more messages than it could hold.
    #[error(
        "batch of {len} bytes claims {messages} messages; the broker's batches have 4 to {max} bytes"
    )]
    Batch {
        /// Claimed payload length, bytes.
        len: u32,
        /// Claimed message count.
        messages: u32,
        /// Largest payload, bytes.
        max: u32,
    },
}

impl RequestFrame {
    /// The frame of a request.
    #[must_use]
    pub fn new(request: &Request) -> Self {
        let mut frame = Self::new_zeroed();
        match *request {
            Request::Start(start) => {
                frame.kind = KIND_START;
                frame.flags = if start.is_registered {
                    FLAG_REGISTERED
                } else {
                    0
                };
                let (at, position) = match start.at {
                    StartAt::Oldest => (0, 0),
                    StartAt::End => (1, 0),
                    StartAt::Index(index) => (2, index),
                    StartAt::Time(time) => (3, time),
                };
                (frame.start_at, frame.position) = (at, position.into());
                frame.credit = start.credit.into();
            }
            Request::Progress(progress) => {
                frame.kind = KIND_PROGRESS;
                frame.position = progress.needed_from.into();
                frame.credit = progress.credit.into();
            }
        }
        frame.checksum = sum_without_last_word(frame.as_bytes()).into();
        frame
    }

    /// What the subscriber requests.
    ///
    /// # Errors
    /// [`InvalidFrame`] says what cannot be served.
    pub fn parse(&self) -> Result<Request, InvalidFrame> {
        let has_reserved = self.reserved != [0; 5] || self.reserved_too != [0; 4];
        if has_reserved || !matches!(self.kind, KIND_START | KIND_PROGRESS) {
            return Err(InvalidFrame::Kind(self.kind));
        }
        if self.checksum.get() != sum_without_last_word(self.as_bytes()) {
            return Err(InvalidFrame::Checksum);
        }
        let (position, credit) = (self.position.get(), self.credit.get());
        if self.kind == KIND_PROGRESS {
            return match (self.flags, self.start_at) {
                (0, 0) => Ok(Request::Progress(Progress {
                    needed_from: position,
                    credit,
                })),
                _ => Err(InvalidFrame::Kind(self.kind)),
            };
        }
        if self.flags & !FLAG_REGISTERED != 0 {
            return Err(InvalidFrame::Kind(self.kind));
        }
        let at = match self.start_at {
            0 => StartAt::Oldest,
            1 => StartAt::End,
            2 => StartAt::Index(position),
            3 => StartAt::Time(position),
            other => return Err(InvalidFrame::StartAt(other)),
        };
        Ok(Request::Start(Start {
            at,
            is_registered: self.flags & FLAG_REGISTERED != 0,
            credit,
        }))
    }
}

impl DeliveryHeader {
    /// The header of a delivery.
    #[must_use]
    pub fn new(delivery: &Delivery) -> Self {
        let mut header = Self::new_zeroed();
        match *delivery {
            Delivery::Batch(batch) => {
                header.kind = KIND_BATCH;
                header.body_len = batch.payload_len.into();
                header.index = batch.index.into();
                header.session = batch.session.into();
                header.batch_seq = batch.batch_seq.into();
                header.arrival_unix_ns = batch.arrival_unix_ns.into();
                header.stream = batch.stream.into();
                header.messages = batch.messages.into();
                header.batch_checksum = batch.checksum.into();
            }
            Delivery::Lost {
                next,
                batches,
                messages,
            } => {
                header.kind = KIND_LOST;
                header.index = next.into();
                header.session = batches.into();
                header.batch_seq = messages.into();
            }
            Delivery::Damaged { index } => {
                header.kind = KIND_DAMAGED;
                header.index = index.into();
            }
            Delivery::CaughtUp { next } => {
                header.kind = KIND_CAUGHT_UP;
                header.index = next.into();
            }
            Delivery::Evicted => header.kind = KIND_EVICTED,
            Delivery::Error { code, text_len } => {
                header.kind = KIND_ERROR;
                header.code = code.to_le_bytes();
                header.body_len = (text_len as u32).into();
            }
        }
        header.checksum = sum_without_last_word(header.as_bytes()).into();
        header
    }

    /// A delivery that ends the connection, as bytes: the header and its text, which begins at [`DELIVERY_LEN`].
    #[must_use]
    pub fn error(fault: crate::reply::Fault, text: &str) -> Vec<u8> {
        let text = clip(text, MAX_TEXT_LEN);
        let header = Self::new(&Delivery::Error {
            code: fault as u16,
            text_len: text.len(),
        });
        [header.as_bytes(), text.as_bytes()].concat()
    }

    /// What is delivered. `max_payload` is the largest batch payload that the broker named in its Welcome.
    ///
    /// # Errors
    /// [`InvalidFrame`] says what is wrong.
    pub fn parse(&self, max_payload: u32) -> Result<Delivery, InvalidFrame> {
        let is_known = (KIND_BATCH..=KIND_ERROR).contains(&self.kind);
        if !is_known || self.reserved != 0 || self.reserved_too != [0; 8] {
            return Err(InvalidFrame::Kind(self.kind));
        }
        if self.checksum.get() != sum_without_last_word(self.as_bytes()) {
            return Err(InvalidFrame::Checksum);
        }
        let index = self.index.get();
        let body_len = self.body_len.get();
        match self.kind {
            KIND_BATCH => self.parse_batch(max_payload).map(Delivery::Batch),
            KIND_ERROR if body_len as usize <= MAX_TEXT_LEN => Ok(Delivery::Error {
                code: u16::from_le_bytes(self.code),
                text_len: body_len as usize,
            }),
            KIND_LOST if body_len == 0 => Ok(Delivery::Lost {
                next: index,
                batches: self.session.get(),
                messages: self.batch_seq.get(),
            }),
            KIND_DAMAGED if body_len == 0 => Ok(Delivery::Damaged { index }),
            KIND_CAUGHT_UP if body_len == 0 => Ok(Delivery::CaughtUp { next: index }),
            KIND_EVICTED if body_len == 0 => Ok(Delivery::Evicted),
            kind => Err(InvalidFrame::Kind(kind)),
        }
    }

    fn parse_batch(&self, max: u32) -> Result<BatchInfo, InvalidFrame> {
        let (len, messages) = (self.body_len.get(), self.messages.get());
        let fits = len as usize >= message::OVERHEAD && len <= max;
        if !fits || messages == 0 || messages as usize > len as usize / message::OVERHEAD {
            return Err(InvalidFrame::Batch { len, messages, max });
        }
        Ok(BatchInfo {
            index: self.index.get(),
            session: self.session.get(),
            stream: self.stream.get(),
            batch_seq: self.batch_seq.get(),
            messages,
            payload_len: len,
            checksum: self.batch_checksum.get(),
            arrival_unix_ns: self.arrival_unix_ns.get(),
        })
    }
}

/// CRC32C over all bytes but the last four, where it is kept.
fn sum_without_last_word(bytes: &[u8]) -> u32 {
    crc32c::checksum(&bytes[..bytes.len() - 4])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::Fault;
    use proptest::prelude::*;

    const MAX: u32 = 4096;

    fn batch() -> BatchInfo {
        BatchInfo {
            index: 1,
            session: 2,
            stream: 3,
            batch_seq: 4,
            messages: 5,
            payload_len: 60,
            checksum: 7,
            arrival_unix_ns: 8,
        }
    }

    #[test]
    fn requests_round_trip_and_every_changed_bit_is_detected() {
        assert_eq!(REQUEST_LEN, 32);
        let start = |at| Start {
            at,
            is_registered: matches!(at, StartAt::End),
            credit: 9,
        };
        let progress = Progress {
            needed_from: u64::MAX,
            credit: 1 << 40,
        };
        let starts = [
            StartAt::Oldest,
            StartAt::End,
            StartAt::Index(5),
            StartAt::Time(6),
        ];
        let requests = starts.map(|at| Request::Start(start(at)));
        for request in requests.into_iter().chain([Request::Progress(progress)]) {
            let frame = RequestFrame::new(&request);
            assert_eq!(frame.parse(), Ok(request));
            for bit in 0..8 * REQUEST_LEN {
                let mut bytes: [u8; REQUEST_LEN] = frame.as_bytes().try_into().unwrap();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let changed = RequestFrame::read_from_bytes(&bytes).unwrap();
                assert!(changed.parse().is_err(), "bit {bit} of {request:?}");
            }
        }
    }

    #[test]
    fn unknown_starts_and_flags_are_named() {
        let with = |offset: usize, byte: u8| {
            let start = Start {
                at: StartAt::Oldest,
                is_registered: false,
                credit: 0,
            };
            let mut frame = RequestFrame::new(&Request::Start(start));
            frame.as_mut_bytes()[offset] = byte;
            frame.checksum = sum_without_last_word(frame.as_bytes()).into();
            frame.parse().unwrap_err()
        };
        assert_eq!(with(2, 4), InvalidFrame::StartAt(4));
        assert_eq!(with(1, 2), InvalidFrame::Kind(KIND_START));
        assert_eq!(with(3, 1), InvalidFrame::Kind(KIND_START));
        assert_eq!(with(0, 9), InvalidFrame::Kind(9));
    }

    #[test]
    fn deliveries_round_trip_and_every_changed_bit_is_detected() {
        assert_eq!(DELIVERY_LEN, 64);
        let lost = Delivery::Lost {
            next: 9,
            batches: 8,
            messages: 7,
        };
        let error = Delivery::Error {
            code: Fault::Shutdown as u16,
            text_len: 3,
        };
        for delivery in [
            Delivery::Batch(batch()),
            lost,
            Delivery::Damaged { index: 6 },
            Delivery::CaughtUp { next: 5 },
            Delivery::Evicted,
            error,
        ] {
            let header = DeliveryHeader::new(&delivery);
            assert_eq!(header.parse(MAX), Ok(delivery));
            for bit in 0..8 * DELIVERY_LEN {
                let mut bytes: [u8; DELIVERY_LEN] = header.as_bytes().try_into().unwrap();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let changed = DeliveryHeader::read_from_bytes(&bytes).unwrap();
                assert!(changed.parse(MAX).is_err(), "bit {bit} of {delivery:?}");
            }
        }
        let bytes = DeliveryHeader::error(Fault::Shutdown, "end");
        let (header, text) = DeliveryHeader::read_from_prefix(&bytes).unwrap();
        assert_eq!((header.parse(MAX), text), (Ok(error), &b"end"[..]));
    }

    #[test]
    fn impossible_batches_are_refused() {
        let parsed = |change: fn(&mut BatchInfo)| {
            let mut batch = batch();
            change(&mut batch);
            DeliveryHeader::new(&Delivery::Batch(batch)).parse(MAX)
        };
        for change in [
            (|batch| batch.payload_len = 3) as fn(&mut BatchInfo),
            |batch| batch.payload_len = MAX + 1,
            |batch| batch.messages = 0,
            |batch| batch.messages = 16,
        ] {
            assert!(matches!(parsed(change), Err(InvalidFrame::Batch { .. })));
        }
        assert!(parsed(|batch| batch.messages = 15).is_ok());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(request: [u8; REQUEST_LEN], delivery in prop::collection::vec(any::<u8>(), DELIVERY_LEN), sum: bool) {
            let mut request = RequestFrame::read_from_bytes(&request).unwrap();
            let mut delivery = DeliveryHeader::read_from_bytes(&delivery).unwrap();
            if sum {
                request.checksum = sum_without_last_word(request.as_bytes()).into();
                delivery.checksum = sum_without_last_word(delivery.as_bytes()).into();
            }
            let _ = request.parse();
            let _ = delivery.parse(MAX);
        }
    }
}
