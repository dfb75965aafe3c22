//! Words in commands that people are told to type.

use std::borrow::Cow;
use std::fmt::Write;

/// A word as a shell takes it: quoted if need be. Nearly every byte may be in an interface's name.
///
/// Whatever would move a terminal's cursor is spelt out for printf(1), so that showing a command does
/// nothing either.
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
        /// Of what the kernel lets a name be: no slash, colon or space (`dev_valid_name`).
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
