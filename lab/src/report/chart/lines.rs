//! Curves over time, as SVG without a background: the page around it has one, light or dark.

use plotters::prelude::*;

use super::palette::{INK, colour, text};

const WIDTH: u32 = 560;
const HEIGHT: u32 = 280;
/// Room above the highest point.
const ABOVE: f64 = 1.08;

/// Curves that share a scale.
pub struct Lines<'a> {
    /// What the vertical axis counts.
    pub unit: &'a str,
    pub curves: Vec<Curve>,
}

/// Points in the order of time: seconds and figure.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

impl Lines<'_> {
    /// The picture.
    pub fn svg(&self) -> Result<String, String> {
        let mut svg = String::new();
        let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        self.draw(&root)?;
        root.present().map_err(text)?;
        drop(root);
        Ok(svg)
    }

    fn draw<DB: DrawingBackend>(
        &self,
        root: &DrawingArea<DB, plotters::coord::Shift>,
    ) -> Result<(), String> {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(0.0, f64::max);
        let (right, top) = (most(|p| p.0).max(0.1), most(|p| p.1).max(1e-3) * ABOVE);
        let mut chart = ChartBuilder::on(root)
            .margin(6)
            .margin_right(14)
            .x_label_area_size(34)
            .y_label_area_size(62)
            .build_cartesian_2d(0.0..right, 0.0..top)
            .map_err(text)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(super::palette::GRID)
            .axis_style(super::palette::GRID)
            .label_style(("sans-serif", 14, &INK))
            .x_desc("seconds")
            .y_desc(self.unit)
            .x_labels(8)
            .y_labels(6)
            .x_label_formatter(&|at| super::palette::short(*at))
            .y_label_formatter(&|at| super::palette::short(*at))
            .draw()
            .map_err(text)?;
        for (number, curve) in self.curves.iter().enumerate() {
            let line = PathElement::new(curve.points.clone(), colour(number).stroke_width(2));
            chart.draw_series([line]).map_err(text)?;
        }
        Ok(())
    }
}
