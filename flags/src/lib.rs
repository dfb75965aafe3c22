//! Command-line parsing that all programs share: durations and sizes with units, and how an error is
//! shown.

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
