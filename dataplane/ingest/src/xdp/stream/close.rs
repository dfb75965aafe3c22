//! The end of a stream: the publisher's end frame, the answer to it, and what goes back to the broker.

use penstock_log::Writer;
use penstock_transport::OpenBatch;
use penstock_wire::handshake::Path;

use super::{Context, Stream};
use crate::session::stats::ConnectionReport;
use crate::xdp::close_reason::CloseReason;

impl Stream {
    /// Reads what the publisher has sent over the control connection.
    pub(super) fn read_control(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        while self.control.is_ready() {
            match self.control.read_end(&mut cx.xdp.control_reads)? {
                Some(batches) if batches < self.commits.committed() => {
                    return Err(CloseReason::not_the_end());
                }
                Some(batches) => self.end = Some(batches),
                None => {}
            }
        }
        Ok(())
    }

    /// Answers the end of the stream once all of it is visible.
    pub(super) fn answer_end(&mut self) -> Result<(), CloseReason> {
        let visible = self.commits.visible();
        if self.end != Some(visible) {
            return Ok(());
        }
        self.end = None;
        let answered = self.control.complete(visible);
        answered.map_err(CloseReason::Io)?;
        Err(CloseReason::Completed)
    }

    /// Releases what the stream holds, reports a fault to the publisher, and summarises the stream.
    pub(in crate::xdp) fn finish(
        mut self,
        writer: &mut Writer,
        reason: &CloseReason,
    ) -> ConnectionReport {
        if let CloseReason::Fault(fault, text) = reason {
            self.control.fail(*fault, self.commits.visible(), text);
        }
        for OpenBatch {
            received,
            placement,
            ..
        } in self.receiver.open_batches()
        {
            if let Some(claim) = placement.claim.take() {
                claim.release(received);
            }
        }
        let ended = reason.to_string();
        let report = ConnectionReport::new(
            self.peer,
            Path::Xdp,
            &self.admission,
            self.buffers,
            self.commits.here(),
            ended,
        );
        let invisible = self.commits.invisible();
        let open = self.receiver.into_placements();
        for placement in open.chain(self.commits.into_placements()) {
            if let Some(reservation) = placement.reservation {
                writer.abort(reservation);
            }
        }
        // The stream's next connection reports these batches as committed, so readers must see them.
        if let Some(index) = invisible {
            writer.wait_until_visible(index);
        }
        report
    }
}
