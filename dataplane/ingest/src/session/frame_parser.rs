//! The headers of frames on a publisher's tcp connection, as their bytes arrive, and the tags of frames.

use std::sync::Arc;

use penstock_auth::PacketKeys;
use penstock_wire::batch::{Frame, HEADER_LEN, Header};
use penstock_wire::packet::TAG_LEN;
use zerocopy::FromBytes;

const MAX_HEADER_LEN: usize = HEADER_LEN + TAG_LEN;

/// Collects the header of the next frame, with its tag if the connection has keys.
#[derive(Debug)]
pub(crate) struct FrameParser {
    header: [u8; MAX_HEADER_LEN],
    filled: usize,
    header_len: usize,
    keys: Option<Arc<PacketKeys>>,
    /// Number of frames with a valid tag so far, which is the number of the next one.
    verified: u64,
    /// Header and tag of the current frame; the next header may arrive together with its end.
    current: [u8; MAX_HEADER_LEN],
}

/// The tag of a frame is invalid: it was changed, inserted, removed or repeated on the path.
#[derive(Debug)]
pub(crate) struct InvalidTag;

impl FrameParser {
    pub(crate) fn new(keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            header: [0; MAX_HEADER_LEN],
            filled: 0,
            header_len: HEADER_LEN + if keys.is_some() { TAG_LEN } else { 0 },
            keys,
            verified: 0,
            current: [0; MAX_HEADER_LEN],
        }
    }

    /// Bytes of a header, with its tag if there are keys.
    pub(crate) fn header_len(&self) -> usize {
        self.header_len
    }

    pub(crate) fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Buffer for the missing bytes of the next header.
    pub(crate) fn missing(&mut self) -> &mut [u8] {
        &mut self.header[self.filled..self.header_len]
    }

    /// Notes that `len` bytes were written to the buffer from [`Self::missing`].
    pub(crate) fn advance(&mut self, len: usize) {
        self.filled += len;
    }

    /// The next frame, once its header is complete. `None` says that bytes are missing.
    ///
    /// # Errors
    /// What is wrong with the header.
    pub(crate) fn next(&mut self, max_payload: u32) -> Option<Result<Frame, String>> {
        if self.filled < self.header_len {
            return None;
        }
        self.filled = 0;
        self.current = self.header;
        let (header, _) = Header::read_from_prefix(&self.header).expect("the length matches");
        Some(header.parse(max_payload).map_err(|e| e.to_string()))
    }

    /// Verifies the tag of the current frame, if the connection has keys.
    pub(crate) fn verify(&mut self, payload: &[u8]) -> Result<(), InvalidTag> {
        let Some(keys) = &self.keys else {
            return Ok(());
        };
        let (header, tag) = self.current.split_at(HEADER_LEN);
        let tag = tag.try_into().expect("the length matches");
        if !keys.verify_frame(self.verified, tag, &[header, payload]) {
            return Err(InvalidTag);
        }
        self.verified += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn header(seq: u64) -> Header {
        Header::for_batch(seq, 1, 4, 7)
    }

    fn feed(parser: &mut FrameParser, mut bytes: &[u8], step: usize) {
        while !bytes.is_empty() {
            assert!(parser.next(4096).is_none());
            let missing = parser.missing();
            let len = missing.len().min(step).min(bytes.len());
            missing[..len].copy_from_slice(&bytes[..len]);
            parser.advance(len);
            bytes = &bytes[len..];
        }
    }

    #[test]
    fn a_header_may_arrive_in_any_pieces() {
        for step in 1..=HEADER_LEN {
            let mut parser = FrameParser::new(None);
            for seq in 0..3 {
                feed(&mut parser, header(seq).as_bytes(), step);
                let Some(Ok(Frame::Batch(batch))) = parser.next(4096) else {
                    panic!("batch {seq} in steps of {step}");
                };
                assert_eq!(batch.batch_seq, seq);
                parser.verify(b"data").expect("there are no keys");
            }
        }
    }

    #[test]
    fn tags_cover_header_payload_and_position() {
        let keys = Arc::new(PacketKeys::new(&[1; 32]));
        let sealed = |number, payload: &[u8]| {
            let header = header(0);
            let tag = keys.seal_frame(number, &[header.as_bytes(), payload]);
            [header.as_bytes(), &tag].concat()
        };
        let mut parser = FrameParser::new(Some(Arc::clone(&keys)));
        let mut check = |bytes: &[u8], payload: &[u8]| {
            feed(&mut parser, bytes, 100);
            assert!(matches!(parser.next(4096), Some(Ok(Frame::Batch(_)))));
            parser.verify(payload).is_ok()
        };
        assert!(check(&sealed(0, b"data"), b"data"));
        assert!(!check(&sealed(0, b"data"), b"data"), "repeated");
        assert!(!check(&sealed(1, b"data"), b"else"), "changed");
        assert!(check(&sealed(1, b"data"), b"data"));
    }
}
