//! Command line of the subscriber.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Parser, ValueEnum};
use nix::unistd::geteuid;
use penstock_auth::read_key;
use penstock_flags::{BareUnit, duration, size};
use penstock_runtime::address::{AddressError, check_broker};
use penstock_wire::handshake::{MAX_STREAMS, check_topic};

use super::from::From;
use super::position_file;
use crate::{RemoteConfig, RemoteStart, Start};

const EXAMPLES: &str = "\
Examples:
  # Print every message that is still in the log on this host, one per line:
  penstock-subscriber --topic trades

  # The same log by its file:
  penstock-subscriber --path /dev/shm/penstock/trades.log

  # Follow a topic on its brokers; the next run continues where this one ended:
  penstock-subscriber --brokers 10.0.0.1:1214,10.0.0.2:1214 --topic trades \\
      --follow --position-file trades.position

  # Follow new messages; a broker with --full block waits for this reader:
  penstock-subscriber --path /dev/shm/penstock/trades.log --from end \\
      --follow --register

  # Verify every batch and print the totals of each stream:
  penstock-subscriber --path /dev/shm/penstock/trades.log --stat --verify

  # One stream only, as raw bytes:
  penstock-subscriber --path /dev/shm/penstock/trades.log \\
      --session 00c0ffee00c0ffee --stream 2 --output raw

--follow ends at Ctrl-C (the totals are still printed; a second Ctrl-C ends at
once), or when no broker has the log open and everything has been read. With
--brokers it ends at Ctrl-C or after --until-idle.
Exit codes: 0 everything read, 1 failed, or a batch is damaged, or a broker was
not reachable at the end, 2 wrong usage, 3 some batches were overwritten after
reading began, before they were read, or no broker has them.";

const SOURCE: &str = "Input";
const SECURITY: &str = "Security";
const RESULT: &str = "Output";
/// Where brokers of root and services keep their logs.
const BUFFERS: &str = "/dev/shm/penstock";
/// Longest wait that a flag accepts.
const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// Reads a topic: prints, counts and checks its messages.
///
/// Reads over the network with --brokers; otherwise in place, from a broker's log on this host.
#[derive(Debug, Parser)]
#[command(name = "penstock-subscriber", version, after_help = EXAMPLES,
    group(ArgGroup::new("source").required(true).args(["path", "topic"])))]
pub struct Cli {
    /// Brokers to read from, separated by commas, each host:port. Name all brokers of the topic: each
    /// stream is read in its order, and each batch once, even if a stream moved to another broker.
    /// Brokers without keys need --remote-subscribers any.
    #[arg(long, value_delimiter = ',', value_parser = parse_broker, requires = "topic",
        conflicts_with = "path", help_heading = SOURCE)]
    pub brokers: Vec<String>,
    /// Topic to read, from --brokers or from its log on this host.
    #[arg(long, value_parser = parse_topic, help_heading = SOURCE)]
    pub topic: Option<String>,
    /// Directory of the logs, without --brokers [default: that of a broker of this user, or
    /// /dev/shm/penstock].
    #[arg(long, value_name = "DIR", requires = "topic", conflicts_with = "brokers",
        help_heading = SOURCE)]
    buffer_dir: Option<PathBuf>,
    #[allow(rustdoc::invalid_html_tags, reason = "it is shown in a terminal")]
    /// The log: <buffer-dir>/<topic>.log of a broker on this host.
    #[arg(long, value_name = "FILE", help_heading = SOURCE)]
    path: Option<PathBuf>,
    /// Where to start: oldest (the oldest batch that is still in the log), end (after the newest), the
    /// index of a batch (not with several brokers), a time such as 2026-11-30T04:00:00Z or
    /// unix:1796011200, or @FILE, which --position-file wrote.
    #[arg(long, default_value = "oldest", help_heading = SOURCE)]
    from: From,
    /// Start at the position in this file if it exists, and save the position there. It is saved after
    /// the output was written; a subscriber that is killed prints the messages after it again.
    #[arg(long, value_name = "FILE", requires = "brokers", conflicts_with = "count",
        value_parser = NonEmptyStringValueParser::new(), help_heading = SOURCE)]
    pub position_file: Option<String>,
    /// Wait for more at the end of the log, and for the log if it does not exist yet.
    #[arg(long, help_heading = SOURCE)]
    pub follow: bool,
    /// With --follow, end after this long without a batch, such as 5s; a number alone is seconds.
    #[arg(long, value_name = "DURATION", requires = "follow", help_heading = SOURCE,
        value_parser = duration(BareUnit::Seconds, Duration::ZERO..=YEAR))]
    pub until_idle: Option<Duration>,
    /// How long to wait for a log that does not exist yet, or for a broker that cannot be reached at the
    /// start, such as 10s [default: with --follow, until it is there or --until-idle is over; otherwise
    /// do not wait].
    #[arg(long, value_name = "DURATION", help_heading = SOURCE,
        value_parser = duration(BareUnit::Seconds, Duration::ZERO..=YEAR))]
    wait: Option<Duration>,
    /// Stop after this many messages.
    #[arg(long, value_name = "N", help_heading = SOURCE,
        value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Make a broker with --full block wait for this reader. Without --brokers this needs write
    /// permission for the .readers file beside the log.
    #[arg(long, help_heading = SOURCE)]
    pub register: bool,
    /// Bytes that each broker may be ahead of the output; a larger window needs more memory.
    #[arg(long, default_value = "4MiB", value_name = "SIZE", requires = "brokers", help_heading = SOURCE,
        value_parser = size(RemoteConfig::MIN_WINDOW..=RemoteConfig::MAX_WINDOW))]
    window: ByteSize,
    /// How long to wait for missing batches of a stream while a broker that may have them is not
    /// reachable. Without --follow, also how long to try to reconnect, if --wait is not longer.
    #[arg(long, default_value = "10s", value_name = "DURATION", requires = "brokers", help_heading = SOURCE,
        value_parser = duration(BareUnit::Seconds, Duration::ZERO..=YEAR))]
    gap_timeout: Duration,
    /// File with this subscriber's key (penstock-broker --keygen creates one); only its owner may have
    /// access to it.
    #[arg(long, value_name = "FILE", requires = "brokers", help_heading = SECURITY)]
    auth_key: Option<PathBuf>,
    /// Require authenticated deliveries, so that nobody on the path can change, add or remove messages.
    #[arg(long, requires = "auth_key", help_heading = SECURITY)]
    packet_auth: bool,
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
    /// Do not count overwritten or missing batches as a failure.
    #[arg(long, help_heading = RESULT)]
    pub allow_loss: bool,
    /// Format of --stat.
    #[arg(long, value_enum, default_value_t = Format::Text, help_heading = RESULT)]
    pub format: Format,
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
    /// Checks what is wrong only in combination.
    pub fn check(&self) -> Result<()> {
        match (&self.from, self.brokers.is_empty()) {
            (From::File(path), true) => bail!(
                "--from @{}: a saved position is about brokers; add --brokers",
                path.display()
            ),
            (_, true) => Ok(()),
            _ => Ok(self.config(RemoteStart::Each(self.start())).check()?),
        }
    }

    /// Where to start, if not at a saved position.
    pub fn start(&self) -> Start {
        match self.from {
            From::Each(start) => start,
            From::File(_) => Start::Oldest,
        }
    }

    /// The log on this host.
    pub fn log_path(&self) -> PathBuf {
        if let Some(path) = &self.path {
            return path.clone();
        }
        let file = format!("{}.log", self.topic.as_deref().unwrap_or_default());
        if let Some(dir) = &self.buffer_dir {
            return dir.join(file);
        }
        // As a broker of this user chooses it.
        let own = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let own = own.filter(|own| own.is_absolute() && !geteuid().is_root());
        let own = own.map(|own| own.join("penstock").join(&file));
        let shared = Path::new(BUFFERS).join(file);
        own.filter(|own| own.exists() || !shared.exists())
            .unwrap_or(shared)
    }

    /// Settings to read from brokers, with the key and the saved position.
    pub fn remote_config(&self) -> Result<RemoteConfig> {
        let topic = self.topic.as_deref().unwrap_or_default();
        let kept = match &self.position_file {
            Some(path) => position_file::load(Path::new(path), topic)?,
            None => None,
        };
        let saved = match (kept, &self.from) {
            (Some(position), _) => Some(position),
            (None, From::File(path)) => {
                let found = position_file::load(path, topic)?;
                Some(found.with_context(|| format!("--from @{}: no such file", path.display()))?)
            }
            (None, From::Each(_)) => None,
        };
        let otherwise = self.start();
        let start = match saved {
            Some(position) => RemoteStart::Position {
                position,
                otherwise,
            },
            None => RemoteStart::Each(otherwise),
        };
        let key = self.auth_key.as_deref().map(read_key).transpose();
        let mut config = self.config(start);
        config.key = key.context("--auth-key")?;
        config.packet_auth = self.packet_auth;
        Ok(config)
    }

    fn config(&self, start: RemoteStart) -> RemoteConfig {
        let topic = self.topic.clone().unwrap_or_default();
        let mut config = RemoteConfig::new(self.brokers.clone(), topic);
        config.start = start;
        config.register = self.register;
        config.window = self.window.as_u64();
        config.gap_timeout = self.gap_timeout;
        config.wait = self.longest_wait().unwrap_or(Duration::ZERO);
        if !self.follow {
            config.reconnect_for = config.wait.max(self.gap_timeout);
        }
        config
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

fn parse_broker(text: &str) -> Result<String, AddressError> {
    check_broker(text).map(|()| text.trim().to_owned())
}

fn parse_topic(text: &str) -> Result<String, String> {
    let topic = check_topic(text.as_bytes());
    topic.map(str::to_owned).map_err(|error| error.to_string())
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
        assert_eq!(examples.len(), 6);
        for words in examples {
            Cli::try_parse_from(&words).unwrap().check().unwrap();
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

    fn check(flags: &[&str]) -> Result<Cli, String> {
        let words = ["penstock-subscriber"].iter().chain(flags);
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        cli.check().map_err(|error| error.to_string())?;
        Ok(cli)
    }

    #[test]
    fn a_source_is_a_file_a_topic_on_this_host_or_brokers() {
        let path = |flags: &[&str]| check(flags).unwrap().log_path();
        assert_eq!(path(&["--path", "x/t.log"]), Path::new("x/t.log"));
        assert_eq!(
            path(&["--topic", "t", "--buffer-dir", "x"]),
            Path::new("x/t.log")
        );
        assert!(path(&["--topic", "t"]).ends_with("penstock/t.log"));
        for (flags, words) in [
            (&[][..], "--path <FILE>|--topic <TOPIC>"),
            (&["--path", "x", "--topic", "t"], "cannot be used with"),
            (&["--brokers", "a:1"], "--topic <TOPIC>"),
            (&["--brokers", "a:1", "--topic", "../t"], "topic name"),
            (&["--brokers", "a", "--topic", "t"], "it has no port"),
            (
                &["--brokers", "a:1", "--topic", "t", "--buffer-dir", "x"],
                "cannot be used with",
            ),
            (&["--topic", "t", "--position-file", "p"], "--brokers"),
            (&["--topic", "t", "--auth-key", "k"], "--brokers"),
            (&["--topic", "t", "--from", "@p"], "add --brokers"),
            (
                &["--brokers", "a:1,b:1", "--topic", "t", "--from", "7"],
                "start at a saved position",
            ),
            (
                &["--brokers", "a:1", "--topic", "t", "--window", "1"],
                "the nearest is",
            ),
        ] {
            let error = check(flags).unwrap_err();
            assert!(error.contains(words), "{flags:?}: {error}");
        }
        let one = check(&["--brokers", "a:1", "--topic", "t", "--from", "7"]).unwrap();
        let start = one.remote_config().unwrap().start;
        assert_eq!(start, RemoteStart::Each(Start::Index(7)));
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
