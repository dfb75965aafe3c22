//! Where the time went: stage timers cheap enough to stay on, and what the process used.

mod rounds;
mod snapshot;
mod stages;
mod usage;

pub use rounds::Rounds;
pub use snapshot::{SNAPSHOT_INTERVAL, SnapshotCell};
pub use stages::{Stage, StageReport, StageTimer, Tick};
pub use usage::ProcessUsage;
