//! Commits complete batches of a stream, over either path, and counts them.

use std::time::{SystemTime, UNIX_EPOCH};

use penstock_log::{Commit, Reservation, Writer};
use penstock_wire::batch;
use penstock_wire::message;
use penstock_wire::packet::BatchInfo;

use super::admission::Admission;

/// What a stream has committed over one connection.
#[derive(Debug, Default)]
pub(crate) struct Committed {
    pub(crate) batches: u64,
    /// Bytes of messages, without framing.
    pub(crate) payload_bytes: u64,
}

impl Committed {
    /// Commits the stream's next batch, which `reservation` holds completely; returns its index in the log.
    /// With `verify`, it drops a batch that does not match its checksum.
    ///
    /// # Errors
    /// The text for the publisher about a wrong checksum.
    pub(crate) fn commit(
        &mut self,
        writer: &mut Writer,
        reservation: Reservation,
        admission: &Admission,
        info: &BatchInfo,
        verify: bool,
    ) -> Result<u64, String> {
        if verify {
            let placed = writer.placed(&reservation, info.len);
            if batch::checksum(info.seq, info.messages, placed) != info.checksum {
                writer.abort(reservation);
                return Err(format!("batch {}: its checksum does not match", info.seq));
            }
        }
        let arrival = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let index = writer.commit(
            reservation,
            &Commit {
                session: admission.session,
                stream: admission.stream,
                batch_seq: info.seq,
                messages: info.messages,
                checksum: info.checksum,
                arrival_unix_ns: arrival.as_nanos() as u64,
            },
        );
        admission.lease.set_committed(info.seq + 1);
        self.batches += 1;
        self.payload_bytes +=
            u64::from(info.len) - u64::from(info.messages) * message::OVERHEAD as u64;
        Ok(index)
    }
}
