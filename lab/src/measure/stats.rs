//! Median and range of repeated runs.

use serde::{Deserialize, Serialize};

/// Figures of one case over its runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub runs: Vec<f64>,
}

impl Spread {
    /// The spread of `runs`, in the order in which they ran; there must be one at least.
    pub fn of(runs: Vec<f64>) -> Self {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Self {
            median,
            min: sorted[0],
            max: sorted[sorted.len() - 1],
            runs,
        }
    }

    /// The distance between the runs, as a share of their median; 0 for one run.
    pub fn width(&self) -> f64 {
        match self.median.abs() {
            0.0 => 0.0,
            median => (self.max - self.min) / median,
        }
    }

    /// Bounds between which the median of all possible runs lies with a confidence of 95 %, from the order
    /// of these alone (sign test); none for fewer than six.
    pub fn confidence(&self) -> Option<(f64, f64)> {
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        // Of tosses of a coin: heads so seldom that both tails together are a twentieth.
        let mut chance = 0.5_f64.powi(i32::try_from(count).ok()?);
        let (mut tail, mut outside) = (chance, 0);
        while tail <= 0.025 {
            outside += 1;
            chance *= (count - outside + 1) as f64 / outside as f64;
            tail += chance;
        }
        let first = outside.checked_sub(1)?;
        Some((sorted[first], sorted[count - 1 - first]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_odd_and_even_counts() {
        let odd = Spread::of(vec![3.0, 1.0, 2.0]);
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert_eq!(odd.runs, [3.0, 1.0, 2.0]);
        assert_eq!(Spread::of(vec![4.0, 1.0]).median, 2.5);
        assert_eq!(Spread::of(vec![7.0]).median, 7.0);
    }

    /// Ranks as in tables of the sign test.
    #[test]
    fn the_confidence_interval_of_a_median() {
        let of = |count: u32| Spread::of((1..=count).map(f64::from).collect()).confidence();
        assert_eq!(of(5), None);
        assert_eq!(of(6), Some((1.0, 6.0)));
        assert_eq!(of(10), Some((2.0, 9.0)));
        assert_eq!(of(20), Some((6.0, 15.0)));
        assert_eq!(of(50), Some((18.0, 33.0)));
    }
}
