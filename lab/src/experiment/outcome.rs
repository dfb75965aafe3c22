//! What becomes of an experiment's figures.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use tracing::info;

use crate::results;
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
        results::write(folder, &report, &markdown(&report))?;
        results::print(output.format, &report, || summary(&report))?;
        Ok(true)
    });
    match output.format {
        Format::Text => results::told(folder, printed),
        // Stdout is JSON and nothing else.
        Format::Json => {
            info!("results are in {}", folder.display());
            printed
        }
    }
}
