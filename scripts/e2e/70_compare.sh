#!/usr/bin/env bash
# xdp beside tcp, and what the host can do at best: the shape of the reports, never their figures.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
SMALL=(--runs 1 --size 32MiB --latency-seconds 0.2)

# lab_report ARGUMENTS...: sets $folder, the last line printed, and $report.
lab_report() {
  lab "$@" --results "$T/results" >"$T/stdout" 2>"$T/stderr" || {
    tail -n 5 "$T/stderr"
    fail "penstock-lab $*"
  }
  folder=$(tail -n 1 "$T/stdout")
  report=$folder/report.json
  [ -s "$report" ] || fail "no report.json in '$folder', the last line printed"
  [ -s "$folder/report.md" ] || fail "no report.md in $folder"
}

# rows FILTER: how many rows of the report pass the jq filter.
rows() { jq "[.rows[] | select($1)] | length" "$report"; }

# every_run PATHS: each publisher had all its messages acked, over the paths named, without a move.
every_run() {
  expect "runs not acked whole" "$(jq -s '[.[] | select(.messages_acked != .messages_sent
    or .messages_sent == 0)] | length' "$folder"/*/publisher.json)" 0
  expect "batches without a figure" "$(jq -s '[.[] | select(.ack_latency_us.count != .batches)]
    | length' "$folder"/*/publisher.json)" 0
  expect "paths" "$(jq -rs '[.[].brokers[].streams[] | select(.moves == 0) | .path] | unique
    | join(" ")' "$folder"/*/publisher.json)" "$1"
}

picture() {
  local svg=$folder/compare.svg
  grep -q '</svg>' "$svg" || fail "no picture in $folder"
  grep -q 'compare.svg' "$folder/report.md" || fail "report.md does not show the picture"
  for title in Payload 'CPU time' 'low rate' 'high rate'; do
    grep -q "$title" "$svg" || fail "the picture has no panel '$title'"
  done
}

METRICS="payload_mb_per_s host_cpu_s_per_gb broker_cpu_s_per_gb publisher_cpu_s_per_gb drops \
retransmits ack_latency_us_p50 ack_latency_us_p99 ack_latency_us_p999"

wire() {
  lab_report compare "${SMALL[@]}" --profile wire
  expect kind "$(jq -r .kind "$report")" compare
  local metric mtu
  for mtu in 1500 9000; do
    for metric in $METRICS; do
      local wanted=1
      [[ $metric != ack_* ]] || wanted=2
      expect "rows of $metric, MTU $mtu" \
        "$(rows ".profile == \"wire\" and .mtu == $mtu and .metric == \"$metric\"")" "$wanted"
    done
  done
  expect "rows at 1,000 batches/s" "$(rows '.rate == 1000')" 6
  expect "rows with figures of both paths" "$(rows '(.xdp, .tcp)
    | .runs == [.median] and .min == .median and .max == .median')" $((2 * $(rows true)))
  expect "rows whose ratio is that of the medians" "$(rows '.tcp.median > 0
    and (.ratio - .xdp.median / .tcp.median | fabs) < 1e-9')" "$(rows '.tcp.median > 0')"
  # The work of each host is measured in one mode, where the kernel allows the samples.
  local by_mode='(.metric | test("^(sending|receiving)_host") | not)'
  expect "rows with both modes" "$(rows '.xdp_by_mode | keys == ["generic", "native"]')" "$(rows "$by_mode")"
  expect "rows that name the better mode" \
    "$(rows "$by_mode and .xdp == .xdp_by_mode[.xdp_mode]")" "$(rows "$by_mode")"
  if [ "$(jq -r '.host_times_unavailable // ""' "$report")" = "" ]; then
    expect "rows of one host's work" "$(rows "$by_mode | not")" 6
  fi
  expect "full speed adaptive, latency busy" \
    "$(rows '.poll == if .rate then "busy" else "adaptive" end')" "$(rows true)"
  expect "% of limit" "$(rows '.percent_of_limit | .xdp > 0 and .tcp > 0')" 2
  expect limits "$(jq -r '[.limits[] | select(.mb_per_s > 0) | "\(.name) \(.mtu // "")"] | join(",")' "$report")" \
    "raw_af_xdp_native 1500,raw_af_xdp_generic 1500,iperf3_1 1500,iperf3_4 1500,raw_af_xdp_native 9000,raw_af_xdp_generic 9000,iperf3_1 9000,iperf3_4 9000,memory_copy "
  every_run "tcp xdp"
  picture
  expect "runs told on stderr" "$(grep -c ' run 1/1: ' "$T/stderr")" 18
}

offload() {
  lab_report compare "${SMALL[@]}" --profile offload --mtu 1500 --brokers 2 --threads-per-broker 2
  expect "rows with both modes" "$(rows '.xdp_by_mode | keys == ["generic", "native"]')" 12
  every_run "tcp xdp"
  expect "streams of a run" "$(jq '[.brokers[].streams[]] | length' "$folder"/*/publisher.json | sort -u)" 4
}

limits() {
  lab_report limits --runs 2 --seconds 1 --profile wire --mtu 9000
  expect kind "$(jq -r .kind "$report")" limits
  expect "limits with two runs" "$(jq '[.limits[] | select((.runs | length) == 2 and .mb_per_s > 0)] | length' "$report")" 5
  expect "raw limits that say what they are" \
    "$(jq '[.limits[] | select(.mode and .datagram > 0 and .lost_percent != null)] | length' "$report")" 2
  lab_report throughput --mode xdp --brokers 1 --total-size 64MiB --limits
  expect "% of limit" "$(jq '.percent_of_limit > 0' "$report")" true
  expect "its limits" "$(jq '.limits | length' "$report")" 4
}

# A broker that was started by hand, as on another host.
remote() {
  start_broker 0 --mode xdp --iface eth0
  lab_in_namespace compare "${SMALL[@]}" --remote "$(at 0)"
  expect "rows" "$(rows '.profile == "remote" and .mtu == 1500 and .xdp_mode == null')" 11
  expect "limits" "$(jq '.limits | length' "$report")" 0
  expect "remote" "$(jq -r .remote "$report")" "$(at 0)"
  every_run "tcp xdp"
  stop_broker 0
}

lab_in_namespace() {
  limited ip netns exec "$NET-pub" "$BIN/penstock-lab" "$@" --results "$T/results" >"$T/stdout"
  folder=$(tail -n 1 "$T/stdout")
  report=$folder/report.json
}

# A broker without the xdp path: no figure of tcp must stand for one of xdp.
remote_tcp_only() {
  start_broker 0
  refuses 'tcp only|xdp' limited ip netns exec "$NET-pub" "$BIN/penstock-lab" compare "${SMALL[@]}" \
    --remote "$(at 0)" --results "$T/results"
  [ -z "$(find "$T/results" -name report.json)" ] || fail "there is a report"
  stop_broker 0
}

wrong_usage() {
  local case code
  while read -r words case; do
    code=0
    # shellcheck disable=SC2086 # options, separated by blanks
    lab compare $case --results "$T/results" >"$T/said" 2>&1 || code=$?
    expect "exit code of $case" "$code" 2
    grep -q -- "$words" "$T/said" || fail "$case: the message says nothing of $words"
  done <<'CASES'
--runs --runs 0
576 --mtu 100
native --xdp-mode fast
wire --profile best
--brokers --brokers 0
--mode --mode xdp
--size --size many
--remote --remote 10.0.0.1:1 --mtu 1500
CASES
  refuses 'leave it out' lab compare --ack 0
  refuses 'less than one message' lab compare --size 10
  refuses 'HOST:PORT' lab compare --remote nowhere
  refuses 'penstock-broker where it runs' lab compare --remote 127.0.0.1:1 --workers 2
  "$ROOT/scripts/compare.sh" --help | grep -q -- '--quick' || fail "compare.sh --help"
}

# interrupted_once COMMAND...: Ctrl-C once the command succeeds; it sees the lab's number as $lab.
interrupted_once() {
  "$BIN/penstock-lab" compare --runs 1 --profile wire --mtu 1500 --results "$T/results" >"$T/stdout" 2>"$T/stderr" &
  local lab=$! code=0
  for _ in {1..600}; do
    ! "$@" || break
    kill -0 "$lab" 2>/dev/null || break
    sleep 0.1
  done
  sleep 0.5
  kill -INT "$lab"
  wait "$lab" || code=$?
  expect "exit code" "$code" 130
  expect "namespaces left" "$(ip netns list | grep "^penstock-$lab-" || true)" ""
  [ ! -e "/dev/shm/penstock-$lab-shm" ] || fail "buffers are left in /dev/shm"
}

raw_is_running() { ip -n "penstock-$lab-b0" link show eth0 2>/dev/null | grep -q xdp; }
a_run_is_over() { grep -q 'full speed, run 1/1: tcp' "$T/stderr"; }
interrupt_limits() { interrupted_once raw_is_running; }
interrupt_runs() { interrupted_once a_run_is_over; }

run_test "compare: wire profile, both MTUs and modes" wire
run_test "compare: offload profile, two brokers, two streams to each" offload
run_test "limits of the host, and throughput in percent of them" limits
run_test "compare against a broker that runs elsewhere" remote
run_test "compare takes no tcp run for one over xdp" remote_tcp_only
run_test "compare refuses wrong options" wrong_usage
run_test "Ctrl-C while limits are measured leaves nothing behind" interrupt_limits
run_test "Ctrl-C while a path is measured leaves nothing behind" interrupt_runs
finish
