//! The command line, driven by arbitrary text: by libFuzzer in `fuzz/`, and by a test over its corpus.

use clap::Parser;

use crate::cli::Cli;

/// Flags, one a line: a configuration that can be served, or a message.
pub fn flags(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words = ["penstock-broker"].into_iter().chain(text.lines());
    let config = match Cli::try_parse_from(words).map(Cli::check) {
        Ok(Ok(config)) => config,
        Ok(Err(error)) => return assert!(!error.to_string().is_empty()),
        // Asked for help, or wrong.
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(config.tcp_workers > 0 && config.limits.max_handshakes > 0);
    assert!(config.limits.max_connections as u64 <= config.log.geometry.index_slots() / 2);
    assert!(config.topics.len() <= config.topic.max);
    assert!(!config.worker.stall_timeout.is_zero());
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn kept_flags_whole_and_cut_short() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/broker_flags");
        for file in fs::read_dir(corpus).unwrap() {
            let input = fs::read(file.unwrap().path()).unwrap();
            for len in 0..=input.len() {
                flags(&input[..len]);
            }
        }
    }
}
