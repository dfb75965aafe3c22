#!/usr/bin/env bash
# Compares the xdp path with the tcp path: builds, measures in network namespaces, shows the ratios.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Alternates the xdp and the tcp path on the same workload, in both profiles at MTU 1500 and 9000, and
writes results/<UTC time>/ with report.md, report.json and a chart, compare.svg.

Usage: scripts/compare.sh [--quick] [options of penstock-lab compare]

  --quick  fewer and smaller runs: under three minutes once built, instead of under twelve.

The most important other options (penstock-lab compare --help lists all):
  --profile wire|offload     only with segmentation offloads off, or only with them on
  --mtu 1500,9000            MTUs of the links
  --xdp-mode native|generic  only this mode; otherwise both, and the better one counts
  --brokers N --runs N --size SIZE
  --remote HOST:PORT         against brokers that run elsewhere (docs/operations.md)

Needs root for the namespaces (uses sudo if available), except with --remote. The last line printed
is the result folder.
Exit codes: 0 measured, 1 failed, 2 wrong usage, 130 interrupted.

Examples:
  scripts/compare.sh --quick
  scripts/compare.sh --profile wire --mtu 9000 --runs 15
TEXT
}

privileged=as_root
for argument in "$@"; do
  case $argument in
    -h | --help)
      help
      exit 0
      ;;
    --remote | --remote=*) privileged= ;;
  esac
done

build_release
$privileged "$BIN_DIR/penstock-lab" compare --results "$ROOT/results" "$@"
