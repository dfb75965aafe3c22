//! The command line, driven by arbitrary text: by libFuzzer in `fuzz/`, and by a test over its corpus.

use clap::Parser;

use super::cli::{Cli, Job};

/// Flags, one a line: a plan that comes to an end, or a message.
pub fn flags(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words = ["penstock-publisher"].into_iter().chain(text.lines());
    let plan = match Cli::try_parse_from(words).map(|cli| cli.plan(true)) {
        Ok(Ok(plan)) => plan,
        Ok(Err(error)) => return assert!(!error.to_string().is_empty()),
        // Asked for help, or wrong.
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(!plan.config.brokers.is_empty());
    assert_ne!(plan.rate, Some(0));
    if let Job::Synthetic {
        message_size,
        messages,
    } = plan.job
    {
        assert!(message_size > 0 && messages > 0);
        assert!(plan.total_bytes().is_some());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn kept_flags_whole_and_cut_short() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/publisher_flags");
        for file in fs::read_dir(corpus).unwrap() {
            let input = fs::read(file.unwrap().path()).unwrap();
            for len in 0..=input.len() {
                flags(&input[..len]);
            }
        }
    }
}
