//! The frame of a page, its tables and its pictures.

use anyhow::{Result, anyhow};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use plotters::style::RGBColor;

use crate::report::chart;

const STYLE: &str = include_str!("style.css");

/// A whole page.
pub fn page(title: &str, body: &Markup) -> String {
    // A browser would ask for an icon, and may run what it finds: both are refused.
    let policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content=(policy);
                link rel="icon" href="data:,";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body { main { (body) } }
        }
    }
    .into_string()
}

/// A picture with its title, what its colours mean, and a text for people who do not see it.
pub fn figure(
    title: &str,
    note: &str,
    legend: &[(String, RGBColor)],
    svg: Result<String, String>,
) -> Result<Markup> {
    let svg = svg.map_err(|error| anyhow!("cannot draw {title}: {error}"))?;
    Ok(framed(title, note, legend, &svg))
}

pub fn drawn(picture: &chart::Figure) -> Markup {
    framed(&picture.title, "", &picture.legend, &picture.svg)
}

fn framed(title: &str, note: &str, legend: &[(String, RGBColor)], svg: &str) -> Markup {
    html! {
        figure {
            figcaption {
                strong { (title) }
                @if !note.is_empty() { " " span.note { (note) } }
            }
            div.legend {
                @for (name, colour) in legend {
                    span {
                        i style=(format!("background:rgb({},{},{})", colour.0, colour.1, colour.2)) {}
                        (name)
                    }
                }
            }
            div role="img" aria-label=(title) { (PreEscaped(svg)) }
        }
    }
}

/// A table; cells are text.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> Markup {
    html! {
        div.scroll {
            table {
                thead { tr { @for cell in head { th { (cell) } } } }
                tbody {
                    @for row in rows {
                        tr { @for cell in row { td { (cell) } } }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_style_gives_the_pictures_ink_a_colour_of_its_own() {
        for colour in [crate::report::chart::INK, crate::report::chart::GRID] {
            let hex = format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2);
            assert!(STYLE.contains(&hex), "{hex}");
        }
    }
}
