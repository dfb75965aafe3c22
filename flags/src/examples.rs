//! The examples in help texts, for tests: the program must accept each of them.

/// The words of each command in `text` that runs `program`, starting with the program's name. A command
/// may be part of a pipe or a list, and continue over lines that end with a backslash.
#[must_use]
pub fn examples(text: &str, program: &str) -> Vec<Vec<String>> {
    let whole = text.replace("\\\n", " ");
    let lines = whole
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#'));
    lines
        .flat_map(|line| line.split(" | ").flat_map(|part| part.split(" && ")))
        .filter_map(|command| {
            // Quoted words contain no blanks.
            let words = command.split_whitespace();
            let words = words.map(|word| word.trim_matches('\'').to_owned());
            let words: Vec<_> = words.skip_while(|word| word != program).collect();
            (!words.is_empty()).then_some(words)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_in_pipes_and_over_lines() {
        let text =
            "Examples:\n  # tool is not run here\n  a | sudo tool --x \\\n      --y '1'\n  other\n";
        assert_eq!(examples(text, "tool"), [["tool", "--x", "--y", "1"]]);
    }
}
