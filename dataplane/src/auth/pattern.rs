//! Patterns of topics: a name, or the beginning of names with `*` behind it.

use std::fmt;
use std::str::FromStr;

use crate::wire::handshake::check_topic;

/// A topic, or all topics whose names begin alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicPattern(String);

impl TopicPattern {
    /// Whether a topic is one of these.
    #[must_use]
    pub fn matches(&self, topic: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => topic.starts_with(prefix),
            None => topic == self.0,
        }
    }
}

impl FromStr for TopicPattern {
    type Err = String;

    fn from_str(pattern: &str) -> Result<Self, String> {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        if pattern == "*" || check_topic(name.as_bytes()).is_ok() {
            return Ok(Self(pattern.to_owned()));
        }
        Err(format!(
            "{pattern:?} is no topic, nor the beginning of one with * behind it, such as trades.*"
        ))
    }
}

impl fmt::Display for TopicPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
