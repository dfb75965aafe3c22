#!/usr/bin/env bash
# Runs the throughput workload in network namespaces, with the variables of the original script.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Publishes one workload to brokers in network namespaces and writes results/<UTC time>/.

Usage: [VARIABLE=value ...] scripts/run_throughput.sh [options of penstock-lab throughput]

Variables, with their defaults:
  ORDER=0                          order level: 0 (per stream)
  ACK=1                            ack level: 0 (none), 1 (committed in the broker's shared buffer)
  TEST_TYPE=5                      workload: 5 (publish only)
  TOTAL_MESSAGE_SIZE=10737418240   bytes of all messages together
  MESSAGE_SIZE=1024                bytes per message
  NUM_BROKERS=4                    brokers, each in a namespace of its own
  MODE=tcp                         path of the payload: tcp, xdp, auto (xdp, or tcp if xdp is not available)
  PROFILE=wire                     wire (segmentation offloads off), offload (left on)
  MTU=1500                         MTU of the links
  NUM_TRIALS=1                     runs, one after another, each with its own folder
  THREADS_PER_BROKER=1             streams from the publisher to each broker
  REPLICATION_FACTOR=1             copies of a message: only 1 (no replication)
  SEQUENCER=NONE                   only NONE: messages of different brokers have no order

Values of the original script that are not supported are refused, not ignored.

Needs root (uses sudo if available). The last line that each run prints is its result folder.
Exit codes: 0 every message acknowledged and in the logs, 1 otherwise, 2 wrong usage.

Examples:
  scripts/run_throughput.sh
  NUM_TRIALS=3 THREADS_PER_BROKER=2 scripts/run_throughput.sh
  TOTAL_MESSAGE_SIZE=1073741824 NUM_BROKERS=2 PROFILE=offload scripts/run_throughput.sh
  scripts/run_throughput.sh --verify --ring-size 4GiB
TEXT
}

for argument in "$@"; do
  case $argument in -h | --help)
    help
    exit 0
    ;;
  esac
done

: "${ORDER:=0}" "${ACK:=1}" "${TEST_TYPE:=5}" "${TOTAL_MESSAGE_SIZE:=10737418240}"
: "${MESSAGE_SIZE:=1024}" "${NUM_BROKERS:=4}" "${MODE:=tcp}" "${PROFILE:=wire}" "${MTU:=1500}"
: "${NUM_TRIALS:=1}" "${THREADS_PER_BROKER:=1}" "${REPLICATION_FACTOR:=1}" "${SEQUENCER:=NONE}"

# supported NAME VALUE CHOICE...: refuses an unsupported value.
supported() {
  local name=$1 value=$2 choice
  shift 2
  for choice in "$@"; do
    [ "$value" = "$choice" ] && return 0
  done
  usage_error "$name=$value is not supported; supported: $*"
}

# positive NAME VALUE: refuses what is not a whole number above 0.
positive() {
  [[ $2 =~ ^0*[1-9][0-9]*$ ]] || usage_error "$1=$2 is not a whole number above 0"
}

[ "$TEST_TYPE" = 5 ] ||
  usage_error "TEST_TYPE=$TEST_TYPE is not supported; supported: 5 (publish only)"
supported ORDER "$ORDER" 0
supported ACK "$ACK" 0 1
supported MODE "$MODE" tcp xdp auto
supported PROFILE "$PROFILE" wire offload
positive TOTAL_MESSAGE_SIZE "$TOTAL_MESSAGE_SIZE"
positive MESSAGE_SIZE "$MESSAGE_SIZE"
positive NUM_BROKERS "$NUM_BROKERS"
positive MTU "$MTU"
positive NUM_TRIALS "$NUM_TRIALS"
positive THREADS_PER_BROKER "$THREADS_PER_BROKER"
[ "$REPLICATION_FACTOR" = 1 ] ||
  usage_error "REPLICATION_FACTOR=$REPLICATION_FACTOR is not supported; supported: 1 (each broker keeps its own messages)"
[ "${SEQUENCER^^}" = NONE ] ||
  usage_error "SEQUENCER=$SEQUENCER is not supported; supported: none (order level 0 needs no sequencer)"

build_release
code=0
for ((trial = 1; trial <= NUM_TRIALS; trial++)); do
  [ "$NUM_TRIALS" -eq 1 ] || say "== run $trial of $NUM_TRIALS"
  as_root "$BIN_DIR/penstock-lab" throughput \
    --mode "$MODE" --profile "$PROFILE" --mtu "$MTU" --brokers "$NUM_BROKERS" \
    --total-size "$TOTAL_MESSAGE_SIZE" --message-size "$MESSAGE_SIZE" \
    --threads-per-broker "$THREADS_PER_BROKER" \
    --ack "$ACK" --order "$ORDER" --results "$ROOT/results" "$@" || code=$?
  # Wrong usage and an interrupt end all trials; after a failed run the next one still starts.
  [ "$code" -le 1 ] || exit "$code"
done
exit "$code"
