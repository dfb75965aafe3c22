//! Where the time went: stage timers cheap enough to stay on, and what the process used.

mod stages;
mod usage;

pub use stages::{Stage, StageReport, StageTimer, Tick};
pub use usage::ProcessUsage;
