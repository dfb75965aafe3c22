#!/usr/bin/env bash
# Memory of a broker stays at its ring's size however much passes through.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

# Beyond the ring: code, index, stacks, socket bookkeeping.
ALLOWANCE=$((64 << 20))

# through RING TOTAL: every byte passes a ring that is much smaller.
through() {
  local report total ring
  total=$(bytes_of "$2")
  ring=$(bytes_of "$1")
  lab throughput --brokers 1 --ring-size "$ring" --total-size "$total" \
    --profile offload --results "$T/results" >"$T/stdout"
  report=$(tail -n 1 "$T/stdout")/report.json
  expect messages_in_logs "$(jq .messages_in_logs "$report")" $((total / 1024))
  expect "ring" "$(jq '.brokers[0].ring_bytes' "$report")" "$ring"
  local peak
  peak=$(jq '.brokers[0].peak_rss_bytes' "$report")
  [ "$peak" -le $((ring + ALLOWANCE)) ] || fail "peak memory $peak, ring $ring"
}

small() { through 64MiB 1GiB; }
large() {
  [ "$QUICK" -eq 0 ] || skip "not in a quick run"
  through 1GiB 10GiB
}

run_test "1 GiB through a ring of 64 MiB in constant memory" small
run_test "10 GiB through a ring of 1 GiB in constant memory" large
finish
