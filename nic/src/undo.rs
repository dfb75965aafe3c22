//! The changes to revert, in a file that outlives the process that made them.
//!
//! The file's lock tells that its owner lives; the kernel gives it up however that ends. Whoever
//! gets the lock next takes the changes back.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use penstock_files::{Dir, NewDir, Open};
use serde::{Deserialize, Serialize};
use serde_json::Deserializer;

use crate::{Change, Error, Facts, Sysfs};

/// Where the files are.
pub const DIRECTORY: &str = "/run/penstock";
/// The folder, if it is missing.
const FOLDER: NewDir = NewDir {
    mode: 0o755,
    owner: None,
    group: None,
};
/// Maximum size of the file, bytes: some thousand changes.
const MAX_TEXT: u64 = 1 << 20;
/// A driver may refuse changes while the kernel still closes a dead broker's sockets.
const RETRY_TIME: Duration = Duration::from_secs(3);
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Changes to one interface that are to be reverted.
#[derive(Debug)]
pub struct Undo {
    path: PathBuf,
    file: File,
    state: State,
}

/// What came of asking for the file.
#[derive(Debug)]
pub enum Taken {
    /// It is ours; its contents are from a process that has ended.
    Ours(Undo),
    /// Somebody who lives has it.
    Busy,
    /// There is none: nothing to take back.
    Missing,
}

#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Number and hardware address of the interface: another one may come to have its name.
    index: u32,
    address: String,
    /// What takes the changes back, in the order in which they were made.
    changes: Vec<Change>,
}

impl State {
    /// Behind the first value there may be the rest of a longer one. Nothing whole: whoever wrote it
    /// was killed before it did anything.
    fn of(text: &str) -> Self {
        let first = Deserializer::from_str(text).into_iter().next();
        first.and_then(Result::ok).unwrap_or_default()
    }

    fn text(&self) -> String {
        serde_json::to_string(self).expect("its parts are plain")
    }
}

impl Undo {
    /// Takes the file of an interface in `directory`, which is made if need be, for new changes.
    /// Waits a moment for one who is taking changes back.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn take(directory: &Path, interface: &str) -> Result<Taken, Error> {
        Self::after_a_moment(directory, interface, true)
    }

    /// Takes the file of an interface if there is one. Waits as [`Self::take`] does.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn find(directory: &Path, interface: &str) -> Result<Taken, Error> {
        Self::after_a_moment(directory, interface, false)
    }

    fn after_a_moment(directory: &Path, interface: &str, make: bool) -> Result<Taken, Error> {
        let start = Instant::now();
        loop {
            match Self::open(directory, interface, make, false)? {
                Taken::Busy if start.elapsed() < 2 * RETRY_TIME => thread::sleep(RETRY_PAUSE),
                taken => return Ok(taken),
            }
        }
    }

    /// Waits until the process that holds the file of an interface has ended.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn wait(directory: &Path, interface: &str) -> Result<Taken, Error> {
        Self::open(directory, interface, false, true)
    }

    fn open(directory: &Path, interface: &str, make: bool, wait: bool) -> Result<Taken, Error> {
        let path = path_of(directory, interface)?;
        let failed = |action| {
            let path = path.clone();
            move |source| Error::File {
                action,
                path,
                source,
            }
        };
        // Root executes what the file contains, so no other user may have been able to change it.
        let folder = match make {
            true => Dir::make(directory, &FOLDER),
            false => Dir::open(directory),
        };
        let folder = match folder {
            Err(error) if !make && error.kind() == io::ErrorKind::NotFound => {
                return Ok(Taken::Missing);
            }
            folder => folder.map_err(failed("use the folder of"))?,
        };
        let name = path.file_name().unwrap_or_default();
        let how = match make {
            true => Open::Make(0o600),
            false => Open::Write,
        };
        loop {
            let opened = folder.file(name, how);
            let file = match opened {
                Err(error) if !make && error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Taken::Missing);
                }
                opened => opened.map_err(failed("open"))?,
            };
            if wait {
                lock(&file).map_err(failed("lock"))?;
            } else {
                match file.try_lock() {
                    Ok(()) => {}
                    Err(TryLockError::WouldBlock) => return Ok(Taken::Busy),
                    Err(TryLockError::Error(error)) => return Err(failed("lock")(error)),
                }
            }
            // Whoever had it may have removed it meanwhile.
            if !folder.has(name, &file).map_err(failed("look at"))? {
                continue;
            }
            let text = io::read_to_string((&file).take(MAX_TEXT)).map_err(failed("read"))?;
            let state = State::of(&text);
            return Ok(Taken::Ours(Self { path, file, state }));
        }
    }

    /// Whether there is nothing to take back.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.changes.is_empty()
    }

    /// Remembers what takes a change of `facts`' interface back; before the change is made, so that
    /// no crash comes between.
    ///
    /// # Errors
    /// [`Error::File`]: the change must not be made then.
    pub fn remember(&mut self, facts: &Facts, reverse: Change) -> Result<(), Error> {
        self.state.index = facts.index;
        self.state.address.clone_from(&facts.address);
        self.state.changes.push(reverse);
        self.write()
    }

    /// Forgets the last one: its change was refused.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn forget_last(&mut self) -> Result<(), Error> {
        self.state.changes.pop();
        self.write()
    }

    /// The index of the interface that was changed.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.state.index
    }

    /// Takes all changes back, the last one first, and forgets those that it could. `now` are the
    /// facts of the interface, if it is still there, under whatever name; nothing is done to another
    /// one. Settings in /sys are made through `sysfs`.
    ///
    /// Returns each command with what came of it.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn restore(
        &mut self,
        now: Option<&Facts>,
        sysfs: Option<&Sysfs>,
    ) -> Result<Vec<(Change, Option<Error>)>, Error> {
        let is_same =
            |facts: &Facts| facts.index == self.state.index && facts.address == self.state.address;
        let mut done = Vec::new();
        let changes = std::mem::take(&mut self.state.changes);
        if let Some(now) = now.filter(|facts| is_same(facts)) {
            let start = Instant::now();
            for change in changes.into_iter().rev() {
                let change = change.renamed(&now.interface);
                let failure = retry(start, || change.apply(sysfs)).err();
                if failure.is_some() {
                    self.state.changes.insert(0, change.clone());
                }
                done.push((change, failure));
            }
        }
        self.write()?;
        Ok(done)
    }

    /// Removes the file, unless there is still something in it.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn remove(self) -> Result<(), Error> {
        if !self.is_empty() {
            return Ok(());
        }
        fs::remove_file(&self.path).map_err(|source| Error::File {
            action: "remove",
            path: self.path,
            source,
        })
    }

    fn write(&self) -> Result<(), Error> {
        let text = self.state.text();
        // In this order, so that one who is killed in between leaves the old or the new state.
        let written = self.file.write_all_at(text.as_bytes(), 0);
        let written = written.and_then(|()| self.file.set_len(text.len() as u64));
        written.map_err(|source| Error::File {
            action: "write",
            path: self.path.clone(),
            source,
        })
    }
}

/// One file for each interface of each network namespace: all of them may share /run.
fn path_of(directory: &Path, interface: &str) -> Result<PathBuf, Error> {
    let namespace = fs::metadata("/proc/self/ns/net").map_err(|source| Error::File {
        action: "tell the network namespace for a file in",
        path: directory.to_owned(),
        source,
    })?;
    Ok(directory.join(format!("nic-{}-{interface}.json", namespace.ino())))
}

fn lock(file: &File) -> io::Result<()> {
    loop {
        match file.lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Retries until [`RETRY_TIME`] after `start`.
fn retry<T, E>(start: Instant, mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    loop {
        match attempt() {
            Err(_) if start.elapsed() < RETRY_TIME => thread::sleep(RETRY_PAUSE),
            result => return result,
        }
    }
}

/// A file in any state, driven by libFuzzer in `fuzz/` and by a test over its corpus: what is read from
/// it is what was written, whatever an earlier and longer one left behind it.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let state = State::of(&text);
    assert_eq!(State::of(&(state.text() + &text)), state);
    for change in &state.changes {
        assert!(!change.to_string().is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn kept_files_whole_and_cut_short() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/undo");
        for file in fs::read_dir(corpus).unwrap() {
            let input = fs::read(file.unwrap().path()).unwrap();
            (0..=input.len()).for_each(|len| fuzz(&input[..len]));
        }
    }

    fn ours(taken: Taken) -> Undo {
        match taken {
            Taken::Ours(undo) => undo,
            other => panic!("{other:?}"),
        }
    }

    fn facts() -> Facts {
        Facts::read("lo").expect("every namespace has one")
    }

    /// ethtool that is asked for nothing but its version.
    fn harmless() -> Change {
        Change::ethtool("--version")
    }

    #[test]
    fn the_lock_tells_whether_the_owner_lives() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("penstock");
        assert!(matches!(Undo::find(&at, "lo").unwrap(), Taken::Missing));
        assert!(matches!(Undo::wait(&at, "lo").unwrap(), Taken::Missing));
        let mut first = ours(Undo::take(&at, "lo").unwrap());
        first.remember(&facts(), harmless()).unwrap();
        assert!(matches!(Undo::find(&at, "lo").unwrap(), Taken::Busy));
        let waiting = thread::spawn({
            let at = at.clone();
            move || ours(Undo::wait(&at, "lo").unwrap())
        });
        // Gone without a word.
        drop(first);
        let second = waiting.join().unwrap();
        assert_eq!(second.state.changes, [harmless()]);
        // Another interface has a file of its own.
        assert!(matches!(Undo::find(&at, "eth7").unwrap(), Taken::Missing));
    }

    /// Root runs what is in the file.
    #[test]
    fn files_that_others_may_have_made_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("penstock");
        let undo = ours(Undo::take(&at, "lo").unwrap());
        let (path, aside) = (undo.path.clone(), dir.path().join("aside"));
        drop(undo);
        fs::rename(&path, &aside).unwrap();
        std::os::unix::fs::symlink(&aside, &path).unwrap();
        for taken in [Undo::take(&at, "lo"), Undo::find(&at, "lo")] {
            let said = taken.unwrap_err().to_string();
            assert!(said.contains("symbolic link"), "{said}");
        }
        fs::remove_file(&path).unwrap();
        fs::rename(&aside, &path).unwrap();
        fs::set_permissions(&at, PermissionsExt::from_mode(0o777)).unwrap();
        for taken in [Undo::take(&at, "lo"), Undo::find(&at, "lo")] {
            let said = taken.unwrap_err().to_string();
            assert!(said.contains("chmod go-w"), "{said}");
        }
        assert!(matches!(
            Undo::find(&at, "../lo"),
            Err(_) | Ok(Taken::Missing)
        ));
    }

    #[test]
    fn what_is_taken_back_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut undo = ours(Undo::take(dir.path(), "lo").unwrap());
        undo.remember(&facts(), harmless()).unwrap();
        undo.remember(&facts(), harmless()).unwrap();
        undo.forget_last().unwrap();
        let done = undo.restore(Some(&facts()), None).unwrap();
        assert_eq!(done.len(), 1);
        assert!(undo.is_empty());
        let path = undo.path.clone();
        undo.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_cannot_be_taken_back_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut undo = ours(Undo::take(dir.path(), "lo").unwrap());
        let nonsense = Change::ethtool("--no-such-option lo");
        undo.remember(&facts(), harmless()).unwrap();
        undo.remember(&facts(), nonsense.clone()).unwrap();
        let done = undo.restore(Some(&facts()), None).unwrap();
        // The last one first.
        assert_eq!(done[0].0, nonsense);
        assert!(done[0].1.is_some());
        let path = undo.path.clone();
        undo.remove().unwrap();
        assert!(path.exists());
        let again = ours(Undo::take(dir.path(), "lo").unwrap());
        assert_eq!(again.state.changes[0], nonsense);
    }

    #[test]
    fn another_interface_of_the_same_name_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut undo = ours(Undo::take(dir.path(), "lo").unwrap());
        let earlier = Facts {
            address: "02:00:00:00:00:07".to_owned(),
            ..facts()
        };
        undo.remember(&earlier, harmless()).unwrap();
        assert!(undo.restore(Some(&facts()), None).unwrap().is_empty());
        assert!(undo.is_empty());
        undo.remember(&earlier, harmless()).unwrap();
        assert!(undo.restore(None, None).unwrap().is_empty());
    }

    #[test]
    fn who_is_killed_while_writing_leaves_the_old_or_the_new_state() {
        let dir = tempfile::tempdir().unwrap();
        let mut undo = ours(Undo::take(dir.path(), "lo").unwrap());
        undo.remember(&facts(), harmless()).unwrap();
        let path = undo.path.clone();
        drop(undo);
        let text = fs::read_to_string(&path).unwrap();
        for (left, changes) in [
            (format!("{text}o longer\"]}}]}}"), 1),
            (text[..9].into(), 0),
        ] {
            fs::write(&path, left).unwrap();
            let undo = ours(Undo::take(dir.path(), "lo").unwrap());
            assert_eq!(undo.state.changes.len(), changes);
        }
    }
}
