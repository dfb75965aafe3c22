//! A batch that is complete, and the queue entries in front of a stream.

use crossbeam_channel::Sender;
use penstock_runtime::profile::Tick;
use penstock_wire::batch::Header;

use super::payload::Payload;

/// A batch that is ready to go.
#[derive(Debug)]
pub(crate) struct SealedBatch {
    pub(crate) payload: Payload,
    pub(crate) messages: u32,
    /// CRC32C of the payload.
    pub(crate) checksum: u32,
    /// When it became complete.
    pub(crate) sealed: Tick,
}

impl SealedBatch {
    /// Header of the batch at its place in a stream.
    pub(crate) fn header(&self, seq: u64) -> Header {
        Header::for_batch(seq, self.messages, self.payload.len() as u32, self.checksum)
    }
}

/// What a stream is asked to do.
#[derive(Debug)]
pub(crate) enum Job {
    Batch(SealedBatch),
    /// Answer once everything before is acked (at ack level 0: sent).
    Flush(Sender<()>),
}
