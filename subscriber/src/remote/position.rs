//! How far a remote subscriber has come, to be stored and resumed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where a remote subscriber is: store it with your results, and start another one from it.
///
/// Batches behind it are delivered once more or for the first time, those before it never again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The log of each broker that was read, by the broker's address.
    pub brokers: BTreeMap<String, LogPosition>,
    /// Every stream that was read.
    pub streams: Vec<StreamPosition>,
}

/// A place in a broker's log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogPosition {
    /// Index of the next batch.
    pub next: u64,
    /// Identity of the log; 0 if the broker told none.
    #[serde(with = "hexadecimal")]
    pub log: u64,
}

/// A place in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamPosition {
    /// Its session.
    #[serde(with = "hexadecimal")]
    pub session: u64,
    /// Its number in the session.
    pub stream: u32,
    /// Number of its next batch.
    pub next: u64,
}

/// 16 digits, because many readers of JSON round large numbers.
mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{number:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        u64::from_str_radix(&text, 16).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_keep_their_form() {
        let position = Position {
            brokers: [(
                "10.0.0.1:1214".to_owned(),
                LogPosition { next: 7, log: 0xab },
            )]
            .into(),
            streams: vec![StreamPosition {
                session: u64::MAX,
                stream: 3,
                next: 9,
            }],
        };
        let text = serde_json::to_string(&position).unwrap();
        assert_eq!(
            text,
            r#"{"brokers":{"10.0.0.1:1214":{"next":7,"log":"00000000000000ab"}},"streams":[{"session":"ffffffffffffffff","stream":3,"next":9}]}"#
        );
        assert_eq!(serde_json::from_str::<Position>(&text).unwrap(), position);
    }
}
