//! Time, which is an argument here: no state machine reads a clock.
//!
//! Both types are a `u64` of nanoseconds, and every operation saturates: a clock that goes backwards
//! makes a span of zero, and a deadline beyond the end of time is never reached.

use std::fmt;
use std::ops::{Add, AddAssign, Div, Mul, Rem, Sub, SubAssign};
use std::time::Duration;

/// A moment: nanoseconds since any fixed one, which the caller chooses.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Timestamp(u64);

/// A span of time, nanoseconds.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Nanos(u64);

impl Timestamp {
    /// The fixed moment.
    pub const ZERO: Self = Self(0);
    /// Never.
    pub const MAX: Self = Self(u64::MAX);

    /// The moment this many nanoseconds after [`Self::ZERO`].
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since [`Self::ZERO`].
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }
}

impl Nanos {
    /// No time.
    pub const ZERO: Self = Self(0);
    /// Forever.
    pub const MAX: Self = Self(u64::MAX);
    /// The shortest span.
    pub const ONE: Self = Self(1);

    /// A span of nanoseconds.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// A span of microseconds.
    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros.saturating_mul(1_000))
    }

    /// A span of milliseconds.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// A span of seconds.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Self {
        Self(seconds.saturating_mul(1_000_000_000))
    }

    /// Nanoseconds.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Whole microseconds.
    #[must_use]
    pub const fn as_micros(self) -> u64 {
        self.0 / 1_000
    }

    /// Whole seconds.
    #[must_use]
    pub const fn as_secs(self) -> u64 {
        self.0 / 1_000_000_000
    }

    /// Seconds.
    #[must_use]
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 * 1e-9
    }

    /// The difference, whichever is longer.
    #[must_use]
    pub const fn abs_diff(self, other: Self) -> Self {
        Self(self.0.abs_diff(other.0))
    }
}

impl Add<Nanos> for Timestamp {
    type Output = Self;

    #[inline]
    fn add(self, span: Nanos) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl AddAssign<Nanos> for Timestamp {
    #[inline]
    fn add_assign(&mut self, span: Nanos) {
        *self = *self + span;
    }
}

impl Sub<Nanos> for Timestamp {
    type Output = Self;

    #[inline]
    fn sub(self, span: Nanos) -> Self {
        Self(self.0.saturating_sub(span.0))
    }
}

impl Sub for Timestamp {
    type Output = Nanos;

    #[inline]
    fn sub(self, earlier: Self) -> Nanos {
        Nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add for Nanos {
    type Output = Self;

    #[inline]
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Nanos {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Nanos {
    type Output = Self;

    #[inline]
    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl SubAssign for Nanos {
    #[inline]
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

impl Mul<u64> for Nanos {
    type Output = Self;

    #[inline]
    fn mul(self, times: u64) -> Self {
        Self(self.0.saturating_mul(times))
    }
}

impl Mul<Nanos> for u64 {
    type Output = Nanos;

    #[inline]
    fn mul(self, span: Nanos) -> Nanos {
        span * self
    }
}

impl Div<u64> for Nanos {
    type Output = Self;

    #[inline]
    fn div(self, parts: u64) -> Self {
        Self(self.0 / parts)
    }
}

impl Div for Nanos {
    type Output = u64;

    #[inline]
    fn div(self, other: Self) -> u64 {
        self.0 / other.0
    }
}

impl Rem for Nanos {
    type Output = Self;

    #[inline]
    fn rem(self, other: Self) -> Self {
        Self(self.0 % other.0)
    }
}

impl From<Duration> for Nanos {
    #[inline]
    fn from(span: Duration) -> Self {
        Self(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl From<Nanos> for Duration {
    #[inline]
    fn from(span: Nanos) -> Self {
        Self::from_nanos(span.0)
    }
}

/// Time since [`Timestamp::ZERO`].
impl From<Duration> for Timestamp {
    #[inline]
    fn from(since_zero: Duration) -> Self {
        Self(Nanos::from(since_zero).0)
    }
}

/// Time since [`Timestamp::ZERO`].
impl From<Timestamp> for Duration {
    #[inline]
    fn from(at: Timestamp) -> Self {
        Self::from_nanos(at.0)
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", Duration::from(*self))
    }
}

impl fmt::Debug for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", Duration::from(*self))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = Nanos::from_millis(1);

    #[test]
    fn arithmetic_saturates() {
        let (early, late) = (Timestamp::ZERO + MS, Timestamp::ZERO + 3 * MS);
        assert_eq!(late - early, 2 * MS);
        assert_eq!(early - late, Nanos::ZERO);
        assert_eq!(early - 2 * MS, Timestamp::ZERO);
        assert_eq!(Timestamp::MAX + MS, Timestamp::MAX);
        assert_eq!(Nanos::MAX + MS, Nanos::MAX);
        assert_eq!(Nanos::MAX * 2, Nanos::MAX);
        assert_eq!(MS - 2 * MS, Nanos::ZERO);
        assert_eq!(Nanos::from_secs(u64::MAX), Nanos::MAX);
        assert_eq!(Nanos::from(Duration::MAX), Nanos::MAX);
    }

    #[test]
    fn conversions_and_display_agree_with_duration() {
        let span = Duration::from_micros(1_500);
        assert_eq!(Duration::from(Nanos::from(span)), span);
        assert_eq!(Duration::from(Timestamp::from(span)), span);
        assert_eq!(Nanos::from(span).to_string(), "1.5ms");
        assert_eq!((7 * MS / (2 * MS), 7 * MS % (2 * MS)), (3, MS));
        assert_eq!(Nanos::from_secs(2).as_secs_f64(), 2.0);
    }
}
