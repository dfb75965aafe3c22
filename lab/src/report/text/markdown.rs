//! Parts of Markdown that all reports share.

use crate::measure::environment::Environment;
use crate::measure::stats::Spread;

pub fn spread(spread: &Spread) -> String {
    format!(
        "{:.0} ({:.0}..{:.0})",
        spread.median, spread.min, spread.max
    )
}

pub fn environment(e: &Environment) -> String {
    let rows = [
        ("date", &e.date),
        ("penstock", &e.version),
        ("kernel", &e.kernel),
        ("CPU", &format!("{} × {}", e.cpus, e.cpu_model)),
        ("net.core.rmem_max", &e.rmem_max),
        ("net.core.wmem_max", &e.wmem_max),
        ("net.ipv4.tcp_rmem", &e.tcp_rmem),
        ("net.ipv4.tcp_wmem", &e.tcp_wmem),
        ("congestion control", &e.congestion_control),
    ]
    .map(|(what, value)| [what.to_owned(), value.clone()]);
    format!("## Environment\n\n{}", table(["what", "value"], &rows))
}

pub fn reproduce(environment: &Environment) -> String {
    format!(
        "## How to reproduce\n\n```sh\n{}\n```",
        environment.command_line
    )
}

/// A Markdown table whose columns also line up as plain text.
pub fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    // Characters that would end a cell or a row are escaped.
    let cell = |text: &String| text.replace('|', r"\|").replace(['\n', '\r'], " ");
    let rows: Vec<[String; N]> = rows.iter().map(|row| row.each_ref().map(cell)).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells
            .chain([head[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded = cells
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!(" {cell:width$} |"));
        format!("|{}", padded.collect::<String>())
    };
    let rule = widths
        .map(|width| format!("{:-<1$}|", "", width + 2))
        .concat();
    let mut lines = vec![line(head), format!("|{rule}")];
    lines.extend(
        rows.iter()
            .map(|row| line(std::array::from_fn(|i| row[i].as_str()))),
    );
    lines.join("\n")
}
