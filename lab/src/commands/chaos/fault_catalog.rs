//! The catalogue of faults. What each does is in `trial/fault_actions.rs`.

/// How much of a run fits in its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogCapacity {
    /// All of it; it is read afterwards.
    Large,
    /// All of it, in a directory with little more room.
    Bounded,
    /// Little, so that lagging readers matter.
    Small,
}

impl LogCapacity {
    /// Size of the log's ring, bytes.
    pub fn ring(self) -> u64 {
        match self {
            Self::Large | Self::Bounded => 32 << 20,
            Self::Small => 2 << 20,
        }
    }
}

/// Identifies a fault; the catalogue describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Loss,
    Reorder,
    Duplicate,
    Corrupt,
    Truncate,
    Delay,
    LinkDown,
    Mtu,
    BrokerKilled,
    BrokerStopped,
    PublisherKilled,
    PublisherStopped,
    DirectoryFull,
    ReaderSlow,
    ReaderKilled,
    Clock,
    Descriptors,
    Memory,
}

/// A kind of fault.
pub struct Kind {
    pub fault: Fault,
    pub name: &'static str,
    /// Description for `--list`.
    pub what: &'static str,
    /// Name of the counter that shows how often it happened.
    pub counted: &'static str,
    /// Range of its duration, seconds.
    pub lasts: [f64; 2],
    pub capacity: LogCapacity,
    /// Whether it may overlap with other faults.
    pub mixes: bool,
    /// Whether it may end publishers before they report all that was acknowledged.
    pub kills_publishers: bool,
    /// Whether it ends brokers, and with them readers that follow.
    pub ends_brokers: bool,
}

impl Kind {
    /// Whether it may happen in a run that tests `main`.
    pub fn goes_with(&self, main: &Self) -> bool {
        self.mixes && !(self.ends_brokers && main.capacity == LogCapacity::Small)
    }
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// Defaults of a kind.
const PLAIN: Kind = Kind {
    fault: Fault::Loss,
    name: "",
    what: "",
    counted: "",
    lasts: [0.3, 1.4],
    capacity: LogCapacity::Large,
    mixes: true,
    kills_publishers: false,
    ends_brokers: false,
};

pub static FAULT_CATALOG: &[Kind] = &[
    Kind {
        fault: Fault::Loss,
        name: "loss",
        what: "2 to 15 % of the packets are lost",
        counted: "lost",
        ..PLAIN
    },
    Kind {
        fault: Fault::Reorder,
        name: "reorder",
        what: "2 to 30 % of the packets come 1 to 16 packets late",
        counted: "held",
        ..PLAIN
    },
    Kind {
        fault: Fault::Duplicate,
        name: "duplicate",
        what: "2 to 30 % of the packets come twice",
        counted: "duplicated",
        ..PLAIN
    },
    Kind {
        fault: Fault::Corrupt,
        name: "corrupt",
        what: "one bit of 2 to 5 % of the packets is another",
        counted: "corrupted",
        ..PLAIN
    },
    Kind {
        fault: Fault::Truncate,
        name: "truncate",
        what: "2 to 5 % of the packets come without their end",
        counted: "truncated",
        ..PLAIN
    },
    Kind {
        fault: Fault::Delay,
        name: "delay",
        what: "packets to the broker take 1 to 20 ms, and up to as much again by chance",
        counted: "delayed",
        // It interrupts the link when it begins, and streams take a while to recover.
        lasts: [1.0, 2.0],
        mixes: false,
        ..PLAIN
    },
    Kind {
        fault: Fault::LinkDown,
        name: "link-down",
        what: "an interface of the link is down, at either end or in the middle",
        counted: "links_down",
        ..PLAIN
    },
    Kind {
        fault: Fault::Mtu,
        name: "mtu",
        what: "an interface of the link has another MTU: 1280, 1400 or 9000 instead of 1500",
        counted: "mtu_changes",
        ..PLAIN
    },
    Kind {
        fault: Fault::BrokerKilled,
        name: "broker-killed",
        what: "kill -9 of the broker; another one starts on its log",
        counted: "brokers_killed",
        ends_brokers: true,
        ..PLAIN
    },
    Kind {
        fault: Fault::BrokerStopped,
        name: "broker-stopped",
        what: "the broker sleeps (SIGSTOP)",
        counted: "brokers_stopped",
        ..PLAIN
    },
    Kind {
        fault: Fault::PublisherKilled,
        name: "publisher-killed",
        what: "kill -9 of a publisher; another one comes",
        counted: "publishers_killed",
        kills_publishers: true,
        ..PLAIN
    },
    Kind {
        fault: Fault::PublisherStopped,
        name: "publisher-stopped",
        what: "a publisher sleeps (SIGSTOP)",
        counted: "publishers_stopped",
        ..PLAIN
    },
    Kind {
        fault: Fault::DirectoryFull,
        name: "directory-full",
        what: "no byte is free in the buffer directory: no new topic, but existing ones continue",
        counted: "directories_full",
        capacity: LogCapacity::Bounded,
        mixes: false,
        ..PLAIN
    },
    Kind {
        fault: Fault::ReaderSlow,
        name: "reader-slow",
        what: "readers sleep: the broker waits for the registered one, and overruns the other",
        counted: "readers_stopped",
        capacity: LogCapacity::Small,
        mixes: false,
        ..PLAIN
    },
    Kind {
        fault: Fault::ReaderKilled,
        name: "reader-killed",
        what: "a registered reader that the broker waits for gets a kill -9; another one comes",
        counted: "readers_killed",
        capacity: LogCapacity::Small,
        mixes: false,
        ..PLAIN
    },
    Kind {
        fault: Fault::Clock,
        name: "clock",
        what: "kill -9 of the broker; the next one's monotonic clock is days ahead, or behind",
        counted: "clock_jumps",
        mixes: false,
        ends_brokers: true,
        ..PLAIN
    },
    Kind {
        fault: Fault::Descriptors,
        name: "descriptors",
        what: "broker or publishers cannot open another file while a publisher connects or reconnects",
        counted: "limits_set",
        mixes: false,
        ends_brokers: true,
        ..PLAIN
    },
    Kind {
        fault: Fault::Memory,
        name: "memory",
        what: "broker or publishers get no more memory (RLIMIT_AS); meanwhile there is a new topic",
        counted: "limits_set",
        mixes: false,
        kills_publishers: true,
        ends_brokers: true,
        ..PLAIN
    },
];
