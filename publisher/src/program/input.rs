//! The source of messages: synthetic, or read from a file or a pipe.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, poll};

use super::cli::{Job, STDIN, Split};

const BUFFER: usize = 256 << 10;
/// Time that a read waits before it checks whether it should stop, milliseconds.
const STOP_CHECK_MS: u16 = 100;

/// Takes each message; `false` ends the input.
type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> bool;

/// Messages of one size, all different: each begins with its number.
fn synthetic(size: usize, messages: u64, sink: Sink<'_>) {
    let mut message: Vec<u8> = (0..size).map(|n| b'a' + (n % 26) as u8).collect();
    for number in 0..messages {
        let digits = number.to_le_bytes();
        let len = digits.len().min(size);
        message[..len].copy_from_slice(&digits[..len]);
        if !sink(&message) {
            break;
        }
    }
}

/// An opened source of messages.
pub enum Source {
    /// Synthetic messages.
    Synthetic { message_size: usize, messages: u64 },
    /// An input, and how it is split into messages.
    Input { input: Input, split: Split },
}

impl Source {
    pub fn open(job: &Job) -> Result<Self> {
        Ok(match job {
            &Job::Synthetic {
                message_size,
                messages,
            } => Self::Synthetic {
                message_size,
                messages,
            },
            Job::Input { source, split } => Self::Input {
                input: Input::open(source)?,
                split: *split,
            },
        })
    }

    /// Passes on messages of at most `limit` bytes until there are no more or `stop` is set.
    pub fn read(self, limit: usize, stop: &AtomicBool, sink: Sink<'_>) -> Result<()> {
        match self {
            Self::Synthetic {
                message_size,
                messages,
            } => {
                synthetic(message_size, messages, sink);
                Ok(())
            }
            Self::Input { input, split } => input.read(split, limit, stop, sink),
        }
    }
}

/// An open file or standard input.
pub struct Input {
    file: File,
    name: String,
}

impl Input {
    /// Opens a file, or standard input (`-`).
    fn open(source: &Path) -> Result<Self> {
        if source == Path::new(STDIN) {
            let file = io::stdin().as_fd().try_clone_to_owned();
            return Ok(Self {
                file: file.context("standard input")?.into(),
                name: "standard input".to_owned(),
            });
        }
        let name = format!("--input {}", source.display());
        // Without O_NONBLOCK, opening a FIFO would wait for a writer and ignore signals.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(source)
            .with_context(|| name.clone())?;
        if file.metadata().is_ok_and(|meta| meta.is_dir()) {
            bail!("{name} is a directory; give a file");
        }
        Ok(Self { file, name })
    }

    fn read(self, split: Split, limit: usize, stop: &AtomicBool, sink: Sink<'_>) -> Result<()> {
        let source = Interruptible {
            inner: self.file,
            stop,
        };
        cut(source, split, limit, sink).context(self.name)
    }
}

/// Whether standard input is a pipe, a socket or a file, and so meant to be read.
pub fn is_piped() -> bool {
    let stdin = io::stdin().as_fd().try_clone_to_owned().map(File::from);
    stdin.and_then(|file| file.metadata()).is_ok_and(|meta| {
        let kind = meta.file_type();
        kind.is_fifo() || kind.is_file() || kind.is_socket()
    })
}

fn cut(source: impl Read, split: Split, limit: usize, sink: Sink<'_>) -> Result<()> {
    let source = BufReader::with_capacity(BUFFER, source);
    match split {
        Split::Lines => lines(source, limit, sink),
        Split::LengthPrefixed => length_prefixed(source, limit, sink),
    }
}

/// Splits at newlines. An empty line is an empty message, and a last line counts even without a
/// newline. A line above the limit is not read to its end.
fn lines(mut source: impl BufRead, limit: usize, sink: Sink<'_>) -> Result<()> {
    let mut line = Vec::new();
    let (mut number, mut offset) = (1u64, 0u64);
    loop {
        line.clear();
        let room = (limit as u64).saturating_add(1);
        let read = (&mut source).take(room).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        if line.len() > limit {
            bail!(
                "line {number}, at byte {offset}, is longer than {limit} bytes, the largest message \
                 that the brokers accept; split it, raise their --segment-size, or use --split \
                 length-prefixed if this is not text"
            );
        }
        if !sink(&line) {
            return Ok(());
        }
        number += 1;
        offset += read as u64;
    }
}

fn length_prefixed(mut source: impl BufRead, limit: usize, sink: Sink<'_>) -> Result<()> {
    let mut message = Vec::new();
    let mut offset = 0u64;
    while !source.fill_buf()?.is_empty() {
        let mut prefix = [0; 4];
        source
            .read_exact(&mut prefix)
            .with_context(|| format!("the length at byte {offset} is cut off"))?;
        let len = u32::from_le_bytes(prefix);
        if len as usize > limit {
            bail!(
                "the length at byte {offset} is {len}, but the brokers accept messages of at most \
                 {limit} bytes: is this input length-prefixed? If so, split the message, or raise \
                 their --segment-size"
            );
        }
        message.clear();
        let got = (&mut source)
            .take(u64::from(len))
            .read_to_end(&mut message)?;
        if got < len as usize {
            bail!("the message at byte {offset} has {len} bytes, the input only {got} more");
        }
        offset += 4 + u64::from(len);
        if !sink(&message) {
            break;
        }
    }
    Ok(())
}

/// A reader that stops when a flag is set, even if no data arrives, because a signal alone does not end
/// a read.
struct Interruptible<'a, R> {
    inner: R,
    stop: &'a AtomicBool,
}

impl<R: Read + AsFd> Read for Interruptible<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.stop.load(Ordering::Relaxed) {
            let mut wait = [PollFd::new(self.inner.as_fd(), PollFlags::POLLIN)];
            let ready = match poll(&mut wait, STOP_CHECK_MS) {
                Ok(0) => continue,
                Ok(_) => self.inner.read(buffer),
                Err(error) => Err(error.into()),
            };
            match ready {
                // Another reader of the pipe was faster, or a signal arrived.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                done => return done,
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 100;

    fn messages(bytes: impl Read, split: Split) -> Result<Vec<Vec<u8>>> {
        let mut messages = Vec::new();
        cut(bytes, split, LIMIT, &mut |message| {
            messages.push(message.to_vec());
            true
        })?;
        Ok(messages)
    }

    #[test]
    fn lines_keep_empty_ones_and_the_last() {
        let read = messages(&b"a\n\n\r\nlast"[..], Split::Lines).unwrap();
        assert_eq!(read, [&b"a"[..], b"", b"\r", b"last"]);
        assert!(messages(&b""[..], Split::Lines).unwrap().is_empty());
        assert_eq!(messages(&b"\n"[..], Split::Lines).unwrap(), [b""]);
    }

    /// Endless input; panics if more than a buffer beyond the limit is read.
    struct Endless(usize);

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 += buffer.len();
            assert!(
                self.0 <= 2 * BUFFER,
                "{} bytes of one line were read",
                self.0
            );
            buffer.fill(b'x');
            Ok(buffer.len())
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_named_and_not_read_to_its_end() {
        let longest = [&b"one\n"[..], &[b'x'; LIMIT], b"\n", &[b'y'; LIMIT]].concat();
        assert_eq!(messages(&longest[..], Split::Lines).unwrap().len(), 3);
        let source = b"one\ntwo\n".chain(Endless(0));
        let mut before = 0;
        let error = cut(source, Split::Lines, LIMIT, &mut |_| {
            before += 1;
            true
        });
        let error = error.unwrap_err().to_string();
        assert_eq!(before, 2);
        for words in ["line 3, at byte 8,", "than 100 bytes", "--segment-size"] {
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn length_prefixes_are_followed_and_checked() {
        let bytes = b"\x02\0\0\0ab\0\0\0\0\x01\0\0\0c";
        let read = messages(&bytes[..], Split::LengthPrefixed).unwrap();
        assert_eq!(read, [&b"ab"[..], b"", b"c"]);
        let error = |len: usize| {
            format!(
                "{:#}",
                messages(&bytes[..len], Split::LengthPrefixed).unwrap_err()
            )
        };
        assert!(error(14).contains("message at byte 10 has 1 bytes, the input only 0 more"));
        assert!(error(8).contains("length at byte 6 is cut off"));
        let text = messages(&b"some text"[..], Split::LengthPrefixed).unwrap_err();
        assert!(text.to_string().contains("is this input length-prefixed?"));
        let long = b"\x65\0\0\0".chain(Endless(0));
        let long = messages(long, Split::LengthPrefixed)
            .unwrap_err()
            .to_string();
        assert!(long.contains("at byte 0 is 101, but"), "{long}");
    }

    #[test]
    fn synthetic_messages_differ() {
        let mut seen = std::collections::HashSet::new();
        synthetic(20, 500, &mut |message| {
            assert_eq!(message.len(), 20);
            seen.insert(message.to_vec())
        });
        assert_eq!(seen.len(), 500);
        synthetic(1, 3, &mut |message| message.len() == 1);
    }
}
