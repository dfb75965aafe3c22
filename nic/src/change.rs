//! A change to an interface: what a person would type, and doing it.

use std::fmt;
use std::io::ErrorKind;
use std::process::Command;
use std::time::Duration;

use penstock_process::child;
use serde::{Deserialize, Serialize};

use crate::sysfs::Sysfs;
use crate::{Error, quote};

/// Where ethtool is looked for, whatever the caller's environment says: it runs as root.
const SEARCH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";
/// How long ethtool may take. It waits while others change the network, and a driver that makes its rings
/// anew takes seconds; it may also hang.
const LIMIT: Duration = Duration::from_secs(30);

/// A setting of an interface in /sys/class/net.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attribute {
    /// Empty polls before a queue's interrupt is switched on again.
    NapiDeferHardIrqs,
    /// Nanoseconds until the kernel polls a queue whose interrupt is off and that no socket polled.
    GroFlushTimeout,
}

impl Attribute {
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Self::NapiDeferHardIrqs => "napi_defer_hard_irqs",
            Self::GroFlushTimeout => "gro_flush_timeout",
        }
    }

    /// Its file, in a /sys that belongs to this network namespace.
    #[must_use]
    pub fn path(self, interface: &str) -> String {
        format!("/sys/class/net/{interface}/{}", self.file_name())
    }
}

/// A change; shown as the command that makes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// ethtool with these arguments.
    Ethtool(Vec<String>),
    /// A setting in /sys.
    Set {
        /// The interface.
        interface: String,
        /// The setting.
        attribute: Attribute,
        /// Its value.
        value: u64,
    },
}

impl Change {
    /// An ethtool command from a line of arguments; interface names contain no spaces.
    pub(crate) fn ethtool(line: &str) -> Self {
        Self::Ethtool(line.split_whitespace().map(str::to_owned).collect())
    }

    /// The same change for an interface that has been renamed.
    #[must_use]
    pub(crate) fn renamed(&self, to: &str) -> Self {
        let mut change = self.clone();
        match &mut change {
            Self::Set { interface, .. } => to.clone_into(interface),
            // The argument after the option is the interface.
            Self::Ethtool(arguments) => {
                if let Some(interface) = arguments.get_mut(1) {
                    to.clone_into(interface);
                }
            }
        }
        change
    }

    /// Makes the change; returns what the command printed. `sysfs` is used for settings in /sys.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason, [`Error::NoEthtool`], [`Error::NoAnswer`].
    pub fn apply(&self, sysfs: Option<&Sysfs>) -> Result<String, Error> {
        let refused = |reason| Error::Refused {
            command: self.to_string(),
            reason,
        };
        match self {
            Self::Set {
                interface,
                attribute,
                value,
            } => {
                let sysfs = sysfs.ok_or(Error::OtherNamespace)?;
                sysfs
                    .write(interface, attribute.file_name(), &value.to_string())
                    .map(|()| String::new())
                    .map_err(|error| refused(error.to_string()))
            }
            Self::Ethtool(arguments) => {
                // Nothing of the environment, so that it speaks English.
                let mut command = Command::new("ethtool");
                command.args(arguments).env_clear().env("PATH", SEARCH);
                self.run(&mut command, LIMIT)
            }
        }
    }

    /// Runs the program that makes the change, for at most `limit`.
    fn run(&self, command: &mut Command, limit: Duration) -> Result<String, Error> {
        let (shown, refused) = (self.to_string(), |reason| Error::Refused {
            command: self.to_string(),
            reason,
        });
        let output = child::output(command, limit).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::NoEthtool { command: shown },
            ErrorKind::TimedOut => Error::NoAnswer {
                command: shown,
                limit,
            },
            _ => refused(error.to_string()),
        })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(refused(said.trim().replace('\n', "; ")));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ethtool(arguments) => {
                f.write_str("ethtool")?;
                let mut words = arguments.iter();
                words.try_for_each(|word| write!(f, " {}", quote(word)))
            }
            Self::Set {
                interface,
                attribute,
                value,
            } => write!(f, "echo {value} > {}", quote(&attribute.path(interface))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_ended() {
        let change = Change::ethtool("-L eth0 combined 4");
        let mut command = Command::new("sh");
        command.args(["-c", "exec sleep 600"]);
        let error = change.run(&mut command, Duration::from_millis(50));
        let error = error.unwrap_err();
        assert!(matches!(error, Error::NoAnswer { .. }), "{error}");
        assert!(
            error.to_string().contains("ethtool -L eth0 combined 4"),
            "{error}"
        );
    }
}
