//! What the lab can change about a cause, for a second run: one line for each cause that a diagnosis
//! names.

use bytesize::ByteSize;

use penstock_testbed::settings::Workload;

/// As much as a socket buffer may be on any path of a lab.
const LARGE_BUFFER: ByteSize = ByteSize::mib(64);
/// The publisher's and the broker's own defaults.
const IN_FLIGHT: u32 = 32;
const BATCH: ByteSize = ByteSize::kib(64);
const XDP_RING: u32 = 1024;

/// A change, or why there is none.
#[derive(Debug, Clone)]
pub enum Fix {
    Change {
        what: String,
        workload: Box<Workload>,
    },
    None {
        why: &'static str,
    },
}

type Remedy = fn(&Workload) -> Fix;

const REMEDIES: &[(&str, Remedy)] = &[
    ("receive-window-limited", larger_window),
    ("send-buffer-limited", tuned_send_buffer),
    ("syscall-overhead", larger_batches),
    ("sender-application-limited", more_in_flight),
    ("credit-limited", larger_xdp_ring),
    ("nic-drops", larger_xdp_ring),
    ("receiver-cpu", |_| Fix::None {
        why: "the receiver has no core left: give it more or faster ones (--workers, --cpus), or move the publisher to another host",
    }),
    ("receiver-application-limited", |_| Fix::None {
        why: "the receiving threads do not come to read: see what they wait for",
    }),
    ("sender-cpu", |_| Fix::None {
        why: "the sender has no core left: give it more or faster ones, or spread the load over several hosts",
    }),
    ("cpu-taken-by-others", |_| Fix::None {
        why: "other programs use the CPU: stop them, or run on an idle host",
    }),
    ("accept-queue-full", |_| Fix::None {
        why: "the server accepts connections too slowly: see what its threads wait for",
    }),
    ("shared-buffer-full", |_| Fix::None {
        why: "a registered reader does not keep up; without waiting for it, it would lose data: make the reader faster",
    }),
    ("congestion-limited", |_| Fix::None {
        why: "the path between the hosts is the limit: look for losses and queues on it",
    }),
    ("idle-or-offered-slower-than-capacity", |_| Fix::None {
        why: "nothing is limiting: there is nothing to remove",
    }),
];

/// What can be done about a cause.
pub fn of(cause: &str, workload: &Workload) -> Fix {
    let remedy = REMEDIES.iter().find(|(name, _)| *name == cause);
    remedy.map_or(
        Fix::None {
            why: "the lab knows no remedy for it",
        },
        |(_, remedy)| remedy(workload),
    )
}

fn change(what: impl Into<String>, workload: Workload) -> Fix {
    Fix::Change {
        what: what.into(),
        workload: Box::new(workload),
    }
}

fn larger_window(workload: &Workload) -> Fix {
    let large = workload.rcvbuf.is_some_and(|size| size >= LARGE_BUFFER);
    if workload.rcvbuf_force && large && workload.rcvbuf_on.as_deref() == Some("both") {
        return Fix::None {
            why: "the buffer is as large already as the lab makes it",
        };
    }
    let what = format!(
        "brokers with --rcvbuf {} --rcvbuf-on both --rcvbuf-force",
        LARGE_BUFFER.as_u64()
    );
    change(
        what,
        Workload {
            rcvbuf: Some(LARGE_BUFFER),
            rcvbuf_on: Some("both".to_owned()),
            rcvbuf_force: true,
            ..workload.clone()
        },
    )
}

fn tuned_send_buffer(workload: &Workload) -> Fix {
    let sized = |option: &String| option.starts_with("--sndbuf");
    if !workload.publisher_option.iter().any(sized) {
        return Fix::None {
            why: "the kernel sizes the sender's buffer already: raise net.ipv4.tcp_wmem on its host",
        };
    }
    let mut workload = workload.clone();
    workload.publisher_option.retain(|option| !sized(option));
    change(
        "a publisher without --sndbuf, so that the kernel sizes its buffer",
        workload,
    )
}

fn larger_batches(workload: &Workload) -> Fix {
    let now = workload.batch_size.unwrap_or(BATCH);
    if now >= BATCH {
        return Fix::None {
            why: "batches are large already: the calls are small for another reason",
        };
    }
    change(
        format!("a publisher with --batch-size {}", BATCH.as_u64()),
        Workload {
            batch_size: Some(BATCH),
            ..workload.clone()
        },
    )
}

fn more_in_flight(workload: &Workload) -> Fix {
    let throttled = |option: &String| option.starts_with("--rate");
    if workload.publisher_option.iter().any(throttled) {
        return Fix::None {
            why: "the publisher was configured to be slow (--rate)",
        };
    }
    let now = workload.in_flight.unwrap_or(IN_FLIGHT);
    change(
        format!(
            "a publisher with --in-flight {}: it waits less for acks",
            8 * now
        ),
        Workload {
            in_flight: Some(8 * now),
            ..workload.clone()
        },
    )
}

fn larger_xdp_ring(workload: &Workload) -> Fix {
    let given = |option: &String| option.starts_with("--xdp-ring");
    if workload.broker_option.iter().any(given) {
        return Fix::None {
            why: "the ring was given (--xdp-ring): give a larger one",
        };
    }
    let ring = format!("--xdp-ring={}", 4 * XDP_RING);
    let mut workload = workload.clone();
    workload.broker_option.push(ring.clone());
    change(format!("brokers with {ring}"), workload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_cause_has_its_line_and_every_line_a_cause() {
        let known: BTreeSet<_> = penstock_diagnose::causes()
            .map(|(cause, _)| cause)
            .collect();
        let here: BTreeSet<_> = REMEDIES.iter().map(|(cause, _)| *cause).collect();
        assert_eq!(known, here);
    }

    fn changed(cause: &str, workload: &Workload) -> Option<Workload> {
        match of(cause, workload) {
            Fix::Change { workload, what } => {
                assert!(!what.is_empty());
                Some(*workload)
            }
            Fix::None { why } => {
                assert!(!why.is_empty());
                None
            }
        }
    }

    #[test]
    fn a_small_window_is_made_large_once() {
        let small = Workload {
            rcvbuf: Some(ByteSize::kib(32)),
            ..Workload::default()
        };
        let fixed = changed("receive-window-limited", &small).unwrap();
        assert!(fixed.rcvbuf_force && fixed.rcvbuf == Some(LARGE_BUFFER));
        assert!(changed("receive-window-limited", &fixed).is_none());
    }

    #[test]
    fn what_was_asked_for_on_purpose_is_taken_back_or_left() {
        let with = |option: &str| Workload {
            publisher_option: vec![option.to_owned(), "--linger=1".to_owned()],
            ..Workload::default()
        };
        let fixed = changed("send-buffer-limited", &with("--sndbuf=4096")).unwrap();
        assert_eq!(fixed.publisher_option, ["--linger=1"]);
        assert!(changed("send-buffer-limited", &Workload::default()).is_none());
        assert!(changed("sender-application-limited", &with("--rate=1MB")).is_none());
        let more = changed("sender-application-limited", &Workload::default());
        assert_eq!(more.unwrap().in_flight, Some(256));
        assert!(changed("sender-cpu", &Workload::default()).is_none());
        assert!(changed("made-up", &Workload::default()).is_none());
    }

    #[test]
    fn batches_and_rings_grow_where_they_were_small() {
        let small = Workload {
            batch_size: Some(ByteSize(2048)),
            ..Workload::default()
        };
        assert_eq!(
            changed("syscall-overhead", &small).unwrap().batch_size,
            Some(BATCH)
        );
        assert!(changed("syscall-overhead", &Workload::default()).is_none());
        let ring = changed("credit-limited", &Workload::default()).unwrap();
        assert_eq!(ring.broker_option, ["--xdp-ring=4096"]);
        assert!(changed("credit-limited", &ring).is_none());
    }
}
