//! Keys in files: one a line, with a name and the topics that it may publish to or read.
//!
//! ```text
//! # name        secret, 64 hexadecimal digits     topics, * at the end stands for anything
//! collector-eu  4f0c...                           trades.* audit
//! dashboard     91b2...                           read:trades.*
//! archive       77d0...                           register:trades.*
//! ```
//!
//! A broker has one such file for all its peers, a publisher or subscriber one with its own line; topics in that line
//! have no effect.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use zeroize::Zeroizing;

use super::key::{Key, KeyId, SECRET_LEN, generate};
use super::pattern::TopicPattern;

/// Longest file that is read, bytes: some ten thousand keys.
const MAX_FILE: u64 = 1 << 20;
/// Longest name of a key, bytes.
const MAX_NAME: usize = 64;

/// A file of keys cannot be used.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("cannot read the keys in {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Others than its owner may read or change it.
    #[error(
        "{path} has mode {mode:03o}, so that others may read or change the keys in it: chmod 600 {path}"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A line is no key.
    #[error("{path}, line {line}: {what}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// There are no keys in it, or more than the one that there should be.
    #[error("{path} has {count} keys, not {wanted}; penstock-broker --keygen makes one")]
    Count {
        /// The file.
        path: PathBuf,
        /// Keys in it.
        count: usize,
        /// How many there should be.
        wanted: &'static str,
    },
    /// There is no chance to make a key.
    #[error("this host gives no random numbers: {0}")]
    Random(getrandom::Error),
}

/// A key, and what its holder may do.
#[derive(Debug)]
pub struct Grant {
    /// The key's name, for logs.
    pub name: String,
    /// The key.
    pub key: Key,
    publishes: Vec<TopicPattern>,
    reads: Vec<TopicPattern>,
    registers: Vec<TopicPattern>,
}

impl Grant {
    fn is_empty(&self) -> bool {
        self.publishes.is_empty() && self.reads.is_empty() && self.registers.is_empty()
    }

    /// Whether the holder may publish to a topic.
    #[must_use]
    pub fn permits(&self, topic: &str) -> bool {
        self.publishes.iter().any(|pattern| pattern.matches(topic))
    }

    /// Whether the holder may read a topic.
    #[must_use]
    pub fn permits_reading(&self, topic: &str) -> bool {
        let mut reads = self.reads.iter().chain(&self.registers);
        reads.any(|pattern| pattern.matches(topic))
    }

    /// Whether the holder may read a topic as a registered reader, for which publishers wait.
    #[must_use]
    pub fn permits_registering(&self, topic: &str) -> bool {
        self.registers.iter().any(|pattern| pattern.matches(topic))
    }
}

/// The keys that a broker takes, as of one reading of their file.
#[derive(Debug)]
pub struct Grants {
    by_id: HashMap<KeyId, Arc<Grant>>,
    /// Stands in for a key that is not known, so that a handshake costs the same with any number.
    decoy: Key,
}

impl Grants {
    fn read(path: &Path, owners: &[u32]) -> Result<Self, KeyFileError> {
        Self::parse(path, &read_secret_file(path, owners)?)
    }

    /// The keys in the text of a file; `path` is its name in errors.
    ///
    /// # Errors
    /// What is wrong with which line.
    pub fn parse(path: &Path, text: &str) -> Result<Self, KeyFileError> {
        let decoy = Key::new(&*generate().map_err(KeyFileError::Random)?);
        let mut by_id = HashMap::new();
        for (line, grant) in parse_lines(path, text)? {
            let wrong = |what| KeyFileError::Line {
                path: path.to_owned(),
                line,
                what,
            };
            if grant.is_empty() {
                let name = &grant.name;
                return Err(wrong(format!(
                    "key {name} may not publish to any topic or read any: add topics after the secret, such as trades.* or read:trades.*"
                )));
            }
            if by_id
                .values()
                .any(|other: &Arc<Grant>| other.name == grant.name)
            {
                return Err(wrong(format!("there is a key {} already", grant.name)));
            }
            if let Some(same) = by_id.insert(*grant.key.id(), Arc::new(grant)) {
                return Err(wrong(format!("the secret is that of key {}", same.name)));
            }
        }
        if by_id.is_empty() {
            return Err(KeyFileError::Count {
                path: path.to_owned(),
                count: 0,
                wanted: "one or more",
            });
        }
        Ok(Self { by_id, decoy })
    }

    /// The key with this id if it is known, otherwise one that no publisher holds.
    #[must_use]
    pub fn find(&self, id: &KeyId) -> (Option<&Arc<Grant>>, &Key) {
        match self.by_id.get(id) {
            Some(grant) => (Some(grant), &grant.key),
            None => (None, &self.decoy),
        }
    }

    /// How many keys there are; never 0.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "they are never empty")]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }
}

/// The keys that a broker takes; their file can be read again.
#[derive(Debug)]
pub struct Keys {
    path: PathBuf,
    owners: Vec<u32>,
    now: Mutex<Arc<Grants>>,
}

impl Keys {
    /// Loads a broker's key file, which must belong to this user, to root or to one of `owners`.
    ///
    /// # Errors
    /// [`KeyFileError`] names the line and what to do.
    pub fn load(path: &Path, owners: &[u32]) -> Result<Self, KeyFileError> {
        Ok(Self {
            path: path.to_owned(),
            owners: owners.to_vec(),
            now: Mutex::new(Arc::new(Grants::read(path, owners)?)),
        })
    }

    /// Reads the file again; what was read before stays in force if that fails. Returns the number
    /// of keys.
    ///
    /// # Errors
    /// As [`Self::load`].
    ///
    /// # Panics
    /// Never: no thread panics while it holds the lock.
    pub fn reload(&self) -> Result<usize, KeyFileError> {
        let grants = Grants::read(&self.path, &self.owners)?;
        let count = grants.len();
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(grants);
        Ok(count)
    }

    /// The keys as of now.
    ///
    /// # Panics
    /// Never: no thread panics while it holds the lock.
    #[must_use]
    pub fn grants(&self) -> Arc<Grants> {
        Arc::clone(&self.now.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A publisher's key, the only one in its file.
///
/// ```
/// use std::{fs, fs::Permissions, os::unix::fs::PermissionsExt};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("key");
/// // What `penstock-broker --keygen` prints.
/// fs::write(&path, penstock_auth::describe("collector")?.as_bytes())?;
/// fs::set_permissions(&path, Permissions::from_mode(0o600))?;
/// let key = penstock_auth::read_key(&path)?;
/// assert!(!key.id().is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`KeyFileError`] names the line and what to do.
pub fn read_key(path: &Path) -> Result<Key, KeyFileError> {
    let mut lines = parse_lines(path, &read_secret_file(path, &[])?)?;
    match (lines.pop(), lines.len()) {
        (Some((_, grant)), 0) => Ok(grant.key),
        (last, rest) => Err(KeyFileError::Count {
            path: path.to_owned(),
            count: rest + usize::from(last.is_some()),
            wanted: "one",
        }),
    }
}

/// The line of a new key that may publish to any topic.
///
/// # Errors
/// [`KeyFileError::Random`] if the system gives no random numbers.
///
/// # Panics
/// If the name is none that [`read_key`] would take.
pub fn describe(name: &str) -> Result<Zeroizing<String>, KeyFileError> {
    check_name(name).expect("names are checked before keys are made");
    let secret = generate().map_err(KeyFileError::Random)?;
    let mut line = Zeroizing::new(String::with_capacity(name.len() + 2 * SECRET_LEN + 4));
    line.push_str(name);
    line.push(' ');
    for byte in secret.iter() {
        for digit in [byte >> 4, byte & 0xf] {
            line.push(char::from_digit(digit.into(), 16).expect("four bits"));
        }
    }
    line.push_str(" *\n");
    Ok(line)
}

fn parse_lines(path: &Path, text: &str) -> Result<Vec<(usize, Grant)>, KeyFileError> {
    let mut grants = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        let grant = parse_line(line).map_err(|what| KeyFileError::Line {
            path: path.to_owned(),
            line: index + 1,
            what,
        })?;
        grants.push((index + 1, grant));
    }
    Ok(grants)
}

/// Checks owner and mode on the open file, so that the checked file is the one that is read.
fn read_secret_file(path: &Path, owners: &[u32]) -> Result<Zeroizing<String>, KeyFileError> {
    let read = |source| KeyFileError::Read {
        path: path.to_owned(),
        source,
    };
    let file = penstock_files::open_to_read(path, owners).map_err(read)?;
    let about = file.metadata().map_err(read)?;
    if about.len() > MAX_FILE {
        let what = format!("it is larger than {MAX_FILE} bytes");
        return Err(read(io::Error::other(what)));
    }
    let mode = about.mode() & 0o777;
    // So systemd's LoadCredential= makes them, with an access control list for the service's user.
    let credential = (mode, about.uid(), about.gid()) == (0o440, 0, 0);
    if mode & 0o077 != 0 && !credential {
        return Err(KeyFileError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    // As long as it can become, so that no copy of the secrets is left behind in memory.
    let mut text = Zeroizing::new(String::with_capacity(MAX_FILE as usize + 1));
    file.take(MAX_FILE)
        .read_to_string(&mut text)
        .map_err(read)?;
    Ok(text)
}

/// Errors never quote the line: any part of it may be a secret.
fn parse_line(line: &str) -> Result<Grant, String> {
    let mut words = line.split_whitespace();
    let name = words.next().filter(|name| is_name(name));
    let name = name.ok_or_else(|| {
        let rule = name_rule();
        format!("it does not begin with the name of a key: {rule}")
    })?;
    let secret = words.next().and_then(parse_secret).ok_or_else(|| {
        let digits = 2 * SECRET_LEN;
        format!("the name is not followed by a secret of {digits} hexadecimal digits")
    })?;
    let mut grant = Grant {
        name: name.to_owned(),
        key: Key::new(&secret),
        publishes: Vec::new(),
        reads: Vec::new(),
        registers: Vec::new(),
    };
    for (index, word) in words.enumerate() {
        let (list, pattern) = match word.split_once(':') {
            Some(("read", pattern)) => (&mut grant.reads, pattern),
            Some(("register", pattern)) => (&mut grant.registers, pattern),
            Some(("publish", pattern)) => (&mut grant.publishes, pattern),
            _ => (&mut grant.publishes, word),
        };
        let number = index + 1;
        list.push(pattern.parse().map_err(|_| {
            format!(
                "pattern {number} after the secret is neither a topic name nor a prefix followed by *, with publish:, read: or register: before it or not"
            )
        })?);
    }
    Ok(grant)
}

pub(crate) fn parse_secret(digits: &str) -> Option<Zeroizing<[u8; SECRET_LEN]>> {
    let digits = digits.as_bytes();
    if digits.len() != 2 * SECRET_LEN {
        return None;
    }
    let mut secret = Zeroizing::new([0; SECRET_LEN]);
    for (byte, pair) in secret.iter_mut().zip(digits.as_chunks::<2>().0) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(secret)
}

/// Whether a key may have this name.
///
/// # Errors
/// The rule.
pub fn check_name(name: &str) -> Result<(), String> {
    match is_name(name) {
        true => Ok(()),
        false => Err(format!("{name:?} is not a valid key name: {}", name_rule())),
    }
}

fn name_rule() -> String {
    format!("1 to {MAX_NAME} of A-Z a-z 0-9 . _ - that do not form a secret")
}

/// A name must not look like a secret, because names appear in logs.
fn is_name(name: &str) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    (1..=MAX_NAME).contains(&name.len())
        && name.as_bytes().iter().all(plain)
        && parse_secret(name).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    const ONE: &str = "1111111111111111111111111111111111111111111111111111111111111111";
    const TWO: &str = "22222222222222222222222222222222222222222222222222222222222222AB";

    fn file(text: &str) -> (TempDir, PathBuf) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("keys");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        (dir, path)
    }

    fn error(text: &str) -> String {
        let (_dir, path) = file(text);
        Keys::load(&path, &[]).unwrap_err().to_string()
    }

    #[test]
    fn keys_are_found_by_number_and_permit_their_topics() {
        let (_dir, path) = file(&format!("# all\n\neu {ONE} trades.* audit\n us\t{TWO} *\n"));
        let grants = Keys::load(&path, &[]).unwrap().grants();
        assert_eq!(grants.len(), 2);
        let key = Key::new(&parse_secret(ONE).unwrap());
        let (grant, found) = grants.find(key.id());
        let grant = grant.unwrap();
        assert_eq!((grant.name.as_str(), found.id()), ("eu", key.id()));
        for (topic, allowed) in [
            ("trades.eu", true),
            ("trades.", true),
            ("trades", false),
            ("audit", true),
            ("audit2", false),
        ] {
            assert_eq!(grant.permits(topic), allowed, "{topic}");
        }
        let us = Key::new(&parse_secret(TWO).unwrap());
        assert!(grants.find(us.id()).0.unwrap().permits("anything"));
        let (none, decoy) = grants.find(&[7; 16]);
        assert!(none.is_none() && decoy.id() != key.id() && decoy.id() != us.id());
    }

    #[test]
    fn rights_to_read_and_to_publish_are_apart() {
        let (_dir, path) = file(&format!(
            "eu {ONE} a read:b publish:c register:d.*\nus {TWO} read:*\n"
        ));
        let grants = Keys::load(&path, &[]).unwrap().grants();
        let grant_of = |digits| {
            let key = Key::new(&parse_secret(digits).unwrap());
            Arc::clone(grants.find(key.id()).0.unwrap())
        };
        let (eu, us) = (grant_of(ONE), grant_of(TWO));
        for (topic, publishes, reads) in [
            ("a", true, false),
            ("b", false, true),
            ("c", true, false),
            ("d.x", false, true),
        ] {
            assert_eq!(
                (eu.permits(topic), eu.permits_reading(topic)),
                (publishes, reads),
                "{topic}"
            );
            assert!(us.permits_reading(topic) && !us.permits(topic));
            assert_eq!(eu.permits_registering(topic), topic == "d.x");
            assert!(!us.permits_registering(topic));
        }
    }

    #[test]
    fn wrong_files_say_what_to_do() {
        for (text, words) in [
            (
                "".to_owned(),
                "has 0 keys, not one or more; penstock-broker --keygen",
            ),
            (
                "eu".to_owned(),
                "line 1: the name is not followed by a secret of 64",
            ),
            (
                format!("eu {} *", &ONE[1..]),
                "not followed by a secret of 64",
            ),
            (
                format!("eu {}g *", &ONE[1..]),
                "not followed by a secret of 64",
            ),
            (format!("eu {ONE}"), "may not publish to any topic"),
            (
                format!("e/u {ONE} *"),
                "begin with the name of a key: 1 to 64",
            ),
            (
                format!("{ONE} eu *"),
                "begin with the name of a key: 1 to 64",
            ),
            (ONE.to_owned(), "that do not form a secret"),
            (format!("eu * {ONE}"), "not followed by a secret of 64"),
            (
                format!("eu {ONE} a a*b"),
                "pattern 2 after the secret is neither a topic",
            ),
            (
                format!("eu {ONE} .hidden"),
                "pattern 1 after the secret is neither a topic",
            ),
            (format!("eu {ONE} /{ONE}"), "is neither a topic name"),
            (
                format!("eu {ONE} *\neu {TWO} *"),
                "line 2: there is a key eu already",
            ),
            (
                format!("eu {ONE} *\nus {ONE} *"),
                "line 2: the secret is that of key eu",
            ),
        ] {
            let said = error(&text);
            assert!(said.contains(words), "{text}: {said}");
            assert!(!said.contains("1111"), "the text contains a secret: {said}");
        }
    }

    #[test]
    fn files_that_others_may_read_are_refused() {
        let (_dir, path) = file(&format!("eu {ONE} *"));
        for mode in [0o640, 0o604, 0o660, 0o644, 0o620, 0o444] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let said = read_key(&path).unwrap_err().to_string();
            assert!(said.contains(&format!("mode {mode:03o}")), "{said}");
            assert!(
                said.contains(&format!("chmod 600 {}", path.display())),
                "{said}"
            );
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        read_key(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o440)).unwrap();
        let about = path.metadata().unwrap();
        let roots = (about.uid(), about.gid()) == (0, 0);
        assert_eq!(read_key(&path).is_ok(), roots, "mode 440");
        assert!(matches!(
            read_key(_dir.path()),
            Err(KeyFileError::Read { .. })
        ));
    }

    /// Opening a FIFO would block, and the file's owner could change its keys.
    #[test]
    fn files_that_other_users_control_are_refused() {
        let (dir, path) = file(&format!("eu {ONE} *"));
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let said = read_key(&fifo).unwrap_err().to_string();
        assert!(said.contains("a FIFO"), "{said}");
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        std::os::unix::fs::chown(&path, Some(54_321), None).unwrap();
        let said = Keys::load(&path, &[]).unwrap_err().to_string();
        assert!(said.contains("user 54321's"), "{said}");
        Keys::load(&path, &[54_321]).unwrap();
    }

    #[test]
    fn a_publisher_can_read_a_new_key() {
        let (_dir, path) = file(&describe("eu-1").unwrap());
        let key = read_key(&path).unwrap();
        let grants = Keys::load(&path, &[]).unwrap().grants();
        let grant = grants.find(key.id()).0.unwrap();
        assert!(grant.name == "eu-1" && grant.permits("t"));
        fs::write(&path, format!("a {ONE}\nb {TWO}")).unwrap();
        assert!(
            read_key(&path)
                .unwrap_err()
                .to_string()
                .contains("has 2 keys, not one")
        );
    }

    #[test]
    fn an_invalid_file_changes_nothing_on_reload() {
        let (_dir, path) = file(&format!("eu {ONE} *"));
        let keys = Keys::load(&path, &[]).unwrap();
        let key = Key::new(&parse_secret(ONE).unwrap());
        fs::write(&path, "nonsense").unwrap();
        keys.reload().unwrap_err();
        assert!(keys.grants().find(key.id()).0.is_some());
        fs::write(&path, format!("us {TWO} *")).unwrap();
        assert_eq!(keys.reload().unwrap(), 1);
        assert!(keys.grants().find(key.id()).0.is_none());
    }

    proptest! {
        #[test]
        fn arbitrary_files_never_panic(text in "([ -~]{0,80}\n){0,5}", valid: bool) {
            let text = if valid { format!("eu {ONE} {text}") } else { text };
            let (_dir, path) = file(&text);
            let _ = Keys::load(&path, &[]);
            let _ = read_key(&path);
        }
    }
}
