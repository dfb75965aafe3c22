#!/usr/bin/env bash
# Diagnosis against the truth: each cause is made on purpose, and must be named first. Every case
# prints a line of the confusion matrix, also when it passes.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
ADDRESS=10.214.0.2
PORT=5300
DURATION=${PENSTOCK_DIAGNOSE_SECONDS:-3}
MATRIX=$WORK/matrix
loads=()
labs=()
group=
: >"$MATRIX"

# in_ns NAMESPACE COMMAND...: runs it in the background until the test ends; its pid is in $load.
in_ns() {
  local namespace=$1
  shift
  ip netns exec "$NET-$namespace" "$@" >>"$T/load.log" 2>&1 &
  load=$!
  loads+=("$load")
}

stop_loads() {
  local pid
  for pid in "${loads[@]}"; do
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  ip netns exec "$NET-pub" tc qdisc del dev b0 root 2>/dev/null || true
  stop_brokers
  for pid in "${labs[@]}"; do
    # It takes its namespaces away.
    kill -INT "$pid" 2>/dev/null || true
    wait "$pid" || true
  done
  [ -z "$group" ] || rmdir "$group"
}

serve() {
  in_ns b0 python3 "$E2E/load.py" serve "$PORT" "$@"
  server=$load
  for _ in {1..100}; do
    ss -Hltn -N "$NET-b0" "sport = :$PORT" | grep -q . && return 0
    sleep 0.1
  done
  cat "$T/load.log"
  fail "the server does not listen"
}

send() { in_ns pub python3 "$E2E/load.py" send "$ADDRESS" "$PORT" "$@"; }

# long_line: puts the case on a link whose round trip takes 30 ms, that of a
# lab whose own publisher hardly sends. The namespaces are that lab's from here on.
long_line() {
  "$BIN/penstock-lab" throughput --brokers 1 --profile offload --delay 30ms --total-size 1TB \
    --publisher-option=--rate=100KB --results "$T/results" >"$T/lab.log" 2>&1 &
  labs+=("$!")
  NET=penstock-$!
  for _ in {1..100}; do
    ip netns exec "$NET-pub" ss -Htn state established "dst $ADDRESS" 2>/dev/null | grep -q . && return 0
    sleep 0.1
  done
  cat "$T/lab.log"
  fail "the lab did not start"
}

# publish [options]: a publisher that does not end before the test does.
publish() {
  in_ns pub "$BIN/penstock-publisher" --brokers "$(at 0)" --total-size 1TB "$@"
}

# Lets what was started come to its steady state; nothing that is asserted depends on how long.
settle() { sleep 1; }

# names CAUSE OPTION...: diagnoses, prints a line of the matrix; CAUSE must come first.
names() {
  local wanted=$1 got
  shift
  lab diagnose --duration "$DURATION" --format json "$@" >"$T/diagnosis.json"
  got=$(jq -r '.verdicts[0].cause // "none"' "$T/diagnosis.json")
  jq -r --arg case "$CASE" --arg wanted "$wanted" '[$case, $wanted] +
    [.verdicts[:3][] | "\(.cause) \(.confidence)"] | join(" | ")' "$T/diagnosis.json" | tee -a "$MATRIX"
  [ "$got" = "$wanted" ] || {
    jq -c '.verdicts[:2][], .sample.connections[:1], .sample.processes' "$T/diagnosis.json"
    fail "named $got, the truth is $wanted"
  }
}

# quota PERCENT PID: the process gets so much of a core.
quota() {
  if [ -w /sys/fs/cgroup/cpu/cgroup.procs ]; then
    group=/sys/fs/cgroup/cpu/penstock-e2e-$$
    mkdir "$group"
    echo $(($1 * 1000)) >"$group/cpu.cfs_quota_us"
  elif grep -qsw cpu /sys/fs/cgroup/cgroup.subtree_control; then
    group=/sys/fs/cgroup/penstock-e2e-$$
    mkdir "$group"
    echo "$(($1 * 1000)) 100000" >"$group/cpu.max"
  else
    skip "no control group for CPU can be made here"
  fi
  echo "$2" >"$group/cgroup.procs"
}

throttled_publisher() {
  start_broker 0
  publish --rate 50MB
  settle
  names sender-application-limited --pid "${brokers_running[0]}"
}

throttled_iperf() {
  in_ns b0 iperf3 -s -1 -p "$PORT"
  local server=$load
  settle
  in_ns pub iperf3 -c "$ADDRESS" -p "$PORT" -b 200M -t 60
  settle
  names sender-application-limited --pid "$server"
}

starved_worker() {
  start_broker 0
  quota 5 "${brokers_running[0]}"
  publish
  settle
  names receiver-cpu --pid "${brokers_running[0]}"
}

starved_publisher() {
  start_broker 0
  publish
  quota 5 "$load"
  settle
  names sender-cpu --pid "${brokers_running[0]}"
}

blocked_reader() {
  start_broker 0 --ring-size 64MiB --topic penstock
  "$BIN/penstock-subscriber" --path "$BUFFERS/b0/penstock.log" --register --follow --output none \
    >"$T/reader.log" 2>&1 &
  loads+=("$!")
  settle
  kill -STOP "$!"
  publish
  settle
  names shared-buffer-full --pid "${brokers_running[0]}"
}

slow_receiver() {
  serve --pause 0.02
  send
  settle
  names receiver-application-limited --pid "$server"
}

tiny_receives() {
  serve --bytes 64
  send
  settle
  names syscall-overhead --pid "$server"
}

small_send_buffer() {
  long_line
  serve
  send --sndbuf 65536
  settle
  names send-buffer-limited --pid "$server"
}

slow_network() {
  ip netns exec "$NET-pub" tc qdisc add dev b0 root tbf rate 100mbit burst 64kb latency 50ms
  start_broker 0
  publish
  settle
  names congestion-limited --pid "${brokers_running[0]}"
}

idle_connection() {
  serve
  send --total 1000 --bytes 1000
  settle
  names idle-or-offered-slower-than-capacity --pid "$server"
  expect "verdicts of a small window" \
    "$(jq '[.verdicts[] | select(.cause == "receive-window-limited")] | length' "$T/diagnosis.json")" 0
}

idle_broker() {
  start_broker 0
  names idle-or-offered-slower-than-capacity --pid "${brokers_running[0]}"
}

# What a person gets, and what is named in the interface.
by_port() {
  start_broker 0
  publish --rate 20MB
  settle
  names sender-application-limited --pid "${brokers_running[0]}" --port 1214
  lab diagnose --pid "${brokers_running[0]}" --duration 1 >"$T/text"
  cat "$T/text"
  grep -q '^1\. sender-application-limited' "$T/text" || fail "the text does not begin with the verdict"
  grep -q 'window scale' "$T/text" || fail "the text has no figures of the connections"
  expect "keys of a verdict" "$(jq -r '.verdicts[0] | keys | join(" ")' "$T/diagnosis.json")" \
    "cause confidence evidence_against evidence_for next_command title"
  expect "system calls seen" \
    "$(jq '[.sample.syscalls[].name | select(startswith("recv"))] | length > 0' "$T/diagnosis.json")" true
  expect "the other end" "$(jq -r '.sample.connections[0].peer.pid' "$T/diagnosis.json")" "$load"
  expect "the broker's own figures" "$(jq '.sample.broker.workers | length' "$T/diagnosis.json")" 1
  expect "buffer set by the broker" \
    "$(jq .sample.connections[0].end.receive_buffer_set "$T/diagnosis.json")" true
  serve
  names idle-or-offered-slower-than-capacity --port "$PORT"
}

# Without privileges: less, with what is missing and how to get it.
unprivileged() {
  start_broker 0
  publish --rate 20MB
  settle
  # Inside the namespace, which nobody else may enter, as a user who may do nothing.
  local as=(ip netns exec "$NET-b0" setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs)
  limited "${as[@]}" "$BIN/penstock-lab" diagnose --port 1214 --duration 2 --format json \
    >"$T/diagnosis.json" 2>"$T/errors"
  cat "$T/errors"
  [ ! -s "$T/errors" ] || fail "something was written to stderr"
  jq -c '.unavailable[], .verdicts[0]' "$T/diagnosis.json"
  expect "connections" "$(jq '.sample.connections | length' "$T/diagnosis.json")" 1
  [ "$(jq '.verdicts | length' "$T/diagnosis.json")" -gt 0 ] || fail "no verdict"
  [ "$(jq '.unavailable | length' "$T/diagnosis.json")" -ge 2 ] || fail "what is missing is not told"
  expect "what is missing without a way to get it" \
    "$(jq '[.unavailable[] | select(.what == "" or .why == "" or .how == "")] | length' "$T/diagnosis.json")" 0
  refuses 'run with sudo' "${as[@]}" "$BIN/penstock-lab" diagnose --pid "${brokers_running[0]}"
  refuses 'run with sudo' "${as[@]}" "$BIN/penstock-lab" diagnose --pid "$load"
}

wrong_input() {
  refuses 'nothing listens on TCP port 5999' lab diagnose --port 5999
  refuses 'there is no process' lab diagnose --pid 4194304
  refuses '--pid' lab diagnose
  refuses '0.5 to 3600' lab diagnose --port 1 --duration 0
  lab diagnose --list-causes >"$T/causes"
  for cause in shared-buffer-full receive-window-limited credit-limited nic-drops; do
    grep -q "^$cause " "$T/causes" || fail "$cause is not listed"
  done
}

# case_of NAME FUNCTION: a test with its loads. PENSTOCK_CASES names those to be run, all without it.
case_of() {
  [[ " ${PENSTOCK_CASES:-$2} " == *" $2 "* ]] || return 0
  eval "with_loads_$2() { CASE='$1'; trap stop_loads EXIT; $2; }"
  run_test "$1" "with_loads_$2"
}

case_of "throttled publisher" throttled_publisher
case_of "throttled iperf3, a foreign server" throttled_iperf
case_of "worker without CPU" starved_worker
case_of "publisher without CPU" starved_publisher
case_of "shared buffer full, its reader stopped" blocked_reader
case_of "server that reads slowly" slow_receiver
case_of "server that reads 64 bytes a call" tiny_receives
case_of "client with a send buffer of 64 KiB, 30 ms away" small_send_buffer
case_of "network of 100 Mbit/s" slow_network
case_of "idle connection" idle_connection
case_of "broker without connections" idle_broker
case_of "process and port, as text, both ends" by_port
case_of "without privileges" unprivileged
case_of "wrong input" wrong_input
echo "case | truth | named, with confidence | second | third"
cat "$MATRIX"
finish
