//! Damaged logs, driven by arbitrary bytes: by libFuzzer in `fuzz/`, and by a test over its corpus.

use crate::harness::{Snapshot, look_at};

/// A log whose file is damaged anywhere: batches, then places and what is flipped there.
pub fn log(data: &[u8]) {
    let Some((batches, damage)) = data.split_first() else {
        return;
    };
    let written = Snapshot::with_batches(u64::from(batches % 24));
    let mut snapshot = written.expect("memory for a small file");
    let (damage, _) = damage.as_chunks::<3>();
    for [low, high, bits] in damage {
        snapshot.damage(usize::from(u16::from_le_bytes([*low, *high])), *bits);
    }
    look_at(&snapshot).expect("memory for a small file");
}

#[cfg(test)]
mod tests {
    #[test]
    fn kept_and_mutated_damage() {
        penstock_fuzz_replay::replay("log", 20, super::log);
    }
}
