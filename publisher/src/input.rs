//! Where messages come from: made up, or cut out of a file or a pipe.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};

use crate::cli::Split;

const BUFFER: usize = 256 << 10;
/// How long a read waits before it looks whether it should stop, milliseconds.
const LOOK_MS: i32 = 100;
/// Largest message that a length prefix may announce; brokers accept less.
const MAX_MESSAGE: u32 = 1 << 30;

/// Takes each message; `false` ends the input.
type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<bool>;

/// Messages of one size, all different: each begins with its number.
pub fn synthetic(size: usize, messages: u64, sink: Sink<'_>) -> Result<()> {
    let mut message: Vec<u8> = (0..size).map(|n| b'a' + (n % 26) as u8).collect();
    for number in 0..messages {
        let digits = number.to_le_bytes();
        let len = digits.len().min(size);
        message[..len].copy_from_slice(&digits[..len]);
        if !sink(&message)? {
            break;
        }
    }
    Ok(())
}

/// Messages of a file, or of standard input (`-`), until it ends or `stop` is set.
pub fn read(source: &Path, split: Split, stop: &AtomicBool, sink: Sink<'_>) -> Result<()> {
    if source == Path::new("-") {
        return cut(
            Interruptible {
                inner: io::stdin(),
                stop,
            },
            split,
            sink,
        )
        .context("standard input");
    }
    let name = || format!("--input {}", source.display());
    let file = File::open(source).with_context(name)?;
    cut(Interruptible { inner: file, stop }, split, sink).with_context(name)
}

fn cut(source: impl Read, split: Split, sink: Sink<'_>) -> Result<()> {
    let source = BufReader::with_capacity(BUFFER, source);
    match split {
        Split::Lines => lines(source, sink),
        Split::LengthPrefixed => length_prefixed(source, sink),
    }
}

/// Each line without its newline; an empty line is an empty message, and a last line counts even
/// if its newline is missing.
fn lines(mut source: impl BufRead, sink: Sink<'_>) -> Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if source.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        if !sink(&line)? {
            return Ok(());
        }
    }
}

fn length_prefixed(mut source: impl BufRead, sink: Sink<'_>) -> Result<()> {
    let mut message = Vec::new();
    let mut offset = 0u64;
    while !source.fill_buf()?.is_empty() {
        let mut prefix = [0; 4];
        source
            .read_exact(&mut prefix)
            .with_context(|| format!("the length at byte {offset} is cut off"))?;
        let len = u32::from_le_bytes(prefix);
        if len > MAX_MESSAGE {
            bail!("the length at byte {offset} is {len}: is this input length-prefixed?");
        }
        message.clear();
        let got = (&mut source)
            .take(u64::from(len))
            .read_to_end(&mut message)?;
        if got < len as usize {
            bail!("the message at byte {offset} has {len} bytes, the input only {got} more");
        }
        offset += 4 + u64::from(len);
        if !sink(&message)? {
            break;
        }
    }
    Ok(())
}

/// Reads that end when a flag is set, even if nothing comes: a signal alone does not end a read.
struct Interruptible<'a, R> {
    inner: R,
    stop: &'a AtomicBool,
}

impl<R: Read + AsFd> Read for Interruptible<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.stop.load(Ordering::Relaxed) {
            let mut wait = libc::pollfd {
                fd: self.inner.as_fd().as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd, exclusively borrowed, with a descriptor that is open.
            match unsafe { libc::poll(&raw mut wait, 1, LOOK_MS) } {
                0 => {}
                -1 => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                _ => return self.inner.read(buffer),
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(bytes: &[u8], split: Split) -> Result<Vec<Vec<u8>>> {
        let mut messages = Vec::new();
        cut(bytes, split, &mut |message| {
            messages.push(message.to_vec());
            Ok(true)
        })?;
        Ok(messages)
    }

    #[test]
    fn lines_keep_empty_ones_and_the_last() {
        let read = messages(b"a\n\n\r\nlast", Split::Lines).unwrap();
        assert_eq!(read, [&b"a"[..], b"", b"\r", b"last"]);
        assert!(messages(b"", Split::Lines).unwrap().is_empty());
        assert_eq!(messages(b"\n", Split::Lines).unwrap(), [b""]);
    }

    #[test]
    fn length_prefixes_are_followed_and_checked() {
        let bytes = b"\x02\0\0\0ab\0\0\0\0\x01\0\0\0c";
        let read = messages(bytes, Split::LengthPrefixed).unwrap();
        assert_eq!(read, [&b"ab"[..], b"", b"c"]);
        let error = |len: usize| {
            format!(
                "{:#}",
                messages(&bytes[..len], Split::LengthPrefixed).unwrap_err()
            )
        };
        assert!(error(14).contains("message at byte 10 has 1 bytes, the input only 0 more"));
        assert!(error(8).contains("length at byte 6 is cut off"));
        let text = messages(b"some text", Split::LengthPrefixed).unwrap_err();
        assert!(text.to_string().contains("is this input length-prefixed?"));
    }

    #[test]
    fn synthetic_messages_differ() {
        let mut seen = std::collections::HashSet::new();
        synthetic(20, 500, &mut |message| {
            assert_eq!(message.len(), 20);
            Ok(seen.insert(message.to_vec()))
        })
        .unwrap();
        assert_eq!(seen.len(), 500);
        synthetic(1, 3, &mut |message| Ok(message.len() == 1)).unwrap();
    }
}
