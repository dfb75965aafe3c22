//! The decision table: every cause, the evidence for and against it, and what to do next.
//!
//! Thresholds are here and nowhere else. Each clue gives the reason for its threshold. Weights add up to a confidence from 0 to 1: what a cause
//! `requires` makes it possible, what `supports` it makes it likely, and what `contradicts` it is
//! usually the mark of another cause of which this one would be a symptom.

use super::clue::{Cause, at_least, below};
use super::facts::Figure;

const MEGABYTE: f64 = 1e6;
/// What a thread has left above this goes to sampling, its other work and other processes.
pub const WHOLE_CORE: f64 = 0.85;

const NO_TIME_LEFT: &str = "above 85 % of a core, a thread has no idle time left";
const TIME_LEFT: &str = "a thread that sleeps half of the time is not the bottleneck";
const BUSY_OR_READY: &str = "a thread that wants to run a third of the time keeps others waiting";
const QUEUE_FULL: &str =
    "unread data fills the receive buffer: the limit is the application, not the network";
const QUEUE_EMPTY: &str = "an almost empty receive buffer means that the receiver keeps up";
/// Not a share of the buffer: what a sender may have unacked may be little of a large one.
const READ_AT_ONCE: &str =
    "data is read within a millisecond, about as long as a thread may wait to be scheduled";
const SOMETHING_FLOWS: &str = "below 1 MB/s there is too little traffic for anything to limit";
const MOSTLY: &str = "most of the time";
const A_FIFTH: &str =
    "every connection at full speed waits briefly, but not for a fifth of the time";
const OUT_OF_QUOTA: &str =
    "a control group that has no quota left for a tenth of the time slows its threads down";
const OFTEN_OUT_OF_QUOTA: &str = "three tenths of the time without quota is no coincidence";
const DISPLACED: &str =
    "on a host with idle cores, no thread waits for a core for a fifth of the time";
const A_LOT_DISPLACED: &str = "more than a third of the time";
const STOLEN: &str = "losing a tenth of the CPU slows down every thread without idle time";
/// Less gives a thread without idle time a tenth or two at most: what it lacks is another core.
const A_LOT_STOLEN: &str = "with that quarter of the CPU, the host would do a third more work";
const NOT_ITS_OWN_LIMIT: &str = "it would do more with a core of its own";
const NOT_ALLOWED_TO_RUN: &str = "an end that is out of CPU quota would do more with a larger one";
const NOT_THE_NETWORK: &str =
    "while an end is out of CPU quota, data stays in flight longer, whatever the network does";

/// Every cause. The order decides between equals: a cause before its symptoms.
pub const CAUSES: &[Cause] = &[
    Cause {
        id: "shared-buffer-full",
        title: "The shared buffer is full: a registered reader is slow or has stopped",
        requires: &[&[at_least(
            Figure::Blocked,
            0.2,
            0.65,
            "a connection that waits for room in every fifth sample is blocked, not just unlucky",
        )]],
        unseen: &[],
        supports: &[
            at_least(
                Figure::Unread,
                0.5,
                0.2,
                "a reader that keeps up leaves most of the buffer free",
            ),
            at_least(Figure::Blocked, 0.5, 0.15, MOSTLY),
        ],
        contradicts: &[],
        next: "sudo fuser -v $(find /dev/shm -name '*.readers')  # lists the readers; fix the slow one, or use --full overwrite",
    },
    Cause {
        id: "cpu-taken-by-others",
        title: "CPU taken by others: an end is ready to run, but other processes or the hypervisor have the core",
        requires: &[
            &[
                at_least(Figure::ReceiverDisplaced, 0.2, 0.45, DISPLACED),
                at_least(Figure::ReceiverCore, 0.35, 0.1, BUSY_OR_READY),
            ],
            &[
                at_least(Figure::SenderDisplaced, 0.2, 0.45, DISPLACED),
                at_least(Figure::SenderCore, 0.35, 0.1, BUSY_OR_READY),
            ],
            &[
                at_least(Figure::Stolen, 0.25, 0.55, A_LOT_STOLEN),
                at_least(Figure::ReceiverCore, WHOLE_CORE, 0.1, NO_TIME_LEFT),
            ],
            &[
                at_least(Figure::Stolen, 0.25, 0.55, A_LOT_STOLEN),
                at_least(Figure::SenderCore, WHOLE_CORE, 0.1, NO_TIME_LEFT),
            ],
            &[
                at_least(Figure::Stolen, 0.1, 0.25, STOLEN),
                at_least(Figure::ReceiverCore, WHOLE_CORE, 0.1, NO_TIME_LEFT),
            ],
            &[
                at_least(Figure::Stolen, 0.1, 0.25, STOLEN),
                at_least(Figure::SenderCore, WHOLE_CORE, 0.1, NO_TIME_LEFT),
            ],
        ],
        unseen: &[],
        supports: &[
            at_least(Figure::ReceiverDisplaced, 0.35, 0.2, A_LOT_DISPLACED),
            at_least(Figure::SenderDisplaced, 0.35, 0.15, A_LOT_DISPLACED),
        ],
        contradicts: &[
            at_least(Figure::ReceiverThrottled, 0.1, 0.2, OUT_OF_QUOTA),
            at_least(Figure::SenderThrottled, 0.1, 0.2, OUT_OF_QUOTA),
        ],
        next: "top -b -n 1 -o %CPU | head -n 15  # lists the busiest processes; move or limit them (taskset, cpu.weight of their cgroup), or use a larger host",
    },
    Cause {
        id: "accept-queue-full",
        title: "The accept queue is full and the kernel drops further connections: the server accepts too slowly",
        requires: &[
            &[at_least(
                Figure::AcceptQueueFull,
                0.5,
                0.7,
                "most of the time there is no room for another connection",
            )],
            &[
                at_least(
                    Figure::AcceptQueueFull,
                    0.05,
                    0.2,
                    "sometimes there is no room for another connection",
                ),
                at_least(
                    Figure::AcceptQueueOverflows,
                    1.0,
                    0.3,
                    "the client of a dropped connection retries after one second, then two, then four",
                ),
            ],
        ],
        unseen: &[],
        supports: &[at_least(
            Figure::AcceptQueueOverflows,
            0.1,
            0.2,
            "the client of a dropped connection retries after one second, then two, then four",
        )],
        contradicts: &[at_least(
            Figure::Rate,
            MEGABYTE,
            0.3,
            "accepted connections carry payload",
        )],
        next: "ss -ltn 'sport = :PORT'  # Recv-Q connections are waiting, Send-Q is the limit; accept faster, or raise the backlog of listen() and net.core.somaxconn",
    },
    Cause {
        id: "syscall-overhead",
        title: "Receive calls are too small: the calls themselves cost more than the data",
        requires: &[&[
            below(
                Figure::BytesPerReceive,
                1024.0,
                0.35,
                "below 1 KiB, a call costs more than its copy",
            ),
            at_least(
                Figure::ReceiveCalls,
                20_000.0,
                0.25,
                "20,000 calls a second, up to 1 µs each, begin to show in the use of a core",
            ),
            at_least(
                Figure::ReceiverCore,
                0.7,
                0.2,
                "small calls matter only to a thread that is short of CPU time",
            ),
        ]],
        unseen: &[],
        supports: &[
            at_least(Figure::ReceiverCore, WHOLE_CORE, 0.1, NO_TIME_LEFT),
            at_least(Figure::ReceiveQueue, 0.25, 0.1, QUEUE_FULL),
        ],
        contradicts: &[],
        next: "sudo timeout 5 strace -f -c -e trace=%network,read -p PID  # then receive into larger buffers",
    },
    Cause {
        id: "receiver-cpu",
        title: "A receiving thread is out of CPU time",
        requires: &[
            &[at_least(
                Figure::ReceiverCore,
                WHOLE_CORE,
                0.4,
                NO_TIME_LEFT,
            )],
            &[at_least(Figure::ReceiverThrottled, 0.1, 0.4, OUT_OF_QUOTA)],
        ],
        unseen: &[],
        supports: &[
            at_least(Figure::ReceiveQueue, 0.25, 0.3, QUEUE_FULL),
            at_least(Figure::ReceiverThrottled, 0.3, 0.2, OFTEN_OUT_OF_QUOTA),
            at_least(Figure::RwndLimited, 0.2, 0.1, A_FIFTH),
        ],
        contradicts: &[
            below(Figure::ReadDelay, 1.0, 0.25, READ_AT_ONCE),
            at_least(
                Figure::SenderCore,
                WHOLE_CORE,
                0.1,
                "the sender is as busy: either may be the slower one",
            ),
            below(
                Figure::BytesPerReceive,
                1024.0,
                0.2,
                "it spends its time on calls that return next to nothing",
            ),
            at_least(Figure::ReceiverDisplaced, 0.2, 0.4, NOT_ITS_OWN_LIMIT),
            at_least(Figure::Stolen, 0.25, 0.3, A_LOT_STOLEN),
        ],
        next: "sudo perf top -p PID  # then more workers (--workers), or a larger CPU quota",
    },
    Cause {
        id: "receiver-application-limited",
        title: "The receiving application reads too slowly, although it has CPU time left",
        requires: &[&[
            at_least(Figure::ReceiveQueue, 0.4, 0.4, QUEUE_FULL),
            below(
                Figure::ReceiverCore,
                WHOLE_CORE,
                0.2,
                "a thread that has time left and data to read is waiting for something else",
            ),
        ]],
        unseen: &[at_least(Figure::ReceiveQueue, 0.4, 0.4, QUEUE_FULL)],
        supports: &[
            at_least(Figure::RwndLimited, 0.2, 0.2, A_FIFTH),
            below(Figure::ReceiverCore, 0.5, 0.15, TIME_LEFT),
        ],
        contradicts: &[
            at_least(
                Figure::Blocked,
                0.2,
                0.4,
                "the broker does not read because its shared buffer is full",
            ),
            at_least(Figure::ReceiverDisplaced, 0.2, 0.5, NOT_ITS_OWN_LIMIT),
        ],
        next: "for t in /proc/PID/task/*; do cat $t/comm $t/wchan; echo; done  # what its threads wait for",
    },
    Cause {
        id: "nic-drops",
        title: "Packets are dropped before they reach a socket: rings are too small or polled too late",
        requires: &[&[at_least(
            Figure::Dropped,
            0.001,
            0.6,
            "one packet in a thousand is enough to keep loss recovery and congestion control busy",
        )]],
        unseen: &[],
        supports: &[
            at_least(
                Figure::Dropped,
                0.01,
                0.2,
                "one in a hundred cuts any sender's rate",
            ),
            at_least(
                Figure::Retransmitted,
                0.001,
                0.1,
                "dropped packets are retransmitted",
            ),
        ],
        contradicts: &[below(
            Figure::Rate,
            MEGABYTE,
            0.3,
            "without load, dropped packets are rarely this server's",
        )],
        next: "ethtool -S IFACE | grep -iE 'drop|miss|full'; ethtool -g IFACE  # then larger rings (ethtool -G, --xdp-ring) or more queues",
    },
    Cause {
        id: "credit-limited",
        title: "The publisher is out of credit: too few bytes may be in flight over xdp",
        requires: &[&[at_least(
            Figure::CreditPauses,
            0.2,
            0.6,
            "at every fifth ACK, the publisher was waiting for credit",
        )]],
        unseen: &[],
        supports: &[
            at_least(Figure::CreditPauses, 0.5, 0.2, "at every second ACK"),
            below(
                Figure::ReceiverCore,
                WHOLE_CORE,
                0.1,
                "the worker has CPU time left",
            ),
        ],
        contradicts: &[
            at_least(
                Figure::Blocked,
                0.2,
                0.5,
                "the broker grants no credit while the shared buffer is full",
            ),
            at_least(
                Figure::ReceiverThrottled,
                0.1,
                0.3,
                "a worker that does not run grants no credit",
            ),
            at_least(Figure::ReceiverDisplaced, 0.2, 0.3, NOT_ITS_OWN_LIMIT),
        ],
        next: "tr '\\0' ' ' </proc/PID/cmdline  # a larger --xdp-ring gives more credit",
    },
    Cause {
        id: "receive-window-limited",
        title: "The receiver's window is too small for this path",
        requires: &[
            &[
                at_least(Figure::RwndLimited, 0.2, 0.45, A_FIFTH),
                at_least(
                    Figure::WindowBounded,
                    0.5,
                    0.3,
                    "no buffer can raise the window above that limit",
                ),
            ],
            &[
                at_least(Figure::RwndLimited, 0.2, 0.55, A_FIFTH),
                below(
                    Figure::ReceiveQueue,
                    0.4,
                    0.15,
                    "the window was closed although the buffer was not full of unread data",
                ),
            ],
        ],
        unseen: &[
            at_least(
                Figure::WindowUse,
                0.8,
                0.3,
                "a window that fills up in every round trip limits the rate",
            ),
            below(Figure::ReceiveQueue, 0.25, 0.1, QUEUE_EMPTY),
        ],
        supports: &[
            at_least(Figure::RwndLimited, 0.5, 0.15, MOSTLY),
            below(Figure::ReceiverCore, 0.5, 0.1, TIME_LEFT),
        ],
        contradicts: &[
            at_least(Figure::ReceiverCore, WHOLE_CORE, 0.3, NO_TIME_LEFT),
            at_least(
                Figure::Blocked,
                0.2,
                0.5,
                "the window is closed because the broker waits for its readers",
            ),
            at_least(Figure::ReceiverDisplaced, 0.2, 0.3, NOT_ITS_OWN_LIMIT),
        ],
        next: "scripts/tune_kernel_buffers.sh show  # then set the buffer on the listener (--rcvbuf-on listener), or raise the limit",
    },
    Cause {
        id: "send-buffer-limited",
        title: "The sender's socket buffer is too small for this path",
        requires: &[&[at_least(Figure::SndbufLimited, 0.2, 0.7, A_FIFTH)]],
        unseen: &[],
        supports: &[
            at_least(Figure::SndbufLimited, 0.5, 0.15, MOSTLY),
            at_least(
                Figure::SendQueue,
                0.5,
                0.1,
                "a send buffer that is large enough is not full all the time",
            ),
        ],
        contradicts: &[at_least(
            Figure::RwndLimited,
            0.2,
            0.3,
            "the receiver's window blocked the sender as well",
        )],
        next: "sysctl net.ipv4.tcp_wmem net.core.wmem_max  # then leave SO_SNDBUF alone at the sender, or raise it (--sndbuf)",
    },
    Cause {
        id: "sender-cpu",
        title: "A sending thread is out of CPU time",
        requires: &[
            &[at_least(Figure::SenderCore, WHOLE_CORE, 0.45, NO_TIME_LEFT)],
            &[at_least(Figure::SenderThrottled, 0.1, 0.45, OUT_OF_QUOTA)],
        ],
        unseen: &[],
        supports: &[
            below(Figure::ReadDelay, 1.0, 0.2, READ_AT_ONCE),
            at_least(
                Figure::AppLimited,
                0.5,
                0.1,
                "the application supplies less than the path could carry",
            ),
            at_least(Figure::SenderThrottled, 0.3, 0.2, OFTEN_OUT_OF_QUOTA),
        ],
        contradicts: &[
            at_least(Figure::ReceiveQueue, 0.25, 0.3, QUEUE_FULL),
            at_least(
                Figure::RwndLimited,
                0.2,
                0.3,
                "a sender that waits for the window a fifth of the time has CPU time left",
            ),
            at_least(
                Figure::SndbufLimited,
                0.2,
                0.2,
                "a sender that waits for its buffer a fifth of the time has CPU time left",
            ),
            at_least(Figure::SenderDisplaced, 0.2, 0.4, NOT_ITS_OWN_LIMIT),
            at_least(Figure::Stolen, 0.25, 0.3, A_LOT_STOLEN),
        ],
        next: "sudo perf top -p PEER  # then more streams (--threads-per-broker), or a larger CPU quota",
    },
    Cause {
        id: "congestion-limited",
        title: "The network is the limit: its rate, loss or delay",
        requires: &[
            &[at_least(
                Figure::PathLimited,
                0.5,
                0.35,
                "most of the time, data was queued or in flight and neither buffer nor window was full",
            )],
            &[at_least(
                Figure::CongestionPauses,
                0.2,
                0.35,
                "at every fifth ACK, the publisher's congestion window was full",
            )],
        ],
        unseen: &[
            at_least(Figure::Rate, MEGABYTE, 0.05, SOMETHING_FLOWS),
            below(Figure::ReceiveQueue, 0.05, 0.15, QUEUE_EMPTY),
        ],
        supports: &[
            at_least(
                Figure::CwndFull,
                0.3,
                0.15,
                "the congestion window stopped the sender",
            ),
            at_least(
                Figure::Retransmitted,
                0.001,
                0.15,
                "losing one byte in a thousand is enough to keep halving the window",
            ),
            at_least(
                Figure::Missing,
                0.001,
                0.15,
                "losing one packet in a thousand is enough to keep the congestion window small",
            ),
            at_least(
                Figure::RttGrowth,
                3.0,
                0.1,
                "packets spend more time in a queue than on the wire",
            ),
            below(Figure::SenderCore, 0.5, 0.1, TIME_LEFT),
        ],
        contradicts: &[
            at_least(Figure::SenderThrottled, 0.1, 0.4, NOT_THE_NETWORK),
            at_least(Figure::ReceiverThrottled, 0.1, 0.4, NOT_THE_NETWORK),
            at_least(Figure::SenderCore, WHOLE_CORE, 0.3, NO_TIME_LEFT),
            at_least(Figure::ReceiverCore, WHOLE_CORE, 0.3, NO_TIME_LEFT),
            at_least(Figure::ReceiveQueue, 0.25, 0.3, QUEUE_FULL),
            at_least(
                Figure::Dropped,
                0.001,
                0.3,
                "this host drops the lost packets, not the network",
            ),
            at_least(Figure::ReceiverDisplaced, 0.2, 0.4, NOT_ITS_OWN_LIMIT),
            at_least(Figure::SenderDisplaced, 0.2, 0.4, NOT_ITS_OWN_LIMIT),
        ],
        next: "ss -tin '( sport = :PORT or dport = :PORT )'  # cwnd, retrans, rtt; then tc -s qdisc along the path",
    },
    Cause {
        id: "sender-application-limited",
        title: "The sending application supplies no more data: it is throttled, or waits for its input or for acks",
        requires: &[
            &[
                at_least(Figure::Rate, MEGABYTE, 0.1, SOMETHING_FLOWS),
                below(
                    Figure::SenderBusy,
                    0.7,
                    0.45,
                    "for the rest of the time the sender's kernel had nothing to send",
                ),
            ],
            &[
                at_least(Figure::Rate, MEGABYTE, 0.1, SOMETHING_FLOWS),
                at_least(
                    Figure::IdlePauses,
                    0.2,
                    0.45,
                    "at every fifth ACK, the publisher had nothing left to send",
                ),
            ],
        ],
        unseen: &[
            at_least(Figure::Rate, MEGABYTE, 0.1, SOMETHING_FLOWS),
            below(Figure::ReceiveQueue, 0.05, 0.2, QUEUE_EMPTY),
        ],
        supports: &[
            at_least(
                Figure::AppLimited,
                0.5,
                0.15,
                "the application supplies less than the path could carry",
            ),
            below(Figure::SenderCore, 0.5, 0.1, TIME_LEFT),
            below(Figure::ReadDelay, 1.0, 0.1, READ_AT_ONCE),
        ],
        contradicts: &[
            at_least(Figure::SenderCore, WHOLE_CORE, 0.4, NO_TIME_LEFT),
            at_least(Figure::SenderThrottled, 0.1, 0.4, OUT_OF_QUOTA),
            at_least(
                Figure::CreditPauses,
                0.2,
                0.4,
                "over xdp it waits for credit",
            ),
            at_least(
                Figure::CongestionPauses,
                0.2,
                0.3,
                "over xdp it waits for the network",
            ),
            at_least(
                Figure::ReceiverThrottled,
                0.1,
                0.4,
                "it may be waiting for acks from a receiver that does not run",
            ),
            at_least(Figure::SenderDisplaced, 0.2, 0.5, NOT_ITS_OWN_LIMIT),
            at_least(Figure::ReceiverDisplaced, 0.2, 0.3, NOT_ITS_OWN_LIMIT),
        ],
        next: "for t in /proc/PEER/task/*; do cat $t/comm $t/wchan; echo; done  # what its threads wait for; see --rate, --in-flight, its input",
    },
    Cause {
        id: "idle-or-offered-slower-than-capacity",
        title: "Nothing limits it: it is idle, or the load is far below its capacity",
        requires: &[&[
            below(
                Figure::Rate,
                MEGABYTE,
                0.5,
                "at 1 MB/s a stage has 1 µs for each byte; no stage is that slow unless it waits for something",
            ),
            below(
                Figure::Queued,
                65_536.0,
                0.3,
                "a bottleneck builds a queue; less than 64 KiB is one batch in flight",
            ),
        ]],
        unseen: &[],
        supports: &[below(
            Figure::SenderBusy,
            0.05,
            0.15,
            "the senders' sockets had next to nothing to send",
        )],
        contradicts: &[
            at_least(
                Figure::SenderBusy,
                0.5,
                0.7,
                "data was queued or in flight half of the time",
            ),
            at_least(
                Figure::Blocked,
                0.2,
                0.5,
                "connections wait for room in the shared buffer",
            ),
            at_least(Figure::ReceiverThrottled, 0.1, 0.5, NOT_ALLOWED_TO_RUN),
            at_least(Figure::SenderThrottled, 0.1, 0.5, NOT_ALLOWED_TO_RUN),
            at_least(Figure::ReceiverDisplaced, 0.2, 0.5, NOT_ITS_OWN_LIMIT),
            at_least(Figure::SenderDisplaced, 0.2, 0.5, NOT_ITS_OWN_LIMIT),
        ],
        next: "penstock-lab diagnose --pid PID --duration 30  # while the load runs",
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clue::Clue;
    use std::collections::BTreeSet;

    #[test]
    fn every_line_is_whole() {
        let ids: BTreeSet<_> = CAUSES.iter().map(|cause| cause.id).collect();
        assert_eq!(ids.len(), CAUSES.len(), "names are unique");
        let sum = |clues: &[Clue]| clues.iter().map(|clue| clue.weight).sum::<f64>();
        for cause in CAUSES {
            let id = cause.id;
            assert!(!cause.next.is_empty(), "{id}");
            let parts = [cause.unseen, cause.supports, cause.contradicts];
            let ways = cause.requires.iter().copied();
            for clue in ways.chain(parts).flatten() {
                assert!(!clue.why.is_empty() && clue.weight > 0.0, "{id}");
            }
            for way in cause.requires {
                assert!(sum(way) >= 0.35, "{id}: what it requires names it");
                assert!(sum(way) + sum(cause.supports) <= 1.001, "{id}");
            }
            assert!(sum(cause.unseen) <= 0.5, "{id}: half blind is not sure");
        }
    }
}
