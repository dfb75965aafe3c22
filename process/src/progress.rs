//! Where progress bars are drawn: on stderr, through the log's queue. So a stopped terminal (Ctrl-S)
//! does not delay the work, and bars and log lines do not mix.

use std::io::{self, IsTerminal};

use indicatif::{ProgressDrawTarget, TermLike};
use terminal_size::terminal_size_of;

use crate::stderr;

/// Maximum number of redraws per second.
const HZ: u8 = 20;
/// Columns of a terminal that does not report its width.
const COLUMNS: u16 = 80;

/// The draw target for a progress bar; it draws nothing unless stderr is a terminal that can move its
/// cursor.
#[must_use]
pub fn target() -> ProgressDrawTarget {
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    if dumb || !io::stderr().is_terminal() {
        return ProgressDrawTarget::hidden();
    }
    ProgressDrawTarget::term_like_with_hz(Box::new(Terminal), HZ)
}

#[derive(Debug)]
struct Terminal;

impl Terminal {
    /// A control sequence with a count (ECMA-48); a count of zero writes nothing.
    fn go(&self, count: usize, letter: char) -> io::Result<()> {
        match count {
            0 => Ok(()),
            count => self.write_str(&format!("\x1b[{count}{letter}")),
        }
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        terminal_size_of(io::stderr()).map_or(COLUMNS, |(width, _)| width.0)
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.go(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.go(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.go(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.go(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write_str(&format!("{text}\n"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        // A bar that is not drawn is no loss.
        stderr::offer(text.as_bytes().to_vec());
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.write_str("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
