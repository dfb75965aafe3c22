//! Files of keys, driven by arbitrary bytes: by libFuzzer in `fuzz/`, and by a test over its corpus.

use std::path::Path;

use crate::Grants;
use crate::keys::parse_secret;

/// A broker's file of keys: some, or a message that tells none of its secrets.
pub fn keys(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match Grants::parse(Path::new("keys"), &text) {
        Ok(grants) => assert!(grants.len() > 0),
        Err(error) => {
            let said = error.to_string();
            let told = |word: &str| parse_secret(word).is_some() && said.contains(word);
            assert!(!text.split_whitespace().any(told));
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn kept_and_mutated_files() {
        penstock_fuzz_replay::replay("keys", 2000, super::keys);
    }
}
