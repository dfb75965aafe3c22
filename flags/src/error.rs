//! How an error is shown: its causes on one line, each once.

use std::error::Error;

use clap::CommandFactory;
use clap::error::ErrorKind;

/// An error with its causes, separated by colons. Omits a cause that the text before it already quotes:
/// library errors often include their cause in their own text.
#[must_use]
pub fn explain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// Wrong usage that is detected only after parsing, reported like clap's own errors; its exit code is
/// 2.
pub fn usage_error<C: CommandFactory>(error: &anyhow::Error) -> clap::Error {
    C::command().error(ErrorKind::ValueValidation, explain(error.as_ref()))
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn a_cause_that_is_quoted_already_is_not_repeated() {
        let refused = || io::Error::from_raw_os_error(111);
        let quoting =
            anyhow::Error::new(refused()).context(format!("broker b: {}; see x", refused()));
        let text = explain(quoting.context("failed").as_ref());
        assert_eq!(
            text,
            "failed: broker b: Connection refused (os error 111); see x"
        );
    }

    #[test]
    fn a_cause_that_is_not_quoted_is_told() {
        let error = Err::<(), _>(anyhow!("no room")).context("topic a");
        let error = error.context("cannot start").unwrap_err();
        assert_eq!(explain(error.as_ref()), "cannot start: topic a: no room");
    }
}
