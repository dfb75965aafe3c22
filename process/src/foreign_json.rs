//! JSON from other programs: every text in it is escaped as it is read, so that it is safe to show on a
//! terminal or a page.

use std::io::{self, Read};
use std::path::Path;

use crate::text::{escape, escape_lines};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Maximum size of a JSON file, bytes: several times the report of a run of a day. Parsed, it can take a
/// dozen times as much memory.
pub const MAX_JSON: u64 = 16 << 20;

/// The text of a JSON file.
///
/// # Errors
/// If it cannot be read, is not a regular file, or is longer than [`MAX_JSON`].
pub fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = penstock_files::open_regular(path)?;
    match file.take(MAX_JSON + 1).read_to_string(&mut text)? as u64 > MAX_JSON {
        true => {
            let what = format!("it is larger than {MAX_JSON} bytes");
            Err(io::Error::new(io::ErrorKind::FileTooLarge, what))
        }
        false => Ok(text),
    }
}

/// Reads what another process reports about itself.
pub fn from_process<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    serde_json::from_value(escaped(serde_json::from_slice(json)?, false))
}

/// Reads a report of an earlier run, whose texts may have several lines.
pub fn from_report(json: &str) -> serde_json::Result<Value> {
    Ok(escaped(serde_json::from_str(json)?, true))
}

fn escaped(value: Value, lines: bool) -> Value {
    let escape_one = |text: &str| match lines {
        true => escape_lines(text).into_owned(),
        false => escape(text).into_owned(),
    };
    match value {
        Value::String(text) => Value::String(escape_one(&text)),
        Value::Array(list) => list
            .into_iter()
            .map(|value| escaped(value, lines))
            .collect(),
        Value::Object(map) => map
            .into_iter()
            .map(|(key, value)| (escape_one(&key), escaped(value, lines)))
            .collect(),
        plain => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::is_unsafe;
    use std::collections::BTreeMap;

    #[test]
    fn no_text_of_others_reaches_a_terminal_as_it_is() {
        let evil = "\u{1b}[2J\n\u{202e}\u{9b}31m";
        let json = serde_json::json!({ evil: [{ "a": evil }, 7, 1.5, null] }).to_string();
        let read: BTreeMap<String, Value> = from_process(json.as_bytes()).unwrap();
        assert_eq!(read.keys().next().unwrap(), &*escape(evil));
        assert_eq!(read[&*escape(evil)][0]["a"], &*escape(evil));
        assert_eq!(read[&*escape(evil)][2], 1.5);
        let report = from_report(&json).unwrap().to_string();
        let unescaped: Value = serde_json::from_str(&report).unwrap();
        let key = unescaped.as_object().unwrap().keys().next().unwrap();
        assert!(!key.contains(|c| is_unsafe(c) && c != '\n') && key.contains('\n'));
    }
}
