//! Untrusted text from a peer, another process or a file name, made safe to show.
//!
//! A terminal obeys control characters, a log is read line by line, and bidirectional overrides make
//! text look different from what it is (CVE-2021-42574). So text from others is escaped before it
//! reaches a terminal, a log, a report or a page. Escaping twice gives the same text.

use std::borrow::Cow;
use std::fmt::{self, Display, Write};

/// Maximum number of characters that [`foreign`] shows; longer texts end with `…`.
pub const MAX_FOREIGN: usize = 1024;

/// Whether a character does anything other than show itself: it moves the cursor, changes the direction
/// of the following text, or is invisible.
#[must_use]
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Soft hyphen, grapheme joiner, Arabic letter mark, Hangul, Khmer and Mongolian fillers.
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{3164}' | '\u{ffa0}'
            // Zero width, direction marks.
            | '\u{200b}'..='\u{200f}'
            // Line and paragraph separators, bidirectional embeddings and overrides.
            | '\u{2028}'..='\u{202e}'
            // Invisible operators, bidirectional isolates, deprecated format characters.
            | '\u{2060}'..='\u{206f}'
            // Blank Braille pattern, variation selectors.
            | '\u{2800}' | '\u{fe00}'..='\u{fe0f}'
            // Byte order mark, interlinear annotations, tags and further variation selectors.
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Untrusted text on one line, escaped and at most [`MAX_FOREIGN`] characters long.
///
/// ```
/// let name = penstock_process::text::foreign("eth0\x1b[2J\nall is well");
/// assert_eq!(name.to_string(), r"eth0\x1b[2J\nall is well");
/// ```
#[must_use]
pub fn foreign(text: &str) -> Foreign<'_> {
    Foreign(text)
}

/// Untrusted text that is safe to show; made by [`foreign`].
#[derive(Debug, Clone, Copy)]
pub struct Foreign<'a>(&'a str);

impl Display for Foreign<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(MAX_FOREIGN) {
            None => Escaper(f).write_str(self.0),
            Some((end, _)) => {
                Escaper(&mut *f).write_str(&self.0[..end])?;
                f.write_char('…')
            }
        }
    }
}

/// The bytes of an untrusted text, which need not be UTF-8: other bytes are shown as `\xff`.
#[must_use]
pub fn foreign_bytes(bytes: &[u8]) -> String {
    let mut out = String::new();
    // Each byte is shown with at most four characters, so later bytes can never be shown.
    for chunk in bytes[..bytes.len().min(4 * MAX_FOREIGN)].utf8_chunks() {
        out.push_str(chunk.valid());
        for byte in chunk.invalid() {
            write!(out, "\\x{byte:02x}").expect("a string takes all");
        }
    }
    foreign(&out).to_string()
}

/// All bytes, made safe for a terminal: like [`foreign_bytes`], but without a length limit and with
/// tabs.
#[must_use]
pub fn visible(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(&escape_but(chunk.valid(), |c| c == '\t'));
        for byte in chunk.invalid() {
            write!(out, "\\x{byte:02x}").expect("a string takes all");
        }
    }
    out
}

/// The whole text on one line, with every unsafe character escaped.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    escape_but(text, |_| false)
}

/// The text with its line breaks, and every other unsafe character escaped: for our own messages that
/// have several lines.
#[must_use]
pub fn escape_lines(text: &str) -> Cow<'_, str> {
    escape_but(text, |c| c == '\n')
}

fn escape_but(text: &str, keep: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(|c| is_unsafe(c) && !keep(c)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        let written = match keep(c) {
            true => out.write_char(c),
            false => write_escaped(&mut out, c),
        };
        written.expect("a string takes all");
    }
    Cow::Owned(out)
}

/// Escapes everything written through it.
#[derive(Debug)]
pub struct Escaper<W>(pub W);

impl<W: Write> Write for Escaper<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some((at, c)) = rest.char_indices().find(|&(_, c)| is_unsafe(c)) {
            self.0.write_str(&rest[..at])?;
            write_escaped(&mut self.0, c)?;
            rest = &rest[at + c.len_utf8()..];
        }
        self.0.write_str(rest)
    }
}

fn write_escaped(out: &mut impl Write, c: char) -> fmt::Result {
    match c {
        '\n' => out.write_str("\\n"),
        '\r' => out.write_str("\\r"),
        '\t' => out.write_str("\\t"),
        c if !is_unsafe(c) => out.write_char(c),
        c if u32::from(c) < 0x100 => write!(out, "\\x{:02x}", u32::from(c)),
        c => write!(out, "\\u{{{:x}}}", u32::from(c)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        for (text, shown) in [
            ("plain – ünïcode 日本 👍", "plain – ünïcode 日本 👍"),
            ("\x1b]0;owned\x07\x1b[2J", "\\x1b]0;owned\\x07\\x1b[2J"),
            ("\u{9b}31m", "\\x9b31m"),
            ("a\r\nb\tc\0\x7f", "a\\r\\nb\\tc\\x00\\x7f"),
            (
                "user\u{202e}gpj.exe\u{2066}",
                "user\\u{202e}gpj.exe\\u{2066}",
            ),
            (
                "a\u{2028}b\u{feff}\u{e0041}",
                "a\\u{2028}b\\u{feff}\\u{e0041}",
            ),
            // Names that look like others.
            (
                "pay\u{3164}\u{fe0f}\u{e0100}",
                "pay\\u{3164}\\u{fe0f}\\u{e0100}",
            ),
        ] {
            assert_eq!(foreign(text).to_string(), shown);
            assert_eq!(escape(text), shown);
        }
        assert_eq!(escape_lines("one\ntwo\r\x1b"), "one\ntwo\\r\\x1b");
        assert_eq!(visible(b"a\tb\xff\x1b[2J"), "a\tb\\xff\\x1b[2J");
        assert_eq!(foreign_bytes(b"a\xff\x1b\xc3"), "a\\xff\\x1b\\xc3");
    }

    #[test]
    fn long_texts_are_cut() {
        let long = "é".repeat(MAX_FOREIGN + 1);
        assert_eq!(foreign(&long).to_string().chars().count(), MAX_FOREIGN + 1);
        assert!(foreign(&long).to_string().ends_with('…'));
        assert!(foreign_bytes(&[0xff; 1 << 20]).chars().count() <= MAX_FOREIGN + 1);
    }

    /// Texts with many of the characters that matter.
    fn texts() -> impl Strategy<Value = String> {
        let character = prop_oneof![
            any::<char>(),
            (0..0xa0u32).prop_map(|c| char::from_u32(c).unwrap()),
            (0x2000..0x2070u32).prop_map(|c| char::from_u32(c).unwrap()),
        ];
        prop::collection::vec(character, 0..300).prop_map(String::from_iter)
    }

    proptest! {
        #[test]
        fn nothing_unsafe_is_left(text in texts()) {
            let shown = foreign(&text).to_string();
            prop_assert!(!shown.contains(is_unsafe), "{shown:?}");
            prop_assert_eq!(escape(&text), &*shown);
            prop_assert_eq!(escape(&shown), &*shown);
            let lines = escape_lines(&text);
            prop_assert!(!lines.contains(|c| is_unsafe(c) && c != '\n'));
            prop_assert_eq!(lines.matches('\n').count(), text.matches('\n').count());
        }

        #[test]
        fn what_is_safe_stays(text in texts()) {
            let safe: String = text.chars().filter(|&c| !is_unsafe(c)).collect();
            prop_assert_eq!(foreign(&safe).to_string(), safe);
        }

        #[test]
        fn bytes_are_shown_safely(bytes: Vec<u8>) {
            prop_assert!(!foreign_bytes(&bytes).contains(is_unsafe));
        }
    }
}
