//! Assembles the request frames of one subscriber from the bytes that arrive, and verifies their tags.

use std::sync::Arc;

use penstock_auth::PacketKeys;
use penstock_wire::delivery::{InvalidFrame, REQUEST_LEN, Request, RequestFrame};
use penstock_wire::packet::TAG_LEN;
use thiserror::Error;
use zerocopy::FromBytes;

/// Collects the next frame, with its tag if the connection has keys.
#[derive(Debug)]
pub(crate) struct RequestReader {
    frame: [u8; REQUEST_LEN + TAG_LEN],
    filled: usize,
    keys: Option<Arc<PacketKeys>>,
    /// Number of frames with a valid tag so far, which is the number of the next one.
    verified: u64,
}

/// A frame that cannot be served.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum RequestError {
    #[error(transparent)]
    Invalid(#[from] InvalidFrame),
    #[error(
        "a frame has an invalid tag: it was changed, inserted, removed or repeated on the path"
    )]
    Tag,
}

impl RequestReader {
    pub(crate) fn new(keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            frame: [0; REQUEST_LEN + TAG_LEN],
            filled: 0,
            keys,
            verified: 0,
        }
    }

    /// Buffer for the missing bytes of the next frame.
    pub(crate) fn missing(&mut self) -> &mut [u8] {
        let len = self.len();
        &mut self.frame[self.filled..len]
    }

    /// Notes that `len` bytes were written to the buffer from [`Self::missing`]; returns the frame that they complete,
    /// if any.
    pub(crate) fn advance(&mut self, len: usize) -> Option<Result<Request, RequestError>> {
        self.filled += len;
        if self.filled < self.len() {
            return None;
        }
        self.filled = 0;
        let (frame, tag) = self
            .frame
            .split_first_chunk::<REQUEST_LEN>()
            .expect("it is longer");
        if let Some(keys) = &self.keys {
            let tag = tag.first_chunk::<TAG_LEN>().expect("it has this length");
            if !keys.verify_frame(self.verified, tag, &[frame]) {
                return Some(Err(RequestError::Tag));
            }
            self.verified += 1;
        }
        let frame = RequestFrame::ref_from_bytes(frame).expect("a frame is plain bytes");
        Some(frame.parse().map_err(RequestError::from))
    }

    fn len(&self) -> usize {
        match self.keys {
            Some(_) => REQUEST_LEN + TAG_LEN,
            None => REQUEST_LEN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::delivery::{Progress, Start, StartAt};
    use zerocopy::IntoBytes;

    fn requests() -> [Request; 2] {
        let start = Start {
            at: StartAt::Index(7),
            is_registered: true,
            credit: 1,
        };
        let progress = Progress {
            needed_from: 8,
            credit: 2,
        };
        [Request::Start(start), Request::Progress(progress)]
    }

    /// Feeds bytes in steps of `step`; returns what they are.
    fn feed(
        reader: &mut RequestReader,
        mut bytes: &[u8],
        step: usize,
    ) -> Vec<Result<Request, RequestError>> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let missing = reader.missing();
            let len = missing.len().min(step).min(bytes.len());
            missing[..len].copy_from_slice(&bytes[..len]);
            found.extend(reader.advance(len));
            bytes = &bytes[len..];
        }
        found
    }

    #[test]
    fn frames_may_arrive_in_any_pieces() {
        let bytes = requests().map(|request| RequestFrame::new(&request).as_bytes().to_vec());
        for step in 1..=2 * REQUEST_LEN {
            let mut reader = RequestReader::new(None);
            let found = feed(&mut reader, &bytes.concat(), step);
            assert_eq!(found, requests().map(Ok), "steps of {step}");
        }
    }

    #[test]
    fn tags_cover_the_frame_and_its_position() {
        let keys = Arc::new(PacketKeys::new(&[1; 32]));
        let [first, second] = requests().map(|request| RequestFrame::new(&request));
        let sealed = |number, frame: &RequestFrame| {
            let tag = keys.seal_frame(number, &[frame.as_bytes()]);
            [frame.as_bytes(), &tag].concat()
        };
        let mut reader = RequestReader::new(Some(Arc::clone(&keys)));
        let good = [sealed(0, &first), sealed(1, &second)].concat();
        assert_eq!(feed(&mut reader, &good, 5), requests().map(Ok));
        assert_eq!(
            feed(&mut reader, &sealed(1, &second), 100),
            [Err(RequestError::Tag)],
            "repeated"
        );
        assert_eq!(
            feed(&mut reader, &[0; REQUEST_LEN + TAG_LEN], 100),
            [Err(RequestError::Tag)]
        );
    }
}
