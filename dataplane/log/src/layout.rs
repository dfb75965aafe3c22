//! The only place that knows offsets in a log file: header page, control page, index, segments.
//!
//! ```text
//! 0        header    magic, version, geometry, checksum; then the writer epoch and the identity
//! 4096     control   tail, index tail, frontier, granted limit (one cache line pair each)
//! 8192     index     `index_slots` descriptors of 128 bytes
//! (2 MiB)  segments  `ring_bytes`, a ring of segments that no batch straddles
//! ```

use std::fmt;

use penstock_wire::crc32c;
use thiserror::Error;

use super::slot::{Descriptor, SLOT_BYTES};

/// First bytes of a log file.
pub const MAGIC: [u8; 8] = *b"PENSTOCK";
/// Positions and batch numbers stay below this; at 100 GB/s it takes more than a year.
pub const MAX_POSITION: u64 = 1 << 62;
/// Version of this layout.
pub const VERSION: u64 = 1;
/// Every batch starts at a multiple of this, so that writers never share a cache line.
pub const ALIGNMENT: u64 = 64;
/// Offset of the control block, bytes.
pub const CONTROL_OFFSET: usize = 4096;
/// Offset of the batch index, bytes.
pub const INDEX_OFFSET: usize = 8192;
/// Offset of the writer epoch in the header page, bytes.
pub const EPOCH_OFFSET: usize = 2048;
/// Offset of the log's identity in the header page, bytes.
pub const IDENTITY_OFFSET: usize = EPOCH_OFFSET + 8;

/// Segments start at, and the file is a multiple of, a huge page, for hugetlbfs and DAX.
const HUGE_PAGE: u64 = 2 << 20;
const MIN_SEGMENT: u64 = 4096;
const MAX_SEGMENT: u64 = 2 << 30;
const MAX_INDEX_SLOTS: u64 = 1 << 28;
pub(super) const HEADER_LEN: usize = 48;

/// Sizes of a log; fixed when the file is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    ring_bytes: u64,
    segment_bytes: u64,
    index_slots: u64,
}

/// The first page is not that of a log that this build can serve.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum HeaderError {
    /// Other first bytes.
    #[error("not a Penstock log")]
    Magic,
    /// Another version of the layout.
    #[error("log layout version {0}, this build reads version {VERSION}")]
    Version(u64),
    /// The header's checksum does not match.
    #[error("the header is damaged (checksum mismatch)")]
    Checksum,
    /// The sizes contradict each other.
    #[error("the header is damaged ({0})")]
    Geometry(String),
    /// What tells how far writers had come cannot be.
    #[error("the control page is damaged ({0})")]
    Control(&'static str),
    /// The file is shorter or longer than its header says.
    #[error("the file has {found} bytes, its header says {expected}")]
    FileLen {
        /// Size of the file.
        found: u64,
        /// Size that the geometry asks for.
        expected: u64,
    },
}

impl Geometry {
    /// Checks and fixes sizes.
    ///
    /// `ring_bytes` must be a multiple of `segment_bytes` and hold at least two segments;
    /// `segment_bytes` is a power of two from 4 KiB to 2 GiB; `index_slots` is a power of two from
    /// 2 to 2^28.
    ///
    /// # Errors
    /// A sentence that says which rule is broken.
    pub fn new(ring_bytes: u64, segment_bytes: u64, index_slots: u64) -> Result<Self, String> {
        if !segment_bytes.is_power_of_two() || !(MIN_SEGMENT..=MAX_SEGMENT).contains(&segment_bytes)
        {
            return Err(format!(
                "segment size {segment_bytes} is not a power of two from {MIN_SEGMENT} to {MAX_SEGMENT}"
            ));
        }
        if !ring_bytes.is_multiple_of(segment_bytes)
            || ring_bytes / segment_bytes < 2
            || ring_bytes > 1 << 46
        {
            return Err(format!(
                "ring size {ring_bytes} is not a multiple of the segment size {segment_bytes} with at least two segments"
            ));
        }
        if !index_slots.is_power_of_two() || !(2..=MAX_INDEX_SLOTS).contains(&index_slots) {
            return Err(format!(
                "{index_slots} index slots are not a power of two from 2 to {MAX_INDEX_SLOTS}"
            ));
        }
        Ok(Self {
            ring_bytes,
            segment_bytes,
            index_slots,
        })
    }

    /// Bytes of payload that the ring holds.
    #[must_use]
    pub fn ring_bytes(&self) -> u64 {
        self.ring_bytes
    }

    /// Bytes of a segment.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Descriptors that the index holds.
    #[must_use]
    pub fn index_slots(&self) -> u64 {
        self.index_slots
    }

    /// Largest batch payload, bytes: half a segment, so that a second try always fits.
    #[must_use]
    pub fn max_payload(&self) -> u32 {
        let half = self.segment_bytes / 2;
        u32::try_from(half)
            .unwrap_or(u32::MAX)
            .min(penstock_wire::batch::MAX_PAYLOAD)
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        (self.segments_offset() + self.ring_bytes).next_multiple_of(HUGE_PAGE)
    }

    /// Offset of the first segment in the file, bytes.
    #[must_use]
    pub fn segments_offset(&self) -> u64 {
        (INDEX_OFFSET as u64 + self.index_slots * SLOT_BYTES as u64).next_multiple_of(HUGE_PAGE)
    }

    /// Offset in the file of a position in the endless sequence of payload bytes.
    #[must_use]
    pub fn offset_of(&self, position: u64) -> usize {
        (self.segments_offset() + position % self.ring_bytes) as usize
    }

    /// Whether a batch's payload lies where it can lie: inside one segment.
    #[must_use]
    pub fn may_hold(&self, batch: &Descriptor) -> bool {
        let (start, len) = (batch.position, u64::from(batch.payload_len));
        len > 0
            && start <= MAX_POSITION
            && start / self.segment_bytes == (start + len - 1) / self.segment_bytes
    }

    /// The header page's first bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[..8].copy_from_slice(&MAGIC);
        let fields = [
            VERSION,
            self.ring_bytes,
            self.segment_bytes,
            self.index_slots,
        ];
        for (chunk, field) in header[8..40].chunks_exact_mut(8).zip(fields) {
            chunk.copy_from_slice(&field.to_le_bytes());
        }
        let sum = u64::from(crc32c::checksum(&header[..40]));
        header[40..].copy_from_slice(&sum.to_le_bytes());
        header
    }

    /// Reads the header of a file that has `file_len` bytes.
    ///
    /// # Errors
    /// [`HeaderError`] says why this build cannot serve the file.
    pub fn decode(header: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        if header.len() < HEADER_LEN || header[..8] != MAGIC {
            return Err(HeaderError::Magic);
        }
        let field = |n: usize| read_u64(&header[8 + 8 * n..]);
        if field(0) != VERSION {
            return Err(HeaderError::Version(field(0)));
        }
        if u64::from(crc32c::checksum(&header[..40])) != field(4) {
            return Err(HeaderError::Checksum);
        }
        let geometry = Self::new(field(1), field(2), field(3)).map_err(HeaderError::Geometry)?;
        let expected = geometry.file_bytes();
        if file_len != expected {
            return Err(HeaderError::FileLen {
                found: file_len,
                expected,
            });
        }
        Ok(geometry)
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            ring_bytes,
            segment_bytes,
            index_slots,
        } = self;
        write!(
            f,
            "a ring of {ring_bytes} bytes in segments of {segment_bytes} with {index_slots} index slots"
        )
    }
}

/// Reads the first eight bytes as a little-endian integer.
fn read_u64(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(
        *bytes
            .first_chunk()
            .expect("the header's length was checked"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_every_damaged_byte_is_detected() {
        let geometry = Geometry::new(1 << 20, 1 << 16, 64).unwrap();
        let header = geometry.encode();
        assert_eq!(
            Geometry::decode(&header, geometry.file_bytes()),
            Ok(geometry)
        );
        for at in 0..HEADER_LEN {
            let mut damaged = header;
            damaged[at] ^= 0x40;
            assert!(
                Geometry::decode(&damaged, geometry.file_bytes()).is_err(),
                "byte {at}"
            );
        }
        for len in 0..HEADER_LEN {
            assert_eq!(Geometry::decode(&header[..len], 0), Err(HeaderError::Magic));
        }
        assert!(matches!(
            Geometry::decode(&header, 7),
            Err(HeaderError::FileLen { .. })
        ));
    }

    #[test]
    fn invalid_sizes_are_named() {
        for (ring, segment, slots, word) in [
            (1 << 20, 3000, 64, "segment"),
            (1 << 20, 1 << 20, 64, "ring"),
            ((1 << 20) + 1, 1 << 16, 64, "ring"),
            (1 << 20, 1 << 16, 63, "index"),
        ] {
            let error = Geometry::new(ring, segment, slots).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
