//! Frames on their way into the socket of a stream over tcp: several go out with one system call, because
//! each call ends with a short segment (`TCP_NODELAY`) and costs as much as some kilobytes.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};

use penstock_wire::batch::{HEADER_LEN, Header};
use penstock_wire::packet::{TAG_LEN, Tag};
use zerocopy::IntoBytes;

use crate::batch::sealed_batch::SealedBatch;

/// Frames that one call writes at most.
const MAX_FRAMES: usize = 4;

/// A frame that is not written whole.
struct Frame {
    /// Header, and tag if it has one.
    head: [u8; HEADER_LEN + TAG_LEN],
    head_len: usize,
    /// None for the end of the stream.
    batch: Option<SealedBatch>,
}

impl Frame {
    fn parts(&self) -> [&[u8]; 2] {
        let payload = self.batch.as_ref().map_or(&[][..], |batch| &batch.payload);
        [&self.head[..self.head_len], payload]
    }

    fn len(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }
}

/// What a frame carried that is written.
#[derive(Debug)]
pub(crate) enum Written {
    Batch(SealedBatch),
    End,
}

/// Frames that are being written, in their order.
#[derive(Default)]
pub(crate) struct FrameWriter {
    frames: VecDeque<Frame>,
    /// Bytes that are written: of the first frame, and of those behind it if it is whole.
    written: usize,
}

impl FrameWriter {
    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether one more frame could go out with the next call.
    pub(crate) fn has_room(&self) -> bool {
        self.frames.len() < MAX_FRAMES
    }

    /// Adds a frame with a batch, or the end of the stream.
    pub(crate) fn push(&mut self, header: &Header, tag: Option<Tag>, batch: Option<SealedBatch>) {
        let mut head = [0; HEADER_LEN + TAG_LEN];
        head[..HEADER_LEN].copy_from_slice(header.as_bytes());
        let mut head_len = HEADER_LEN;
        if let Some(tag) = tag {
            head[HEADER_LEN..].copy_from_slice(&tag);
            head_len += TAG_LEN;
        }
        self.frames.push_back(Frame {
            head,
            head_len,
            batch,
        });
    }

    /// Writes as much as the socket takes with one call; returns the bytes.
    ///
    /// # Errors
    /// The socket's, also `WouldBlock` and `Interrupted`.
    pub(crate) fn write(&mut self, mut socket: impl Write) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); 2 * MAX_FRAMES];
        let mut count = 0;
        let mut skip = self.written;
        for part in self.frames.iter().flat_map(Frame::parts) {
            let rest = &part[skip.min(part.len())..];
            skip -= part.len() - rest.len();
            if !rest.is_empty() {
                slices[count] = IoSlice::new(rest);
                count += 1;
            }
        }
        let more = socket.write_vectored(&slices[..count])?;
        self.written += more;
        Ok(more)
    }

    /// The next frame that is written whole.
    pub(crate) fn pop_written(&mut self) -> Option<Written> {
        let len = self.frames.front()?.len();
        self.written = self.written.checked_sub(len)?;
        let batch = self.frames.pop_front()?.batch;
        Some(batch.map_or(Written::End, Written::Batch))
    }

    /// Batches that are not written whole.
    pub(crate) fn batches(&self) -> impl Iterator<Item = &SealedBatch> {
        self.frames.iter().filter_map(|frame| frame.batch.as_ref())
    }

    /// Gives the batches up to another connection, which writes them from their start.
    pub(crate) fn take_batches(&mut self) -> impl Iterator<Item = SealedBatch> {
        self.written = 0;
        std::mem::take(&mut self.frames)
            .into_iter()
            .filter_map(|frame| frame.batch)
    }
}

#[cfg(test)]
mod tests {
    use penstock_runtime::profile::StageTimer;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::batch::payload::Payload;
    use crate::summary::PublishStage;

    fn batch(len: usize) -> SealedBatch {
        let mut payload = Payload::default();
        payload.append(&vec![len as u8; len]);
        SealedBatch {
            checksum: payload.seal(),
            payload,
            messages: 1,
            sealed: StageTimer::<PublishStage>::default().now(),
        }
    }

    /// A socket that takes so many bytes with each call, as long as there are numbers.
    struct Socket {
        takes: Vec<usize>,
        got: Vec<u8>,
        calls: usize,
    }

    impl Write for Socket {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            unreachable!("all frames go out together")
        }

        fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
            let mut room = self.takes.pop().unwrap_or(usize::MAX);
            let before = self.got.len();
            for part in parts {
                let len = room.min(part.len());
                self.got.extend(&part[..len]);
                room -= len;
            }
            self.calls += 1;
            Ok(self.got.len() - before)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn frames_arrive_whole_and_in_order_however_little_a_call_takes(
            batches in vec(0..5000usize, 1..20),
            takes in vec(1..8000usize, 0..40),
            is_tagged: bool,
        ) {
            let mut socket = Socket { takes, got: Vec::new(), calls: 0 };
            let (mut writer, mut wanted, mut done) = (FrameWriter::default(), Vec::new(), Vec::new());
            let mut next = batches.iter().enumerate().peekable();
            while next.peek().is_some() || !writer.is_empty() {
                while writer.has_room() && let Some((seq, &len)) = next.next() {
                    let batch = batch(len);
                    let header = batch.header(seq as u64);
                    let tag = is_tagged.then_some([seq as u8; TAG_LEN]);
                    wanted.extend_from_slice(header.as_bytes());
                    wanted.extend(tag.iter().flatten());
                    wanted.extend_from_slice(&batch.payload);
                    writer.push(&header, tag, Some(batch));
                }
                prop_assert_eq!(writer.batches().count(), writer.len());
                writer.write(&mut socket).unwrap();
                while let Some(Written::Batch(batch)) = writer.pop_written() {
                    done.push(batch.payload.len());
                }
                prop_assert_eq!(done.len() + writer.len(), batches.len() - next.len());
            }
            prop_assert_eq!(&socket.got, &wanted);
            prop_assert_eq!(done.len(), batches.len());
        }
    }

    #[test]
    fn several_frames_take_one_call_and_the_end_is_one_of_them() {
        let mut socket = Socket {
            takes: Vec::new(),
            got: Vec::new(),
            calls: 0,
        };
        let mut writer = FrameWriter::default();
        for seq in 0..MAX_FRAMES as u64 - 1 {
            let batch = batch(100);
            writer.push(&batch.header(seq), None, Some(batch));
        }
        assert!(writer.has_room());
        writer.push(&Header::for_end(3), None, None);
        assert!(!writer.has_room());
        writer.write(&mut socket).unwrap();
        assert_eq!(socket.calls, 1);
        let written: Vec<_> = std::iter::from_fn(|| writer.pop_written()).collect();
        assert!(matches!(written[..], [.., Written::Batch(_), Written::End]));
        assert_eq!(written.len(), MAX_FRAMES);
    }

    #[test]
    fn another_connection_gets_what_is_not_written_whole() {
        let mut socket = Socket {
            takes: vec![HEADER_LEN + 300],
            got: Vec::new(),
            calls: 0,
        };
        let mut writer = FrameWriter::default();
        for seq in 0..3 {
            let batch = batch(200);
            writer.push(&batch.header(seq), None, Some(batch));
        }
        writer.write(&mut socket).unwrap();
        assert!(matches!(writer.pop_written(), Some(Written::Batch(_))));
        assert!(writer.pop_written().is_none());
        assert_eq!(writer.take_batches().count(), 2);
        assert!(writer.is_empty());
    }
}
