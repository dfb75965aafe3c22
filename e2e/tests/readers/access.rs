//! Who may read the logs, and who may register: by mode and group of the files, as users that have neither.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::{Group, User};
use penstock_e2e::bed::{BROKER, Bed, program};
use penstock_e2e::commands::command;
use penstock_e2e::{Broker, Case, cases};

/// The group of no group.
const NOGROUP: u32 = 65_534;
/// Messages in the log.
const MESSAGES: u64 = 1024;

pub fn cases() -> impl IntoIterator<Item = Case> {
    let all = cases![
        by_default_only_the_brokers_group_reads,
        members_of_buffer_group_read_and_register_but_do_not_write,
        with_mode_644_anybody_reads_and_the_group_alone_registers,
        a_log_of_an_earlier_broker_gets_the_mode_of_this_one,
        a_group_that_the_brokers_user_is_not_in_is_refused,
    ];
    all.map(Case::long)
}

/// A group that nobody is in.
fn unused_group() -> Result<Group> {
    for name in ["games", "daemon"] {
        if let Some(group) = Group::from_name(name)? {
            return Ok(group);
        }
    }
    anyhow::bail!("there is neither a group games nor daemon")
}

/// A broker with a log that has something in it.
struct Served<'a> {
    bed: &'a Bed,
    broker: Broker,
}

impl<'a> Served<'a> {
    /// Started with these options, as a member of a further group if one is given.
    fn start(bed: &'a Bed, group: Option<&Group>, options: &[&str]) -> Result<Self> {
        bed.open_to_others()?;
        // Where nobody may run it.
        let copy = bed.file("penstock-subscriber");
        fs::copy(program("subscriber"), &copy)?;
        fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
        fs::create_dir(bed.buffers())?;
        fs::set_permissions(bed.buffers(), Permissions::from_mode(0o755))?;
        let mut setup = bed.broker(&["--topic", "penstock"]).with(options);
        if let Some(group) = group {
            setup = setup.through(&["setpriv", "--groups", &group.gid.to_string()]);
        }
        let broker = setup.start()?;
        bed.publish(&["--brokers", BROKER, "--total-size", "1MiB"])?;
        Ok(Self { bed, broker })
    }

    /// As nobody with one group.
    fn as_group(&self, group: u32, program: &str, arguments: &[&str]) -> Command {
        let group = group.to_string();
        #[rustfmt::skip]
        let user = ["--reuid", "nobody", "--regid", &group, "--clear-groups", program];
        command("setpriv", &[&user, arguments].concat())
    }

    fn subscriber(&self, group: u32, arguments: &[&str]) -> Command {
        let copy = self.bed.file("penstock-subscriber").display().to_string();
        #[rustfmt::skip]
        let first = ["--from", "start", "--stat", "--format", "json", "--output", "none"];
        let mut command = self.as_group(group, &copy, &[&first, arguments].concat());
        command.arg("--path").arg(self.bed.log_of("penstock"));
        command
    }

    fn reads(&self, group: u32, arguments: &[&str]) -> Result<()> {
        let mut command = self.subscriber(group, arguments);
        let read = self.bed.run("subscriber", &mut command)?.success()?;
        assert_eq!(read.json()?["messages"], MESSAGES);
        Ok(())
    }

    #[track_caller]
    fn is_refused(&self, regex: &str, group: u32, arguments: &[&str]) {
        let mut command = self.subscriber(group, arguments);
        self.bed.refuses(regex, &mut command);
    }

    #[track_caller]
    fn cannot_write(&self, group: u32) {
        let script = format!(": >>{}", self.bed.log_of("penstock").display());
        let mut command = self.as_group(group, "sh", &["-c", &script]);
        self.bed.refuses("Permission denied", &mut command);
    }
}

/// Mode and group of the log and of the registry of its readers.
#[track_caller]
fn assert_modes(bed: &Bed, log: (u32, u32), registry: (u32, u32)) {
    for (extension, wanted) in [("log", log), ("readers", registry)] {
        let path = bed.log_of("penstock").with_extension(extension);
        let metadata = fs::metadata(&path).expect("it is there");
        let found = (metadata.mode() & 0o7777, metadata.gid());
        assert_eq!(found, wanted, "{} {:o}", path.display(), found.0);
    }
}

fn by_default_only_the_brokers_group_reads(bed: &Bed) -> Result<()> {
    let served = Served::start(bed, None, &[])?;
    assert_modes(bed, (0o640, 0), (0o660, 0));
    let message = "may not read it; the broker's --buffer-mode and --buffer-group";
    served.is_refused(message, NOGROUP, &[]);
    served.broker.stop()?;
    Ok(())
}

fn members_of_buffer_group_read_and_register_but_do_not_write(bed: &Bed) -> Result<()> {
    let group = unused_group()?;
    let gid = group.gid.as_raw();
    let served = Served::start(bed, Some(&group), &["--buffer-group", &group.name])?;
    assert_modes(bed, (0o640, gid), (0o660, gid));
    served.reads(gid, &[])?;
    served.reads(gid, &["--register"])?;
    served.cannot_write(gid);
    served.is_refused("may not read it", NOGROUP, &[]);
    served.broker.stop()?;
    Ok(())
}

fn with_mode_644_anybody_reads_and_the_group_alone_registers(bed: &Bed) -> Result<()> {
    let group = unused_group()?;
    let gid = group.gid.as_raw();
    let options = ["--buffer-mode", "644", "--buffer-group", &group.name];
    let served = Served::start(bed, Some(&group), &options)?;
    assert_modes(bed, (0o644, gid), (0o660, gid));
    served.reads(NOGROUP, &[])?;
    served.reads(gid, &["--register"])?;
    served.is_refused("may not register in it", NOGROUP, &["--register"]);
    served.cannot_write(NOGROUP);
    served.broker.stop()?;
    Ok(())
}

/// The files stay.
fn a_log_of_an_earlier_broker_gets_the_mode_of_this_one(bed: &Bed) -> Result<()> {
    let mut served = Served::start(bed, None, &["--buffer-mode", "644"])?;
    served.reads(NOGROUP, &[])?;
    served.broker.stop()?;
    served.broker = bed.start_broker(&["--topic", "penstock", "--buffer-mode", "600"])?;
    assert_modes(bed, (0o600, 0), (0o600, 0));
    served.is_refused("may not read it", NOGROUP, &[]);
    served.broker.stop()?;
    Ok(())
}

fn a_group_that_the_brokers_user_is_not_in_is_refused(bed: &Bed) -> Result<()> {
    let nobody = User::from_name("nobody")?.context("a user nobody")?;
    fs::create_dir_all(bed.buffer_dir())?;
    chown(bed.buffer_dir(), Some(nobody.uid.as_raw()), None)?;
    let group = unused_group()?.name;
    #[rustfmt::skip]
    let broker = bed.broker(&[
        "--user", "nobody", "--topic", "penstock", "--buffer-group", &group]);
    broker.refuses("must be in that group");
    Ok(())
}
