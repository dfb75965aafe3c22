//! Command-line parsing that all programs share: durations and sizes with units, and how an error is
//! shown.
//!
//! ```
//! use std::time::Duration;
//! use penstock_flags::{BareUnit, duration, duration_text, size, size_text};
//!
//! let second = Duration::from_secs(1);
//! let parse = duration(BareUnit::Seconds, second..=60 * second);
//! assert_eq!(parse("250ms"), Err("not from 1s to 1m; the nearest is 1s".to_owned()));
//! assert_eq!(parse("30").map(duration_text), Ok("30s".to_owned()));
//! let parse = size(4096..=1 << 30);
//! assert_eq!(parse("64MiB").map(|bytes| size_text(bytes.as_u64())), Ok("64MiB".to_owned()));
//! ```

mod duration;
mod error;
mod examples;
mod quoting;
mod size;

pub use duration::{BareUnit, duration, duration_text};
pub use error::{explain, usage_error};
pub use examples::examples;
pub use quoting::quoted;
pub use size::{
    MAX_SOCKET_BUFFER, MIN_SOCKET_BUFFER, nearest_multiple, nearest_power_of_two, size, size_text,
};
