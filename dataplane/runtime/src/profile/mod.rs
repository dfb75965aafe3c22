//! Where the time went: stage timers cheap enough to stay on, and what the process used.

mod live;
mod rounds;
mod stages;
mod usage;

pub use live::{Live, SHOW_EVERY};
pub use rounds::Rounds;
pub use stages::{Stage, StageReport, StageTimer, Tick};
pub use usage::ProcessUsage;
