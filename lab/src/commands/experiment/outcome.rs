//! Writes and prints the figures of an experiment.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use tracing::info;

use crate::report::result_folder;
use crate::settings::{Format, Output};

/// Keeps and prints what was measured, then where it is. Errors aside it is always a success: the figures
/// are for the reader to judge.
pub fn finish<R: Serialize>(
    output: &Output,
    folder: &Path,
    measured: Result<R>,
    markdown: fn(&R) -> String,
    summary: fn(&R) -> String,
) -> Result<bool> {
    let printed = measured.and_then(|report| {
        result_folder::write(folder, &report, &markdown(&report))?;
        result_folder::print(output.format, &report, || summary(&report))?;
        Ok(true)
    });
    match output.format {
        Format::Text => result_folder::print_path(folder, printed),
        // Stdout is JSON and nothing else.
        Format::Json => {
            info!("results are in {}", folder.display());
            printed
        }
    }
}
