#!/usr/bin/env bash
# Finds what limits receiving at a running broker; takes the variables of the original script.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Observes a running broker, or any other TCP server, says what limits it, and keeps the figures.

Usage: [VARIABLE=value ...] scripts/diagnose_recv_bottleneck.sh [BROKER_PID [BROKER_PORT [STRACE_SEC [MPSTAT_SEC]]]]

Each of the four may also be an environment variable; an argument takes precedence.

  BROKER_PID   process; '-' or empty: the process that listens on BROKER_PORT, in any network namespace
  BROKER_PORT  TCP port; '-': all ports of the process; without a process, 1214
  STRACE_SEC   seconds for which an eBPF program (not strace) counts system calls; 0: never
               (default 2)
  MPSTAT_SEC   total seconds of observation, 0.5 to 3600 (default 10)

Run it while the load runs. Without root and sudo, it says what it could not see. The last line
printed is the result folder (in results/, or in $RESULTS) with diagnosis.txt and diagnosis.json.
docs/DIAGNOSTIC_RUNBOOK_RECV.md says how to read them. It changes nothing in the broker.

Exit codes: 0 diagnosed, whatever the verdict, 1 failed, 2 wrong usage.

Examples:
  scripts/diagnose_recv_bottleneck.sh
  BROKER_PORT=5201 MPSTAT_SEC=5 scripts/diagnose_recv_bottleneck.sh
  scripts/diagnose_recv_bottleneck.sh "$(pgrep -x penstock-broker)" 1214 2 10
  scripts/diagnose_recv_bottleneck.sh "$(pgrep -x iperf3)" 5201
TEXT
}

for argument in "$@"; do
  case $argument in
    -h | --help)
      help
      exit 0
      ;;
    -?*) usage_error "unknown option '$argument'" ;;
  esac
done
[ $# -le 4 ] || usage_error "at most four arguments; the fifth is '$5'"
pid=${1:-${BROKER_PID:--}} port=${2:-${BROKER_PORT:--}}
trace=${3:-${STRACE_SEC:-2}} duration=${4:-${MPSTAT_SEC:-10}}
for seconds in "STRACE_SEC $trace" "MPSTAT_SEC $duration"; do
  [[ ${seconds#* } =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage_error "${seconds% *} is a number of seconds, not '${seconds#* }'"
done

target=()
if [ "$pid" != - ]; then
  [[ $pid =~ ^[0-9]+$ ]] || usage_error "BROKER_PID is one number or '-', not '$pid'"
  target+=(--pid "$pid")
elif [ "$port" = - ]; then
  port=1214
fi
if [ "$port" != - ]; then
  [[ $port =~ ^[0-9]+$ ]] || usage_error "BROKER_PORT is a number or '-', not '$port'"
  target+=(--port "$port")
fi
# A build at the same time would limit the broker that is observed.
[ -x "$BIN_DIR/penstock-lab" ] || build_release

privilege=()
if [ "$(id -u)" -ne 0 ]; then
  if command -v sudo >/dev/null; then privilege=(sudo); else say "neither root nor sudo: the diagnosis sees less"; fi
fi
exec "${privilege[@]}" "$BIN_DIR/penstock-lab" diagnose "${target[@]}" --trace "$trace" \
  --duration "$duration" --results "${RESULTS:-$ROOT/results}"
