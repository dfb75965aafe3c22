//! The command line, driven by arbitrary text: by libFuzzer in `fuzz/`, and by a test over its corpus.

use clap::Parser;

use super::cli::Cli;

/// Flags, one a line: what to read, or a message.
pub fn flags(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words = ["penstock-subscriber"].into_iter().chain(text.lines());
    match Cli::try_parse_from(words) {
        Ok(cli) => {
            let _ = (cli.start(), cli.output(), cli.selects(1, 1));
            // Both are read only when they are used.
            let _ = (cli.check(), cli.log_path());
            assert!(cli.follow || cli.until_idle.is_none());
        }
        // Asked for help, or wrong.
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn kept_flags_whole_and_cut_short() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/subscriber_flags");
        for file in fs::read_dir(corpus).unwrap() {
            let input = fs::read(file.unwrap().path()).unwrap();
            for len in 0..=input.len() {
                flags(&input[..len]);
            }
        }
    }
}
