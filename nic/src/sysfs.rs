//! /sys/class/net of this process's own network namespace.
//!
//! A sysfs shows the namespace that it was mounted in, and a process may be in another one (nsenter -n,
//! a container that joins a network). There the same name, even with the same index, means another
//! interface. So this module mounts a sysfs of this namespace if allowed (CAP_SYS_ADMIN), without
//! attaching it to the directory tree. Otherwise it trusts /sys if it agrees with netlink.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use crate::Error;
use crate::netlink;

const CLASS: &str = "class/net";

/// Directory of the attributes of this namespace's interfaces.
#[derive(Debug)]
pub struct Sysfs {
    root: OwnedFd,
}

impl Sysfs {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::OtherNamespace`] if /sys belongs to another namespace and a sysfs cannot be mounted.
    pub fn open() -> Result<Self, Error> {
        if let Ok(root) = mount() {
            return Ok(Self { root });
        }
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let root = openat(rustix::fs::CWD, "/sys", flags, Mode::empty());
        let sysfs = root.map(|root| Self { root });
        match sysfs {
            Ok(sysfs) if sysfs.shows_this_namespace() => Ok(sysfs),
            _ => Err(Error::OtherNamespace),
        }
    }

    /// An attribute of an interface.
    pub(crate) fn read(&self, interface: &str, attribute: &str) -> io::Result<String> {
        let path = format!("{CLASS}/{interface}/{attribute}");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = openat(self.root.as_fd(), path, flags, Mode::empty())?;
        let mut text = String::new();
        File::from(file).read_to_string(&mut text)?;
        Ok(text.trim().to_owned())
    }

    /// An attribute that is a number.
    #[must_use]
    pub fn number(&self, interface: &str, attribute: &str) -> Option<u64> {
        self.read(interface, attribute).ok()?.parse().ok()
    }

    /// Sets an attribute.
    pub(crate) fn write(&self, interface: &str, attribute: &str, value: &str) -> io::Result<()> {
        let path = format!("{CLASS}/{interface}/{attribute}");
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(self.root.as_fd(), path, flags, Mode::empty())?;
        File::from(file).write_all(value.as_bytes())
    }

    /// Receive queues of an interface.
    pub(crate) fn rx_queues(&self, interface: &str) -> io::Result<u32> {
        let names = self.names(&format!("{CLASS}/{interface}/queues"))?;
        let queues = names.iter().filter(|name| name.starts_with("rx-"));
        Ok(queues.count() as u32)
    }

    fn names(&self, path: &str) -> io::Result<Vec<String>> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let directory = openat(self.root.as_fd(), path, flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in Dir::read_from(directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !name.starts_with('.') {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Whether it has the same interfaces as netlink, with the same indexes and hardware addresses.
    fn shows_this_namespace(&self) -> bool {
        let here = netlink::interfaces().map(|found| {
            let found = found.into_iter();
            found
                .map(|interface| (interface.name, (interface.index, interface.address)))
                .collect::<BTreeMap<_, _>>()
        });
        let shown = || -> io::Result<BTreeMap<_, _>> {
            let mut shown = BTreeMap::new();
            for name in self.names(CLASS)? {
                // Some entries are files, such as bonding_masters.
                let Ok(index) = self.read(&name, "ifindex") else {
                    continue;
                };
                let index: u32 = index.parse().map_err(io::Error::other)?;
                let address = self.read(&name, "address")?;
                shown.insert(name, (index, address));
            }
            Ok(shown)
        };
        matches!((here, shown()), (Ok(here), Ok(shown)) if here == shown)
    }
}

/// A sysfs of this namespace that is attached nowhere; it ends with its descriptor.
fn mount() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("sysfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_a_receive_queue() {
        let sysfs = Sysfs::open().unwrap();
        assert_eq!(sysfs.rx_queues("lo").unwrap(), 1);
        assert!(sysfs.number("lo", "mtu").is_some());
        assert!(sysfs.read("no-such-iface", "mtu").is_err());
    }
}
