//! Set-up that all AF_XDP sockets share: packet memory (UMEM), rings, and bind(2) to a queue.

use std::io;
use std::num::NonZeroU32;
use std::thread;
use std::time::{Duration, Instant};

use xsk_rs::config::{
    BindFlags, FrameSize, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig,
};
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::{CompQueue, FillQueue, RxQueue, Socket, TxQueue, Umem};

use super::error::{Error, Purpose, hint};

/// Time limit for bind(2) to succeed: the kernel tears down an earlier socket of the queue asynchronously
/// and answers EBUSY until then.
const BIND_RETRY_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval of the attempts.
const BIND_RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Sizes of packet memory and of its rings; all but `frames` are powers of two.
pub(super) struct UmemSizes {
    pub(super) frames: u32,
    /// Bytes of a frame, 2048 or 4096.
    pub(super) frame_size: u32,
    pub(super) fill: u32,
    pub(super) completed: u32,
}

impl UmemSizes {
    pub(super) fn register(&self) -> Result<(Umem, Vec<FrameDesc>), Error> {
        let umem = UmemConfig::builder()
            .frame_size(FrameSize::new(self.frame_size).expect("a frame is 2048 bytes or more"))
            .fill_queue_size(size(self.fill))
            .comp_queue_size(size(self.completed))
            .build()
            .expect("a frame has room for its headroom");
        let count = NonZeroU32::new(self.frames).expect("a ring has entries");
        let bytes = u64::from(self.frames) * u64::from(self.frame_size);
        // Huge pages if the host has reserved some.
        Umem::new(umem, count, true)
            .or_else(|_| Umem::new(umem, count, false))
            .map_err(|error| Error::umem(bytes, cause(&error)))
    }
}

/// A socket's own rings, and the queue that it binds to.
pub(super) struct Rings<'a> {
    pub(super) interface: &'a str,
    pub(super) queue: u32,
    /// Entries of the receive ring and of the transmit ring, powers of two.
    pub(super) received: u32,
    pub(super) sent: u32,
    pub(super) flags: BindFlags,
    pub(super) purpose: Purpose,
}

/// A socket's rings and, if it is the first one of its queue, the rings of the queue.
pub(super) type Bound = (TxQueue, RxQueue, Option<(FillQueue, CompQueue)>);

impl Rings<'_> {
    fn refused(&self, source: io::Error) -> Error {
        Error::Socket {
            interface: self.interface.to_owned(),
            queue: self.queue,
            hint: hint(&source, self.purpose),
            source,
        }
    }

    pub(super) fn bind(&self, umem: &Umem) -> Result<Bound, Error> {
        let interface: Interface = self.interface.parse().map_err(|_| Error::Interface {
            interface: self.interface.to_owned(),
        })?;
        let socket = SocketConfig::builder()
            .rx_queue_size(size(self.received))
            .tx_queue_size(size(self.sent))
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(self.flags)
            .build();
        let start = Instant::now();
        loop {
            // SAFETY: no program is loaded; sockets of one queue share its fill and completion ring
            // under a lock.
            let error = match unsafe { Socket::new(socket, umem, &interface, self.queue) } {
                Ok(rings) => return Ok(rings),
                Err(error) => cause(&error),
            };
            let busy = error.raw_os_error() == Some(libc::EBUSY);
            if !busy || start.elapsed() > BIND_RETRY_TIMEOUT {
                return Err(self.refused(error));
            }
            thread::sleep(BIND_RETRY_INTERVAL);
        }
    }
}

fn size(entries: u32) -> QueueSize {
    QueueSize::new(entries).expect("a ring's size is a power of two")
}

/// The kernel's answer below an error of xsk-rs.
fn cause(error: &(dyn std::error::Error + 'static)) -> io::Error {
    let io = error.source().and_then(|e| e.downcast_ref::<io::Error>());
    match io.and_then(io::Error::raw_os_error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(error.to_string()),
    }
}
