//! Whether to write in colour.

use std::env;
use std::io::IsTerminal;

/// Whether `stream` is a terminal that supports colours, and the user wants them
/// (<https://no-color.org>).
#[must_use]
pub fn are_wanted(stream: &impl IsTerminal) -> bool {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    stream.is_terminal() && !is_set("NO_COLOR") && !is_dumb
}
