#!/usr/bin/env bash
# A short soak: publishers and readers come, go and die over bad links; nothing is lost, nothing kept.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

namespaces() { ip netns list | grep -c "^penstock-$1-" || true; }

short() {
  local report
  lab soak --minutes 0.4 --seed 5 --results "$T/results" --format json >"$T/stdout" || { cat "$T/stdout"; fail "something is wrong"; }
  report=$(tail -n 1 "$T/stdout")/report.json
  expect problems "$(jq -c .problems "$report")" "[]"
  expect "brokers whose logs hold something" "$(jq '[.brokers[] | select(.messages_in_log > 10000)] | length' "$report")" 2
  expect "paths" "$(jq -r '.streams | keys | join(" ")' "$report")" "tcp xdp"
  local what
  for what in publishers_killed publishers_stopped readers_killed messages_read faults.lost; do
    [ "$(jq ".$what" "$report")" -gt 0 ] || fail "there was nothing of $what: $(jq -c . "$report")"
  done
  lab report "$report" | grep -q '^- broker 1: ' || fail "it is not shown again"
  grep -q '^- broker 1: ' "$(dirname "$report")/report.md" || fail "report.md does not tell of broker 1"
}

# has_lines LAB: a log of the lab's brokers has messages.
has_lines() {
  local log messages
  for log in "$(buffers_of "$1")"/*/*.log; do
    messages=$("$BIN/penstock-subscriber" --path "$log" --from end --stat --format json 2>/dev/null | jq .log.messages) || continue
    [ "${messages:-0}" -eq 0 ] || return 0
  done
  return 1
}

# Ctrl-C and SIGTERM: processes, namespaces and buffers are gone, also of those that are stopped.
interrupted() {
  local signal lab code
  for signal in INT TERM; do
    code=0
    setsid "$BIN/penstock-lab" soak --minutes 5 --seed 1 --results "$T/results" >"$T/stdout" 2>&1 &
    lab=$!
    for _ in {1..200}; do
      [ "$(pgrep -P "$lab" | wc -l)" -lt 6 ] || break
      sleep 0.1
    done
    [ "$(namespaces "$lab")" -eq 4 ] || fail "$(namespaces "$lab") namespaces: $(cat "$T/stdout")"
    within 60 has_lines "$lab"
    kill "-$signal" "$lab"
    wait "$lab" || code=$?
    expect "exit code after SIG$signal" "$code" 130
    expect "namespaces that are left" "$(namespaces "$lab")" 0
    [ -z "$(buffers_of "$lab")" ] || fail "buffers are left"
    grep -q interrupted "$T/stdout" || fail "it does not say so"
  done
}

wrong_usage() {
  refuses 'the nearest is 6s' lab soak --minutes 0
  refuses 'invalid digit' lab soak --seed x
}

run_test "half a minute of everything" short
run_test "interrupted: all is taken down" interrupted
run_test "wrong usage" wrong_usage
finish
