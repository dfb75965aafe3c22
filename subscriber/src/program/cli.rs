//! Command line of the subscriber.

use std::path::PathBuf;
use std::time::Duration;

use crate::Start;
use clap::{Parser, ValueEnum};
use penstock_flags::{BareUnit, duration};
use penstock_wire::handshake::MAX_STREAMS;

const EXAMPLES: &str = "\
Examples:
  # Print every message that is still in the log, one per line:
  penstock-subscriber --path /dev/shm/penstock/trades.log

  # Follow new messages; a broker with --full block waits for this reader:
  penstock-subscriber --path /dev/shm/penstock/trades.log --from end \\
      --follow --register

  # Verify every batch and print the totals of each stream:
  penstock-subscriber --path /dev/shm/penstock/trades.log --stat --verify

  # One stream only, as raw bytes:
  penstock-subscriber --path /dev/shm/penstock/trades.log \\
      --session 00c0ffee00c0ffee --stream 2 --output raw

--follow ends at Ctrl-C (the totals are still printed; a second Ctrl-C ends at
once), or when no broker has the log open and everything has been read.
Exit codes: 0 everything read, 1 failed or a batch is damaged, 2 wrong usage,
3 some batches were overwritten after reading began, before they were read.";

const SOURCE: &str = "Input";
const RESULT: &str = "Output";
/// Longest wait that a flag accepts.
const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// Reads a topic's log in place: prints, counts and checks its messages.
#[derive(Debug, Parser)]
#[command(name = "penstock-subscriber", version, after_help = EXAMPLES)]
pub struct Cli {
    #[allow(rustdoc::invalid_html_tags, reason = "it is shown in a terminal")]
    /// The log: <buffer-dir>/<topic>.log of a broker on this host.
    #[arg(long, value_name = "FILE", help_heading = SOURCE)]
    pub path: PathBuf,
    /// Where to start: at the oldest batch that is still in the log, or after the newest.
    #[arg(long, value_enum, default_value_t = From::Start, help_heading = SOURCE)]
    from: From,
    /// Wait for more at the end of the log, and for the log if it does not exist yet.
    #[arg(long, help_heading = SOURCE)]
    pub follow: bool,
    /// With --follow, end after this long without a batch, such as 5s; a number alone is seconds.
    #[arg(long, value_name = "DURATION", requires = "follow", help_heading = SOURCE,
        value_parser = duration(BareUnit::Seconds, Duration::ZERO..=YEAR))]
    pub until_idle: Option<Duration>,
    /// How long to wait for a log that does not exist yet, such as 10s [default: with --follow, until
    /// it exists or --until-idle is over; otherwise do not wait].
    #[arg(long, value_name = "DURATION", help_heading = SOURCE,
        value_parser = duration(BareUnit::Seconds, Duration::ZERO..=YEAR))]
    wait: Option<Duration>,
    /// Stop after this many messages.
    #[arg(long, value_name = "N", help_heading = SOURCE,
        value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Make a broker with --full block wait for this reader; needs write permission for the
    /// .readers file beside the log.
    #[arg(long, help_heading = SOURCE)]
    pub register: bool,
    /// Only this session, as 16 hexadecimal digits.
    #[arg(long, value_parser = parse_session, value_name = "HEX", help_heading = SOURCE)]
    session: Option<u64>,
    /// Only the stream with this number.
    #[arg(long, value_name = "N", help_heading = SOURCE,
        value_parser = clap::value_parser!(u32).range(..i64::from(MAX_STREAMS)))]
    stream: Option<u32>,
    /// How to print messages [default: lines, or none with --stat].
    #[arg(long, value_enum, help_heading = RESULT)]
    output: Option<Output>,
    /// Print counts, bytes and the SHA-256 of each stream at the end: on stdout, or on stderr if
    /// messages are printed too. The SHA-256 is over every message followed by a newline.
    #[arg(long, help_heading = RESULT)]
    pub stat: bool,
    /// Also check each batch's message count, and its order in the stream. Without this flag, a batch is
    /// a failure only if its messages cannot be separated, or if its CRC32C is wrong; such a batch is
    /// never printed.
    #[arg(long, help_heading = RESULT)]
    pub verify: bool,
    /// Do not count overwritten batches as a failure.
    #[arg(long, help_heading = RESULT)]
    pub allow_loss: bool,
    /// Format of --stat.
    #[arg(long, value_enum, default_value_t = Format::Text, help_heading = RESULT)]
    pub format: Format,
}

/// Where to begin.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum From {
    Start,
    End,
}

/// How messages are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Each followed by a newline. On a terminal, control characters are shown as \x1b; files and pipes
    /// get every byte unchanged. The other formats never change bytes.
    Lines,
    /// Back to back.
    Raw,
    /// Each after its length as 4 bytes, little-endian.
    LengthPrefixed,
    /// Not at all.
    None,
}

/// Form of the sums.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

impl Cli {
    pub fn start(&self) -> Start {
        match self.from {
            From::Start => Start::Oldest,
            From::End => Start::End,
        }
    }

    /// How long to wait for a log that does not exist, if at all.
    pub fn longest_wait(&self) -> Option<Duration> {
        let follows = self.follow.then(|| self.until_idle.unwrap_or(YEAR));
        self.wait.or(follows)
    }

    pub fn output(&self) -> Output {
        self.output.unwrap_or(if self.stat {
            Output::None
        } else {
            Output::Lines
        })
    }

    /// Whether batches of this stream are wanted.
    pub fn selects(&self, session: u64, stream: u32) -> bool {
        self.session.is_none_or(|wanted| wanted == session)
            && self.stream.is_none_or(|wanted| wanted == stream)
    }
}

fn parse_session(text: &str) -> Result<u64, String> {
    match u64::from_str_radix(text, 16) {
        // No session has this number (docs/protocol.md).
        Ok(0) | Err(_) => Err("not a session key of up to 16 hex digits other than 0".to_owned()),
        Ok(session) => Ok(session),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_valid_and_fit_in_80_columns() {
        assert_eq!(EXAMPLES.lines().find(|line| line.len() > 79), None);
        let examples = penstock_flags::examples(EXAMPLES, "penstock-subscriber");
        assert_eq!(examples.len(), 4);
        for words in examples {
            Cli::try_parse_from(&words).unwrap();
        }
    }

    #[test]
    fn what_no_log_can_hold_is_not_waited_for() {
        for (flags, words) in [
            (["--count", "0"], "0 is not in 1.."),
            (["--stream", "1024"], "1024 is not in 0..1024"),
            (["--session", "0"], "other than 0"),
            (["--session", "xyz"], "16 hex digits"),
        ] {
            let cli = ["penstock-subscriber", "--path", "x"].iter().chain(&flags);
            let error = Cli::try_parse_from(cli).unwrap_err().to_string();
            assert!(error.contains(words), "{flags:?}: {error}");
        }
    }

    #[test]
    fn waiting_is_asked_for() {
        let wait = |flags: &[&str]| {
            let words = ["penstock-subscriber", "--path", "x"];
            let cli = Cli::try_parse_from(words.iter().chain(flags)).unwrap();
            cli.longest_wait()
        };
        assert_eq!(wait(&[]), None);
        assert_eq!(wait(&["--follow"]), Some(YEAR));
        assert_eq!(
            wait(&["--follow", "--until-idle", "3"]),
            Some(Duration::from_secs(3))
        );
        assert_eq!(wait(&["--wait", "500ms"]), Some(Duration::from_millis(500)));
        assert_eq!(
            wait(&["--follow", "--wait", "1m"]),
            Some(Duration::from_secs(60))
        );
    }
}
