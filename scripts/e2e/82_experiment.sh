#!/usr/bin/env bash
# Experiments: what Linux does with SO_RCVBUF, and what being diagnosed costs; never how fast anything is.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

RMEM_MAX=/proc/sys/net/core/rmem_max
[ -w "$RMEM_MAX" ] || {
  echo "SKIP experiment rcvbuf: $RMEM_MAX cannot be set here"
  exit 0
}
before=$(cat "$RMEM_MAX")

# row CASE RMEM_MAX FIELD
row() { jq -r ".rows[] | select(.case == \"$1\" and .rmem_max == $2) | .$3" "$T/out.json"; }

# every WHAT FILTER: each row passes it.
every() { expect "rows that do not: $1" "$(jq "[.rows[] | select(($2) | not)]" "$T/out.json")" "[]"; }

facts() {
  local small=212992 large=33554432 folder
  lab experiment rcvbuf --quick --seconds 0.5 --format json --results "$T/results" >"$T/out.json"
  expect "rmem_max afterwards" "$(cat "$RMEM_MAX")" "$before"
  expect "rows" "$(jq -r '[.rows[] | "\(.case) \(.rmem_max)"] | join(",")' "$T/out.json")" \
    "none $small,accepted $small,listener $small,both $small,force $small,none $large,accepted $large,listener $large,both $large,force $large"
  local limit
  for limit in $small $large; do
    expect "accepted inherits its listener's buffer" \
      "$(row listener "$limit" rcvbuf_effective)" $((2 * limit))
    expect "buffer set after accept" "$(row accepted "$limit" rcvbuf_effective)" $((2 * limit))
    expect "buffer past rmem_max" "$(row force "$limit" rcvbuf_effective)" $((2 * large))
    expect "buffer that nobody set" "$(row none "$limit" rcvbuf_effective)" 131072
    expect "window scale, set after accept" \
      "$(row accepted "$limit" window_scale)" "$(row none "$limit" window_scale)"
    [ "$(row listener "$limit" rcv_ssthresh_first)" -gt "$(row accepted "$limit" rcv_ssthresh_first)" ] ||
      fail "the first window of a listener's buffer is not larger"
    expect "first window, set after accept" \
      "$(row accepted "$limit" rcv_ssthresh_first)" "$(row none "$limit" rcv_ssthresh_first)"
  done
  [ "$(row listener "$small" window_scale)" -lt "$(row accepted "$small" window_scale)" ] ||
    fail "a small buffer on the listener does not lower the window scale"
  every "a buffer that was set stays" '.case == "none" or .rcvbuf_final == .rcvbuf_effective'
  every "capped where less was given" '.rcvbuf_capped ==
    ((.case | IN("accepted", "listener", "both")) and .rmem_max < .rcvbuf_requested)'
  every "figures are whole" '.mb_per_s.median > 0 and (.mb_per_s.runs | length) == 1
    and .rwnd_limited_percent.median >= 0 and .rcv_ssthresh_final > 0 and .rcv_space_final > 0'
  expect "claims" "$(jq '[.claims[] | select(.claim != "" and .evidence != "")] | length' "$T/out.json")" 8
  folder=$(jq -r .folder "$T/out.json")
  grep -q 'does not hold' "$folder/report.md" || fail "report.md does not tell what was wrong"
  expect "report.json" "$(jq -c .rows "$folder/report.json")" "$(jq -c .rows "$T/out.json")"
}

# stopped SIGNAL: the lab gets it while rmem_max is not what it was.
stopped() {
  "$BIN/penstock-lab" experiment rcvbuf --rmem-max 208KiB --results "$T/results" >"$T/stdout" 2>&1 &
  local lab=$! code=0
  for _ in {1..3000}; do
    [ "$(cat "$RMEM_MAX")" = "$before" ] || break
    kill -0 "$lab" || fail "the lab ended: $(cat "$T/stdout")"
    sleep 0.01
  done
  kill -"$1" "$lab"
  wait "$lab" || code=$?
  expect "exit code" "$code" "$2"
  # What puts it back outlives the lab.
  for _ in {1..500}; do
    [ "$(cat "$RMEM_MAX")" != "$before" ] || return 0
    sleep 0.01
  done
  fail "rmem_max is $(cat "$RMEM_MAX"), it was $before"
}

interrupted() { stopped INT 130; }
terminated() { stopped TERM 130; }
killed() {
  stopped KILL 137
  # The next lab takes away what a killed one left.
  lab throughput --brokers 1 --total-size 1MiB --results "$T/results" >/dev/null
}

# Figures are whole and add up; how large they are is not for a test to say.
observer() {
  local folder
  lab experiment diagnose --pairs 6 --seconds 0.5 --format json --results "$T/results" >"$T/out.json"
  expect "pairs that are not whole" "$(jq '[.pairs[] | select((.alone_mb_per_s > 0 and
    .observed_mb_per_s > 0 and .observer_cores > 0) | not)]' "$T/out.json")" "[]"
  expect "pairs, their ratios in order, the interval around the median" "$(jq -c '[(.pairs | length),
    ([.pairs[] | .observed_mb_per_s / .alone_mb_per_s] == .ratio.runs),
    (.ratio_low <= .ratio.median and .ratio.median <= .ratio_high)]' "$T/out.json")" "[6,true,true]"
  folder=$(jq -r .folder "$T/out.json")
  expect "diagnoses that saw the broker" "$(jq -s '[.[] | select(.sample.broker.workers | length > 0)] | length' \
    "$folder"/diagnosis-*.json)" 6
  lab report "$folder" | grep -q 'Throughput observed / alone: median' || fail "it is not shown again"
}

wrong() {
  refuses 'not from 4KiB to' lab experiment rcvbuf --rmem-max 1KiB --results "$T/results"
  refuses 'the nearest is 1073741823' lab experiment rcvbuf --rcvbuf 2GiB --results "$T/results"
  refuses 'such as 10ms' lab experiment rcvbuf --delay 10
  refuses 'rcvbuf' lab experiment
  local held
  exec {held}<"$RMEM_MAX"
  flock "$held"
  refuses 'another experiment' lab experiment rcvbuf --quick --results "$T/results"
}

run_test "experiment rcvbuf: inheritance, caps, window scales, first windows" facts
run_test "experiment diagnose: pairs of intervals of one run" observer
run_test "Ctrl-C puts rmem_max back" interrupted
run_test "SIGTERM puts rmem_max back" terminated
run_test "kill -9 puts rmem_max back" killed
run_test "experiment refuses what it cannot do" wrong
finish
