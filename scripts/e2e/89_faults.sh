#!/usr/bin/env bash
# Some fault runs over every path: nothing that was acked is lost, doubled, torn or out of order.
# Usage: 89_faults.sh [RUNS [SEED]]
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

RUNS=${1:-4}
SEED=${2:-$(date +%s)}

namespaces() { ip netns list | grep -c "^penstock-$1-" || true; }

# Other faults each time: what is wrong is told with the command that repeats it.
short() {
  local report
  lab faults --schedules "$RUNS" --seed "$SEED" --results "$T/results" >"$T/stdout" || { cat "$T/stdout"; fail "something is wrong"; }
  report=$(tail -n 1 "$T/stdout")/report.json
  expect "problems" "$(jq .problems "$report")" 0
  expect "runs" "$(jq '.runs | length' "$report")" "$RUNS"
  expect "wrong lines" "$(jq '[.runs[].wrong[]] | add' "$report")" 0
  expect "runs that published nothing" "$(jq '[.runs[] | select(.lines_acked < 1000)] | length' "$report")" 0
  expect "lines that are not accounted for" \
    "$(jq '[.runs[] | .lines_in_log - .lines_acked - .lines_of_killed] | map(select(. != 0)) | length' "$report")" 0
  tail -n 2 "$T/stdout" | head -n 1 >>"$REPORT"
}

# What makes a run about a fault, and over a path, does happen.
happens() {
  local report
  lab faults --schedules 4 --faults broker-killed,loss --paths xdp,fallback --seed 3 --results "$T/results" \
    >"$T/stdout" || { cat "$T/stdout"; fail "something is wrong"; }
  report=$(tail -n 1 "$T/stdout")/report.json
  expect "cells" "$(jq '[.cells[] | select(.happened > 0)] | length' "$report")" 4
  [ "$(jq '[.runs[].moves] | add' "$report")" -gt 0 ] || fail "no stream went on over another connection"
  [ "$(jq '[.runs[].counts.fell_back // 0] | add' "$report")" -gt 0 ] || fail "no stream fell back to tcp"
  expect "paths of --paths xdp" "$(jq -r '[.runs[] | select(.path == "xdp") | .streams | keys[]] | unique | join(" ")' "$report")" xdp
  lab report "$report" | grep -q '^ *broker-killed ' || fail "it is not shown again"
  grep -q '^| broker-killed ' "$(dirname "$report")/report.md" || fail "report.md has no table"
}

# Ctrl-C and SIGTERM: processes, namespaces, mounts and buffers are gone.
interrupted() {
  local signal lab code
  for signal in INT TERM; do
    code=0
    setsid "$BIN/penstock-lab" faults --faults directory-full --seed 1 --results "$T/results" >"$T/stdout" 2>&1 &
    lab=$!
    for _ in {1..200}; do
      [ ! -e "$(buffers_of "$lab")/b0/filler" ] || break
      sleep 0.05
    done
    mountpoint -q "$(buffers_of "$lab")/b0" || fail "there is no directory of its own: $(cat "$T/stdout")"
    kill "-$signal" "$lab"
    wait "$lab" || code=$?
    expect "exit code after SIG$signal" "$code" 130
    expect "namespaces that are left" "$(namespaces "$lab")" 0
    [ -z "$(buffers_of "$lab")" ] || fail "buffers are left"
    ! grep -q "penstock-$lab-shm" /proc/mounts || fail "a mount is left"
    grep -q interrupted "$T/stdout" || fail "it does not say so"
  done
}

# After kill -9 the next one tidies up.
killed() {
  local lab code=0
  "$BIN/penstock-lab" faults --faults directory-full --results "$T/results" >"$T/stdout" 2>&1 &
  lab=$!
  for _ in {1..200}; do
    ! mountpoint -q "$(buffers_of "$lab")/b0" || break
    sleep 0.05
  done
  kill -KILL "$lab"
  { wait "$lab" || true; } 2>/dev/null
  lab faults --schedules 1 --faults directory-full --paths tcp --results "$T/results" >"$T/stdout" || fail "the next one fails: $(cat "$T/stdout")"
  expect "namespaces that are left" "$(namespaces "$lab")" 0
  [ -z "$(buffers_of "$lab")" ] || fail "buffers are left"
}

wrong_usage() {
  refuses 'possible values: loss, reorder' lab faults --faults noise
  refuses 'tcp, xdp, fallback' lab faults --paths udp
  refuses '1..=100000' lab faults --schedules 0
  refuses '--seed' lab faults --only 3
  lab faults --schedules 1 --faults mtu --paths tcp --results "$T/results" --format json >"$T/stdout"
  expect "fault as JSON" "$(head -n -1 "$T/stdout" | jq -r '.runs[0].fault')" mtu
  expect "kinds that --list tells" "$("$BIN/penstock-lab" faults --list | wc -l)" 18
}

REPORT=$WORK/report
: >"$REPORT"
run_test "fault runs over all paths: nothing acked is lost, doubled, torn or out of order" short
run_test "fault runs: what they are about happens" happens
run_test "fault runs: interrupted, all is taken down" interrupted
run_test "fault runs: killed, the next one takes all down" killed
run_test "fault runs: wrong usage, JSON" wrong_usage
cat "$REPORT"
finish
