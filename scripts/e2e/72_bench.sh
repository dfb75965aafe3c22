#!/usr/bin/env bash
# The benchmark that measures every target: the shape of its report, never its figures.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

SMALL=(--runs 1 --seconds 0.1)

# bench ARGUMENTS...: sets $folder, the last line printed, and $report.
bench() {
  lab bench "${SMALL[@]}" "$@" --results "$T/results" >"$T/stdout" 2>"$T/stderr" || {
    tail -n 5 "$T/stderr"
    fail "penstock-lab bench $*"
  }
  folder=$(tail -n 1 "$T/stdout")
  report=$folder/report.json
}

# nothing_left PID: no namespace, process or buffer of that lab.
nothing_left() {
  ! ip netns list | grep "penstock-$1-" || fail "namespaces are left"
  ! pgrep -f "/dev/shm/penstock-$1-" || fail "processes are left"
  expect "buffers" "$(buffers_of "$1")" ""
}

json() {
  bench --rows throughput,memory --format json
  head -n -1 "$T/stdout" | jq . >"$T/printed"
  cmp "$T/printed" <(jq . "$report") || fail "what is printed is not report.json"
  expect kind "$(jq -r .kind "$report")" bench
  expect complete "$(jq .complete "$report")" true
  jq -c '.cases[].contenders[] | select(.failures != []) | {kind, mode, failures}' "$report"
  expect "rows without a verdict" "$(jq '[.rows[] | select(.verdict == "not_measured")] | length' "$report")" 0
  expect "lost rows without a sentence" \
    "$(jq '[.rows[] | select(.verdict == "lost" and (.sentence // "") == "")] | length' "$report")" 0
  local id
  for id in xdp_raw xdp_tcp xdp_tcp_of_limits tcp_iperf3_wire_1 ack_p50_full ack_p99_full cpu_both_hosts; do
    expect "rows of $id" "$(jq --arg id "$id" '[.rows[] | select(.id | test("^" + $id + "_(1500|9000)$"))]
      | length' "$report")" 2
  done
  expect "rows of idle streams" "$(jq '[.rows[] | select(.id | startswith("idle_stream_"))] | length' "$report")" 2
  expect "figures that lack a run" "$(jq '[.cases[].contenders[].figures[] | select(.runs | length != 1)]
    | length' "$report")" 0
  expect "folders of runs that failed" "$(find "$folder" -mindepth 1 -maxdepth 1 -type d | wc -l)" \
    "$(jq '[.cases[].contenders[].failures[]] | length' "$report")"
  grep -q '^| what must hold' "$folder/report.md" || fail "report.md has no table"
}

markdown() {
  bench --rows peers --format markdown
  grep -q '^.penstock-lab bench.: ' "$T/stdout" || fail "the machine is not named"
  grep -q '^| xdp / Aeron C, 1 KiB, MTU 1500 ' "$T/stdout" || fail "no row for Aeron"
  grep -q -- '--aeron' "$T/stdout" || fail "how to get Aeron is not told"
  lab report "$folder" | grep -q 'xdp / nats-server' || fail "the report is not shown again"
}

interrupted() {
  local code=0 pid
  "$BIN/penstock-lab" bench --runs 100 --seconds 0.1 --rows throughput --results "$T/results" >"$T/stdout" 2>"$T/stderr" &
  pid=$!
  within 60 grep -q 'round 1' "$T/stderr"
  kill -INT "$pid"
  wait "$pid" || code=$?
  expect "exit code" "$code" 130
  nothing_left "$pid"
}

wrong_input() {
  refuses 'throughput, brokers, latency' lab bench --rows kafka
  refuses '1..=1000' lab bench --runs 0
  refuses 'such as|nearest' lab bench --seconds 0
}

run_test "figures, targets and sentences as JSON" json
run_test "peers, absent ones too, as Markdown" markdown
run_test "interrupted" interrupted
run_test "wrong input" wrong_input
finish
