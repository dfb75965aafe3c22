//! Opens files and directories so that no other local user can redirect the access.
//!
//! A path is walked component by component. Each component is opened relative to the one before and
//! checked while open, so the checked object is the one used. Symbolic links on the way are followed
//! only if root or this user made them. A link at the end of a file's path is followed only by
//! [`open_to_read`], under the same rule.
//!
//! - [`Dir`] is a directory that no other user can write to, also not through its parents;
//! - [`displace`] frees a name for a directory that another user may have taken first;
//! - [`Trusted`] adds users whose directories and links count as our own;
//! - [`open_to_write`] is for files that a user names, such as reports;
//! - [`open_to_read`] is for files with security-relevant contents, such as keys;
//! - [`open_regular`] is for files that are only inspected.
//!
//! A refusal is an [`io::Error`] whose text names the owner and the remedy; callers prepend the path
//! and the action.
//!
//! ```
//! use std::ffi::OsStr;
//! use std::io::Write;
//! use penstock_files::{Dir, NewDir, Open, open_to_write};
//!
//! # let temp = tempfile::tempdir()?;
//! # let base = temp.path();
//! let mut report = open_to_write(&base.join("report.json"), 0o644)?;
//! report.write_all(b"{}")?;
//!
//! // No other user can replace what is in this directory, or redirect a path into it.
//! let dir = Dir::make(&base.join("logs"), &NewDir { mode: 0o700, owner: None, group: None })?;
//! let log = dir.file(OsStr::new("trades.log"), Open::New(0o600))?;
//! assert!(dir.has(OsStr::new("trades.log"), &log)?);
//!
//! std::os::unix::fs::symlink("report.json", base.join("link"))?;
//! assert!(open_to_write(&base.join("link"), 0o644).is_err(), "a link is not followed");
//! # Ok::<(), std::io::Error>(())
//! ```

mod dir;
mod displace;
mod file;
mod trust;
mod walk;

pub use dir::{Dir, NewDir};
pub use displace::{Displaced, displace};
pub use file::{Open, open_regular, open_to_read, open_to_write};
pub use trust::Trusted;

use std::io;

use nix::unistd::{Uid, User};

/// A user as shown in messages: the name, if there is one.
fn user_name(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name,
        _ => format!("user {uid}"),
    }
}

fn refuse<T>(text: String) -> io::Result<T> {
    Err(io::Error::other(text))
}
