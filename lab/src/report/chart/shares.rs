//! Shares of a whole as bars of parts, one bar below the other, as SVG without a background.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::palette::{INK, text};

const WIDTH: i32 = 560;
/// Height of a bar with its name, and of the bar alone.
const ROW: i32 = 46;
const BAR: i32 = 22;
/// Below this share there is no room for a figure.
const LABELLED: f64 = 9.0;

/// One bar.
pub struct Bar {
    pub name: String,
    /// Percent of the whole, and the colour, of each part.
    pub parts: Vec<(f64, RGBColor)>,
}

/// Bars that share a scale.
pub fn svg(bars: &[Bar]) -> Result<String, String> {
    let mut svg = String::new();
    let height = ROW * bars.len().max(1) as i32;
    let root = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32));
    let root = root.into_drawing_area();
    // More than one thread may spend more than the whole of the time.
    let wholes = bars
        .iter()
        .map(|bar| bar.parts.iter().map(|part| part.0).sum::<f64>());
    let whole = wholes.fold(100.0, f64::max);
    for (row, bar) in (0..).step_by(ROW as usize).zip(bars) {
        draw(&root, bar, row, whole)?;
    }
    root.present().map_err(text)?;
    drop(root);
    Ok(svg)
}

fn draw<DB: DrawingBackend>(
    root: &DrawingArea<DB, plotters::coord::Shift>,
    bar: &Bar,
    row: i32,
    whole: f64,
) -> Result<(), String> {
    let name = ("sans-serif", 14).into_text_style(root).color(&INK);
    root.draw(&Text::new(bar.name.clone(), (0, row + 1), name))
        .map_err(text)?;
    let place = |share: f64| (share / whole * f64::from(WIDTH - 1)) as i32;
    let (top, bottom) = (row + ROW - BAR - 4, row + ROW - 4);
    let mut from = 0.0;
    for (share, colour) in &bar.parts {
        let corners = [(place(from), top), (place(from + share), bottom)];
        root.draw(&Rectangle::new(corners, colour.filled()))
            .map_err(text)?;
        if *share >= LABELLED {
            let style = ("sans-serif", 13, &WHITE)
                .into_text_style(root)
                .pos(Pos::new(HPos::Center, VPos::Center));
            let at = (place(from + share / 2.0), i32::midpoint(top, bottom));
            root.draw(&Text::new(format!("{share:.0} %"), at, style))
                .map_err(text)?;
        }
        from += share;
    }
    let frame = [(0, top), (WIDTH - 1, bottom)];
    root.draw(&Rectangle::new(frame, super::palette::GRID))
        .map_err(text)
}
