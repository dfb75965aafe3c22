//! Log lines: one line per event, with unsafe characters escaped, written to stderr through a queue.

use std::fmt::{self, Debug, Write as _};
use std::io;
use std::time::Duration;

use crate::text::Escaper;
use tracing::field::{Field, Visit};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;

use crate::{Program, colours, stderr};

/// Maximum length of a log line, bytes; longer ones are cut.
const MAX_LINE: usize = 8 << 10;
/// How long the end of a program waits for its last lines to be written.
const FLUSH: Duration = Duration::from_secs(1);

/// Installs the program's log.
///
/// Until [`start_thread`], callers write lines themselves, as far as stderr accepts them at once.
pub(crate) fn install(program: &Program) {
    let filter = EnvFilter::try_from_env(program.log_variable)
        .unwrap_or_else(|_| EnvFilter::new(program.log_level));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Line)
        .with_ansi(colours::are_wanted(&io::stderr()))
        .with_target(program.log_target)
        // Writing to our own writer never fails.
        .log_internal_errors(false)
        .fmt_fields(Fields)
        .finish();
    // Fails only if a subscriber is already installed.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Starts the thread that writes log lines. It inherits the privileges of the calling thread.
///
/// # Errors
/// If the system cannot start a thread.
pub fn start_thread() -> io::Result<()> {
    stderr::start()
}

/// Waits until all lines so far are written, at most one second.
pub fn flush() {
    stderr::flush(FLUSH);
}

/// Number of log lines dropped because stderr did not accept them.
#[must_use]
pub fn dropped_lines() -> u64 {
    stderr::dropped()
}

/// Accepts one formatted event.
struct Line;

impl io::Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        stderr::say(cut(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn cut(line: &[u8]) -> Vec<u8> {
    if line.len() <= MAX_LINE {
        return line.to_vec();
    }
    // Not in the middle of a character.
    let end = (0..=MAX_LINE)
        .rev()
        .find(|&end| line[end] & 0xc0 != 0x80)
        .unwrap_or_default();
    [&line[..end], "…\n".as_bytes()].concat()
}

/// Formats the fields of an event like tracing does, and escapes their contents.
struct Fields;

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = Visitor {
            writer,
            first: true,
            result: Ok(()),
        };
        fields.record(&mut visitor);
        visitor.result
    }
}

struct Visitor<'writer> {
    writer: Writer<'writer>,
    first: bool,
    result: fmt::Result,
}

impl Visitor<'_> {
    fn write(&mut self, field: &Field, value: fmt::Arguments<'_>) -> fmt::Result {
        if !std::mem::take(&mut self.first) {
            self.writer.write_char(' ')?;
        }
        if field.name() != "message" {
            match self.writer.has_ansi_escapes() {
                true => write!(self.writer, "\x1b[3m{}\x1b[0m\x1b[2m=\x1b[0m", field.name())?,
                false => write!(self.writer, "{}=", field.name())?,
            }
        }
        Escaper(&mut self.writer).write_fmt(value)
    }
}

impl Visit for Visitor<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if self.result.is_ok() {
            self.result = self.write(field, format_args!("{value:?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(line);
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let kept = Kept::default();
        let to = kept.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || to.clone())
            .with_ansi(false)
            .without_time()
            .fmt_fields(Fields)
            .finish();
        let evil = "x\x1b[2J\n2026-01-01 INFO all is well\u{202e}\u{9b}";
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(plain = 7, text = evil, shown = %evil, error = &io::Error::other(evil) as &dyn std::error::Error, "said {evil}");
        });
        let lines = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        assert_eq!(lines.matches('\n').count(), 1, "{lines}");
        let line = lines.trim_end_matches('\n');
        assert!(!line.contains(crate::text::is_unsafe), "{line}");
        assert!(
            line.contains("plain=7") && line.contains("said x\\x1b[2J\\n2026"),
            "{line}"
        );
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let line = "é".repeat(MAX_LINE);
        let cut = String::from_utf8(cut(line.as_bytes())).unwrap();
        assert!(cut.ends_with("é…\n") && cut.len() <= MAX_LINE + 4);
        assert_eq!(super::cut(b"short\n"), b"short\n");
    }
}
