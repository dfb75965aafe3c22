//! How a stream's datagrams leave: through its UDP socket, or past the kernel.

use std::io::{self, IoSlice};
use std::sync::Arc;

use tracing::warn;

use crate::config::{Mode, Transmit};
use crate::net::af_xdp::{AfXdp, TransmitError};
use crate::net::tx_queues::TxQueues;
use crate::net::udp::Datagrams;
use crate::stream::connection::StreamId;
use crate::{Config, Error};

/// How a stream's datagrams leave.
pub(crate) enum DatagramTx {
    Udp,
    AfXdp(Box<AfXdp>),
}

impl DatagramTx {
    /// As the settings ask for; with `--mode auto` through the UDP socket, if need be.
    pub(crate) fn open(
        config: &Config,
        target: &StreamId,
        datagrams: &Datagrams,
        taken: &Arc<TxQueues>,
    ) -> Result<Self, Error> {
        let Transmit::AfXdp { interface, queues } = &config.transmit else {
            return Ok(Self::Udp);
        };
        match AfXdp::open(datagrams, interface.as_deref(), queues, taken) {
            Ok(socket) => Ok(Self::AfXdp(Box::new(socket))),
            Err(error) => Self::or_udp(config.mode, target, error),
        }
    }

    /// What is left when AF_XDP is not to be had: with `--mode auto`, the UDP socket.
    pub(crate) fn or_udp(
        mode: Mode,
        target: &StreamId,
        error: TransmitError,
    ) -> Result<Self, Error> {
        if mode == Mode::Auto {
            warn!(
                broker = target.broker,
                stream = target.number,
                "datagrams go through the UDP socket: {error}"
            );
            return Ok(Self::Udp);
        }
        Err(Error::Transmit {
            broker: target.broker.clone(),
            reason: error,
        })
    }

    /// The name in reports.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Udp => Transmit::UDP,
            Self::AfXdp(_) => Transmit::AF_XDP,
        }
    }

    /// Largest UDP payload that can be sent, bytes.
    pub(crate) fn max_datagram(&self, datagrams: &Datagrams) -> io::Result<u32> {
        let largest = datagrams.max_datagram()?;
        Ok(match self {
            Self::Udp => largest,
            Self::AfXdp(socket) => largest.min(socket.max_datagram() as u32),
        })
    }

    /// Sends packets, each in two parts: all as long as the first, but the last may be shorter.
    pub(crate) fn send(
        &mut self,
        datagrams: &mut Datagrams,
        packets: &[[IoSlice<'_>; 2]],
    ) -> io::Result<()> {
        match self {
            Self::Udp => datagrams.send(packets),
            Self::AfXdp(socket) => socket.send(datagrams, packets),
        }
    }

    /// System calls made to send.
    pub(crate) fn calls(&self, datagrams: &Datagrams) -> u64 {
        datagrams.calls()
            + match self {
                Self::Udp => 0,
                Self::AfXdp(socket) => socket.calls(),
            }
    }
}
