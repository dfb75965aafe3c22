//! Network namespaces of this host: those with a name, and those that processes are in.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use super::settings::Settings;
use super::sockets::Diag;

/// Where `ip netns` keeps its handles.
const HANDLES: &str = "/run/netns";
/// Handle of the namespace that this program runs in.
pub const OWN: &str = "/proc/self/ns/net";

/// A namespace that can be asked.
#[derive(Debug)]
pub struct Namespace {
    /// Inode of its handle, which is its identity.
    pub id: u64,
    /// Where it can be entered.
    pub handle: PathBuf,
    /// Lists its sockets.
    pub diag: Diag,
    /// Its settings of TCP.
    pub settings: Settings,
}

/// The identity of a handle's namespace.
pub fn id_of(handle: &Path) -> Result<u64> {
    let metadata = fs::metadata(handle);
    Ok(metadata
        .with_context(|| format!("cannot see {}", handle.display()))?
        .ino())
}

/// The handle of a process's namespace.
pub fn handle_of(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// Every namespace that can be seen, each with a handle: this program's own is among them.
pub fn all() -> BTreeMap<u64, PathBuf> {
    let mut handles = vec![PathBuf::from(OWN)];
    handles.extend(entries(HANDLES));
    let processes = entries("/proc").filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
    });
    handles.extend(processes.map(|path| path.join("ns/net")));
    let mut found = BTreeMap::new();
    for handle in handles {
        // What cannot be seen, or has gone, is none that could be asked.
        if let Ok(id) = id_of(&handle) {
            found.entry(id).or_insert(handle);
        }
    }
    found
}

fn entries(folder: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let list = fs::read_dir(folder).into_iter().flatten();
    list.filter_map(|entry| Some(entry.ok()?.path()))
}

impl Namespace {
    /// Opens the namespace of a handle.
    pub fn open(handle: &Path) -> Result<Self> {
        let id = id_of(handle)?;
        inside(handle, || {
            Ok(Self {
                id,
                handle: handle.to_owned(),
                diag: Diag::open()?,
                settings: Settings::read(),
            })
        })
    }
}

/// Asks something inside the namespace of a handle, from a thread that goes there and ends: the caller
/// stays where it is.
pub fn inside<T: Send>(handle: &Path, ask: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    if id_of(Path::new(OWN))? == id_of(handle)? {
        return ask();
    }
    let file = File::open(handle).with_context(|| format!("cannot open {}", handle.display()))?;
    let visit = move || {
        setns(file, CloneFlags::CLONE_NEWNET).context(
            "cannot enter its network namespace, which takes CAP_SYS_ADMIN: run with sudo",
        )?;
        ask()
    };
    thread::scope(|scope| {
        let visitor = scope.spawn(visit);
        visitor.join().map_err(|_| anyhow!("a thread panicked"))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_namespace_is_among_all_and_can_be_asked() {
        let all = all();
        let handle = &all[&id_of(Path::new(OWN)).unwrap()];
        let namespace = Namespace::open(handle).unwrap();
        let mine = id_of(&handle_of(std::process::id())).unwrap();
        assert_eq!(namespace.id, mine);
        namespace.diag.sockets().unwrap();
    }
}
