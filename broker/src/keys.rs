//! Keys of publishers: a new one, those that the broker takes, and what is said about having none.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use nix::unistd::User;
use penstock_dataplane::auth::{self, Keys};
use penstock_dataplane::text::escape;
use penstock_process::output;
use tracing::{error, info, warn};

/// Makes a key and writes it to a new file, for its owner's eyes only.
pub fn make(path: &Path) -> Result<()> {
    // The file's name without what is behind the last dot is a good name for the key.
    let name = path.file_stem().and_then(|stem| stem.to_str());
    let name = name.unwrap_or_default();
    auth::check_name(name)
        .map_err(|rule| anyhow!("--keygen: the file is named as its key is: {rule}"))?;
    let line = auth::describe(name)?;
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| {
        file.write_all(line.as_bytes())
            .and_then(|()| file.sync_all())
    })
    .with_context(|| format!("cannot write a new key to {}", path.display()))?;
    output::print_line(format_args!(
        "key {name} is in {path}: publishers name that file with --auth-key. Add its line to the file behind --auth-keys, with the topics that it may publish to instead of *.",
        path = escape(&path.to_string_lossy())
    ))
}

/// Reads the keys that the broker takes, while it may still do what its user may.
/// Their file may be `user`'s, who reads it again later.
pub fn load(path: &Path, user: Option<&User>) -> Result<Arc<Keys>> {
    let owners: Vec<_> = user.iter().map(|user| user.uid.as_raw()).collect();
    let keys = Keys::load(path, &owners).context("--auth-keys")?;
    info!(keys = keys.grants().len(), "publishers must hold a key");
    Ok(Arc::new(keys))
}

/// Reads them again, after SIGHUP. Streams that are open stay open.
pub fn reload(keys: &Keys) {
    match keys.reload() {
        Ok(count) => info!(keys = count, "keys read again"),
        Err(error) => error!("the keys stay as they were: {error}"),
    }
}

/// Says it when everybody who reaches the broker may publish.
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
        let key = auth::read_key(&path).unwrap();
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
        assert!(said.contains("is no name of a key"), "{said}");
    }
}
