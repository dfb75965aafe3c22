//! Sockets and routes: what carries bytes to a broker.

pub(crate) mod af_xdp;
pub(crate) mod route;
pub(crate) mod tx_queues;
pub(crate) mod udp;
