//! Runs a fuzz target's kept corpus as a test, so that `cargo test` repeats what fuzzing found.

use std::fs;
use std::path::Path;

use fastrand::Rng;

/// Runs `target` over each file in `fuzz/corpus/NAME`, and over `mutations` changed copies of them:
/// arbitrary bytes alone do not get far into a parser.
///
/// # Panics
/// If the target does, or if there is no corpus.
pub fn replay(name: &str, mutations: usize, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus");
    let kept = fs::read_dir(corpus.join(name)).expect("a directory of inputs");
    let kept: Vec<_> = kept
        .map(|file| fs::read(file.expect("a readable directory").path()).expect("a readable file"))
        .collect();
    assert!(!kept.is_empty(), "{name} has no corpus");
    let mut rng = Rng::with_seed(5);
    for input in &kept {
        target(input);
    }
    for _ in 0..mutations {
        let mut input = kept[rng.usize(0..kept.len())].clone();
        input.truncate(rng.usize(0..=input.len()));
        input.extend((0..rng.usize(0..40)).map(|_| rng.u8(..)));
        for _ in 0..rng.usize(0..4) {
            let at = rng.usize(0..input.len().max(1));
            if let Some(byte) = input.get_mut(at) {
                *byte = rng.u8(..);
            }
        }
        target(&input);
    }
}
