//! Shell quoting for commands that messages tell the user to run.

use std::borrow::Cow;
use std::fmt::Write;

/// A word quoted for a shell if necessary. Interface names may contain nearly any byte.
///
/// Control characters are written as printf(1) escapes, so that displaying a command has no effect on
/// the terminal.
#[must_use]
pub fn quote(word: &str) -> Cow<'_, str> {
    if word.chars().any(char::is_control) {
        let mut text = String::from("\"$(printf '");
        for byte in word.bytes() {
            if byte.is_ascii_alphanumeric() {
                text.push(char::from(byte));
            } else {
                write!(text, "\\{byte:03o}").expect("a string takes everything");
            }
        }
        text.push_str("')\"");
        return text.into();
    }
    // The only error is a zero byte, which is a control character.
    shlex::try_quote(word).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn as_a_shell_reads(command: &str) -> String {
        let output = Command::new("sh").args(["-c", command]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn ordinary_names_stay_as_they_are() {
        for name in ["eth0", "enp3s0f1np1", "eth0.100", "br-lan", "bond_0"] {
            assert_eq!(quote(name), name);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Any name that the kernel allows: no slash, colon or space (`dev_valid_name`).
        #[test]
        fn a_shell_reads_the_same_word(
            words in proptest::collection::vec("[^\0\n/: ]{1,15}|['\"$`\\\\;&|<>(){}*?~#!%-]{1,9}|[\x01-\x09\x0b-\x7f]{1,9}", 1..20)
        ) {
            let quoted: Vec<_> = words.iter().map(|word| quote(word)).collect();
            for word in &quoted {
                prop_assert!(!word.chars().any(char::is_control));
            }
            let command = format!("printf '%s\\n' {}", quoted.join(" "));
            let told: String = words.iter().map(|word| format!("{word}\n")).collect();
            prop_assert_eq!(as_a_shell_reads(&command), told);
        }
    }
}
