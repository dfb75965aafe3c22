//! What threads that carry payload run on, in the broker and in the publisher.
//!
//! [`poller`] and [`sleep`] wait, [`deadline`] limits how long a peer may take, [`address`] resolves
//! names, [`profile`] measures stages and publishes figures of a running thread, [`tcp_info`] reads what the
//! kernel knows of a connection, and [`poison`] takes locks that survive a panic.
//!
//! ```
//! use std::io::Write;
//! use std::net::{TcpListener, TcpStream};
//! use std::time::{Duration, Instant};
//! use penstock_runtime::deadline;
//! use penstock_runtime::poller::{Events, Interest, Poller};
//!
//! let listener = TcpListener::bind("127.0.0.1:0")?;
//! let mut peer = TcpStream::connect(listener.local_addr()?)?;
//! let (socket, _) = listener.accept()?;
//!
//! let (poller, mut events) = (Poller::new()?, Events::default());
//! poller.add(&socket, 7, Interest::READABLE)?;
//! peer.write_all(b"hello")?;
//! poller.wait(&mut events, Duration::from_secs(5))?;
//! let event = events.iter().next().expect("the socket is readable");
//! assert!(event.key == 7 && event.is_readable);
//!
//! // All five bytes have to arrive by the deadline, however slowly the peer sends.
//! let mut bytes = [0; 5];
//! deadline::read_exact(&socket, &mut bytes, Instant::now() + Duration::from_secs(5))?;
//! assert_eq!(&bytes, b"hello");
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod address;
pub mod deadline;
pub mod poison;
pub mod poller;
pub mod profile;
pub mod sleep;
pub mod tcp_info;
