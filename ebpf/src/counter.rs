//! Counters that programs keep per core.

use libbpf_rs::{MapCore, MapFlags, MapHandle};

/// The sum over all cores.
///
/// # Panics
/// If the map's values are shorter than 64 bits.
pub(crate) fn counter(map: &MapHandle, key: u32) -> libbpf_rs::Result<u64> {
    let cores = map.lookup_percpu(&key.to_ne_bytes(), MapFlags::ANY)?;
    let counts = cores.iter().flatten();
    Ok(counts
        .map(|value| u64::from_ne_bytes(value[..8].try_into().expect("eight bytes")))
        .sum())
}
