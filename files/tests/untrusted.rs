//! Objects that another local user may have put in the way.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::{geteuid, mkfifo};
use penstock_files::{Dir, NewDir, Open, Trusted, displace, open_to_read, open_to_write};
use tempfile::TempDir;

/// A user who is neither root nor the one running the tests.
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
    // A user who may write to a parent can replace this directory by another one.
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
    refused(open_to_read(&top.path().join(".."), &[]), "Is a directory");
    fs::create_dir(at("dir")).unwrap();
    symlink("../link", at("dir/up")).unwrap();
    open_to_read(&at("dir/up"), &[]).unwrap();
    symlink("around", at("around")).unwrap();
    refused(open_to_read(&at("around"), &[]), "symbolic links");
}

/// While others put their link in the place of ours and back, ours is followed or nothing is.
#[test]
fn a_link_is_not_exchanged_between_the_look_at_it_and_the_use() {
    if !geteuid().is_root() {
        return;
    }
    let top = TempDir::new().unwrap();
    let at = |file: &str| top.path().join(file);
    fs::write(at("keys"), "ours").unwrap();
    fs::write(at("other"), "of ours too, but not what was meant").unwrap();
    symlink("keys", at("link")).unwrap();
    symlink("other", at("theirs")).unwrap();
    std::os::unix::fs::lchown(at("theirs"), Some(STRANGER), Some(STRANGER)).unwrap();
    let (link, theirs) = (at("link"), at("theirs"));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let exchange = RenameFlags::RENAME_EXCHANGE;
                renameat2(AT_FDCWD, &link, AT_FDCWD, &theirs, exchange).unwrap();
            }
        });
        let _done = Done(&done);
        for _ in 0..3000 {
            match open_to_read(&link, &[]) {
                Ok(mut file) => {
                    let mut text = String::new();
                    file.read_to_string(&mut text).unwrap();
                    assert_eq!(text, "ours");
                }
                Err(error) => assert!(error.to_string().contains("symbolic link"), "{error}"),
            }
        }
    });
}

/// Ends what runs beside a test, also when that fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A sticky directory in which a stranger took a name.
fn squatted(make: impl FnOnce(&Path)) -> (TempDir, PathBuf) {
    let top = TempDir::new().unwrap();
    set_mode(top.path(), 0o1777);
    let path = top.path().join("penstock");
    make(&path);
    std::os::unix::fs::lchown(&path, Some(STRANGER), Some(STRANGER)).unwrap();
    (top, path)
}

#[test]
fn what_a_stranger_made_under_our_name_is_renamed_whole() {
    if !geteuid().is_root() {
        return;
    }
    let victim = TempDir::new().unwrap();
    let in_a_directory = |path: &Path| {
        fs::create_dir(path).unwrap();
        fs::write(path.join("kept"), "").unwrap();
        symlink(victim.path(), path.join("link")).unwrap();
    };
    let makers: [&dyn Fn(&Path); 4] = [
        &in_a_directory,
        &|path| fs::write(path, "").unwrap(),
        &|path| symlink(victim.path(), path).unwrap(),
        &|path| mkfifo(path, Mode::S_IRWXU).unwrap(),
    ];
    for make in makers {
        let (top, path) = squatted(make);
        // The first name for it is taken.
        fs::write(top.path().join("penstock.of-54321-1"), "").unwrap();
        let before = path.symlink_metadata().unwrap().ino();
        let other = displace(&path, &NEW).unwrap().unwrap();
        assert_eq!(other.owner, "user 54321");
        assert_eq!(other.path, top.path().join("penstock.of-54321-2"));
        assert_eq!(other.path.symlink_metadata().unwrap().ino(), before);
        let made = path.symlink_metadata().unwrap();
        assert!(made.is_dir() && made.uid() == 0 && made.mode() & 0o777 == 0o750);
        Dir::make(&path, &NEW).unwrap();
        assert_eq!(displace(&path, &NEW).unwrap(), None);
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 3);
    }
    assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0);
}

#[test]
fn what_is_in_use_or_of_a_service_or_out_of_place_stays() {
    if !geteuid().is_root() {
        return;
    }
    let (_top, path) = squatted(|path| fs::create_dir(path).unwrap());
    let file = fs::File::create(path.join("t.lock")).unwrap();
    file.lock().unwrap();
    refused(
        displace(&path, &NEW),
        "belongs to user 54321, and a running program",
    );
    assert_eq!(path.metadata().unwrap().uid(), STRANGER);
    drop(file);
    chown(&path, Some(999), None).unwrap();
    assert_eq!(displace(&path, &NEW).unwrap(), None);
    chown(&path, Some(STRANGER), None).unwrap();
    let theirs = NewDir {
        owner: Some(STRANGER),
        ..NEW
    };
    assert_eq!(displace(&path, &theirs).unwrap(), None);
    // Where others may rename everything, nothing is gained.
    let parent = path.parent().unwrap();
    set_mode(parent, 0o777);
    assert_eq!(displace(&path, &NEW).unwrap(), None);
    refused(Dir::make(&path, &NEW), "chmod go-w");
    set_mode(parent, 0o1777);
    assert!(displace(&path, &NEW).unwrap().is_some());
}

#[test]
fn those_in_control_of_the_program_may_own_where_results_go() {
    let top = TempDir::new().unwrap();
    let at = |file: &str| top.path().join(file);
    let make = |path: &Path| Dir::make_for(path, &NEW, &Trusted::with_those_in_control());
    let (_dir, path) = make(&at("a/b")).unwrap();
    assert_eq!(path, at("a/b").canonicalize().unwrap());
    symlink("a", at("link")).unwrap();
    let (_dir, path) = make(&at("link/../link/b")).unwrap();
    assert_eq!(path, at("a/b").canonicalize().unwrap());
    set_mode(&at("a"), 0o777);
    refused(make(&at("a/b")), "chmod go-w");
    set_mode(&at("a"), 0o755);
    if !geteuid().is_root() {
        return;
    }
    // A group whose members cannot replace the program.
    chown(at("a"), None, Some(STRANGER)).unwrap();
    set_mode(&at("a"), 0o775);
    refused(make(&at("a/b")), "chmod go-w");
    chown(at("a"), Some(STRANGER), None).unwrap();
    set_mode(&at("a"), 0o755);
    refused(make(&at("a/b")), "belongs to user 54321");
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
