#!/usr/bin/env bash
# Measures every performance target, with peers on the same links: installs the peers, builds, runs the benchmark.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Measures xdp, tcp, raw AF_XDP, iperf3 and nats-server (and Aeron, if its programs are given) on the
same links in network namespaces, compares the figures with the targets, and writes
results/<UTC time>/ with report.md and report.json.

Usage: scripts/bench.sh [--quick] [options of penstock-lab bench]

  --quick  takes about three minutes once built, instead of up to 25. Do not use the machine meanwhile.

The most important other options (penstock-lab bench --help lists all):
  --rows throughput,latency  only these rows
  --runs N --seconds 2       number of rounds, and length of a run
  --aeron DIR                Aeron's C programs
  --format markdown          the tables for a README

Needs root for the namespaces (uses sudo if available). The last line printed is the result folder.
Exit codes: 0 measured, even if targets are missed, 1 failed, 2 wrong usage, 130 interrupted.

Examples:
  scripts/bench.sh --quick
  scripts/bench.sh --format markdown
TEXT
}

for argument in "$@"; do
  case $argument in
    -h | --help)
      help
      exit 0
      ;;
  esac
done

install_packages iperf3 iproute2 ethtool nats-server
build_release
as_root "$BIN_DIR/penstock-lab" bench --results "$ROOT/results" "$@"
