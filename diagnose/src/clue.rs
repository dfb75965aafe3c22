//! What a line of the decision table consists of.

use super::facts::Figure;

/// One line of the table.
#[derive(Debug)]
pub struct Cause {
    /// Stable name.
    pub id: &'static str,
    pub title: &'static str,
    /// Ways to see it, the surest first: the first of which every clue holds makes it possible.
    pub requires: &'static [&'static [Clue]],
    /// Stands in for `requires` when no way could be seen as a whole.
    pub unseen: &'static [Clue],
    pub supports: &'static [Clue],
    pub contradicts: &'static [Clue],
    /// One command; `PID`, `PORT`, `IFACE` and `PEER` (a process at the other end) are filled in.
    pub next: &'static str,
}

/// A figure on one side of a threshold.
#[derive(Debug)]
pub struct Clue {
    pub figure: Figure,
    pub is: Is,
    /// What it is worth, 0 to 1.
    pub weight: f64,
    /// Why the threshold is there.
    pub why: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Is {
    AtLeast(f64),
    Below(f64),
}

impl Is {
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(threshold) => value >= threshold,
            Self::Below(threshold) => value < threshold,
        }
    }
}

/// A clue that holds from the threshold up.
pub const fn at_least(figure: Figure, threshold: f64, weight: f64, why: &'static str) -> Clue {
    Clue {
        figure,
        is: Is::AtLeast(threshold),
        weight,
        why,
    }
}

/// A clue that holds below the threshold.
pub const fn below(figure: Figure, threshold: f64, weight: f64, why: &'static str) -> Clue {
    Clue {
        figure,
        is: Is::Below(threshold),
        weight,
        why,
    }
}
