//! Other users of the host: what they make beforehand in places that everybody can write to, what they do to
//! files that they may read or register in. Nothing of root's is touched, and no broker ends or is kept out.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use penstock_e2e::bed::{BROKER, Bed, program};
use penstock_e2e::commands::command;
use penstock_e2e::{BrokerSetup, cases, eventually, run};

const STRANGER: &str = "54321";
const MEMBER: &str = "54322";
const GROUP: &str = "54323";
const SMALL: [&str; 6] = [
    "--ring-size",
    "1MiB",
    "--segment-size",
    "64KiB",
    "--topic",
    "penstock",
];

fn main() -> ExitCode {
    run(cases![
        a_directory_of_another_user_is_refused,
        a_stranger_in_the_default_directorys_place_keeps_no_broker_out,
        reports_and_keys_are_no_links_or_fifos,
        roots_subscriber_on_a_strangers_log,
        modes_do_not_depend_on_the_umask,
        a_member_of_the_group_neither_ends_a_broker_nor_keeps_one_out,
        a_log_with_holes_on_a_full_file_system_is_refused,
    ])
}

/// Runs a shell script as another user.
fn as_user(user: &str, group: &str, script: &str) -> Command {
    let user = [
        "--reuid",
        user,
        "--regid",
        group,
        "--clear-groups",
        "bash",
        "-c",
        script,
    ];
    command("setpriv", &user)
}

fn as_stranger(bed: &Bed, script: &str) -> Result<()> {
    bed.run("stranger", &mut as_user(STRANGER, STRANGER, script))?
        .success()?;
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

/// A place such as /dev/shm, where a stranger was first, with files of root that must not change.
struct PublicPlace<'a> {
    bed: &'a Bed,
    precious: Vec<(PathBuf, Vec<u8>, u32)>,
}

impl<'a> PublicPlace<'a> {
    fn make(bed: &'a Bed) -> Result<Self> {
        bed.open_to_others()?;
        DirBuilder::new().create(bed.buffers())?;
        set_mode(bed.buffers(), 0o1777)?;
        let mut rng = fastrand::Rng::with_seed(1);
        let mut precious = Vec::new();
        for (name, mode) in [("public", 0o644), ("private", 0o600)] {
            let (path, mut content) = (bed.buffers().join(name), vec![0; 9000]);
            rng.fill(&mut content);
            fs::write(&path, &content)?;
            set_mode(&path, mode)?;
            precious.push((path, content, mode));
        }
        Ok(Self { bed, precious })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bed.buffers().join(name)
    }

    fn shown(&self) -> String {
        self.bed.buffers().display().to_string()
    }

    #[track_caller]
    fn assert_untouched(&self) {
        for (path, content, mode) in &self.precious {
            assert!(
                fs::read(path).is_ok_and(|now| now == *content),
                "{} changed",
                path.display()
            );
            let now = fs::metadata(path).map(|metadata| metadata.mode() & 0o7777);
            assert_eq!(now.ok(), Some(*mode), "mode of {}", path.display());
        }
    }
}

fn broker_in<'a>(bed: &'a Bed, dir: &Path) -> BrokerSetup<'a> {
    bed.broker(&SMALL).buffer_dir(dir.to_owned())
}

/// That another user made, or may change.
fn a_directory_of_another_user_is_refused(bed: &Bed) -> Result<()> {
    let place = PublicPlace::make(bed)?;
    let there = place.shown();
    as_stranger(bed, &format!(
        "mkdir {there}/b0 && chmod 777 {there}/b0 &&
         ln -s {there}/public {there}/b0/penstock.new && ln -s {there}/private {there}/b0/penstock.readers &&
         ln -s {there}/private {there}/b0/penstock.lock && ln -s {there}/private {there}/b0/broker-1214.sock"
    ))?;
    broker_in(bed, &place.path("b0")).refuses(&format!("user {STRANGER}, who could replace"));
    as_stranger(bed, &format!("ln -s {there}/own {there}/link"))?;
    let own = place.path("own");
    DirBuilder::new().mode(0o755).create(&own)?;
    let by_link = format!("link that user {STRANGER} made");
    broker_in(bed, &place.path("link")).refuses(&by_link);
    broker_in(bed, &place.path("link/logs")).refuses(&by_link);
    set_mode(&own, 0o777)?;
    broker_in(bed, &own).refuses(&format!("chmod go-w {}", own.display()));
    // With --shared-buffer-dir, files are checked one by one.
    DirBuilder::new().create(own.join("b0"))?;
    set_mode(&own.join("b0"), 0o777)?;
    let shared = |dir: &Path| broker_in(bed, dir).with(&["--shared-buffer-dir"]);
    shared(&own.join("b0")).start()?.stop()?;
    shared(&place.path("b0")).refuses("symbolic link");
    fs::write(place.path("file"), "")?;
    broker_in(bed, &place.path("file")).refuses("not a directory");
    place.assert_untouched();
    Ok(())
}

/// The default directory, in a /dev/shm of this test's own: what a stranger made there is renamed, unless a
/// program that runs has a lock in it.
fn a_stranger_in_the_default_directorys_place_keeps_no_broker_out(bed: &Bed) -> Result<()> {
    let script = r#"
set -euo pipefail
mount -t tmpfs -o mode=1777,size=64m tmpfs /dev/shm
stranger=(setpriv --reuid "$1" --regid "$1" --clear-groups)
"${stranger[@]}" bash -c 'mkdir -m 777 /dev/shm/penstock && echo mine >/dev/shm/penstock/t.lock'
mkfifo "$3/locked" "$3/ready"
"${stranger[@]}" flock --no-fork /dev/shm/penstock/t.lock bash -c 'echo locked && exec sleep 60' >"$3/locked" &
holder=$!
read -r _ <"$3/locked"
small=(--ring-size 1MiB --segment-size 64KiB --topic t)
! timeout 30 "$2" "${small[@]}" >"$3/refused.log" 2>&1 || exit 1
grep -q "user $1, and a running program has locked files there" "$3/refused.log" || { cat "$3/refused.log"; exit 1; }
kill -KILL "$holder"
wait "$holder" || true
"$2" "${small[@]}" --ready-fd 3 3>"$3/ready" >"$3/default.log" 2>&1 &
broker=$!
[ "$(timeout 30 cat "$3/ready")" = READY=1 ] || { cat "$3/default.log"; exit 1; }
grep "penstock belonged to user $1, .*: renamed it to /dev/shm/penstock.of-$1-1\$" "$3/default.log"
[ "$(stat -c %u:%a /dev/shm/penstock)" = 0:750 ]
[ "$(cat "/dev/shm/penstock.of-$1-1/t.lock")" = mine ]
kill "$broker"
wait "$broker"
"#;
    let broker = program("broker").display().to_string();
    let folder = bed.folder().display().to_string();
    // `ip netns exec` has given the script a mount namespace of its own.
    let arguments = ["-c", script, "-", STRANGER, &broker, &folder];
    bed.run("default", &mut bed.in_broker_ns("bash", &arguments))?
        .success()?;
    Ok(())
}

/// Nor anything of another user's.
fn reports_and_keys_are_no_links_or_fifos(bed: &Bed) -> Result<()> {
    let place = PublicPlace::make(bed)?;
    let there = place.shown();
    as_stranger(
        bed,
        &format!("ln -s {there}/public {there}/report.json; mkfifo {there}/fifo.json"),
    )?;
    let (link, fifo) = (format!("{there}/report.json"), format!("{there}/fifo.json"));
    bed.broker(&["--report", &link]).refuses("report.json");
    bed.broker(&["--report", &fifo]).refuses("fifo.json");
    bed.broker(&["--auth-keys", &fifo]).refuses("fifo.json");
    let mut publisher = bed.publisher(&["--brokers", BROKER, "--auth-key", &fifo, "--synthetic"]);
    bed.refuses("fifo.json", &mut publisher);
    let key = format!("{there}/theirs.key");
    let mut keygen = bed.broker(&["--keygen", &key]).command_without_dir();
    bed.run("keygen", &mut keygen)?.success()?;
    chown(&key, Some(STRANGER.parse()?), None)?;
    bed.broker(&["--auth-keys", &key])
        .refuses(&format!("{STRANGER}'s, who could change it"));
    place.assert_untouched();
    Ok(())
}

/// It reads what is there, and nothing else.
fn roots_subscriber_on_a_strangers_log(bed: &Bed) -> Result<()> {
    let place = PublicPlace::make(bed)?;
    bed.broker(&SMALL)
        .with(&["--buffer-mode", "644"])
        .start()?
        .stop()?;
    let (there, log) = (place.shown(), bed.log_of("penstock"));
    as_stranger(bed, &format!(
        "mkdir {there}/evil && cp {} {there}/evil/t.log &&
         ln -s {there}/private {there}/evil/t.readers && mkfifo {there}/evil/fifo.log {there}/evil/t.writer",
        log.display()
    ))?;
    let subscriber = |name: &str, arguments: &[&str]| {
        let mut command = bed.subscriber(arguments);
        command.arg("--path").arg(place.path("evil").join(name));
        command
    };
    bed.refuses(
        "t.readers",
        &mut subscriber("t.log", &["--register", "--stat"]),
    );
    bed.refuses(
        "not a regular file",
        &mut subscriber("fifo.log", &["--stat"]),
    );
    bed.run("subscriber", &mut subscriber("t.log", &["--stat"]))?
        .success()?;
    place.assert_untouched();
    Ok(())
}

fn modes_do_not_depend_on_the_umask(bed: &Bed) -> Result<()> {
    DirBuilder::new().mode(0o755).create(bed.buffers())?;
    let starter = ["bash", "-c", "umask 0; exec \"$0\" \"$@\""];
    let broker = bed.broker(&SMALL).through(&starter).start()?;
    assert_eq!(fs::metadata(bed.buffer_dir())?.mode() & 0o7777, 0o750);
    let mut modes = Vec::new();
    for entry in fs::read_dir(bed.buffer_dir())? {
        let entry = entry?;
        let mode = entry.metadata()?.mode() & 0o7777;
        modes.push(format!("{}:{mode:o}", entry.file_name().display()));
    }
    modes.sort();
    #[rustfmt::skip]
    assert_eq!(modes, [
        "broker-1214.sock:600", "penstock.lock:600", "penstock.log:640", "penstock.readers:660",
        "penstock.writer:640"]);
    broker.stop()?;
    Ok(())
}

/// A member of the broker's group, who may read and register, does what it can while a publisher is at
/// work.
fn a_member_of_the_group_neither_ends_a_broker_nor_keeps_one_out(bed: &Bed) -> Result<()> {
    bed.open_to_others()?;
    DirBuilder::new().create(bed.buffers())?;
    set_mode(bed.buffers(), 0o1777)?;
    let copy = bed.file("penstock-broker");
    fs::copy(program("broker"), &copy)?;
    set_mode(&copy, 0o755)?;
    fs::write(bed.file("broker-0.json"), "")?;
    chown(bed.file("broker-0.json"), Some(STRANGER.parse()?), None)?;
    let starter = [
        "setpriv",
        "--reuid",
        STRANGER,
        "--regid",
        GROUP,
        "--clear-groups",
    ];
    let setup = bed.broker(&SMALL).program(copy).through(&starter);
    let broker = setup.start()?;
    #[rustfmt::skip]
    let mut publisher = bed.publisher(&[
        "--brokers", BROKER, "--synthetic", "--total-size", "256MiB", "--rate", "200MB", "--format", "json"]);
    let publisher = bed.background("publisher", &mut publisher)?;
    let log = bed.log_of("penstock");
    let file = |extension| log.with_extension(extension).display().to_string();
    let (registry, log_path) = (file("readers"), file("log"));
    let member = |script: &str| bed.run("member", &mut as_user(MEMBER, GROUP, script));
    member(&format!(
        "for round in {{1..20}}; do
           truncate -s 0 {registry}
           dd if=/dev/urandom of={registry} bs=4096 count=1 conv=notrunc status=none
           truncate -s $((round * 100)) {registry}
         done"
    ))?
    .success()?;
    let report = publisher
        .wait()?
        .success()
        .context("the publisher")?
        .json()?;
    assert_eq!(report["messages_acked"], 256 * 1024);
    // Operations that must fail.
    let denied = |script: String| member(&script).map(|ended| !ended.status.success());
    assert!(denied(format!(": >>{log_path}"))?, "it writes the log");
    assert!(denied(format!(": <{}", file("lock")))?, "it opens the lock");
    // Read locks on every file that it may open, held as long as it lives, keep no broker out.
    let script = format!(
        "exec python3 -c 'import fcntl, sys, time
files = [open(path, \"rb\") for path in sys.argv[1:]]
for file in files:
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        pass
print(\"locked\", flush=True)
time.sleep(60)' {log_path} {registry} {}",
        file("writer")
    );
    let holder = bed.background("holder", &mut as_user(MEMBER, GROUP, &script))?;
    eventually("the locks are held", || holder.stdout().contains("locked"));
    broker.end(libc::SIGKILL)?;
    setup.start()?.stop()?;
    // Such a lock does not count as a broker either.
    let mut read = bed.subscriber(&["--follow", "--output", "none", "--allow-loss"]);
    bed.run("subscriber", read.arg("--path").arg(&log))?
        .success()?;
    Ok(())
}

/// A copy with holes, on a file system that has filled up since.
fn a_log_with_holes_on_a_full_file_system_is_refused(bed: &Bed) -> Result<()> {
    let path = bed.file("mnt");
    fs::create_dir(&path)?;
    mount(
        Some("tmpfs"),
        &path,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=40m"),
    )?;
    let options = [
        "--ring-size",
        "16MiB",
        "--segment-size",
        "1MiB",
        "--topic",
        "penstock",
    ];
    let setup = bed.broker(&options).buffer_dir(path.join("b0"));
    setup.start()?.stop()?;
    let (log, saved) = (path.join("b0/penstock.log"), bed.file("saved"));
    let copy = |from: &Path, to: &Path| {
        let mut command = command("cp", &["--sparse=always"]);
        bed.run("cp", command.arg(from).arg(to))?.success()
    };
    copy(&log, &saved)?;
    fs::remove_file(&log)?;
    copy(&saved, &log)?;
    // As much as there is room for.
    let _ = fs::write(path.join("others"), vec![0; 100_000_000]);
    setup.refuses("penstock.log: no room for [0-9]+ bytes");
    umount2(&path, MntFlags::MNT_DETACH)?;
    Ok(())
}
