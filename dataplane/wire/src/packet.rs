//! Packets of the xdp path: DATA from publisher to broker, ACK back. Each is one UDP datagram.
//!
//! ```
//! use penstock_wire::packet::{BatchInfo, Chunk, Content, Data, Feedback, MAX_ACK_LEN, StreamKey, split};
//! use zerocopy::IntoBytes;
//!
//! let stream = StreamKey { key: 0x5ec2, stream: 0 };
//! let payload = b"\x05\0\0\0hello";
//! let batch = BatchInfo { seq: 0, len: payload.len() as u32, messages: 1, checksum: 0 };
//! let chunk = Chunk { batch, offset: 0 };
//! let header = Data::payload(stream, 7, &chunk, None, payload);
//! let datagram = [header.as_bytes(), payload].concat();
//!
//! // The broker checks it and answers.
//! let (header, rest) = split(&datagram)?;
//! let received = header.parse(&[rest])?;
//! assert_eq!((received.packet, received.content), (7, Content::Payload(chunk)));
//! let mut ack = [0; MAX_ACK_LEN];
//! let mut feedback = Feedback::new(stream);
//! feedback.received.push((7, 7));
//! let len = feedback.write(&mut ack);
//!
//! // The publisher reads the answer.
//! let mut told = Feedback::new(stream);
//! told.read(&ack[..len])?;
//! assert_eq!(told.received, [(7, 7)]);
//! # Ok::<(), penstock_wire::packet::Invalid>(())
//! ```

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::crc32c::{self, Joiner};
use super::message;

mod ack;

pub use ack::{ACK_LEN, ACK_MAGIC, Ack, Feedback, MAX_ACK_LEN, MAX_GAPS};

/// First four bytes of a DATA packet: what the XDP program looks for.
pub const DATA_MAGIC: [u8; 4] = *b"PNSD";
/// Bytes of a [`Data`] header.
pub const DATA_LEN: usize = size_of::<Data>();

/// Bytes of the tag that stands behind a sealed DATA header.
pub const TAG_LEN: usize = 16;
/// Bytes of counter and tag that stand behind a sealed ACK.
pub const ACK_SEAL_LEN: usize = 8 + TAG_LEN;

/// Stands for the checksum where packets are authenticated; see `PacketKeys` in penstock-auth.
pub type Tag = [u8; TAG_LEN];

/// Packet numbers stay below this; at 100 million packets a second it takes a thousand years.
pub const MAX_PACKET: u64 = 1 << 62;

/// The checksum covers what lies behind it.
const COVERED: usize = 8;

/// Header of a packet from publisher to broker, as it lies on the wire; payload follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Data {
    magic: [u8; 4],
    checksum: U32,
    key: U64,
    stream: U16,
    len: U16,
    pause: u8,
    sealed: u8,
    reserved: [u8; 2],
    packet: U64,
    batch_seq: U64,
    batch_len: U32,
    offset: U32,
    messages: U32,
    batch_checksum: U32,
}

/// What a DATA packet says of the batch that it carries a part of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchInfo {
    /// Position of the batch in its stream; rises by one.
    pub seq: u64,
    /// Bytes of the whole batch.
    pub len: u32,
    /// Messages in it.
    pub messages: u32,
    /// CRC32C of the whole batch, see [`super::batch::checksum`].
    pub checksum: u32,
}

/// A part of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The batch.
    pub batch: BatchInfo,
    /// Where the payload lies in the batch.
    pub offset: u32,
}

/// Which stream a packet belongs to: answered by the broker in its Welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamKey {
    /// Random, new for each connection of a stream, so that no stray packet of an earlier one fits.
    pub key: u64,
    /// Number of the stream in its session.
    pub stream: u16,
}

/// Why a publisher sent nothing for a while before a packet; the broker counts them, to tell what
/// limits a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// It had nothing to send.
    Idle = 1,
    /// It had no credit left.
    Credit = 2,
    /// Its congestion window was full.
    Congestion = 3,
}

/// What a packet from a publisher carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Payload of a batch.
    Payload(Chunk),
    /// Nothing but the wish for an ACK; padding may follow, to find out what fits.
    Ping,
}

/// A checked packet from a publisher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// The stream.
    pub stream: StreamKey,
    /// Number of the packet; a retransmission has a new one.
    pub packet: u64,
    /// What it carries.
    pub content: Content,
    /// Why nothing was sent before it, if nothing was.
    pub pause: Option<Pause>,
}

/// A packet that cannot be served.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum Invalid {
    /// Fewer bytes than its header.
    #[error("packet of {0} bytes is shorter than its header")]
    Short(usize),
    /// Other first bytes.
    #[error("not a packet of this protocol")]
    Magic,
    /// Damaged on the way, or by its sender.
    #[error("checksum {computed:#010x} is not the packet's {sent:#010x}")]
    Checksum {
        /// Of the bytes that arrived.
        computed: u32,
        /// In the packet.
        sent: u32,
    },
    /// Fields that contradict each other.
    #[error("invalid field: {0}")]
    InvalidField(&'static str),
    /// Its tag is wrong, or missing, or there where none is to be.
    #[error("not authentic")]
    Seal,
}

impl Data {
    /// Header of a packet with `payload`, a part of a batch; tells why nothing was sent before it.
    #[must_use]
    pub fn payload(
        stream: StreamKey,
        packet: u64,
        chunk: &Chunk,
        pause: Option<Pause>,
        payload: &[u8],
    ) -> Self {
        Self::of_chunk(stream, packet, chunk)
            .after(pause)
            .with_checksum(payload)
    }

    /// As [`Self::payload`], without reading the payload: `payload_sum` is its CRC32C, `joiner` is for
    /// its length.
    ///
    /// # Panics
    /// If the length does not fit into a datagram.
    #[must_use]
    pub fn summed_payload(
        stream: StreamKey,
        packet: u64,
        chunk: &Chunk,
        pause: Option<Pause>,
        payload_sum: u32,
        joiner: &Joiner,
    ) -> Self {
        let mut data = Self::of_chunk(stream, packet, chunk).after(pause);
        data.set_len(joiner.len());
        data.checksum = joiner.join(data.checksum_with(&[]), payload_sum).into();
        data
    }

    /// Header of a packet that only asks for an ACK, with `padding` behind it.
    #[must_use]
    pub fn ping(stream: StreamKey, packet: u64, padding: &[u8]) -> Self {
        Self::empty(stream, packet).with_checksum(padding)
    }

    /// Header of a packet whose tag follows it: with `len` bytes of a batch, or of padding if it only
    /// asks for an ACK. It has no checksum.
    #[must_use]
    pub fn to_be_sealed(
        stream: StreamKey,
        packet: u64,
        chunk: Option<&Chunk>,
        pause: Option<Pause>,
        len: u16,
    ) -> Self {
        let chunk = chunk.copied().unwrap_or_default();
        Self {
            len: len.into(),
            sealed: 1,
            ..Self::of_chunk(stream, packet, &chunk).after(pause)
        }
    }

    /// Whether a tag follows the header, as it says, before anything is checked.
    #[inline]
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed != 0
    }

    /// The number of the packet, before anything is checked.
    #[inline]
    #[must_use]
    pub fn packet(&self) -> u64 {
        self.packet.get()
    }

    /// Bytes that follow the header, as it says, before anything is checked: behind them another
    /// packet may begin, when a kernel that was to cut a long buffer into datagrams left it whole.
    #[inline]
    #[must_use]
    pub fn rest_len(&self) -> usize {
        self.len.get().into()
    }

    /// The stream that the packet says it belongs to, before anything is checked.
    #[inline]
    #[must_use]
    pub fn stream(&self) -> StreamKey {
        StreamKey {
            key: self.key.get(),
            stream: self.stream.get(),
        }
    }

    /// Checks the header against itself and, with the checksum, against what follows it: `rest`,
    /// in as many parts as it lies in.
    ///
    /// # Errors
    /// [`Invalid`] when it is damaged or a field is invalid.
    pub fn parse(&self, rest: &[&[u8]]) -> Result<Received, Invalid> {
        if self.magic != DATA_MAGIC {
            return Err(Invalid::Magic);
        }
        let rest_len = rest.iter().map(|part| part.len()).sum::<usize>();
        let (computed, sent) = (self.checksum_with(rest), self.checksum.get());
        if computed != sent {
            return Err(Invalid::Checksum { computed, sent });
        }
        if self.is_sealed() {
            return Err(Invalid::Seal);
        }
        self.parse_fields(rest_len)
    }

    /// Likewise for a packet whose tag says that it is as it was sealed, `rest_len` bytes behind it.
    ///
    /// # Errors
    /// [`Invalid`] when a field is invalid.
    #[inline]
    pub fn parse_sealed(&self, rest_len: usize) -> Result<Received, Invalid> {
        if self.magic != DATA_MAGIC {
            return Err(Invalid::Magic);
        }
        if self.sealed != 1 || self.checksum.get() != 0 {
            return Err(Invalid::InvalidField("reserved bits"));
        }
        self.parse_fields(rest_len)
    }

    /// What the packet says, checked against itself only: its checksum must still be compared with
    /// [`Self::sum_before_payload`], continued over the `rest_len` bytes behind it.
    ///
    /// # Errors
    /// [`Invalid`] when a field is invalid.
    #[inline]
    pub fn parse_unverified(&self, rest_len: usize) -> Result<Received, Invalid> {
        if self.magic != DATA_MAGIC {
            return Err(Invalid::Magic);
        }
        if self.is_sealed() {
            return Err(Invalid::Seal);
        }
        self.parse_fields(rest_len)
    }

    /// CRC32C of what the checksum covers before the payload.
    #[inline]
    #[must_use]
    pub fn sum_before_payload(&self) -> u32 {
        self.checksum_with(&[])
    }

    /// The checksum, as the packet has it.
    #[must_use]
    pub fn checksum(&self) -> u32 {
        self.checksum.get()
    }

    #[inline]
    fn parse_fields(&self, rest_len: usize) -> Result<Received, Invalid> {
        let invalid = |what| Err(Invalid::InvalidField(what));
        if rest_len != self.rest_len() {
            return invalid("length differs from the datagram's");
        }
        if self.reserved != [0; 2] {
            return invalid("reserved bits");
        }
        let pause = match self.pause {
            0 => None,
            1 => Some(Pause::Idle),
            2 => Some(Pause::Credit),
            3 => Some(Pause::Congestion),
            _ => return invalid("unknown pause"),
        };
        if self.packet.get() >= MAX_PACKET {
            return invalid("packet number too large");
        }
        let chunk = self.chunk();
        let BatchInfo { len, messages, .. } = chunk.batch;
        let content = if messages == 0 {
            if chunk != Chunk::default() {
                return invalid("batch without messages");
            }
            Content::Ping
        } else {
            let end = u64::from(chunk.offset) + rest_len as u64;
            if rest_len == 0 || end > u64::from(len) {
                return invalid("offset beyond the batch");
            }
            if messages as usize > len as usize / message::OVERHEAD {
                return invalid("more messages than fit in the batch");
            }
            Content::Payload(chunk)
        };
        Ok(Received {
            stream: self.stream(),
            packet: self.packet.get(),
            content,
            pause,
        })
    }

    fn chunk(&self) -> Chunk {
        Chunk {
            batch: BatchInfo {
                seq: self.batch_seq.get(),
                len: self.batch_len.get(),
                messages: self.messages.get(),
                checksum: self.batch_checksum.get(),
            },
            offset: self.offset.get(),
        }
    }

    fn of_chunk(stream: StreamKey, packet: u64, chunk: &Chunk) -> Self {
        Self {
            batch_seq: chunk.batch.seq.into(),
            batch_len: chunk.batch.len.into(),
            offset: chunk.offset.into(),
            messages: chunk.batch.messages.into(),
            batch_checksum: chunk.batch.checksum.into(),
            ..Self::empty(stream, packet)
        }
    }

    fn after(mut self, pause: Option<Pause>) -> Self {
        self.pause = pause.map_or(0, |pause| pause as u8);
        self
    }

    fn empty(stream: StreamKey, packet: u64) -> Self {
        Self {
            magic: DATA_MAGIC,
            checksum: U32::ZERO,
            key: stream.key.into(),
            stream: stream.stream.into(),
            len: U16::ZERO,
            pause: 0,
            sealed: 0,
            reserved: [0; 2],
            packet: packet.into(),
            batch_seq: U64::ZERO,
            batch_len: U32::ZERO,
            offset: U32::ZERO,
            messages: U32::ZERO,
            batch_checksum: U32::ZERO,
        }
    }

    fn with_checksum(mut self, rest: &[u8]) -> Self {
        self.set_len(rest.len());
        self.checksum = self.checksum_with(&[rest]).into();
        self
    }

    fn set_len(&mut self, len: usize) {
        self.len = u16::try_from(len)
            .expect("a datagram has a length of 16 bits")
            .into();
    }

    fn checksum_with(&self, rest: &[&[u8]]) -> u32 {
        crc(&self.as_bytes()[COVERED..], rest)
    }
}

/// A header and room for the tag behind it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DataPrefix {
    /// The header.
    pub data: Data,
    /// The tag, if the header announces one.
    pub tag: Tag,
}

impl DataPrefix {
    /// What goes before the payload on the wire.
    #[must_use]
    pub fn on_wire(&self) -> &[u8] {
        let tag = if self.data.is_sealed() { TAG_LEN } else { 0 };
        &self.as_bytes()[..DATA_LEN + tag]
    }
}

/// Splits a datagram from a publisher that holds one packet.
///
/// # Errors
/// [`Invalid::Short`] when it is no whole header.
#[inline]
pub fn split(datagram: &[u8]) -> Result<(&Data, &[u8]), Invalid> {
    Data::ref_from_prefix(datagram).map_err(|_| Invalid::Short(datagram.len()))
}

fn crc(header: &[u8], rest: &[&[u8]]) -> u32 {
    let parts = rest.iter();
    parts.fold(crc32c::checksum(header), |crc, part| {
        crc32c::append(crc, part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const STREAM: StreamKey = StreamKey {
        key: 0x0123_4567_89ab_cdef,
        stream: 7,
    };

    fn chunk(len: u32, offset: u32) -> Chunk {
        Chunk {
            batch: BatchInfo {
                seq: 5,
                len,
                messages: 1,
                checksum: 9,
            },
            offset,
        }
    }

    fn datagram(chunk: &Chunk, payload: &[u8]) -> Vec<u8> {
        let header = Data::payload(STREAM, 11, chunk, None, payload);
        [header.as_bytes(), payload].concat()
    }

    fn parsed(datagram: &[u8]) -> Result<Received, Invalid> {
        split(datagram).and_then(|(header, rest)| header.parse(&[rest]))
    }

    #[test]
    fn packets_round_trip_and_the_xdp_program_finds_its_fields() {
        assert_eq!((DATA_LEN, ACK_LEN), (56, 52));
        let chunk = chunk(100, 90);
        let bytes = datagram(&chunk, &[1; 10]);
        let wanted = Received {
            stream: STREAM,
            packet: 11,
            content: Content::Payload(chunk),
            pause: None,
        };
        assert_eq!(parsed(&bytes), Ok(wanted));
        assert_eq!(bytes[..4], DATA_MAGIC);
        assert_eq!(bytes[8..16], STREAM.key.to_le_bytes());
        assert_eq!(bytes[16..18], STREAM.stream.to_le_bytes());
        assert_eq!(bytes[18..20], 10u16.to_le_bytes());
        let ping = [Data::ping(STREAM, 3, &[0; 50]).as_bytes(), &[0; 50]].concat();
        assert_eq!(parsed(&ping).unwrap().content, Content::Ping);
    }

    #[test]
    fn a_packet_carries_the_reason_of_the_pause_before_it() {
        let after = |pause| Data::payload(STREAM, 11, &chunk(100, 90), pause, &[1; 10]);
        for pause in [Pause::Idle, Pause::Credit, Pause::Congestion] {
            let bytes = [after(Some(pause)).as_bytes(), &[1; 10]].concat();
            assert_eq!(parsed(&bytes).unwrap().pause, Some(pause));
        }
        let unknown = Data {
            pause: 4,
            ..after(None)
        }
        .with_checksum(&[1; 10]);
        let bytes = [unknown.as_bytes(), &[1; 10]].concat();
        assert!(matches!(parsed(&bytes), Err(Invalid::InvalidField { .. })));
    }

    #[test]
    fn a_payload_may_have_several_parts() {
        let bytes = datagram(&chunk(100, 0), &[3; 60]);
        let (header, rest) = split(&bytes).unwrap();
        let (one, two) = rest.split_at(17);
        assert_eq!(header.parse(&[one, two]), header.parse(&[rest]));
        assert!(header.parse(&[two, one, one]).is_err());
    }

    #[test]
    fn every_flipped_bit_is_detected() {
        let bytes = datagram(&chunk(100, 0), &[3; 60]);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(parsed(&flipped).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(parsed(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn contradictory_claims_are_refused() {
        let refused = |chunk: &Chunk, payload: &[u8]| {
            matches!(
                parsed(&datagram(chunk, payload)),
                Err(Invalid::InvalidField(_))
            )
        };
        assert!(refused(&chunk(100, 91), &[1; 10]));
        assert!(refused(&chunk(100, u32::MAX), &[1; 10]));
        assert!(refused(&chunk(100, 0), &[]));
        let mut feedback = Feedback::new(STREAM);
        feedback.received = vec![(u64::MAX - 1, u64::MAX - 1)];
        let mut out = [0; MAX_ACK_LEN];
        let len = feedback.write(&mut out);
        out[20..28].fill(0xff);
        let checksum = crc(&out[COVERED..len], &[]);
        out[4..8].copy_from_slice(&checksum.to_le_bytes());
        assert!(matches!(
            feedback.read(&out[..len]),
            Err(Invalid::InvalidField(_))
        ));
        for messages in [0, 26] {
            let mut chunk = chunk(100, 0);
            chunk.batch.messages = messages;
            assert!(refused(&chunk, &[1; 10]));
        }
    }

    #[test]
    fn ranges_too_long_for_their_field_are_sent_in_part() {
        let mut feedback = Feedback::new(STREAM);
        feedback.received = vec![(5, MAX_PACKET - 1)];
        let mut out = [0; MAX_ACK_LEN];
        let len = feedback.write(&mut out);
        let mut read = Feedback::new(STREAM);
        read.read(&out[..len]).unwrap();
        assert_eq!(
            read.received,
            [(MAX_PACKET - u64::from(u32::MAX), MAX_PACKET - 1)]
        );
    }

    prop_compose! {
        /// Descending, disjoint, not adjacent ranges.
        fn ranges()(steps in vec((2u64..1000, 0u64..1000), 0..40)) -> Vec<(u64, u64)> {
            let mut ranges = Vec::new();
            let mut at = 0;
            for (gap, len) in steps {
                let low = at + gap;
                ranges.insert(0, (low, low + len));
                at = low + len;
            }
            ranges
        }
    }

    #[test]
    fn a_header_from_a_known_sum_equals_one_from_the_payload() {
        let stream = StreamKey { key: 7, stream: 1 };
        let payload = [5; 1416];
        let chunk = Chunk {
            batch: BatchInfo {
                seq: 3,
                len: 9000,
                messages: 9,
                checksum: 1,
            },
            offset: 2832,
        };
        let pause = Some(Pause::Credit);
        let joiner = Joiner::new(payload.len());
        let sum = crc32c::checksum(&payload);
        let from_sum = Data::summed_payload(stream, 4, &chunk, pause, sum, &joiner);
        let from_bytes = Data::payload(stream, 4, &chunk, pause, &payload);
        assert_eq!(from_sum.as_bytes(), from_bytes.as_bytes());
        from_sum.parse(&[&payload]).unwrap();
    }

    proptest! {
        #[test]
        fn acks_round_trip(received in ranges(), delay_us: u32, committed: u64, credit: u64, blocked: bool) {
            let feedback = Feedback { stream: STREAM, received, delay_us, committed, credit, blocked };
            let mut out = [0; MAX_ACK_LEN];
            let len = feedback.write(&mut out);
            let mut read = Feedback::new(StreamKey { key: 0, stream: 0 });
            read.read(&out[..len]).unwrap();
            let told = feedback.received.len().min(MAX_GAPS + 1);
            prop_assert_eq!(&read.received, &feedback.received[..told]);
            prop_assert_eq!((read.stream, read.delay_us), (feedback.stream, feedback.delay_us));
            prop_assert_eq!(
                (read.committed, read.credit, read.blocked), (committed, credit, blocked));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..400)) {
            let _ = parsed(&bytes);
            let _ = Feedback::new(STREAM).read(&bytes);
        }

        /// With a checksum that fits, so that the fields are looked at.
        #[test]
        fn arbitrary_acks_never_panic(mut bytes in vec(any::<u8>(), ACK_LEN..MAX_ACK_LEN), gaps in 0..40u8) {
            bytes[..4].copy_from_slice(&ACK_MAGIC);
            bytes[18] = gaps;
            bytes.truncate(ACK_LEN + usize::from(gaps) * 8);
            let checksum = crc(&bytes[COVERED..], &[]);
            bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
            let mut feedback = Feedback::new(STREAM);
            if feedback.read(&bytes).is_ok() {
                prop_assert!(feedback.received.iter().all(|(low, high)| low <= high));
                prop_assert!(feedback.received.is_sorted_by(|a, b| a.0 > b.1));
            }
        }
    }
}
