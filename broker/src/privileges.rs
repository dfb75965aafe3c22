//! Least privilege: what setting up needs, and its end once everything is open.
//!
//! Capabilities belong to threads, and a new thread has those of the one that starts it. So they go
//! before threads are started; a thread that keeps one is started just before the last ones
//! go.

use std::ffi::CString;

use anyhow::{Context, Result, bail};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::{set_keepcaps, set_no_new_privs};
use nix::unistd::{User, getuid, initgroups, setresgid, setresuid};

/// Opening the xdp path: the program, its place on the interface, the sockets.
pub const XDP: &[Capability] = &[
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
];
/// Buffers of accepted sockets beyond the kernel's limit.
pub const FORCE_BUFFERS: &[Capability] = &[Capability::CAP_NET_ADMIN];
/// Settings of an interface.
pub const CHANGE_INTERFACES: &[Capability] = &[Capability::CAP_NET_ADMIN];
/// Switching to another user.
const SWITCH_USER: &[Capability] = &[Capability::CAP_SETGID, Capability::CAP_SETUID];

/// Fails unless this process has what `purpose` takes; the message names what is missing.
pub fn require(purpose: &str, needed: &[Capability]) -> Result<()> {
    let mut have = caps::read(None, CapSet::Effective)
        .context("cannot read the capabilities of this process")?;
    if have.contains(&Capability::CAP_SYS_ADMIN) {
        // It stands in for this one (capabilities(7)).
        have.insert(Capability::CAP_BPF);
    }
    if needed.iter().all(|capability| have.contains(capability)) {
        return Ok(());
    }
    let missing = needed
        .iter()
        .filter(|capability| !have.contains(capability));
    let program = std::env::current_exe().context("cannot find the path of this program")?;
    bail!(
        "{purpose} needs {}, which this process does not have: run it with sudo, or give them to the program: sudo setcap {}+ep {}",
        names(missing),
        names(needed).to_lowercase().replace(", ", ","),
        program.display()
    );
}

/// The user behind `--user`, whom this process must be able to become.
pub fn find_user(name: &str) -> Result<User> {
    let found = User::from_name(name).with_context(|| format!("cannot look up user {name}"))?;
    let Some(user) = found else {
        bail!("--user: there is no user {name:?} here (getent passwd lists them)");
    };
    if user.uid != getuid() {
        require("--user", SWITCH_USER)?;
    }
    Ok(user)
}

/// Switches to the user permanently and drops every capability but `kept`. Must be called while there
/// is one thread only. Returns whether there was any capability.
pub fn drop_privileges(user: Option<&User>, kept: &[Capability]) -> Result<bool> {
    let before = caps::read(None, CapSet::Permitted)
        .context("cannot read the capabilities of this process")?;
    if let Some(user) = user.filter(|user| user.uid != getuid()) {
        switch(user).with_context(|| format!("cannot become user {}", user.name))?;
    }
    set_no_new_privs().context("cannot set no_new_privs")?;
    keep(kept)?;
    Ok(!before.is_empty())
}

/// Gives up every capability but `kept` in this thread; those that it starts later have no more.
pub fn keep(kept: &[Capability]) -> Result<()> {
    let permitted = caps::read(None, CapSet::Permitted)
        .context("cannot read the capabilities of this process")?;
    let kept: CapsHashSet = kept
        .iter()
        .copied()
        .filter(|capability| permitted.contains(capability))
        .collect();
    // The effective ones first: they must lie within the permitted ones at any time.
    let sets = [
        (CapSet::Ambient, CapsHashSet::new()),
        (CapSet::Inheritable, CapsHashSet::new()),
        (CapSet::Effective, kept.clone()),
        (CapSet::Permitted, kept),
    ];
    for (set, value) in sets {
        caps::set(None, set, &value)
            .with_context(|| format!("cannot give up {set:?} capabilities"))?;
    }
    Ok(())
}

fn switch(user: &User) -> Result<()> {
    let name = CString::new(user.name.as_str()).context("its name has a zero byte")?;
    // Or all capabilities would go with root.
    set_keepcaps(true)?;
    initgroups(&name, user.gid)?;
    setresgid(user.gid, user.gid, user.gid)?;
    setresuid(user.uid, user.uid, user.uid)?;
    set_keepcaps(false)?;
    Ok(())
}

/// Capabilities in a row, for people.
pub fn names<'a>(capabilities: impl IntoIterator<Item = &'a Capability>) -> String {
    let names: Vec<_> = capabilities
        .into_iter()
        .map(Capability::to_string)
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        // In a thread of its own: what it gives up is gone.
        let said = std::thread::spawn(|| {
            keep(&[]).unwrap();
            require("--mode xdp", XDP).unwrap_err().to_string()
        });
        let said = said.join().unwrap();
        assert!(
            said.starts_with("--mode xdp needs CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, which"),
            "{said}"
        );
        assert!(
            said.contains("setcap cap_bpf,cap_net_admin,cap_net_raw+ep /"),
            "{said}"
        );
    }

    #[test]
    fn users_that_are_not_there_are_told() {
        let said = find_user("no-such-user").unwrap_err().to_string();
        assert!(said.contains("no-such-user"), "{said}");
        let me = User::from_uid(getuid()).unwrap().unwrap();
        assert_eq!(find_user(&me.name).unwrap().uid, getuid());
    }

    #[test]
    #[ignore = "needs root"]
    fn what_is_kept_stays_in_the_thread_and_those_it_starts() {
        let told = std::thread::spawn(|| {
            keep(FORCE_BUFFERS).unwrap();
            let child = std::thread::spawn(|| caps::read(None, CapSet::Effective).unwrap());
            let inherited = child.join().unwrap();
            keep(&[]).unwrap();
            (inherited, caps::read(None, CapSet::Permitted).unwrap())
        });
        let (inherited, after) = told.join().unwrap();
        assert_eq!(inherited, FORCE_BUFFERS.iter().copied().collect());
        assert!(after.is_empty());
        assert!(!caps::read(None, CapSet::Permitted).unwrap().is_empty());
    }
}
