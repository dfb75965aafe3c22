//! What publishers and subscribers share: connecting to a broker ([`happy_eyeballs`]), and the handshake that
//! opens a connection ([`ClientHandshake`]).
//!
//! ```
//! use std::io::{Read, Write};
//! use std::net::TcpListener;
//! use std::time::{Duration, Instant};
//! use penstock_client::{ClientHandshake, HandshakeError, happy_eyeballs};
//! use penstock_wire::handshake::{HELLO_LEN, Purpose, Refusal, Welcome};
//!
//! let listener = TcpListener::bind("127.0.0.1:0")?;
//! let address = listener.local_addr()?;
//! let broker = std::thread::spawn(move || -> std::io::Result<()> {
//!     let (mut socket, _) = listener.accept()?;
//!     socket.read_exact(&mut [0; HELLO_LEN + 6])?;
//!     socket.write_all(&Welcome::refuse(Refusal::Permission, "this key may not read trades"))
//! });
//!
//! let second = Duration::from_secs(1);
//! let socket = happy_eyeballs::connect(&[address], second)?;
//! let handshake = ClientHandshake {
//!     socket: &socket,
//!     deadline: Instant::now() + second,
//!     topic: "trades",
//!     key: None,
//!     packet_auth: false,
//! };
//! let refused = handshake.ask(&Purpose::Subscribe).unwrap_err();
//! assert!(matches!(refused, HandshakeError::Refused { code: 10, .. }));
//! broker.join().unwrap()?;
//! # Ok::<(), std::io::Error>(())
//! ```

mod handshake;
pub mod happy_eyeballs;

pub use handshake::{ClientHandshake, HandshakeError};
