//! `--from`: where to start.

use std::path::PathBuf;
use std::str::FromStr;

use jiff::Timestamp;

use crate::Start;

/// Where to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// At the same place in each log.
    Each(Start),
    /// At the position in this file.
    File(PathBuf),
}

impl FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(file) = text.strip_prefix('@').filter(|file| !file.is_empty()) {
            return Ok(Self::File(file.into()));
        }
        let start = match text {
            // Its name before a time or an index could be given.
            "oldest" | "start" => Some(Start::Oldest),
            "end" => Some(Start::End),
            _ if is_digits(text) => text.parse().ok().map(Start::Index),
            _ => time(text).map(Start::Time),
        };
        start.map(Self::Each).ok_or_else(|| {
            "use oldest, end, the index of a batch, a time such as 2026-11-30T04:00:00Z or unix:1796011200, or @FILE"
                .to_owned()
        })
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Nanoseconds since the Unix epoch: RFC 3339, or `unix:` and seconds.
fn time(text: &str) -> Option<u64> {
    let time = match text.strip_prefix("unix:") {
        Some(seconds) => {
            let (whole, part) = seconds.split_once('.').unwrap_or((seconds, "0"));
            let is_valid = is_digits(whole) && is_digits(part) && part.len() <= 9;
            let part = is_valid.then(|| format!("{part:0<9}").parse().ok())??;
            Timestamp::new(whole.parse().ok()?, part).ok()?
        }
        None => text.parse().ok()?,
    };
    u64::try_from(time.as_nanosecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_have_several_forms() {
        let second = 1_000_000_000;
        for (text, start) in [
            ("oldest", Start::Oldest),
            ("start", Start::Oldest),
            ("end", Start::End),
            ("0", Start::Index(0)),
            ("18446744073709551615", Start::Index(u64::MAX)),
            ("unix:12", Start::Time(12 * second)),
            ("unix:12.5", Start::Time(12 * second + second / 2)),
            ("unix:0.000000001", Start::Time(1)),
            ("1970-01-01T00:00:12Z", Start::Time(12 * second)),
            (
                "1970-01-01T01:00:12.25+01:00",
                Start::Time(12 * second + second / 4),
            ),
        ] {
            assert_eq!(text.parse(), Ok(From::Each(start)), "{text}");
        }
        assert_eq!("@a/b".parse(), Ok(From::File("a/b".into())));
        for text in [
            "",
            "@",
            "-1",
            "18446744073709551616",
            "newest",
            "unix:",
            "unix:-1",
            "unix:1.",
            "unix:.5",
            "unix:1.0000000001",
            "unix:99999999999999999999",
            "1969-12-31T23:59:59Z",
            "2026-11-30",
            "12s",
        ] {
            let error = text.parse::<From>().unwrap_err();
            assert!(error.contains("use oldest, end"), "{text}");
        }
    }
}
