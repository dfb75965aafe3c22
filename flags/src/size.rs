//! Sizes on command lines: `64MiB`, `10GB`, or a number of bytes.

use std::ops::RangeInclusive;

use bytesize::ByteSize;

/// Largest `SO_RCVBUF` or `SO_SNDBUF` that the kernel accepts: the option is an `int`, which it doubles
/// (`sock_setsockopt` in net/core/sock.c).
pub const MAX_SOCKET_BUFFER: u64 = i32::MAX as u64 / 2;

/// Smallest useful value: the kernel raises smaller ones to about this size (`SOCK_MIN_SNDBUF` in
/// include/net/sock.h), so a program would not get what it requested.
pub const MIN_SOCKET_BUFFER: u64 = 4096;

/// Units in which sizes are shown.
const UNITS: [(&str, u64); 10] = [
    ("EiB", 1 << 60),
    ("PiB", 1 << 50),
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
];

/// A clap parser for sizes in `range`.
pub fn size(
    range: RangeInclusive<u64>,
) -> impl Fn(&str) -> Result<ByteSize, String> + Clone + Send + Sync + 'static {
    move |text| {
        let parsed: Result<ByteSize, _> = text.trim().parse();
        let size = parsed.map_err(|_| {
            "not a size: use kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of \
             1024), such as 64MiB or 10GB; a number alone counts bytes"
                .to_owned()
        })?;
        let bytes = size.as_u64();
        // A size that does not fit into 64 bits parses as the largest that does.
        if range.contains(&bytes) && bytes != u64::MAX {
            return Ok(size);
        }
        Err(format!(
            "not from {} to {}; the nearest is {}",
            size_text(*range.start()),
            size_text(*range.end()),
            size_text(bytes.clamp(*range.start(), *range.end()))
        ))
    }
}

/// An exact size in the form that can be typed: `256MiB`, `10GB`, `1073741823`.
#[must_use]
pub fn size_text(bytes: u64) -> String {
    let unit = UNITS
        .iter()
        .filter(|(_, factor)| bytes > 0 && bytes.is_multiple_of(*factor))
        .max_by_key(|(_, factor)| *factor);
    match unit {
        Some((name, factor)) => format!("{}{name}", bytes / factor),
        None => bytes.to_string(),
    }
}

/// The power of two in `range` that is nearest to `bytes`; both bounds are powers of two.
#[must_use]
pub fn nearest_power_of_two(bytes: u64, range: RangeInclusive<u64>) -> u64 {
    let bytes = bytes.clamp(*range.start(), *range.end());
    let above = bytes.next_power_of_two();
    if above - bytes <= bytes - above / 2 {
        above
    } else {
        above / 2
    }
}

/// The multiple of `step` that is nearest to `bytes`, from `least` to `most` steps.
#[must_use]
pub fn nearest_multiple(bytes: u64, step: u64, least: u64, most: u64) -> u64 {
    let below = bytes / step;
    let count = below + u64::from(bytes % step >= step.div_ceil(2));
    count.clamp(least, most) * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_bare_numbers() {
        let parse = size(1..=1 << 40);
        for (text, bytes) in [
            ("1", 1),
            ("64MiB", 64 << 20),
            ("10GB", 10_000_000_000),
            ("60 KiB", 60 << 10),
            ("1.5KiB", 1536),
            ("100k", 100_000),
        ] {
            assert_eq!(parse(text).unwrap().as_u64(), bytes, "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_told_with_the_units() {
        for text in ["", "x", "5x", "-1", "MiB", "1..5"] {
            let error = size(1..=10)(text).unwrap_err();
            assert!(error.contains("KiB, MiB, GiB"), "{text:?}: {error}");
        }
    }

    #[test]
    fn what_is_out_of_range_is_told_with_the_nearest() {
        let buffer = size(1..=MAX_SOCKET_BUFFER);
        for (text, nearest) in [
            ("0", "is 1"),
            ("4GiB", "is 1073741823"),
            ("16EiB", "is 1073741823"),
        ] {
            let error = buffer(text).unwrap_err();
            assert!(error.ends_with(nearest), "{text}: {error}");
        }
        assert!(size(0..=u64::MAX)("16EiB").is_err());
    }

    #[test]
    fn sizes_are_shown_as_they_can_be_typed() {
        for text in ["1GiB", "256MiB", "10GB", "1500", "0", "12kB", "61KiB"] {
            let bytes = size(0..=1 << 40)(text).unwrap().as_u64();
            assert_eq!(size_text(bytes), text);
        }
    }

    #[test]
    fn the_nearest_valid_value() {
        let power = |bytes| nearest_power_of_two(bytes, 4096..=1 << 30);
        assert_eq!(power(3 << 20), 4 << 20);
        assert_eq!(power(5 << 20), 4 << 20);
        assert_eq!(power(4096), 4096);
        assert_eq!(power(0), 4096);
        assert_eq!(power(u64::MAX), 1 << 30);
        let multiple = |bytes| nearest_multiple(bytes, 16, 2, 100);
        assert_eq!(multiple(17), 32);
        assert_eq!(multiple(39), 32);
        assert_eq!(multiple(40), 48);
        assert_eq!(multiple(u64::MAX), 1600);
    }
}
