#!/usr/bin/env bash
# Diagnosis against the truth: each cause is made on purpose, and must be named first. Ends with the
# confusion matrix.
#
# PENSTOCK_REPEAT=N runs every case N times; one must then be right in nine of ten.
# PENSTOCK_CASES="FUNCTION..." runs these only. PENSTOCK_DIAGNOSE_SECONDS=S looks for so long.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
ADDRESS=10.214.0.2
PORT=5300
DURATION=${PENSTOCK_DIAGNOSE_SECONDS:-2}
REPEAT=${PENSTOCK_REPEAT:-1}
XDP=(--mode xdp --iface eth0)
MATRIX=$WORK/matrix
loads=()
labs=()
group=
# A value of the whole host, put back when it was changed.
BACKLOG=/proc/sys/net/core/netdev_max_backlog
backlog=
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
  [ -z "$backlog" ] || echo "$backlog" >"$BACKLOG"
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

# unwrapped FILE: its text in one line, because a phrase may stand on two.
unwrapped() { tr -s ' \n' ' ' <"$1"; }

serve() {
  in_ns b0 python3 "$E2E/load.py" serve "$PORT" "$@"
  server=$load
  until_listening
}

until_listening() {
  for _ in {1..100}; do
    ss -Hltn -N "$NET-b0" "sport = :$PORT" | grep -q . && return 0
    sleep 0.1
  done
  cat "$T/load.log"
  fail "the server does not listen"
}

send() { in_ns pub python3 "$E2E/load.py" send "$ADDRESS" "$PORT" "$@"; }

# lab_link OPTION...: starts a lab with one broker and a publisher that does not end; the namespaces
# are that lab's from here on.
lab_link() {
  "$BIN/penstock-lab" throughput --brokers 1 --total-size 1TB --results "$T/results" "$@" \
    >"$T/lab.log" 2>&1 &
  labs+=("$!")
  NET=penstock-$!
  for _ in {1..150}; do
    ip netns exec "$NET-pub" ss -Htn state established "dst $ADDRESS" 2>/dev/null | grep -q . && return 0
    sleep 0.1
  done
  cat "$T/lab.log"
  fail "the lab did not start"
}

# until_connected COUNT: waits until the server's port has this many connections, accepted or not.
until_connected() {
  for _ in {1..300}; do
    [ "$(ss -Htn -N "$NET-b0" state established "sport = :$PORT" | wc -l)" -lt "$1" ] || return 0
    sleep 0.1
  done
  fail "fewer than $1 connections"
}

# is_window_limited: the receiver's window already holds up a sender (TCP_INFO).
is_window_limited() { ss -Htin -N "$NET-pub" "dport = :$PORT" | grep -q rwnd_limited; }

# long_line DELAY: puts the case on a link whose round trip takes so long; the lab's own publisher
# hardly sends there.
long_line() { lab_link --profile offload --delay "$1" --publisher-option=--rate=100KB; }

# publish [options]: a publisher that does not end before the test does.
publish() {
  in_ns pub "$BIN/penstock-publisher" --brokers "$(at 0)" --total-size 1TB "$@"
}

# Lets what was started come to its steady state; nothing that is asserted depends on how long.
settle() { sleep 1; }

# names CAUSE OPTION...: diagnoses, and notes what was named; CAUSE must come first.
names() {
  local wanted=$1 got
  shift
  lab diagnose --duration "$DURATION" --format json "$@" >"$T/diagnosis.json"
  got=$(jq -r '.verdicts[0].cause // "none"' "$T/diagnosis.json")
  jq -r --arg case "$CASE" --arg wanted "$wanted" --arg got "$got" '[$case, $wanted, $got,
    ([.verdicts[:3][] | "\(.cause) \(.confidence)"] | join(", "))] | join("|")' \
    "$T/diagnosis.json" >>"$MATRIX"
  [ "$got" = "$wanted" ] || {
    jq -c '.verdicts[:2][], .sample.connections[:1], .sample.processes, .sample.broker' "$T/diagnosis.json"
    fail "named $got, the truth is $wanted"
  }
}

# because WORDS: the reason of the first verdict speaks of them.
because() {
  jq -r '.verdicts[0].reason' "$T/diagnosis.json" | grep -q -- "$1" || {
    jq -c '.verdicts[0], .sample.connections[:1]' "$T/diagnosis.json"
    fail "the reason says nothing of '$1'"
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
  blocked_by_reader
}

# blocked_by_reader [option of the publisher...]: a registered reader stops, and the ring fills.
blocked_by_reader() {
  "$BIN/penstock-subscriber" --path "$BUFFERS/b0/penstock.log" --register --follow --output none \
    >"$T/reader.log" 2>&1 &
  loads+=("$!")
  settle
  kill -STOP "$!"
  publish "$@"
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
  long_line 30ms
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

# Room for so few packets that a burst does not fit.
drops_before_the_socket() {
  [ -w "$BACKLOG" ] || skip "$BACKLOG cannot be set here"
  start_broker 0
  publish
  settle
  backlog=$(cat "$BACKLOG")
  echo 5 >"$BACKLOG"
  names nic-drops --pid "${brokers_running[0]}"
  because "raise net.core.netdev_max_backlog"
}

# A window of 8 MiB, twice the usual rmem_max, over 100 ms: 80 MB/s. The sender's buffer must hold more.
window_capped() {
  long_line 100ms
  ip netns exec "$NET-pub" sysctl -qw net.ipv4.tcp_wmem="4096 16384 67108864"
  serve --rcvbuf 33554432
  send
  within 30 is_window_limited
  names receive-window-limited --pid "$server"
  because "rmem_max caps"
}

# The listener's buffer fixed a window scale that ends below what was set on the accepted socket.
window_late() {
  long_line 30ms
  serve --rcvbuf 16384 --accepted-rcvbuf 4194304
  send
  settle
  names receive-window-limited --pid "$server"
  because "set too late"
}

window_fixed() {
  long_line 30ms
  serve --rcvbuf 65536
  send
  settle
  names receive-window-limited --pid "$server"
  because "switches autotuning off"
}

window_without_autotuning() {
  long_line 30ms
  ip netns exec "$NET-b0" sysctl -qw net.ipv4.tcp_moderate_rcvbuf=0
  serve
  send
  settle
  names receive-window-limited --pid "$server"
  because "tcp_moderate_rcvbuf=0"
}

window_at_tcp_rmem() {
  long_line 30ms
  ip netns exec "$NET-b0" sysctl -qw net.ipv4.tcp_rmem="4096 65536 262144"
  serve
  send
  settle
  names receive-window-limited --pid "$server"
  because "tcp_rmem allows 262144"
}

# hogs: programs that use all cores, several times over, until the case ends.
hogs() {
  for ((i = 0; i < 4 * $(nproc); i++)); do
    in_ns pub python3 -c 'while True: pass'
  done
}

publisher_displaced() {
  start_broker 0
  publish
  PORT=1214 until_connected 1
  hogs
  settle
  names cpu-taken-by-others --pid "${brokers_running[0]}"
  because "python3"
}

receiver_displaced() {
  serve
  send
  until_connected 1
  hogs
  settle
  names cpu-taken-by-others --pid "$server"
}

# Two threads of one name take turns, as tasks move in a runtime: neither thread is busy.
work_that_moves() {
  serve --bytes 65536 --spin 0.0005 --relay
  send
  settle
  names receiver-cpu --pid "$server"
  because "moves between"
}

accept_queue() {
  serve --backlog 4 --accept 0
  for _ in {1..12}; do
    send --total 1000
  done
  until_connected 5
  names accept-queue-full --port "$PORT"
  because "room for 4"
  lab diagnose --port "$PORT" --duration 1 >"$T/text"
  unwrapped "$T/text" | grep 'wait to be accepted' >/dev/null || fail "the text does not show the queue"
}

stopped_server() {
  serve
  send
  until_connected 1
  settle
  kill -STOP "$server"
  settle
  names receiver-application-limited --pid "$server"
  because "process $server is stopped"
}

# In a PID namespace the kernel's tracing does not know the process numbers that the lab sees.
in_a_pid_namespace() {
  # shellcheck disable=SC2016 # expanded by that shell
  ip netns exec "$NET-b0" unshare --pid --fork --mount-proc bash -c '
    python3 "$1/load.py" serve "$2" & server=$!
    for _ in {1..100}; do ss -Hltn "sport = :$2" | grep -q . && break; sleep 0.1; done
    "$3/penstock-lab" diagnose --pid "$server" --duration 1 --format json
  ' - "$E2E" "$PORT" "$BIN" >"$T/diagnosis.json"
  expect "why system calls are missing" \
    "$(jq -r '.unavailable[] | select(.what | startswith("system calls")) | .why | test("PID namespace")' "$T/diagnosis.json")" true
}

window_without_scaling() {
  long_line 30ms
  ip netns exec "$NET-b0" sysctl -qw net.ipv4.tcp_window_scaling=0
  serve
  send
  settle
  names receive-window-limited --pid "$server"
  because "tcp_window_scaling is 0 here"
}

window_of_the_route() {
  long_line 30ms
  ip -n "$NET-b0" route change 10.214.0.0/24 dev eth0 window 32768
  serve
  send
  settle
  names receive-window-limited --pid "$server"
  because "route to the sender bounds the window at 32768"
}

window_clamped() {
  long_line 30ms
  serve --clamp 32768
  send
  settle
  names receive-window-limited --pid "$server"
  because "TCP_WINDOW_CLAMP"
}

xdp_throttled() {
  start_broker 0 "${XDP[@]}"
  publish --mode xdp --rate 50MB
  settle
  names sender-application-limited --pid "${brokers_running[0]}"
}

# So small a ring gives credit for one burst at a time.
xdp_credit() {
  start_broker 0 "${XDP[@]}" --xdp-ring 64
  publish --mode xdp
  settle
  names credit-limited --pid "${brokers_running[0]}"
}

# Each of 32 streams has at least 64 KiB of credit, and the fill ring holds that of one.
xdp_small_fill_ring() {
  start_broker 0 "${XDP[@]}" --xdp-ring 64
  publish --mode xdp --threads-per-broker 32
  settle
  names nic-drops --pid "${brokers_running[0]}"
}

xdp_starved_worker() {
  start_broker 0 "${XDP[@]}"
  publish --mode xdp
  settle
  quota 5 "${brokers_running[0]}"
  settle
  names receiver-cpu --pid "${brokers_running[0]}"
}

xdp_starved_publisher() {
  start_broker 0 "${XDP[@]}"
  publish --mode xdp
  settle
  quota 5 "$load"
  settle
  names sender-cpu --pid "${brokers_running[0]}"
}

xdp_blocked_reader() {
  start_broker 0 "${XDP[@]}" --ring-size 64MiB --topic penstock
  blocked_by_reader --mode xdp
}

xdp_losses() {
  lab_link --mode xdp --faults loss=5%
  settle
  names congestion-limited --pid "$(ip netns pids "$NET-b0" | head -n 1)"
}

starved_nats() {
  command -v nats-server >/dev/null || skip "there is no nats-server; apt-get install nats-server"
  in_ns b0 nats-server -a 0.0.0.0 -p "$PORT"
  local server=$load
  until_listening
  send --nats
  settle
  quota 5 "$server"
  settle
  names receiver-cpu --pid "$server"
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
  unwrapped "$T/text" | grep 'window scale' >/dev/null || fail "the text has no figures of the connections"
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
  refuses 'the nearest is 500ms' lab diagnose --port 1 --duration 0
  lab diagnose --list-causes >"$T/causes"
  for cause in shared-buffer-full receive-window-limited credit-limited nic-drops; do
    grep -q "^$cause " "$T/causes" || fail "$cause is not listed"
  done
}

# The script with the original's arguments, which are all optional.
original_arguments() {
  local script=$ROOT/scripts/diagnose_recv_bottleneck.sh folder
  serve
  env RESULTS="$T/results" CARGO_TARGET_DIR="${BIN%/release}" "$script" "$server" "$PORT" 0.5 1 >"$T/stdout"
  cat "$T/stdout"
  folder=$(tail -n 1 "$T/stdout")
  expect "what is kept" "$(cd "$folder" && echo *)" "diagnosis.json diagnosis.txt"
  expect "who was observed" "$(jq .sample.pid "$folder/diagnosis.json")" "$server"
  grep -q "^1\. idle" "$folder/diagnosis.txt" || fail "the text does not begin with a verdict"
  refuses "BROKER_PID is one number" "$script" "12 13"
  refuses "at most four" "$script" 1 2 3 4 5
  refuses "there is no process" env CARGO_TARGET_DIR="${BIN%/release}" "$script" 4194304
  "$script" --help | grep -q BROKER_PORT || fail "no help"
}

# case_of NAME FUNCTION: a test with its loads, as often as asked for.
case_of() {
  [[ " ${PENSTOCK_CASES:-$2} " == *" $2 "* ]] || return 0
  CASE=$1
  eval "with_loads_$2() { trap stop_loads EXIT; $2; }"
  if [ "$REPEAT" -eq 1 ]; then
    two_of_three "$1" "with_loads_$2"
    return
  fi
  for ((run = 1; run <= REPEAT; run++)); do
    run_test "$1" "with_loads_$2"
  done
}

# What else the machine does may mislead once: a case that was wrong must be right twice then.
two_of_three() {
  local before=$failed
  run_test "$@" >"$WORK/verdict"
  if [ "$failed" -eq "$before" ]; then
    cat "$WORK/verdict"
    return
  fi
  sed 's/^FAIL/wrong once:/' "$WORK/verdict"
  failed=$before
  run_test "$@"
  run_test "$@"
}

# How often each cause was named first, by truth; and cases that were wrong too often.
confusion() {
  echo "confusion matrix: truth, then what was named first"
  cut -d '|' -f 2,3 "$MATRIX" | sort | uniq -c | awk '{ split($2, pair, "|")
    if (pair[1] != truth) { truth = pair[1]; printf "%s%s:", lines++ ? "\n" : "", truth }
    printf " %s %d", pair[2], $1 } END { print "" }'
  echo "case: right of all, the last with confidences"
  awk -F '|' '{ all[$1]++; right[$1] += $2 == $3; last[$1] = $4 }
    END { for (name in all) printf "  %s: %d of %d, %s\n", name, right[name], all[name], last[name] }' \
    "$MATRIX" | sort
}

case_of "throttled publisher" throttled_publisher
case_of "throttled iperf3, a foreign server" throttled_iperf
case_of "worker without CPU" starved_worker
case_of "publisher without CPU" starved_publisher
case_of "shared buffer full, its reader stopped" blocked_reader
case_of "server that reads slowly" slow_receiver
case_of "server that reads 64 bytes a call" tiny_receives
case_of "network of 100 Mbit/s" slow_network
case_of "window of a fixed buffer" window_fixed
case_of "idle connection" idle_connection
case_of "publisher whose CPU others have" publisher_displaced
case_of "work that moves between threads" work_that_moves
case_of "accept queue full" accept_queue
case_of "stopped server" stopped_server
case_of "in a PID namespace" in_a_pid_namespace
case_of "window without scaling" window_without_scaling
case_of "credit for one burst over xdp" xdp_credit
case_of "fill ring too small for its streams" xdp_small_fill_ring
case_of "network that loses 5 % of xdp's packets" xdp_losses
case_of "process and port, as text, both ends" by_port
case_of "without privileges" unprivileged
case_of "the original's arguments" original_arguments
case_of "wrong input" wrong_input
if [ "$QUICK" = 0 ]; then
  case_of "send buffer of 64 KiB, 30 ms away" small_send_buffer
  case_of "window of a buffer that rmem_max caps" window_capped
  case_of "window of a buffer that was set too late" window_late
  case_of "window that the route bounds" window_of_the_route
  case_of "window that the application bounds" window_clamped
  case_of "receiver whose CPU others have" receiver_displaced
  case_of "queues of the cores too short" drops_before_the_socket
  case_of "window without autotuning" window_without_autotuning
  case_of "window at the limit of tcp_rmem" window_at_tcp_rmem
  case_of "throttled publisher over xdp" xdp_throttled
  case_of "worker without CPU over xdp" xdp_starved_worker
  case_of "publisher without CPU over xdp" xdp_starved_publisher
  case_of "shared buffer full over xdp" xdp_blocked_reader
  case_of "nats-server without CPU" starved_nats
  case_of "broker without connections" idle_broker
fi
confusion
if [ "$REPEAT" -gt 1 ]; then
  # A case fails by being wrong more than once in ten times, not by one repetition.
  failed=$(awk -F '|' '{ all[$1]++; right[$1] += $2 == $3 }
    END { for (name in all) bad += right[name] < 0.9 * all[name]; print bad + 0 }' "$MATRIX")
fi
finish
