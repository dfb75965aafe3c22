//! Pictures of measured figures as SVG: bars of medians with the range of their runs, and for pages
//! curves over time and shares of a whole.

mod lines;
mod palette;
mod shares;

use anyhow::{Result, anyhow};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::measure::stats::Spread;
use palette::text;

pub use lines::{Curve, Lines};
pub use palette::{GRID, INK, WAITING, colour};
pub use shares::{Bar, svg as shares};

const WIDTH: u32 = 900;
const TITLE: u32 = 30;
/// Height of a row of panels.
const ROW: u32 = 330;
/// Width of a panel alone.
const ALONE: u32 = 560;
/// Panels side by side.
const COLUMNS: usize = 2;
/// Height of a line of a label.
const LINE: i32 = 15;
/// One colour for each series; distinguishable without seeing red or green.
const COLOURS: [RGBColor; 2] = [RGBColor(0, 90, 156), RGBColor(221, 132, 36)];
/// Background of a standalone picture, distinct from pure white.
const PAPER: RGBColor = RGBColor(254, 254, 254);
/// Part of a group's width that its bars take.
const FILLED: f64 = 0.7;

/// Figures that share a scale.
pub struct Panel<'a> {
    pub title: String,
    pub unit: &'a str,
    /// Each step up the axis is ten times as much: for figures that differ by orders of magnitude.
    pub logarithmic: bool,
    /// Label, of a line or several, and one figure for each series.
    pub groups: Vec<(String, Vec<&'a Spread>)>,
}

/// The vertical axis of a panel: from figures to places.
struct Axis {
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Axis {
    /// Holds all figures of the panel, and what stands above them.
    fn of(panel: &Panel<'_>, room_above: f64) -> Self {
        let figures = || panel.groups.iter().flat_map(|(_, figures)| figures);
        let most = figures().map(|spread| spread.max).fold(0.0, f64::max);
        if !panel.logarithmic {
            let to = (most * (1.0 + room_above)).max(f64::MIN_POSITIVE);
            let (from, logarithmic) = (0.0, false);
            return Self {
                from,
                to,
                logarithmic,
            };
        }
        let least = figures().map(|spread| spread.min).fold(most, f64::min);
        let from = least.max(f64::MIN_POSITIVE).log10().floor();
        let to = most.max(f64::MIN_POSITIVE).log10();
        Self {
            from,
            to: to + (to - from).max(1.0) * room_above,
            logarithmic: true,
        }
    }

    fn at(&self, figure: f64) -> f64 {
        if self.logarithmic {
            figure.max(f64::MIN_POSITIVE).log10().max(self.from)
        } else {
            figure
        }
    }

    /// Approximate number of labels; a logarithmic axis has one for each power of ten.
    fn labels(&self) -> usize {
        if self.logarithmic {
            (self.to - self.from).ceil() as usize + 1
        } else {
            6
        }
    }

    fn label(&self, at: f64) -> String {
        if self.logarithmic {
            format!("{:.0}", 10f64.powf(at))
        } else {
            at.to_string()
        }
    }
}

/// A picture.
pub struct Chart<'a> {
    pub title: &'a str,
    /// What is compared: as many as each group has figures, at most two.
    pub series: &'a [&'a str],
    pub panels: Vec<Panel<'a>>,
}

/// A panel as part of a page, which supplies title and background.
pub struct Figure {
    pub title: String,
    pub legend: Vec<(String, RGBColor)>,
    pub svg: String,
}

/// What a panel shows besides its bars.
#[derive(Clone, Copy, PartialEq, Eq)]
enum With {
    /// Nothing: the page around it says everything.
    Nothing,
    Title,
    TitleAndLegend,
}

/// A standalone picture follows the browser's colour scheme.
const THEME: &str = "<style>svg{max-width:100%;height:auto}\
    @media (prefers-color-scheme:dark){\
    [fill=\"#FEFEFE\"]{fill:#14181d}[fill=\"#282828\"]{fill:#e6eaef}\
    [stroke=\"#282828\"]{stroke:#e6eaef}[stroke=\"#C8C8C8\"]{stroke:#3a424b}}</style>";

impl Chart<'_> {
    /// The picture with all panels and a background of its own.
    pub fn svg(&self) -> Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg)
            .map_err(|text| anyhow!("cannot draw {:?}: {text}", self.title))?;
        let body = svg.find('>').map_or(0, |end| end + 1);
        svg.insert_str(body, THEME);
        Ok(svg)
    }

    /// One picture per panel, without a background.
    pub fn figures(&self) -> Result<Vec<Figure>> {
        let series = self.series.iter().zip(COLOURS);
        let legend: Vec<_> = series
            .map(|(name, colour)| ((*name).to_owned(), colour))
            .collect();
        let figure = |panel: &Panel<'_>| {
            let mut svg = String::new();
            self.draw_alone(panel, &mut svg)
                .map_err(|text| anyhow!("cannot draw {:?}: {text}", panel.title))?;
            Ok(Figure {
                title: panel.title.clone(),
                legend: legend.clone(),
                svg,
            })
        };
        self.panels.iter().map(figure).collect()
    }

    fn draw_alone(&self, panel: &Panel<'_>, svg: &mut String) -> Result<(), String> {
        let root = SVGBackend::with_string(svg, (ALONE, ROW)).into_drawing_area();
        self.draw_panel(panel, &root, With::Nothing)?;
        root.present().map_err(text)
    }

    fn draw(&self, svg: &mut String) -> Result<(), String> {
        let columns = self.panels.len().clamp(1, COLUMNS);
        let rows = self.panels.len().div_ceil(columns).max(1);
        let height = TITLE + ROW * rows as u32;
        let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
        root.fill(&PAPER).map_err(text)?;
        let root = root
            .titled(self.title, ("sans-serif", 18).into_font().color(&INK))
            .map_err(text)?;
        let areas = root.split_evenly((rows, columns));
        for (number, (panel, area)) in self.panels.iter().zip(&areas).enumerate() {
            let with = match number {
                0 => With::TitleAndLegend,
                _ => With::Title,
            };
            self.draw_panel(panel, area, with)?;
        }
        root.present().map_err(text)
    }

    fn draw_panel<DB: DrawingBackend>(
        &self,
        panel: &Panel<'_>,
        area: &DrawingArea<DB, plotters::coord::Shift>,
        with: With,
    ) -> Result<(), String> {
        let legend = with == With::TitleAndLegend;
        let axis = Axis::of(panel, if legend { 0.3 } else { 0.15 });
        let count = panel.groups.len();
        let labels = panel.groups.iter().map(|(label, _)| label.lines().count());
        let below = 16 + LINE * labels.max().unwrap_or(1) as i32;
        let mut builder = ChartBuilder::on(area);
        if with != With::Nothing {
            builder.caption(&panel.title, ("sans-serif", 15, &INK));
        }
        let mut chart = builder
            .margin(8)
            .x_label_area_size(below)
            .y_label_area_size(58)
            .build_cartesian_2d(0.0..count as f64, axis.from..axis.to)
            .map_err(text)?;
        draw_mesh(&mut chart, panel.unit, &axis)?;
        for (series, name) in self.series.iter().enumerate() {
            let bars = panel.groups.iter().enumerate();
            let bars =
                bars.filter_map(|(group, (_, figures))| Some((group, *figures.get(series)?)));
            let drawn = chart
                .draw_series(bars.clone().map(|(group, spread)| {
                    let (left, right) = self.edges(group, series);
                    let colour = COLOURS[series % COLOURS.len()];
                    let top = axis.at(spread.median);
                    Rectangle::new([(left, axis.from), (right, top)], colour.filled())
                }))
                .map_err(text)?;
            if legend {
                let colour = COLOURS[series % COLOURS.len()];
                drawn.label(*name).legend(move |(x, y)| {
                    Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled())
                });
            }
            chart
                .draw_series(bars.clone().flat_map(|(group, spread)| {
                    let (left, right) = self.edges(group, series);
                    whisker(left, right, &axis, spread)
                }))
                .map_err(text)?;
            // Above the bar and its range, because a short bar has no room.
            let style = ("sans-serif", 11, &INK)
                .into_text_style(area)
                .pos(Pos::new(HPos::Center, VPos::Bottom));
            chart
                .draw_series(bars.map(|(group, spread)| {
                    let (left, right) = self.edges(group, series);
                    let top = axis.at(spread.max.max(spread.median));
                    EmptyElement::at((f64::midpoint(left, right), top))
                        + Text::new(figure(spread.median), (0, -3), style.clone())
                }))
                .map_err(text)?;
        }
        draw_labels(&chart, area, panel, axis.from)?;
        if legend {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperLeft)
                .label_font(("sans-serif", 12, &INK))
                .background_style(PAPER)
                .draw()
                .map_err(text)?;
        }
        Ok(())
    }

    /// Left and right edge of a bar.
    fn edges(&self, group: usize, series: usize) -> (f64, f64) {
        let width = FILLED / self.series.len() as f64;
        let left = group as f64 + (1.0 - FILLED) / 2.0 + series as f64 * width;
        (left + 0.01, left + width - 0.01)
    }
}

/// The coordinates of a panel.
type Plot<'a, DB> = ChartContext<'a, DB, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Draws the vertical axis and its lines.
fn draw_mesh<DB: DrawingBackend>(
    chart: &mut Plot<'_, DB>,
    unit: &str,
    axis: &Axis,
) -> Result<(), String> {
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(("sans-serif", 12, &INK))
        .y_desc(unit)
        .y_labels(axis.labels())
        .y_label_formatter(&|at| axis.label(*at))
        .draw()
        .map_err(text)
}

/// Draws the labels of the groups below the axis.
fn draw_labels<DB: DrawingBackend>(
    chart: &Plot<'_, DB>,
    area: &DrawingArea<DB, plotters::coord::Shift>,
    panel: &Panel<'_>,
    bottom: f64,
) -> Result<(), String> {
    let below = ("sans-serif", 13, &INK)
        .into_text_style(area)
        .pos(Pos::new(HPos::Center, VPos::Top));
    for (group, (label, _)) in panel.groups.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(group as f64 + 0.5, bottom));
        let (left, up) = area.get_base_pixel();
        for (line, y) in label.lines().zip((y - up + 8..).step_by(LINE as usize)) {
            area.draw(&Text::new(line, (x - left, y), below.clone()))
                .map_err(text)?;
        }
    }
    Ok(())
}

/// The range of a bar's runs.
fn whisker(left: f64, right: f64, axis: &Axis, spread: &Spread) -> Vec<PathElement<(f64, f64)>> {
    let middle = f64::midpoint(left, right);
    let reach = (right - left) / 8.0;
    let (min, max) = (axis.at(spread.min), axis.at(spread.max));
    let line = |from, to| PathElement::new(vec![from, to], INK.stroke_width(1));
    let tick = |y| line((middle - reach, y), (middle + reach, y));
    vec![line((middle, min), (middle, max)), tick(min), tick(max)]
}

/// Three significant digits, or all before the point.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::palette::short;
    use super::*;

    #[test]
    fn every_figure_and_label_is_in_the_picture() {
        let (a, b) = (
            Spread::of(vec![120.0, 100.0, 140.0]),
            Spread::of(vec![7.25]),
        );
        let chart = Chart {
            title: "a title",
            series: &["ours", "theirs"],
            panels: vec![Panel {
                title: "a panel".to_owned(),
                unit: "MB/s",
                logarithmic: false,
                groups: vec![
                    ("first\nand more".to_owned(), vec![&a, &b]),
                    ("second".to_owned(), vec![&b]),
                ],
            }],
        };
        let svg = chart.svg().unwrap();
        for wanted in [
            "a title", "a panel", "MB/s", "ours", "theirs", "first", "and more", "second", "120",
            "7.25",
        ] {
            assert!(svg.contains(wanted), "{wanted} is missing");
        }
        assert!(
            svg.contains("viewBox") && svg.contains("prefers-color-scheme"),
            "{svg}"
        );
        let figures = chart.figures().unwrap();
        assert_eq!(figures[0].title, "a panel");
        assert_eq!(figures[0].legend.len(), 2);
        // The page around it has a ground, a title and a legend.
        let svg = &figures[0].svg;
        for unwanted in ["#FEFEFE", "#FFFFFF", "<style", "a panel", "theirs"] {
            assert!(!svg.contains(unwanted), "{unwanted}: {svg}");
        }
    }

    #[test]
    fn curves_and_shares_are_drawn_and_names_cannot_be_markup() {
        let curves = vec![Curve {
            name: "not drawn: the page has the legend".to_owned(),
            points: vec![(0.2, 10.0), (0.4, 30.0)],
        }];
        let unit = "<b>MB/s</b>";
        let svg = Lines { unit, curves }.svg().unwrap();
        assert!(svg.contains("polyline") && svg.contains("seconds"), "{svg}");
        assert!(!svg.contains("<b>") && svg.contains("&lt;b&gt;"), "{svg}");
        let bar = Bar {
            name: "<script>".to_owned(),
            parts: vec![(60.0, colour(0)), (3.0, WAITING)],
        };
        let svg = shares(&[bar]).unwrap();
        assert!(svg.contains("60 %") && !svg.contains("3 %"), "{svg}");
        assert!(!svg.contains("<script>"), "{svg}");
    }

    #[test]
    fn nothing_to_draw_is_no_failure() {
        let lines = Lines {
            unit: "",
            curves: Vec::new(),
        };
        assert!(lines.svg().unwrap().contains("</svg>"));
        assert!(shares(&[]).unwrap().contains("</svg>"));
        let chart = Chart {
            title: "",
            series: &[],
            panels: vec![],
        };
        assert!(chart.svg().unwrap().contains("</svg>"));
    }

    #[test]
    fn figures_on_axes_are_short() {
        assert_eq!(
            [0.0, 0.5, 1200.0, 2.125].map(short),
            ["0", "0.5", "1200", "2.125"]
        );
    }

    #[test]
    fn a_logarithmic_axis_begins_at_a_power_of_ten_below_all_figures() {
        let (a, b) = (Spread::of(vec![45.0, 60.0]), Spread::of(vec![20_000.0]));
        let panel = Panel {
            title: String::new(),
            unit: "µs",
            logarithmic: true,
            groups: vec![(String::new(), vec![&a, &b])],
        };
        let axis = Axis::of(&panel, 0.1);
        assert_eq!(axis.from, 1.0);
        assert!(axis.at(20_000.0) < axis.to);
        assert_eq!((axis.at(100.0), axis.label(2.0)), (2.0, "100".to_owned()));
        // Nothing is below the axis, not even nothing.
        assert_eq!(axis.at(0.0), axis.from);
    }
}
