//! Colours and labels of all pictures.

use std::fmt::Display;

use plotters::style::RGBColor;

/// Colours of curves and of parts of a bar: visible on light and dark ground, and distinguishable by
/// people who do not see red or green.
const LINES: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 145, 110),
    RGBColor(190, 100, 150),
    RGBColor(168, 124, 0),
    RGBColor(60, 150, 210),
    RGBColor(125, 100, 200),
    RGBColor(120, 120, 120),
];
/// For what is no work.
pub const WAITING: RGBColor = LINES[7];
/// A page gives what has these two colours its own.
pub const INK: RGBColor = RGBColor(40, 40, 40);
pub const GRID: RGBColor = RGBColor(200, 200, 200);
/// The colour of the curve or part of this number.
pub fn colour(number: usize) -> RGBColor {
    LINES[number % LINES.len()]
}

/// A figure on an axis: no more digits than it needs.
pub fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The error of a drawing, as a text.
pub fn text(error: impl Display) -> String {
    error.to_string()
}
