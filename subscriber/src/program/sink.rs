//! Where batches go: selected, counted, checked and printed.

use std::process::ExitCode;

use anyhow::Result;
use penstock_process::exit;
use tracing::warn;

use super::cli::Cli;
use super::output::Printer;
use crate::{Batch, Received, Tally, Trouble};

/// Exit code when batches were overwritten before they were read.
const LOST: u8 = 3;
/// Damaged batches that are logged one by one; others are only counted.
const TOLD: u64 = 10;

/// Where batches go; apart from the subscriber, which lends them.
pub struct Sink<'a> {
    cli: &'a Cli,
    pub tally: Tally,
    pub printer: Printer,
    /// Messages shown, or counted where none are shown.
    taken: u64,
    troubles: u64,
    has_gaps: bool,
}

impl<'a> Sink<'a> {
    pub fn new(cli: &'a Cli) -> Self {
        Self {
            cli,
            tally: Tally::new(cli.stat),
            printer: Printer::new(cli.output()),
            taken: 0,
            troubles: 0,
            has_gaps: false,
        }
    }

    /// Whether as many messages were taken as are wanted.
    pub fn is_full(&self) -> bool {
        self.cli.count.is_some_and(|count| self.taken >= count)
    }

    /// Takes a batch of a log that its writer may overwrite.
    pub fn take(&mut self, batch: &Received<'_>) -> Result<()> {
        self.take_with(batch, Tally::add_first)
    }

    /// Takes a batch whose checksum was verified already.
    pub fn take_verified(&mut self, batch: &Received<'_>) -> Result<()> {
        self.take_with(batch, Tally::add_verified)
    }

    fn take_with(
        &mut self,
        batch: &Received<'_>,
        add: fn(&mut Tally, &Batch<'_>, u64) -> Result<(), Trouble>,
    ) -> Result<()> {
        if !self.cli.selects(batch.session, batch.stream) {
            return Ok(());
        }
        let wanted = self.cli.count.map_or(u64::MAX, |count| count - self.taken);
        match add(&mut self.tally, batch, wanted) {
            Ok(()) => {}
            // Nobody is shown other bytes than those that were published.
            Err(Trouble::Checksum(mismatch)) => {
                self.complain(&format!("{mismatch}; it is not shown"));
                return Ok(());
            }
            // Without --verify only what cannot be printed counts.
            Err(trouble) if self.cli.verify || matches!(trouble, Trouble::Malformed { .. }) => {
                self.complain(&trouble.to_string());
            }
            Err(_) => {}
        }
        let whole = batch.messages().map_while(Result::ok);
        for message in whole.take(usize::try_from(wanted).unwrap_or(usize::MAX)) {
            self.printer.print(message)?;
            self.taken += 1;
        }
        Ok(())
    }

    /// Batches between those that were taken are in no log.
    pub fn note_missing(&mut self) {
        self.has_gaps = true;
    }

    /// Something is wrong with what was read.
    pub fn complain(&mut self, what: &str) {
        self.troubles += 1;
        if self.troubles <= TOLD {
            warn!("{what}");
        }
    }

    /// The exit code for what was taken.
    pub fn exit_code(&self) -> ExitCode {
        if self.troubles > TOLD {
            warn!("{} more batches have something wrong", self.troubles - TOLD);
        }
        let has_lost = self.has_gaps || self.tally.lost_batches() > 0;
        match self.troubles {
            0 if has_lost && !self.cli.allow_loss => ExitCode::from(LOST),
            0 => ExitCode::SUCCESS,
            _ => ExitCode::from(exit::FAILURE),
        }
    }
}
