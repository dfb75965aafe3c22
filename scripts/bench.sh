#!/usr/bin/env bash
# Every figure that must hold, with peers on the same links: installs the peers, builds, measures.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Measures xdp, tcp, raw AF_XDP, iperf3 and nats-server (and Aeron, if its programs are given) on the
same links in network namespaces, compares them with what must hold, and writes results/<UTC time>/
with report.md and report.json.

Usage: scripts/bench.sh [--quick] [options of penstock-lab bench]

  --quick  about three minutes once built; without it less than 25. Leave the machine alone meanwhile.

Of the other options these matter first; penstock-lab bench --help has all:
  --rows throughput,latency  only these rows
  --runs N --seconds 2       rounds, and the length of a run
  --aeron DIR                Aeron's C programs
  --format markdown          the tables for a README

Needs root for the namespaces (uses sudo if there is one). The last line printed is the result folder.
Exit codes: 0 measured, also if rows miss their targets, 1 failed, 2 wrong usage, 130 interrupted.

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
