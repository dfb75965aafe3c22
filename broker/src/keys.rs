//! Keys of publishers: creates them, loads the accepted ones, and warns if there are none.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use nix::unistd::User;
use penstock_auth::Keys;
use penstock_process::output;
use penstock_process::text::escape;
use tracing::{error, info, warn};

/// Creates a key and writes it to a new file that only its owner can read.
pub fn make(path: &Path) -> Result<()> {
    // The file's name without its extension is a good name for the key.
    let name = path.file_stem().and_then(|stem| stem.to_str());
    let name = name.unwrap_or_default();
    penstock_auth::check_name(name).map_err(|rule| {
        anyhow!("--keygen: the file name without its extension becomes the key's name: {rule}")
    })?;
    let line = penstock_auth::describe(name)?;
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| {
        file.write_all(line.as_bytes())
            .and_then(|()| file.sync_all())
    })
    .with_context(|| format!("cannot write a new key to {}", path.display()))?;
    output::print_line(format_args!(
        "key {name} was written to {path}: give that file to publishers (--auth-key). Add its line to the broker's --auth-keys file, and replace * by the topics that the key may publish to.",
        path = escape(&path.to_string_lossy())
    ))
}

/// Loads the keys that the broker accepts, while it still has its user's privileges. The file may
/// belong to `user`, who reads it again at a reload.
pub fn load(path: &Path, user: Option<&User>) -> Result<Arc<Keys>> {
    let owners: Vec<_> = user.iter().map(|user| user.uid.as_raw()).collect();
    let keys = Keys::load(path, &owners).context("--auth-keys")?;
    info!(keys = keys.grants().len(), "publishers need a key");
    Ok(Arc::new(keys))
}

/// Loads them again after SIGHUP. Open streams stay open.
pub fn reload(keys: &Keys) {
    match keys.reload() {
        Ok(count) => info!(keys = count, "keys reloaded"),
        Err(error) => error!("cannot reload the keys, so the old ones stay in force: {error}"),
    }
}

/// Warns if anyone who can reach the broker may publish.
pub fn warn_without(address: SocketAddr) {
    if !address.ip().to_canonical().is_loopback() {
        warn!(
            %address,
            "anyone who can reach this address may publish; use --auth-keys to require a key"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_new_key_is_its_owners_and_never_written_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eu.key");
        make(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        let key = penstock_auth::read_key(&path).unwrap();
        assert!(
            load(&path, None)
                .unwrap()
                .grants()
                .find(key.id())
                .0
                .is_some()
        );
        let said = format!("{:#}", make(&path).unwrap_err());
        assert!(said.contains("exists"), "{said}");
        let said = format!("{:#}", make(&dir.path().join("a b")).unwrap_err());
        assert!(said.contains("is not a valid key name"), "{said}");
    }
}
