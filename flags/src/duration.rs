//! Durations on command lines: `5s`, `250ms`, `1m30s`, or a number without a unit.

use std::ops::RangeInclusive;
use std::time::Duration;

use jiff::fmt::friendly::{SpanParser, SpanPrinter};

/// The unit of a bare number; each flag keeps the unit that it had before units existed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BareUnit {
    /// Seconds.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// Minutes.
    Minutes,
}

impl BareUnit {
    fn name(self) -> &'static str {
        match self {
            Self::Seconds => "seconds",
            Self::Milliseconds => "milliseconds",
            Self::Minutes => "minutes",
        }
    }

    fn seconds(self) -> f64 {
        match self {
            Self::Seconds => 1.0,
            Self::Milliseconds => 1e-3,
            Self::Minutes => 60.0,
        }
    }
}

/// A clap parser for durations in `range`; a bare number counts `bare` units.
pub fn duration(
    bare: BareUnit,
    range: RangeInclusive<Duration>,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| {
        let duration = parse(bare, text.trim()).ok_or_else(|| {
            format!(
                "not a duration: use us, ms, s, m or h, such as 5s, 250ms or 1m30s; a number alone \
                 counts {}",
                bare.name()
            )
        })?;
        if range.contains(&duration) {
            return Ok(duration);
        }
        let nearest = duration.clamp(*range.start(), *range.end());
        Err(format!(
            "not from {} to {}; the nearest is {}",
            duration_text(*range.start()),
            duration_text(*range.end()),
            duration_text(nearest)
        ))
    }
}

fn parse(bare: BareUnit, text: &str) -> Option<Duration> {
    match text.parse::<f64>() {
        // A value too long for a Duration exceeds the maximum of every flag.
        Ok(number) if number >= 0.0 => {
            Some(Duration::try_from_secs_f64(number * bare.seconds()).unwrap_or(Duration::MAX))
        }
        Ok(_) => None,
        Err(_) => SpanParser::new().parse_unsigned_duration(text).ok(),
    }
}

/// A duration in the form that can be typed: `30s`, `5ms`, `1h`.
#[must_use]
pub fn duration_text(duration: Duration) -> String {
    SpanPrinter::new()
        .spacing(jiff::fmt::friendly::Spacing::None)
        .unsigned_duration_to_string(&duration)
        .replace('µ', "u")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_seconds(text: &str) -> Result<Duration, String> {
        duration(
            BareUnit::Seconds,
            Duration::from_millis(1)..=Duration::from_secs(86_400),
        )(text)
    }

    #[test]
    fn units_and_bare_numbers() {
        for (text, millis) in [
            ("5", 5000),
            ("0.5", 500),
            ("5s", 5000),
            ("5 s", 5000),
            ("10ms", 10),
            ("1m30s", 90_000),
            ("1.5m", 90_000),
            ("2h", 7_200_000),
            ("1500us", 1),
            (" 3s ", 3000),
        ] {
            let parsed = parse_seconds(text).unwrap();
            assert_eq!(parsed.as_millis(), millis, "{text}");
        }
        let linger = duration(
            BareUnit::Milliseconds,
            Duration::from_millis(1)..=Duration::from_secs(60),
        );
        assert_eq!(linger("5"), Ok(Duration::from_millis(5)));
        assert_eq!(linger("1s"), Ok(Duration::from_secs(1)));
    }

    #[test]
    fn what_is_no_duration_is_told_with_the_units() {
        for text in ["", "x", "5x", "-1", "-1s", "nan", "1s ago", "5 5"] {
            let error = parse_seconds(text).unwrap_err();
            assert!(error.contains("such as 5s, 250ms"), "{text:?}: {error}");
        }
    }

    #[test]
    fn what_is_out_of_range_is_told_with_the_nearest() {
        for (text, nearest) in [
            ("0", "the nearest is 1ms"),
            ("1us", "the nearest is 1ms"),
            ("49h", "the nearest is 24h"),
            ("inf", "the nearest is 24h"),
            ("1e300", "the nearest is 24h"),
        ] {
            let error = parse_seconds(text).unwrap_err();
            assert!(error.contains(nearest), "{text}: {error}");
            assert!(error.contains("from 1ms to 24h"), "{error}");
        }
    }
}
