//! A stream after its handshake.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use penstock_auth::PacketKeys;

use super::admission::Admission;
use super::buffers::EffectiveBuffers;

/// A stream that the accept loop has opened.
#[derive(Debug)]
pub struct AcceptedStream {
    pub(crate) socket: TcpStream,
    pub(crate) peer: SocketAddr,
    pub(crate) buffers: EffectiveBuffers,
    pub(crate) admission: Admission,
    /// Keys of its packets and frames, if they are authenticated.
    pub(crate) keys: Option<Arc<PacketKeys>>,
}
