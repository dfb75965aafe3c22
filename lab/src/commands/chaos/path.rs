//! The paths of fault runs.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Path that payload takes while there are faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultPath {
    Tcp,
    Xdp,
    Fallback,
}

impl FaultPath {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Xdp => "xdp",
            Self::Fallback => "fallback",
        }
    }
}
