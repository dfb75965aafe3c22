#!/usr/bin/env bash
# What the lab leaves behind when it is interrupted or killed: nothing that runs, nothing that stays.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

# start_long_run [options]: too long to end by itself; sets $lab once the publisher is at work.
start_long_run() {
  "$BIN/penstock-lab" throughput --brokers 2 --total-size 1TB "$@" --results "$T/results" >"$T/stdout" 2>&1 &
  lab=$!
  for _ in {1..200}; do
    # Connected; a stream over xdp has a tcp connection for control as well.
    ip netns exec "penstock-$lab-pub" ss -Htn state established dport = :1214 2>/dev/null | grep -q . && return 0
    kill -0 "$lab" 2>/dev/null || break
    sleep 0.1
  done
  cat "$T/stdout"
  fail "the run did not start"
}

namespaces_left() { ip netns list | grep "^penstock-$lab-" || true; }
# All processes whose network namespace is one of the lab's.
processes_left() { for n in $(namespaces_left | awk '{ print $1 }'); do ip netns pids "$n"; done; }

# gone_after SIGNAL [options]
gone_after() {
  local signal=$1 code=0 children
  shift
  start_long_run "$@"
  children=$(processes_left)
  kill "-$signal" "$lab"
  wait "$lab" || code=$?
  expect "exit code after SIG$signal" "$code" 130
  expect "namespaces left" "$(namespaces_left)" ""
  [ -z "$(buffers_of "$lab")" ] || fail "buffers are left in /dev/shm"
  for pid in $children; do
    ! kill -0 "$pid" 2>/dev/null || fail "process $pid is left"
  done
}

interrupt() { gone_after INT; }
terminate() { gone_after TERM; }
with_a_middle() { gone_after INT --mode xdp --faults loss=1% --delay 1ms; }

# kill_lab [options]
kill_lab() {
  start_long_run "$@"
  [ "$(processes_left | wc -l)" -ge 3 ] || fail "a publisher and two brokers should run"
  kill -KILL "$lab"
  wait "$lab" || true
  for _ in {1..100}; do
    [ -n "$(processes_left)" ] || break
    sleep 0.1
  done
  expect "processes left" "$(processes_left)" ""
  local dead=$lab
  lab throughput --brokers 1 --total-size 8MiB --results "$T/results" >"$T/next" 2>&1
  expect "namespaces after the next start" "$(ip netns list | grep "^penstock-$dead-" || true)" ""
  [ -z "$(buffers_of "$dead")" ] || fail "buffers are left in /dev/shm"
}

kill_lab_with_a_middle() { kill_lab --mode xdp --faults loss=1% --delay 1ms; }

broker_dies() {
  start_long_run
  local code=0
  # shellcheck disable=SC2046 # one number
  kill -KILL $(ip netns pids "penstock-$lab-b1")
  wait "$lab" || code=$?
  expect "exit code" "$code" 1
  grep -q 'broker 1' "$T/stdout" || fail "the message does not name the broker"
  expect "namespaces left" "$(namespaces_left)" ""
}

tuning() {
  local saved=/run/penstock-sysctl.saved before tcp_before tune=$ROOT/scripts/tune_kernel_buffers.sh
  [ ! -e "$saved" ] || skip "the limits of this host are tuned already ($saved)"
  [ -w /proc/sys/net/core/rmem_max ] || skip "net.core.rmem_max cannot be set here"
  before=$(cat /proc/sys/net/core/rmem_max)
  tcp_before=$(cat /proc/sys/net/ipv4/tcp_rmem)
  # Without arguments it prints its plan and changes nothing.
  "$tune" --size 48MiB >"$T/plan"
  grep -q "^net.core.rmem_max: $before -> $((48 << 20))\$" "$T/plan" || fail "no plan: $(cat "$T/plan")"
  grep -q '^net.ipv4.tcp_rmem: .*-> .*50331648$' "$T/plan" || fail "no plan for tcp_rmem: $(cat "$T/plan")"
  expect "rmem_max after the plan" "$(cat /proc/sys/net/core/rmem_max)" "$before"
  "$tune" set --size 48MiB
  "$tune" set --size 40MiB
  expect rmem_max "$(cat /proc/sys/net/core/rmem_max)" $((40 << 20))
  expect "the largest of tcp_rmem" "$(awk '{ print $3 }' /proc/sys/net/ipv4/tcp_rmem)" $((40 << 20))
  "$tune" restore
  expect "rmem_max after restore" "$(cat /proc/sys/net/core/rmem_max)" "$before"
  expect "tcp_rmem after restore" "$(cat /proc/sys/net/ipv4/tcp_rmem)" "$tcp_before"
  [ ! -e "$saved" ] || fail "$saved is left"
}

# The settings for the next boot go to a directory of the test's own; /run is empty after a boot.
tuning_persists() {
  local saved=/run/penstock-sysctl.saved before tune=$ROOT/scripts/tune_kernel_buffers.sh
  [ ! -e "$saved" ] || skip "the limits of this host are tuned already ($saved)"
  [ -w /proc/sys/net/core/rmem_max ] || skip "net.core.rmem_max cannot be set here"
  before=$(cat /proc/sys/net/core/rmem_max)
  # shellcheck disable=SC2016 # for the inner shell
  unshare --mount sh -euc 'mkdir -p /etc/sysctl.d; mount -t tmpfs tmpfs /etc/sysctl.d
    "$1" set --size 40MiB --persist
    cat /etc/sysctl.d/60-penstock.conf
    rm /run/penstock-sysctl.saved
    "$1" restore
    ls -A /etc/sysctl.d' - "$tune" >"$T/said"
  grep -q "^net.core.rmem_max = $((40 << 20))\$" "$T/said" || fail "not for the next boot: $(cat "$T/said")"
  expect "what is left" "$(tail -n 1 "$T/said")" "removes /etc/sysctl.d/60-penstock.conf"
  expect "rmem_max after restore" "$(cat /proc/sys/net/core/rmem_max)" "$before"
}

# The original's variables keep their meaning, or are refused.
original_variables() {
  local variable
  for variable in REPLICATION_FACTOR=2 SEQUENCER=CORFU NUM_TRIALS=0 THREADS_PER_BROKER=x; do
    refuses "${variable%=*}=${variable#*=} is not" env "$variable" "$ROOT/scripts/run_throughput.sh"
  done
  refuses "BROKER_PID is one number" env BROKER_PID=x "$ROOT/scripts/diagnose_recv_bottleneck.sh"
  refuses "BROKER_PORT is a number" env BROKER_PORT=x "$ROOT/scripts/diagnose_recv_bottleneck.sh"
  refuses "STRACE_SEC is a number" env STRACE_SEC=x "$ROOT/scripts/diagnose_recv_bottleneck.sh"
  refuses "MPSTAT_SEC is a number" env MPSTAT_SEC=x "$ROOT/scripts/diagnose_recv_bottleneck.sh"
}

run_test "Ctrl-C leaves nothing behind" interrupt
run_test "SIGTERM leaves nothing behind" terminate
run_test "kill -9 leaves no process, and the next start sweeps the rest" kill_lab
run_test "Ctrl-C leaves nothing of bad links behind" with_a_middle
run_test "kill -9 leaves nothing of bad links that the next start does not sweep" kill_lab_with_a_middle
run_test "a broker that dies is named, and all is taken down" broker_dies
run_test "tune_kernel_buffers.sh plans, sets and restores" tuning
run_test "tune_kernel_buffers.sh also for the next boot, and back" tuning_persists
run_test "variables of the original are honoured or refused" original_variables
finish
