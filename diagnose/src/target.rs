//! Finds the process to be observed, its namespace and its ports, from what the user names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::namespaces::{self, Namespace, OWN};
use super::processes::{self, Owners};
use super::sample::Unavailable;
use super::sockets::Socket;

/// What is observed.
#[derive(Debug)]
pub struct Target {
    /// None when it is another user's and only its port is known.
    pub pid: Option<u32>,
    /// Its name.
    pub name: String,
    /// The network namespace that it is in.
    pub namespace: Namespace,
    /// Ports that it listens on; only connections to these are looked at, if there are any.
    pub ports: BTreeSet<u16>,
}

impl Target {
    /// From a process, and perhaps one of its ports.
    pub fn of_process(
        pid: u32,
        port: Option<u16>,
        unavailable: &mut Vec<Unavailable>,
    ) -> Result<Self> {
        if !PathBuf::from(format!("/proc/{pid}")).exists() {
            bail!("there is no process {pid}; ss -ltnp shows servers and their pids");
        }
        let handle = namespaces::handle_of(pid);
        let namespace = match namespaces::id_of(&handle) {
            Ok(_) => Namespace::open(&handle)
                .with_context(|| format!("cannot see the connections of process {pid}"))?,
            Err(_) => {
                unavailable.push(Unavailable {
                    what: format!("the network namespace of process {pid}"),
                    why: "it belongs to another user; taken to be the one this runs in".to_owned(),
                    how: "run with sudo".to_owned(),
                });
                Namespace::open(Path::new(OWN))?
            }
        };
        let mut ports: BTreeSet<u16> = match processes::sockets_of(pid) {
            Ok(inodes) => {
                let sockets = namespace.diag.sockets()?;
                let theirs = sockets.iter().filter(|s| inodes.contains(&s.inode));
                let listeners = theirs.filter(|s| s.is_listening());
                listeners.map(|s| s.local.port()).collect()
            }
            Err(_) if port.is_some() => BTreeSet::new(),
            Err(_) => bail!(
                "process {pid} is another user's, so its sockets cannot be seen: run with sudo, or name its port as well (--port)"
            ),
        };
        if let Some(port) = port {
            if !ports.is_empty() && !ports.contains(&port) {
                bail!("process {pid} does not listen on port {port}, but on {ports:?}");
            }
            ports = [port].into();
        }
        Ok(Self {
            pid: Some(pid),
            name: processes::name_of(pid),
            namespace,
            ports,
        })
    }

    /// From a port, in whichever namespace somebody listens on it.
    pub fn of_port(port: u16, unavailable: &mut Vec<Unavailable>) -> Result<Self> {
        let (mut found, closed) = listeners_on(port)?;
        let mut owners = Owners::default();
        owners.find(found.iter().map(|(_, inode)| *inode));
        if found.len() > 1 {
            let pids: Vec<String> = found
                .iter()
                .map(|(_, inode)| match owners.of(*inode) {
                    Some(pid) => format!("{pid} ({})", processes::name_of(pid)),
                    None => "another user's".to_owned(),
                })
                .collect();
            bail!(
                "port {port} has listeners in {} network namespaces: processes {}; choose one with --pid",
                found.len(),
                pids.join(", ")
            );
        }
        let Some((namespace, inode)) = found.pop() else {
            let hint = match closed {
                0 => String::new(),
                _ => format!("; {closed} namespaces cannot be looked into without sudo"),
            };
            bail!("nothing listens on TCP port {port} (ss -ltn shows what does){hint}");
        };
        let pid = owners.of(inode);
        if pid.is_none() {
            unavailable.push(Unavailable {
                what: format!("the process that listens on port {port}, its CPU and system calls"),
                why: "it belongs to another user".to_owned(),
                how: "run with sudo, or name it with --pid as well".to_owned(),
            });
        }
        Ok(Self {
            name: pid.map(processes::name_of).unwrap_or_default(),
            pid,
            namespace,
            ports: [port].into(),
        })
    }
}

/// Namespaces with a listener on a port, with its inode; and how many could not be looked into.
fn listeners_on(port: u16) -> Result<(Vec<(Namespace, u32)>, usize)> {
    let mut found = Vec::new();
    let mut closed = 0;
    for handle in namespaces::all().values() {
        let Ok(namespace) = Namespace::open(handle) else {
            closed += 1;
            continue;
        };
        let is_it = |socket: &&Socket| socket.is_listening() && socket.local.port() == port;
        let sockets = namespace.diag.sockets()?;
        if let Some(listener) = sockets.iter().find(is_it) {
            found.push((namespace, listener.inode));
        }
    }
    Ok((found, closed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_server_is_found_by_process_and_by_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let pid = std::process::id();
        let mut unavailable = Vec::new();
        let by_port = Target::of_port(port, &mut unavailable).unwrap();
        assert_eq!((by_port.pid, by_port.ports), (Some(pid), [port].into()));
        let by_pid = Target::of_process(pid, None, &mut unavailable).unwrap();
        assert!(by_pid.ports.contains(&port));
        assert_eq!(unavailable, []);
    }

    #[test]
    fn what_is_not_there_is_refused_with_what_to_do() {
        let refused = |result: Result<Target>| format!("{:#}", result.unwrap_err());
        let none = refused(Target::of_process(u32::MAX, None, &mut Vec::new()));
        assert!(none.contains("ss -ltnp"), "{none}");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let none = refused(Target::of_port(port, &mut Vec::new()));
        assert!(none.contains("nothing listens"), "{none}");
    }
}
