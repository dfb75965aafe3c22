#!/usr/bin/env bash
# Runs the throughput workload, diagnoses what limits it, and repeats it without that cause.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Runs the throughput workload, diagnoses a broker meanwhile, and repeats the run without the cause if
the lab can remove it. Writes results/<UTC time>/: report.md (figures, what they mean, root cause, second
run after the fix, next steps), report.html, report.json, diagnosis.txt and every log; the second run is
in after-fix/.

Usage: [VARIABLE=value ...] scripts/run_throughput_with_diagnostics.sh [options of penstock-lab throughput]

The variables are those of scripts/run_throughput.sh (ORDER, ACK, TEST_TYPE, TOTAL_MESSAGE_SIZE,
MESSAGE_SIZE, NUM_BROKERS, MODE, PROFILE, MTU, NUM_TRIALS, THREADS_PER_BROKER), with the same defaults.
A run of less than about two seconds is too short for a diagnosis.

Needs root (uses sudo if available). The last line printed is the result folder.
Exit codes: 0 every message acknowledged and in the logs, 1 otherwise, 2 wrong usage.

Examples:
  scripts/run_throughput_with_diagnostics.sh
  NUM_BROKERS=1 scripts/run_throughput_with_diagnostics.sh --rcvbuf 64KiB --delay 10ms --total-size 500MB
  scripts/run_throughput_with_diagnostics.sh --diagnose-seconds 10
TEXT
}

for argument in "$@"; do
  case $argument in -h | --help)
    help
    exit 0
    ;;
  esac
done

exec "$ROOT/scripts/run_throughput.sh" --diagnose --fix "$@"
