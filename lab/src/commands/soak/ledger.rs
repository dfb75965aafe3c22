//! Compares what publishers saw acknowledged with the logs: every acknowledged message is present, and
//! nothing else but what killed publishers sent first.

use penstock_testbed::lines::Lines;
use penstock_testbed::program_reports::{self, Publisher, ReadStream, Subscriber};
use penstock_testbed::verify;

/// What publishers of one broker reported.
#[derive(Debug, Default)]
pub struct Ledger {
    finished: Vec<Publisher>,
    killed: usize,
}

/// Result of the comparison for one broker.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Audit {
    pub messages_acked: u64,
    pub messages_in_log: u64,
    /// Of publishers that were killed.
    pub messages_of_killed: u64,
    pub problems: Vec<String>,
}

impl Ledger {
    /// Adds the report of a publisher that exited by itself.
    pub fn finished(&mut self, report: Publisher) {
        self.finished.push(report);
    }

    /// Adds a publisher that was killed.
    pub fn killed(&mut self) {
        self.killed += 1;
    }

    /// Compares with what a reader found in the broker's log, and with the broker's own counters.
    pub fn audit(
        &self,
        read: &Subscriber,
        broker: &program_reports::Broker,
        lines: &Lines,
    ) -> Audit {
        let mut audit = Audit {
            messages_in_log: read.messages,
            ..Audit::default()
        };
        for report in &self.finished {
            audit.messages_acked += report.messages_acked;
            if report.messages_acked != report.messages_sent {
                audit.problems.push(format!(
                    "a publisher ended with success, but {} of {} messages acked",
                    report.messages_acked, report.messages_sent
                ));
            }
            let checks = verify::compare(report, std::slice::from_ref(read));
            let one = std::slice::from_ref(read);
            audit.problems.extend(verify::problems(&checks, one));
        }
        let foreign: Vec<_> = read.streams.iter().filter(|s| !self.knows(s)).collect();
        audit.messages_of_killed = foreign.iter().map(|stream| stream.messages).sum();
        if foreign.len() > self.killed {
            audit.problems.push(format!(
                "{} streams in the log belong to no publisher, and {} publishers were killed",
                foreign.len(),
                self.killed
            ));
        }
        for stream in foreign {
            if lines.digest(stream.messages).as_ref() != Some(&stream.sha256) {
                audit.problems.push(format!(
                    "stream {} of session {}: its {} messages are not what a killed publisher sent first",
                    stream.stream, stream.session, stream.messages
                ));
            }
        }
        let counted: u64 = broker.topics.iter().map(|topic| topic.messages).sum();
        if counted != read.messages {
            audit.problems.push(format!(
                "the broker counted {counted} messages, a reader {}",
                read.messages
            ));
        }
        if audit.messages_acked + audit.messages_of_killed != read.messages {
            audit.problems.push(format!(
                "{} messages in the log, but {} acked and {} of killed publishers",
                read.messages, audit.messages_acked, audit.messages_of_killed
            ));
        }
        audit
    }

    fn knows(&self, stream: &ReadStream) -> bool {
        let mut sessions = self.finished.iter().flat_map(|report| &report.brokers);
        sessions.any(|session| session.session == stream.session)
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;
    use serde_json::json;

    use super::*;

    fn lines() -> (tempfile::TempDir, Lines) {
        let dir = tempfile::tempdir().unwrap();
        let lines = Lines::write(
            dir.path().join("lines"),
            "s",
            10_000,
            &mut Rng::with_seed(7),
        )
        .unwrap();
        (dir, lines)
    }

    fn publisher(session: &str, messages: u64, sha256: &str) -> Publisher {
        let json = json!({
            "messages_sent": messages, "messages_acked": messages, "batches": 1,
            "payload_bytes": 9, "seconds": 1.0, "bandwidth_mb_per_s": 1.0, "cpu_seconds": 1.0,
            "peak_rss_bytes": 1, "ack_latency_us": null, "stages": [],
            "brokers": [{ "address": "", "session": session, "streams": [{
                "stream": 0, "messages": messages, "messages_acked": messages, "batches": 1,
                "payload_bytes": 9, "sha256": sha256, "path": "tcp", "moves": 0, "transport": null,
            }] }],
        });
        program_reports::parse("publisher", &json.to_string()).unwrap()
    }

    fn read(streams: &[(&str, u64, &str)]) -> Subscriber {
        let streams = streams
            .iter()
            .map(|(session, messages, sha256)| ReadStream {
                session: (*session).to_owned(),
                stream: 0,
                messages: *messages,
                batches: 1,
                payload_bytes: 9,
                sha256: (*sha256).to_owned(),
            });
        let streams: Vec<_> = streams.collect();
        Subscriber {
            messages: streams.iter().map(|stream| stream.messages).sum(),
            lost_batches: 0,
            lost_messages: 0,
            streams,
        }
    }

    fn broker(messages: u64) -> program_reports::Broker {
        let json = json!({
            "active_seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1, "stages": [],
            "topics": [{ "topic": "soak", "path": "", "ring_bytes": 1, "messages": messages,
                "batches": 1, "payload_bytes": 9 }],
            "batches": 1, "recv_calls": 1, "recv_calls_per_batch": 1.0, "bytes_per_recv": 1.0,
            "eagain": 0, "connections": [], "counters": {}, "xdp": null,
        });
        program_reports::parse("broker", &json.to_string()).unwrap()
    }

    #[test]
    fn all_that_was_acked_and_beginnings_of_the_killed() {
        let (_dir, lines) = lines();
        let beginning = lines.digest(5).unwrap();
        let mut ledger = Ledger::default();
        ledger.finished(publisher("a", 3, "aa"));
        ledger.killed();
        let log = read(&[("a", 3, "aa"), ("b", 5, &beginning)]);
        let audit = ledger.audit(&log, &broker(8), &lines);
        assert_eq!(audit.problems, Vec::<String>::new());
        assert_eq!((audit.messages_acked, audit.messages_of_killed), (3, 5));
        // Killed before anything was committed.
        let audit = ledger.audit(&read(&[("a", 3, "aa")]), &broker(3), &lines);
        assert_eq!(audit.problems, Vec::<String>::new());
    }

    #[test]
    fn whatever_else_is_a_problem() {
        let (_dir, lines) = lines();
        let beginning = lines.digest(5).unwrap();
        let mut ledger = Ledger::default();
        ledger.finished(publisher("a", 3, "aa"));
        for (log, counted, words) in [
            (read(&[]), 0, "absent from the log, 3 messages"),
            (read(&[("a", 3, "bb")]), 3, "SHA-256 differs"),
            (read(&[("a", 3, "aa")]), 4, "the broker counted 4"),
            (
                read(&[("a", 3, "aa"), ("b", 5, &beginning)]),
                8,
                "belong to no publisher, and 0",
            ),
        ] {
            let audit = ledger.audit(&log, &broker(counted), &lines);
            let problems = audit.problems.join("\n");
            assert!(problems.contains(words), "{words}: {problems}");
        }
        ledger.killed();
        let torn = read(&[("a", 3, "aa"), ("b", 5, "cc")]);
        let problems = ledger.audit(&torn, &broker(8), &lines).problems;
        assert!(problems[0].contains("not what a killed publisher sent first"));
    }
}
