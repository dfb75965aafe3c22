//! Ack and order levels of a stream, as numbers on the wire and on command lines.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// When a broker acknowledges a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckLevel {
    /// 0: never while the stream runs; its end is confirmed.
    None,
    /// 1: once the batch is committed in the broker's shared buffer.
    Committed,
}

/// What order a broker keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrderLevel {
    /// 0: batches of one stream stay in order; streams are independent.
    PerStream,
}

/// The level exists in no version that this build speaks.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
#[error("{what} {asked} is not supported; supported: {supported}")]
pub struct UnsupportedLevel {
    what: &'static str,
    asked: String,
    supported: &'static str,
}

impl UnsupportedLevel {
    pub(super) fn new(what: &'static str, asked: impl ToString, supported: &'static str) -> Self {
        Self {
            what,
            asked: asked.to_string(),
            supported,
        }
    }
}

impl AckLevel {
    /// The number on the wire and on command lines.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Committed => 1,
        }
    }
}

impl OrderLevel {
    /// The number on the wire and on command lines.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::PerStream => 0,
        }
    }
}

impl TryFrom<u8> for AckLevel {
    type Error = UnsupportedLevel;

    fn try_from(level: u8) -> Result<Self, UnsupportedLevel> {
        level.to_string().parse()
    }
}

impl TryFrom<u8> for OrderLevel {
    type Error = UnsupportedLevel;

    fn try_from(level: u8) -> Result<Self, UnsupportedLevel> {
        level.to_string().parse()
    }
}

impl FromStr for AckLevel {
    type Err = UnsupportedLevel;

    fn from_str(level: &str) -> Result<Self, UnsupportedLevel> {
        match level {
            "0" => Ok(Self::None),
            "1" => Ok(Self::Committed),
            _ => Err(UnsupportedLevel::new(
                "ack level",
                level,
                "0 (none), 1 (committed in the broker's shared buffer)",
            )),
        }
    }
}

impl FromStr for OrderLevel {
    type Err = UnsupportedLevel;

    fn from_str(level: &str) -> Result<Self, UnsupportedLevel> {
        match level {
            "0" => Ok(Self::PerStream),
            _ => Err(UnsupportedLevel::new(
                "order level",
                level,
                "0 (per stream)",
            )),
        }
    }
}

impl fmt::Display for AckLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number().fmt(f)
    }
}

impl fmt::Display for OrderLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number().fmt(f)
    }
}
