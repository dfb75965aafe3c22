//! The progress bar of a run, from what the brokers' logs already hold: so it shows what is
//! committed, and the publisher's own log stays free of a bar.

use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use penstock_log::{Reader, Start};
use penstock_process::progress;

/// Often enough for the eye, too rare to cost anything.
const REFRESH: Duration = Duration::from_millis(200);

/// Committed payload of all brokers; draws on a terminal only.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    logs: Vec<Reader>,
    shown: Instant,
}

impl Progress {
    /// A bar over the logs at `paths`; of unknown length when `expected_bytes` is not known.
    pub fn over(paths: &[&Path], expected_bytes: Option<u64>) -> Self {
        let (length, template) = match expected_bytes {
            Some(bytes) => (
                bytes,
                "{bar:40} {decimal_bytes} of {decimal_total_bytes} {decimal_bytes_per_sec}, {eta} left",
            ),
            None => (
                0,
                "{spinner} {decimal_bytes} {decimal_bytes_per_sec}, {elapsed}",
            ),
        };
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        let bar = ProgressBar::with_draw_target(Some(length), progress::target());
        // A log that cannot be read yet only means a bar that shows less; the run decides.
        let open = |path: &&Path| Reader::open(path, Start::End).ok();
        Self::with(
            bar.with_style(style),
            paths.iter().filter_map(open).collect(),
        )
    }

    fn with(bar: ProgressBar, logs: Vec<Reader>) -> Self {
        Self {
            bar,
            logs,
            shown: Instant::now(),
        }
    }

    /// Shows how far the logs are, from time to time; cheap to call often.
    pub fn update(&mut self) {
        if self.bar.is_hidden() || self.shown.elapsed() < REFRESH {
            return;
        }
        self.shown = Instant::now();
        self.bar
            .set_position(self.logs.iter().map(|log| log.info().payload_bytes).sum());
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
