//! ACK packets: what a broker reports to a publisher about a stream.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{COVERED, Invalid, MAX_PACKET, StreamKey, crc};

/// First four bytes of an ACK packet.
pub const ACK_MAGIC: [u8; 4] = *b"PNSA";
/// Bytes of an [`Ack`] header, before its gaps.
pub const ACK_LEN: usize = size_of::<Ack>();
/// Maximum number of gaps that an ACK reports.
pub const MAX_GAPS: usize = 31;
/// Bytes of the largest ACK.
pub const MAX_ACK_LEN: usize = ACK_LEN + MAX_GAPS * size_of::<Gap>();

const FLAG_BLOCKED: u8 = 1;

/// Header of a packet from broker to publisher, as it lies on the wire; gaps follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Ack {
    magic: [u8; 4],
    checksum: U32,
    key: U64,
    stream: U16,
    gaps: u8,
    flags: u8,
    largest: U64,
    delay_us: U32,
    first: U32,
    committed: U64,
    credit: U64,
}

/// Packets that did not come, and the packets below them that did.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Gap {
    missing: U32,
    received: U32,
}

/// What a broker tells a publisher about a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feedback {
    /// The stream.
    pub stream: StreamKey,
    /// Packet numbers that came, as inclusive ranges, highest first; at most [`MAX_GAPS`] + 1.
    pub received: Vec<(u64, u64)>,
    /// Time that the largest packet number waited for this ACK, microseconds.
    pub delay_us: u32,
    /// Batches committed: all below this sequence number.
    pub committed: u64,
    /// Position in the stream, bytes of batches counted from its start, that may be sent up to.
    pub credit: u64,
    /// The broker waits for room in the shared buffer.
    pub blocked: bool,
}

impl Feedback {
    /// Nothing received yet; has room for as much as any ACK tells.
    #[must_use]
    pub fn new(stream: StreamKey) -> Self {
        Self {
            stream,
            received: Vec::with_capacity(MAX_GAPS + 1),
            delay_us: 0,
            committed: 0,
            credit: 0,
            blocked: false,
        }
    }

    /// Writes the packet; returns its length. What does not fit of `received` is left out.
    ///
    /// # Panics
    /// If `out` is shorter than [`MAX_ACK_LEN`].
    pub fn write(&self, out: &mut [u8]) -> usize {
        let mut len = ACK_LEN;
        let (largest, first) = match self.received.first() {
            Some(&(low, high)) => (high, clip(high - low + 1)),
            None => (0, 0),
        };
        let mut gaps = 0;
        // A range too long for its field is reported in part; lower ranges wait for the next ACK.
        let mut below = largest.wrapping_add(1).wrapping_sub(u64::from(first));
        for &(low, high) in self.received.iter().skip(1).take(MAX_GAPS) {
            let Ok(missing) = u32::try_from(below - high - 1) else {
                break;
            };
            let received = clip(high - low + 1);
            let gap = Gap {
                missing: missing.into(),
                received: received.into(),
            };
            out[len..len + size_of::<Gap>()].copy_from_slice(gap.as_bytes());
            len += size_of::<Gap>();
            gaps += 1;
            below = high + 1 - u64::from(received);
        }
        let header = Ack {
            magic: ACK_MAGIC,
            checksum: U32::ZERO,
            key: self.stream.key.into(),
            stream: self.stream.stream.into(),
            gaps,
            flags: if self.blocked { FLAG_BLOCKED } else { 0 },
            largest: largest.into(),
            delay_us: self.delay_us.into(),
            first: first.into(),
            committed: self.committed.into(),
            credit: self.credit.into(),
        };
        out[..ACK_LEN].copy_from_slice(header.as_bytes());
        let checksum = crc(&out[COVERED..len], &[]);
        out[4..COVERED].copy_from_slice(&checksum.to_le_bytes());
        len
    }

    /// Reads a packet into this, which keeps its memory.
    ///
    /// # Errors
    /// [`Invalid`] when it is damaged or a field is invalid; this is undefined then.
    pub fn read(&mut self, datagram: &[u8]) -> Result<(), Invalid> {
        let (ack, rest) =
            Ack::ref_from_prefix(datagram).map_err(|_| Invalid::Short(datagram.len()))?;
        if ack.magic != ACK_MAGIC {
            return Err(Invalid::Magic);
        }
        let (computed, sent) = (crc(&datagram[COVERED..], &[]), ack.checksum.get());
        if computed != sent {
            return Err(Invalid::Checksum { computed, sent });
        }
        let invalid = Invalid::InvalidField;
        let gaps = <[Gap]>::ref_from_bytes(rest).map_err(|_| invalid("truncated gap"))?;
        if gaps.len() != usize::from(ack.gaps) || gaps.len() > MAX_GAPS {
            return Err(invalid("gap count differs from the gaps"));
        }
        self.received.clear();
        let mut high = ack.largest.get();
        let first = u64::from(ack.first.get());
        if first > 0 {
            if high >= MAX_PACKET {
                return Err(invalid("packet number too large"));
            }
            let low = (high + 1).checked_sub(first);
            let low = low.ok_or(invalid("packet number below 0"))?;
            self.received.push((low, high));
            high = low;
        } else if !gaps.is_empty() {
            return Err(invalid("gaps without a received packet"));
        }
        for gap in gaps {
            let (missing, received) = (gap.missing.get().into(), u64::from(gap.received.get()));
            let below = high.checked_sub(missing).filter(|_| received > 0);
            let low = below.and_then(|end| end.checked_sub(received));
            let (Some(below), Some(low)) = (below, low) else {
                return Err(invalid("packet number below 0"));
            };
            self.received.push((low, below - 1));
            high = low;
        }
        self.stream = StreamKey {
            key: ack.key.get(),
            stream: ack.stream.get(),
        };
        self.delay_us = ack.delay_us.get();
        self.committed = ack.committed.get();
        self.credit = ack.credit.get();
        self.blocked = ack.flags & FLAG_BLOCKED != 0;
        Ok(())
    }
}

fn clip(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
