//! Modes of created files. In a process of its own, because the umask is per process.

use std::os::unix::fs::MetadataExt;

use nix::sys::stat::Mode;
use penstock_files::{Dir, NewDir};
use tempfile::TempDir;

#[test]
fn a_new_directory_has_its_mode_whatever_the_umask_is() {
    let new = NewDir {
        mode: 0o750,
        owner: None,
        group: None,
    };
    let top = TempDir::new().unwrap();
    for umask in [0, 0o077, 0o777] {
        let before = nix::sys::stat::umask(Mode::from_bits_truncate(umask));
        let path = top.path().join(format!("{umask:o}/logs"));
        let made = Dir::make(&path, &new);
        nix::sys::stat::umask(before);
        made.unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o750);
        let parent = path.parent().unwrap().metadata().unwrap();
        assert_eq!(parent.mode() & 0o7777, 0o755);
    }
}
