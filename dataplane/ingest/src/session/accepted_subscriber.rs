//! A remote subscriber after its handshake.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use penstock_auth::PacketKeys;
use penstock_log::Log;

use super::permits::StreamPermit;

/// A subscriber that the accept loop has admitted.
#[derive(Debug)]
pub struct AcceptedSubscriber {
    /// Its connection, whose next bytes are the subscriber's first frame.
    pub socket: TcpStream,
    /// Its address.
    pub peer: SocketAddr,
    /// The topic that it reads.
    pub topic: String,
    /// The topic's log.
    pub log: Arc<Log>,
    /// Keys of its frames, if they are authenticated.
    pub keys: Option<Arc<PacketKeys>>,
    /// Whether it may register, so that publishers wait for it.
    pub may_register: bool,
    /// Its place; held for as long as it is served.
    pub permit: StreamPermit,
}
