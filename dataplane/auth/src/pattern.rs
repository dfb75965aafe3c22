//! Patterns of topics: a name, or a prefix followed by `*`.

use std::fmt;
use std::str::FromStr;

use penstock_wire::handshake::check_topic;

/// One topic, or all topics whose names begin with a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicPattern(String);

impl TopicPattern {
    /// Whether the pattern matches a topic.
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
            "{pattern:?} is neither a topic name nor a prefix followed by *, such as trades.*"
        ))
    }
}

impl fmt::Display for TopicPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
