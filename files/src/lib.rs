//! Opens files and directories so that no other local user decides which ones they are.
//!
//! A path is walked component by component, each opened relative to the one before it and looked at
//! while it is open, so what was checked is what is used. Symbolic links on the way are followed only
//! if root or this user made them. A link at the end of a file's path is followed only by [`open_to_read`],
//! under the same rule.
//!
//! - [`Dir`] is a directory that nobody else can write to, also by way of its parents;
//! - [`displace`] makes room for a directory under a name that another user can take first;
//! - [`Trusted`] adds users to those whose directories and links count as our own;
//! - [`open_to_write`] is for files that a user names, such as reports;
//! - [`open_to_read`] is for files that decide something, such as keys;
//! - [`open_regular`] is for files that are only looked at.
//!
//! A refusal is an [`io::Error`] whose text says whose the thing is and what to do; callers put the
//! path and the action before it.

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

/// A user for people: the name if there is one.
fn user_name(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name,
        _ => format!("user {uid}"),
    }
}

fn refuse<T>(text: String) -> io::Result<T> {
    Err(io::Error::other(text))
}
