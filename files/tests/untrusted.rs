//! What another local user may have put in the way.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::{geteuid, mkfifo};
use penstock_files::{Dir, NewDir, Open, open_to_read, open_to_write};
use tempfile::TempDir;

/// A user who is neither root nor the one who runs the tests.
const STRANGER: u32 = 54_321;

const NEW: NewDir = NewDir {
    mode: 0o750,
    owner: None,
    group: None,
};

fn name(name: &str) -> &OsStr {
    OsStr::new(name)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: std::io::Result<T>, words: &str) {
    let text = result.unwrap_err().to_string();
    assert!(text.contains(words), "{text}");
}

#[test]
fn a_directory_that_others_may_write_to_is_refused() {
    let top = TempDir::new().unwrap();
    let dir = top.path().join("logs");
    Dir::make(&dir, &NEW).unwrap();
    for (mode, ok) in [
        (0o700, true),
        (0o755, true),
        (0o777, false),
        (0o702, false),
        (0o1777, true),
    ] {
        set_mode(&dir, mode);
        let opened = Dir::open(&dir);
        assert_eq!(opened.is_ok(), ok, "{mode:o}: {opened:?}");
    }
    // Whoever may write to a parent can put another directory in the place of this one.
    set_mode(&dir, 0o700);
    set_mode(top.path(), 0o777);
    refused(Dir::open(&dir), "chmod go-w");
    set_mode(top.path(), 0o1777);
    Dir::open(&dir).unwrap();
    set_mode(top.path(), 0o700);
}

#[test]
fn links_and_names_of_ours_lead_to_a_directory() {
    let top = TempDir::new().unwrap();
    let dir = top.path().join("a/b");
    Dir::make(&dir, &NEW).unwrap();
    symlink("a", top.path().join("relative")).unwrap();
    symlink(top.path(), top.path().join("absolute")).unwrap();
    symlink("loop", top.path().join("loop")).unwrap();
    for way in [
        "relative/b",
        "absolute/a/b",
        "a/../a/./b",
        "relative/../a/b/",
    ] {
        let dir = Dir::open(&top.path().join(way)).unwrap();
        dir.file(name("here"), Open::Make(0o600)).unwrap();
    }
    assert!(dir.join("here").exists());
    refused(Dir::open(&top.path().join("loop")), "symbolic links");
    fs::write(top.path().join("text"), "").unwrap();
    refused(Dir::make(&top.path().join("text"), &NEW), "directory");
    refused(Dir::make(&top.path().join("text/b"), &NEW), "directory");
    refused(Dir::open(&top.path().join("missing")), "No such file");
}

#[test]
fn only_regular_files_with_one_name_are_opened() {
    let top = TempDir::new().unwrap();
    let victim = top.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let dir = Dir::make(&top.path().join("logs"), &NEW).unwrap();
    let at = |file: &str| top.path().join("logs").join(file);
    symlink(&victim, at("link")).unwrap();
    symlink(top.path().join("nothing"), at("dangling")).unwrap();
    fs::hard_link(&victim, at("hard")).unwrap();
    mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
    fs::create_dir(at("dir")).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    for (file, words) in [
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("hard", "2 names"),
        ("fifo", "a FIFO"),
        ("dir", "irectory"),
        ("socket", "No such device"),
    ] {
        refused(dir.file(name(file), Open::Make(0o600)), words);
        refused(open_to_write(&at(file), 0o644), words);
    }
    refused(dir.file(name("../victim"), Open::Read), "Invalid");
    refused(dir.file(name(".."), Open::Read), "Invalid");
    refused(dir.file(name(""), Open::Read), "Invalid");
    assert!(!top.path().join("nothing").exists());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    refused(dir.remove_socket(name("fifo")), "no socket of ours");
    refused(dir.remove_socket(name("link")), "no socket of ours");
    refused(
        dir.set_socket_mode(name("link"), 0o777),
        "no socket of ours",
    );
    dir.set_socket_mode(name("socket"), 0o600).unwrap();
    let mode = at("socket").metadata().unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    dir.remove_socket(name("socket")).unwrap();
    dir.remove_socket(name("socket")).unwrap();
    assert!(!dir.contains(name("socket")).unwrap());
}

#[test]
fn what_decides_something_is_no_fifo_and_never_waited_for() {
    let top = TempDir::new().unwrap();
    let at = |file: &str| top.path().join(file);
    fs::write(at("keys"), "secret").unwrap();
    symlink("keys", at("link")).unwrap();
    mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
    let mut text = String::new();
    open_to_read(&at("link"), &[])
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "secret");
    refused(open_to_read(&at("fifo"), &[]), "a FIFO");
    refused(open_to_read(Path::new("/dev/zero"), &[]), "a device");
    refused(open_to_read(top.path(), &[]), "a directory");
}

#[test]
fn what_strangers_made_is_refused() {
    if !geteuid().is_root() {
        return;
    }
    let top = TempDir::new().unwrap();
    let at = |file: &str| top.path().join(file);
    let give = |file: &str| std::os::unix::fs::lchown(at(file), Some(STRANGER), Some(STRANGER));
    fs::create_dir(at("theirs")).unwrap();
    fs::create_dir(at("ours")).unwrap();
    fs::write(at("theirs/report"), "").unwrap();
    symlink("ours", at("to-ours")).unwrap();
    symlink("/etc/hostname", at("to-file")).unwrap();
    fs::write(at("keys"), "").unwrap();
    for file in ["theirs", "theirs/report", "to-ours", "to-file", "keys"] {
        give(file).unwrap();
    }
    refused(Dir::open(&at("theirs")), "belongs to user 54321");
    refused(Dir::make(&at("theirs"), &NEW), "belongs to user 54321");
    refused(Dir::make(&at("theirs/logs"), &NEW), "belongs to user 54321");
    refused(Dir::open(&at("to-ours")), "user 54321 made");
    refused(
        open_to_write(&at("to-ours/report"), 0o644),
        "user 54321 made",
    );
    refused(open_to_write(&at("to-file"), 0o644), "symbolic link");
    refused(open_to_write(&at("theirs/report"), 0o644), "user 54321's");
    refused(open_to_read(&at("keys"), &[]), "user 54321's");
    refused(open_to_read(&at("to-file"), &[]), "symbolic link");
    open_to_read(&at("keys"), &[STRANGER]).unwrap();
    let theirs = NewDir {
        owner: Some(STRANGER),
        group: Some(STRANGER),
        ..NEW
    };
    Dir::make(&at("theirs"), &theirs).unwrap();
    Dir::make(&at("for-them"), &theirs).unwrap();
    let made = at("for-them").metadata().unwrap();
    assert_eq!((made.uid(), made.gid()), (STRANGER, STRANGER));
    let ours = Dir::open(&at("ours")).unwrap();
    fs::write(at("ours/log"), "").unwrap();
    chown(at("ours/log"), Some(STRANGER), None).unwrap();
    refused(ours.file(name("log"), Open::Write), "user 54321's");
}
