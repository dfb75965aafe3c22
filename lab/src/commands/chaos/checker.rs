//! Compares a log with what publishers saw acknowledged, line by line. It knows only what a reader prints;
//! sessions and batches belong to the programs under test.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use penstock_testbed::lines::Lines;

/// Number of errors that are described in words.
const MAX_EXAMPLES: usize = 5;
/// Length of a line's excerpt, bytes.
const EXCERPT_BYTES: usize = 40;

/// What one publisher sent, and what it saw acknowledged.
#[derive(Debug)]
pub struct Sent {
    /// Prefix of each line.
    pub name: String,
    pub lines: Lines,
    pub reported: Reported,
    pub streams: u32,
}

/// What a publisher reported when it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reported {
    /// It exited with this number of messages acknowledged, which is all of them.
    Acked(usize),
    /// It was killed and reported nothing.
    Nothing,
}

/// Errors of a log, in lines.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrong {
    /// Acknowledged but absent from the log; for a killed publisher, absent before a line that is present.
    pub lost: u64,
    /// Present more than once.
    pub doubled: u64,
    /// Never sent.
    pub torn: u64,
    /// Behind a later line of the same stream.
    pub out_of_order: u64,
}

impl Wrong {
    pub fn sum(self) -> u64 {
        self.lost + self.doubled + self.torn + self.out_of_order
    }
}

impl AddAssign for Wrong {
    fn add_assign(&mut self, other: Self) {
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.torn += other.torn;
        self.out_of_order += other.out_of_order;
    }
}

/// Result of the comparison.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    pub in_log: u64,
    /// Of publishers that were killed.
    pub of_killed: u64,
    pub wrong: Wrong,
    /// Descriptions of some errors.
    pub examples: Vec<String>,
}

/// Collects the lines of a log, stream by stream.
#[derive(Debug)]
pub struct Checker<'a> {
    sent: &'a [Sent],
    /// For each publisher, which lines were found.
    seen: Vec<Vec<bool>>,
    findings: Findings,
}

impl<'a> Checker<'a> {
    pub fn new(sent: &'a [Sent]) -> Self {
        let seen = sent.iter().map(|sent| vec![false; sent.lines.count()]);
        Self {
            sent,
            seen: seen.collect(),
            findings: Findings::default(),
        }
    }

    /// Adds all lines of the streams with one number, in log order.
    pub fn add_streams(&mut self, number: u32, text: &[u8]) {
        let mut next = vec![0; self.sent.len()];
        let Some(text) = text.strip_suffix(b"\n") else {
            if !text.is_empty() {
                self.wrong(
                    |wrong| &mut wrong.torn,
                    || format!("stream {number} ends inside of a line"),
                );
            }
            return;
        };
        for line in text.split(|byte| *byte == b'\n') {
            self.findings.in_log += 1;
            let Some((sender, at)) = self.find(line) else {
                let what = || format!("'{}' was never sent", shown(line));
                self.wrong(|wrong| &mut wrong.torn, what);
                continue;
            };
            let what = || format!("stream {number}: '{}'", shown(line));
            if std::mem::replace(&mut self.seen[sender][at], true) {
                self.wrong(|wrong| &mut wrong.doubled, || what() + " is duplicated");
            } else if at < next[sender] {
                self.wrong(
                    |wrong| &mut wrong.out_of_order,
                    || what() + " is out of order",
                );
            }
            next[sender] = next[sender].max(at + 1);
        }
    }

    /// Finds the sender and number of a line.
    fn find(&self, line: &[u8]) -> Option<(usize, usize)> {
        let mut words = line.split(|byte| *byte == b' ');
        let name = words.next()?;
        let number: usize = str::from_utf8(words.next()?).ok()?.parse().ok()?;
        let sender = self
            .sent
            .iter()
            .position(|sent| sent.name.as_bytes() == name)?;
        let whole = self.sent[sender].lines.get(number)? == line;
        whole.then_some((sender, number))
    }

    fn wrong(&mut self, kind: impl Fn(&mut Wrong) -> &mut u64, what: impl FnOnce() -> String) {
        *kind(&mut self.findings.wrong) += 1;
        if self.findings.examples.len() < MAX_EXAMPLES {
            self.findings.examples.push(what());
        }
    }

    /// Counts what is missing, after everything was added.
    pub fn finish(mut self) -> Findings {
        for (sent, seen) in self.sent.iter().zip(std::mem::take(&mut self.seen)) {
            let due = match sent.reported {
                Reported::Acked(count) => count,
                Reported::Nothing => {
                    self.findings.of_killed += seen.iter().filter(|seen| **seen).count() as u64;
                    // How far each of several streams had come is unknown.
                    if sent.streams > 1 {
                        continue;
                    }
                    seen.iter()
                        .rposition(|seen| *seen)
                        .map_or(0, |last| last + 1)
                }
            };
            for (number, seen) in seen.into_iter().enumerate() {
                if number < due && !seen {
                    let what = || format!("line {number} of {} is lost", sent.name);
                    self.wrong(|wrong| &mut wrong.lost, what);
                } else if number >= due && seen {
                    let what = || format!("line {number} of {} was never sent", sent.name);
                    self.wrong(|wrong| &mut wrong.torn, what);
                }
            }
        }
        self.findings
    }
}

fn shown(line: &[u8]) -> String {
    let cut = &line[..line.len().min(EXCERPT_BYTES)];
    let dots = if cut.len() < line.len() { "…" } else { "" };
    format!("{}{dots}", String::from_utf8_lossy(cut))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fastrand::Rng;

    use super::*;

    /// Two publishers, of which one was killed.
    fn sent(dir: &Path) -> [Sent; 2] {
        let mut rng = Rng::with_seed(3);
        [("a", Reported::Acked(20)), ("b", Reported::Nothing)].map(|(name, reported)| Sent {
            name: name.to_owned(),
            lines: Lines::write(dir.join(name), name, 20_000, &mut rng).unwrap(),
            reported,
            streams: 1,
        })
    }

    fn text(sent: &Sent, numbers: impl IntoIterator<Item = usize>) -> Vec<u8> {
        let lines = numbers.into_iter().map(|n| sent.lines.get(n).unwrap());
        lines.flat_map(|line| [line, b"\n"].concat()).collect()
    }

    fn found(sent: &[Sent], text: &[u8]) -> Findings {
        let mut checker = Checker::new(sent);
        checker.add_streams(0, text);
        checker.finish()
    }

    #[test]
    fn what_was_acked_and_beginnings_of_the_killed_are_right() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = sent(dir.path());
        let text = [text(&b, 0..3), text(&a, 0..20), text(&b, 3..7)].concat();
        let findings = found(&[a, b], &text);
        assert_eq!(findings.wrong.sum(), 0, "{:?}", findings.examples);
        assert_eq!((findings.in_log, findings.of_killed), (27, 7));
    }

    #[test]
    fn streams_share_the_lines_of_a_publisher() {
        let dir = tempfile::tempdir().unwrap();
        let [a, _] = sent(dir.path());
        let (even, odd) = (text(&a, (0..20).step_by(2)), text(&a, (1..20).step_by(2)));
        let sent = [a];
        let mut checker = Checker::new(&sent);
        checker.add_streams(0, &even);
        checker.add_streams(1, &odd);
        assert_eq!(checker.finish().wrong.sum(), 0);
    }

    #[test]
    fn whatever_is_wrong_is_counted_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let sent = sent(dir.path());
        let a = |numbers: &[usize]| text(&sent[0], numbers.iter().copied());
        let all: Vec<usize> = (0..20).collect();
        let cut = text(&sent[0], 0..20).split_last().unwrap().1.to_vec();
        let mut flipped = a(&all);
        flipped[1] ^= 1;
        for (text, wanted, words) in [
            (a(&all[..19]), [1, 0, 0, 0], "line 19 of a is lost"),
            ([a(&all), a(&[4])].concat(), [0, 1, 0, 0], "'a 4 "),
            (
                [a(&[1, 0]), a(&all[2..])].concat(),
                [0, 0, 0, 1],
                "is out of order",
            ),
            (
                [a(&all), a(&[20])].concat(),
                [0, 0, 1, 0],
                "line 20 of a was never sent",
            ),
            (
                [a(&all), b"a 3\n".to_vec()].concat(),
                [0, 0, 1, 0],
                "'a 3' was never sent",
            ),
            (
                [a(&all), b"c 3 x\n".to_vec()].concat(),
                [0, 0, 1, 0],
                "'c 3 x' was never sent",
            ),
            (flipped, [1, 0, 1, 0], "was never sent"),
            (cut, [20, 0, 1, 0], "ends inside of a line"),
            // For a killed publisher, a gap before a line that is present.
            (
                [a(&all), text(&sent[1], [0, 2])].concat(),
                [1, 0, 0, 0],
                "line 1 of b is lost",
            ),
        ] {
            let findings = found(&sent, &text);
            let wrong = findings.wrong;
            let counts = [wrong.lost, wrong.doubled, wrong.torn, wrong.out_of_order];
            assert_eq!(counts, wanted, "{words}: {findings:?}");
            let examples = findings.examples.join("\n");
            assert!(examples.contains(words), "{words}: {examples}");
        }
    }
}
