//! Command line of the subscriber.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use penstock_subscriber::Start;

const EXAMPLES: &str = "\
Examples:
  Print every message that is still in the log, one a line:
    penstock-subscriber --path /dev/shm/penstock/trades.log

  Follow new messages; make a broker with --full block wait for this reader:
    penstock-subscriber --path /dev/shm/penstock/trades.log --from end --follow --register

  Check every batch and sum up each stream:
    penstock-subscriber --path /dev/shm/penstock/trades.log --stat --verify

  One stream only, as raw bytes:
    penstock-subscriber --path trades.log --session 00c0ffee00c0ffee --stream 2 --output raw

Following ends with Ctrl-C (sums are printed; a second one ends at once), or when no broker has the
log open and all of it is read.
Exit codes: 0 all read, 1 failed or a batch is damaged, 2 wrong flags, 3 some batches were
overwritten before they were read.";

/// Reads a topic's log in place: prints, counts, checks.
#[derive(Debug, Parser)]
#[command(name = "penstock-subscriber", version, after_help = EXAMPLES)]
pub struct Cli {
    /// The log: <buffer-dir>/<topic>.log of a broker on this host.
    #[arg(long)]
    pub path: PathBuf,
    /// Where to begin: at the oldest batch that is still there, or behind the newest.
    #[arg(long, value_enum, default_value_t = From::Start)]
    from: From,
    /// Wait for more at the end of the log.
    #[arg(long)]
    pub follow: bool,
    /// With --follow, end after so many seconds without a batch.
    #[arg(long, value_name = "SECONDS", requires = "follow")]
    pub until_idle: Option<u64>,
    /// End after so many messages.
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// Make a broker with --full block wait for this reader; needs write permission for the
    /// .readers file beside the log.
    #[arg(long)]
    pub register: bool,
    /// How messages are printed; without it lines, or none with --stat.
    #[arg(long, value_enum)]
    output: Option<Output>,
    /// Only this session, as 16 hexadecimal digits.
    #[arg(long, value_parser = parse_session, value_name = "HEX")]
    session: Option<u64>,
    /// Only streams of this number.
    #[arg(long, value_name = "N")]
    stream: Option<u32>,
    /// Sum up counts, bytes and SHA-256 per stream at the end: on stdout, or on stderr when
    /// messages are printed too. The SHA-256 is over every message followed by a newline.
    #[arg(long)]
    pub stat: bool,
    /// Compare every batch also with its message count and its stream's order; without it only a batch
    /// whose messages cannot be told apart is a failure, or one that differs from its CRC32C, which
    /// is never shown.
    #[arg(long)]
    pub verify: bool,
    /// Overwritten batches are no failure.
    #[arg(long)]
    pub allow_loss: bool,
    /// Form of --stat.
    #[arg(long, value_enum, default_value_t = Format::Text)]
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
    /// Each followed by a newline.
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
    u64::from_str_radix(text, 16).map_err(|_| "not a session key of up to 16 hex digits".to_owned())
}
