//! The command line of `penstock-lab doctor`.

use clap::Args;

use crate::settings::{Format, Programs};

pub const EXAMPLES: &str = "\
Examples:
  # check this machine, and list the interfaces that could be used
  penstock-lab doctor

  # check an interface as well; with sudo it sees everything
  sudo penstock-lab doctor --iface eth1

Each check says ok, warn (slower, or with restrictions) or fail (--mode xdp
does not work), why it matters and what to do. Doctor changes nothing. Exit
codes: 0 no check fails, 1 a check fails or the interface does not exist,
2 wrong usage.";

/// Flags of `doctor`.
#[derive(Debug, Args)]
#[command(next_help_heading = "What to check")]
pub struct Doctor {
    /// Interface to receive payload on; without it, only the machine is checked.
    #[arg(long, value_name = "NAME")]
    pub iface: Option<String>,
    /// Output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    #[command(flatten)]
    pub programs: Programs,
}
