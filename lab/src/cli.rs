//! The command line.

use clap::{Parser, Subcommand};

use crate::commands::baseline::flags::Baseline;
use crate::commands::bench::flags::{self as bench, Bench};
use crate::commands::chaos::flags::{self as chaos, Faults};
use crate::commands::compare::flags::{self as compare, Compare};
use crate::commands::diagnose::{self, Diagnose};
use crate::commands::doctor::flags::{self as doctor, Doctor};
use crate::commands::experiment::flags::Experiment;
use crate::commands::limits::flags::Limits;
use crate::commands::report::{self, Report};
use crate::commands::soak::flags::{self as soak, Soak};
use crate::commands::throughput::flags::Throughput;

const EXAMPLES: &str = "\
Examples:
  # the standard workload: 10 GiB in 1 KiB messages to four brokers
  sudo penstock-lab throughput --total-size 10GiB

  # publish the lines of a file, read them back and compare
  sudo penstock-lab throughput --input access.log --verify

  # the same over the xdp path and a network that drops, reorders, corrupts
  # and duplicates packets
  sudo penstock-lab throughput --mode xdp --input access.log --verify \\
      --faults loss=1%,reorder=1%,corrupt=0.1%,duplicate=1%

  # find what limits throughput, remove it and run again
  sudo penstock-lab throughput --diagnose --fix

  # one broker against iperf3 on the same links
  sudo penstock-lab baseline --runs 5

  # xdp against tcp on the same workload, in under three minutes
  sudo penstock-lab compare --quick

  # the limits of this host, and whether it is ready for the xdp path
  sudo penstock-lab limits
  sudo penstock-lab doctor --iface eth1

The last line on stdout is the result folder. Exit codes: 0 everything was
acknowledged and is in the logs, 1 otherwise, 2 wrong usage, 130 interrupted.";

/// Runs Penstock workloads in network namespaces, measures them and writes reports.
#[derive(Debug, Parser)]
#[command(name = "penstock-lab", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publishes one workload to brokers, each in a namespace of its own, and reports the results.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Throughput(Throughput),
    /// Alternates Penstock and iperf3 on the same links and reports the ratio.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Baseline(Baseline),
    /// Alternates the xdp and tcp paths on the same workload and reports the ratios.
    #[command(after_help = compare::EXAMPLES, args_override_self = true)]
    Compare(Compare),
    /// Measures everything that must hold, with peers on the same links, and says which targets are met.
    #[command(after_help = bench::EXAMPLES, args_override_self = true)]
    Bench(Box<Bench>),
    /// Measures the limits of this host: bare AF_XDP, iperf3, and a copy in memory.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Limits(Limits),
    /// Shows a report.json again: in the terminal, or as an HTML page.
    #[command(after_help = report::EXAMPLES, args_override_self = true)]
    Report(Report),
    /// Answers a question about the kernel by measurement.
    #[command(subcommand)]
    Experiment(Experiment),
    /// Observes a running TCP server for some seconds and reports what limits it.
    #[command(after_help = diagnose::EXAMPLES, args_override_self = true)]
    Diagnose(Diagnose),
    /// Checks whether this machine is ready for the xdp path, and says what to do.
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(Doctor),
    /// Runs publishers and readers over bad links, stops and kills some of them, and checks that
    /// brokers lose nothing and leak nothing.
    #[command(after_help = soak::EXAMPLES)]
    Soak(Soak),
    /// Injects every kind of fault into publishers, brokers and readers on every path, and compares the
    /// logs with what publishers saw acknowledged.
    #[command(after_help = chaos::EXAMPLES)]
    Faults(Faults),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_does_not_exist_is_refused_with_what_does() {
        for (option, value, supported) in [
            ("--mode", "udp", "tcp, xdp, auto"),
            ("--tx", "raw", "udp, af_xdp"),
            ("--poll", "often", "busy, adaptive"),
            ("--ack", "2", "supported: 0"),
            ("--order", "1", "supported: 0"),
            ("--mtu", "100", "576"),
            ("--faults", "noise=1%", "possible: loss"),
        ] {
            let error = Cli::try_parse_from(["penstock-lab", "throughput", option, value]);
            let text = error.unwrap_err().to_string();
            assert!(text.contains(supported), "{option} {value}: {text}");
        }
    }

    #[test]
    fn comparisons_and_limits_refuse_what_they_cannot_do() {
        for (line, words) in [
            (&["compare", "--runs", "0"][..], "1..=1000"),
            (&["compare", "--xdp-mode", "fast"], "native, generic"),
            (
                &["compare", "--mode", "xdp"],
                "unexpected argument '--mode'",
            ),
            (
                &["compare", "--latency-seconds", "0"],
                "from 100ms to 10m; the nearest is 100ms",
            ),
            (&["compare", "--mtu", "1500,65535"], "16384"),
            (
                &["compare", "--remote", "a:1", "--mtu", "1500"],
                "cannot be used with",
            ),
            (
                &["compare", "--remote", "a:1", "--brokers", "2"],
                "cannot be used with",
            ),
            (&["limits", "--seconds", "61"], "the nearest is 1m"),
            (&["limits", "--seconds", "1.5"], "whole number of seconds"),
            (
                &["throughput", "--rcvbuf", "4GiB"],
                "the nearest is 1073741823",
            ),
            (&["throughput", "--total-size", "5x"], "KiB, MiB, GiB"),
            (&["experiment", "rcvbuf", "--runs", "0"], "1..=1000"),
            (&["experiment", "rcvbuf", "--delay", "1s"], "such as 10ms"),
            (&["throughput", "--fix"], "--diagnose"),
            (&["report"], "FILE|DIR"),
            (&["report", "x", "--format", "pdf"], "text, html"),
            (&["experiment", "sndbuf"], "unrecognized subcommand"),
            (&["limits", "--profile", "best"], "wire, offload"),
        ] {
            let line = ["penstock-lab"].iter().chain(line);
            let text = Cli::try_parse_from(line).unwrap_err().to_string();
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}
