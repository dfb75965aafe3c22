//! Exit codes, the same in all programs.

use std::fmt::{self, Display};

use anyhow::Error;
use penstock_flags::explain;

/// The program failed.
pub const FAILURE: u8 = 1;
/// The command line is wrong; nothing was done.
pub const USAGE: u8 = 2;
/// Ended by SIGINT or SIGTERM, with the code that shells report for SIGINT: 128 + 2.
pub const INTERRUPTED: u8 = 130;

/// Marks an error as wrong usage; see [`usage`] and [`wrong_usage`].
#[derive(Debug)]
pub struct Usage(Error);

/// Wrong usage with this message.
pub fn wrong_usage(text: impl Display + fmt::Debug + Send + Sync + 'static) -> Error {
    usage(Error::msg(text))
}

/// Marks an error as wrong usage; its message stays.
pub fn usage(error: impl Into<Error>) -> Error {
    Error::new(Usage(error.into()))
}

impl Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Includes its causes, because the marker has no source that a caller could print.
        f.write_str(&explain(self.0.as_ref()))
    }
}

impl std::error::Error for Usage {}

/// Whether an error is wrong usage.
#[must_use]
pub fn is_usage(error: &Error) -> bool {
    error.chain().any(<dyn std::error::Error>::is::<Usage>)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn wrong_usage_is_told_behind_a_context() {
        let wrong = wrong_usage("--workers 0 is not from 1 to 256");
        assert!(is_usage(&wrong));
        assert_eq!(format!("{wrong:#}"), "--workers 0 is not from 1 to 256");
        let inner = Err::<(), _>(Error::msg("no number")).context("--workers");
        let outer = inner.map_err(usage).context("flags").unwrap_err();
        assert!(is_usage(&outer));
        assert_eq!(format!("{outer:#}"), "flags: --workers: no number");
        assert!(!is_usage(&Error::msg("no room")));
    }
}
