//! Whether datagrams reach the broker at all: tried before the stream has anything to send.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use penstock_runtime::sleep;

use super::DatagramStream;
use crate::Error;
use crate::net::af_xdp::TransmitError;
use crate::stream::datagram_tx::DatagramTx;

/// Time limit for an answer to the first packets of a stream.
const TRIAL: Duration = Duration::from_millis(800);
/// Interval between packets while there is no answer.
const PROBE_INTERVAL: Duration = Duration::from_millis(50);

impl DatagramStream {
    /// Tries the path through the kernel.
    pub(super) fn try_path(&mut self) -> Result<(), Error> {
        while !self.sender.rtt().is_known() {
            if self.start.elapsed() > TRIAL || self.refused {
                return Err(self.unanswered());
            }
            self.probe()?;
        }
        Ok(())
    }

    fn unanswered(&self) -> Error {
        let why = if self.refused {
            "the broker's host reports that the port is closed"
        } else {
            "there is no answer"
        };
        let cause = match self.datagrams.ends() {
            Ok((own, broker)) if own.ip() == broker.ip() => {
                "the broker is on this host, so packets go over lo and not through the broker's --iface; use --mode tcp here"
            }
            _ => {
                "a firewall may drop them, or they may arrive on an interface other than the broker's --iface"
            }
        };
        let reason = format!("datagrams were sent to its port, but {why}; {cause}");
        Error::path_dead(&self.broker, reason)
    }

    /// Tries, once the path is known to work, whether packets that bypass the kernel arrive as well.
    pub(super) fn try_bypass(&mut self) -> Result<Result<(), TransmitError>, Error> {
        let start = Instant::now();
        // The first packet that bypassed the kernel.
        let mut first = None;
        loop {
            let DatagramTx::AfXdp(socket) = &mut self.tx else {
                return Ok(Ok(()));
            };
            let largest = self.acks.largest();
            if first.is_some_and(|first| largest.is_some_and(|largest| largest >= first)) {
                return Ok(Ok(()));
            }
            if start.elapsed() > TRIAL {
                return Ok(Err(match first {
                    Some(_) => socket.unanswered(),
                    None => socket.unresolved(),
                }));
            }
            if !socket.is_ready()
                && let Err(error) = socket.look()
            {
                return Ok(Err(error));
            }
            if socket.is_ready() && first.is_none() {
                first = Some(self.sender.next_packet());
            }
            self.probe()?;
        }
    }

    /// Sends a packet, and waits for a datagram or for the control connection.
    fn probe(&mut self) -> Result<(), Error> {
        self.sender.probe();
        self.transmit()?;
        let mut watched = [
            PollFd::new(self.datagrams.socket().as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.socket().as_fd(), PollFlags::POLLIN),
        ];
        let waited = sleep::until_ready(&mut watched, PROBE_INTERVAL);
        waited.map_err(|error| Error::Thread(error.to_string()))?;
        if sleep::is_ready(&watched[1]) {
            self.read_control()?;
        }
        self.take_acks()
    }
}
