#!/usr/bin/env bash
# The xdp path: the workload verified, real files, fallback to tcp, death and restart of a broker.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
XDP=(--mode xdp --iface eth0)

# lab_run ARGUMENTS...: a verified run of the lab; sets $report.
lab_run() {
  lab throughput "$@" --verify --results "$T/results" >"$T/stdout"
  report=$(tail -n 1 "$T/stdout")/report.json
}

# all_over PATH STREAMS: everything is verified, and every stream took that path.
all_over() {
  expect "messages in logs" "$(jq .messages_in_logs "$report")" "$(jq .messages_sent "$report")"
  expect "streams verified" "$(jq '[.verification[] | select(.differences == [])] | length' "$report")" "$2"
  expect "paths" "$(jq -r '[.publisher.sessions[].streams[].path] | unique | join(" ")' "$report")" "$1"
}

workload() {
  lab_run --mode xdp --brokers 4 --total-size 512MiB "$@"
  all_over xdp 4
  expect "brokers that placed packets" "$(jq '[.brokers[] | select(.xdp.placed > 0)] | length' "$report")" 4
}

wire() { workload --profile wire; }
# Packets in several buffers; with --xdp-mode auto they would take generic mode.
jumbo() { workload --profile wire --mtu 9000 --xdp-mode native; }
offload() { workload --profile offload; }
generic() { workload --profile wire --xdp-mode generic; }

# A generic program gets what the sender's kernel left to the interface to cut apart.
uncut() {
  workload --profile offload --xdp-mode generic
  expect "datagrams fewer than packets" \
    "$(jq '[.brokers[].xdp | .packets < .placed] | all' "$report")" true
}
busy() { workload --profile wire --poll busy; }
driven() { workload --profile wire --busy-poll 64; }

many_streams() {
  lab_run --mode xdp --brokers 2 --threads-per-broker 3 --total-size 256MiB
  all_over xdp 6
}

# More workers than receive queues, so that they share one.
shared_queue() {
  lab_run --mode xdp --brokers 1 --threads-per-broker 8 --workers 3 --total-size 256MiB
  all_over xdp 8
}

small_messages() {
  lab_run --mode xdp --brokers 1 --ack 0 --total-size 32MiB --message-size 10 --batch-size 1KiB
  all_over xdp 1
}

real_file() {
  head -c 30000000 "$BIN/penstock-lab" | base64 >"$T/input"
  printf '\n\n' >>"$T/input"
  lab_run --mode xdp --brokers 2 --input "$T/input"
  all_over xdp 2
  expect "lines" "$(jq .messages_in_logs "$report")" "$(wc -l <"$T/input")"
}

tcp_only_broker() {
  start_broker 0
  refuses 'tcp only' publisher --mode xdp --brokers "$(at 0)" --total-size 1MiB
  publisher --mode auto --brokers "$(at 0)" --total-size 8MiB --format json >"$T/sent.json" 2>"$T/said"
  expect path "$(jq -r '.brokers[0].streams[0].path' "$T/sent.json")" tcp
  grep -q 'tcp only' "$T/said" || fail "the log does not say why"
  stop_broker 0
}

# The packets come in on another interface than the broker looks at.
silent_path() {
  start_broker 0 --mode xdp --iface lo --listen 0.0.0.0:1214
  refuses 'xdp path fails' publisher --mode xdp --brokers "$(at 0)" --total-size 1MiB --timeout 5
  publisher --mode auto --brokers "$(at 0)" --total-size 8MiB --format json >"$T/sent.json"
  expect path "$(jq -r '.brokers[0].streams[0].path' "$T/sent.json")" tcp
  expect acked "$(jq .messages_acked "$T/sent.json")" 8192
  stop_broker 0
}

# The end that receives takes no packet as large as payload needs: pings come through.
path_dies() {
  start_broker 0 "${XDP[@]}"
  ip -n "$NET-b0" link set eth0 mtu 1000
  publisher --mode auto --brokers "$(at 0)" --total-size 8MiB --format json >"$T/sent.json"
  ip -n "$NET-b0" link set eth0 mtu 1500
  expect path "$(jq -r '.brokers[0].streams[0].path' "$T/sent.json")" tcp
  expect moves "$(jq '.brokers[0].streams[0].moves' "$T/sent.json")" 1
  expect acked "$(jq .messages_acked "$T/sent.json")" 8192
  stop_broker 0
}

both_at_once() {
  start_broker 0 "${XDP[@]}" --ring-size 1GiB
  publisher --brokers "$(at 0)" --mode tcp --total-size 128MiB --format json >"$T/tcp.json" &
  local tcp=$!
  publisher --brokers "$(at 0)" --mode xdp --total-size 128MiB --format json >"$T/xdp.json"
  wait "$tcp"
  stop_broker 0
  expect "messages in the log" "$(jq '.topics[0].messages' "$T/broker-0.json")" 262144
  expect "paths" "$(jq -r '[.connections[].path] | sort | join(" ")' "$T/broker-0.json")" "tcp xdp"
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output none --stat --format json >"$T/read.json"
  expect "messages read" "$(jq .messages "$T/read.json")" 262144
}

# --xdp-mode auto, by driver and MTU, with the reason in the log.
chosen_mode() {
  local mtu
  for mtu in 1500 9000; do
    ip -n "$NET-b0" link set eth0 mtu "$mtu"
    start_broker 0 "${XDP[@]}"
    publisher --mode xdp --brokers "$(at 0)" --total-size 1MiB --format json >"$T/sent-$mtu.json"
    stop_broker 0
    cp "$T/broker-0.log" "$T/broker-$mtu.log"
    expect "acked at MTU $mtu" "$(jq .messages_acked "$T/sent-$mtu.json")" 1024
    jq -r .xdp.xdp_mode "$T/broker-0.json" >"$T/mode-$mtu"
  done
  ip -n "$NET-b0" link set eth0 mtu 1500
  expect "mode at MTU 1500" "$(cat "$T/mode-1500")" native
  expect "mode at MTU 9000" "$(cat "$T/mode-9000")" generic
  grep -q 'eth0 runs the program in native mode: the driver (veth) supports it' "$T/broker-1500.log" \
    || fail "the log does not say why it is native"
  grep -q 'eth0 runs the program in generic mode: packets of MTU 9000 do not fit into one buffer' "$T/broker-9000.log" \
    || fail "the log does not say why it is generic"
}

attached() { ip -n "$NET-b0" -d link show eth0 | grep -c penstock_steer || true; }

second_broker() {
  start_broker 0 "${XDP[@]}"
  refuses 'another penstock-broker serves eth0' broker "${XDP[@]}" --listen 0.0.0.0:1300 --buffer-dir "$BUFFERS/other"
  expect "programs attached" "$(attached)" 1
  stop_broker 0
  expect "programs attached after the end" "$(attached)" 0
}

# goes_on DISTURBANCE: a publisher of numbered lines is disturbed once and gets everything through, in
# order.
goes_on() {
  start_broker 0 "${XDP[@]}" --topic penstock --stall-timeout 2
  publisher --mode auto --brokers "$(at 0)" --input - --rate 1MB --batch-size 2KiB \
    --format json < <(numbered_lines) >"$T/sent.json" 2>"$T/said" &
  local sending=$!
  until_messages 0 1000
  "$1"
  goes_further 0
  enough
  wait "$sending" || fail "the publisher did not go on: $(tail -n 2 "$T/said")"
  expect "acked" "$(jq .messages_acked "$T/sent.json")" "$(wc -l <"$T/input")"
  expect "moves" "$(jq '.brokers[0].streams[0].moves' "$T/sent.json")" 1
  stop_broker 0
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output lines >"$T/back"
  cmp "$T/input" "$T/back" || fail "lines are lost, doubled or out of order"
}

# restart SIGNAL: ends the broker by it and starts another on its log.
restart() {
  local ended=${brokers_running[0]}
  kill "-$1" "$(ip netns pids "$NET-b0" | head -n 1)"
  wait "$ended" || true
  expect "programs attached after the end" "$(attached)" 0
  start_broker 0 "${XDP[@]}" --topic penstock
}
kill_and_restart() { restart KILL; }
stop_and_restart() { restart TERM; }

# Long enough for the publisher to take the path for dead before the machine is there again; it is to
# find it again.
vanish_and_restart() {
  vanish 0 4
  start_broker 0 "${XDP[@]}" --topic penstock
}

# Until the broker has received nothing for its whole timeout.
fall_asleep() {
  local pid
  pid=$(ip netns pids "$NET-pub" | head -n 1)
  kill -STOP "$pid"
  within 30 grep -q 'no packet came for 2 s' "$T/broker-0.log"
  kill -CONT "$pid"
}

# Less than the smallest datagrams take; the broker is not told.
shrink() { ip -n "$NET-pub" link set b0 mtu 1000; }
shrunk() {
  goes_on shrink
  ip -n "$NET-pub" link set b0 mtu 1500
  expect path "$(jq -r '.brokers[0].streams[0].path' "$T/sent.json")" tcp
}

broker_killed() { goes_on kill_and_restart; }
broker_stopped() { goes_on stop_and_restart; }
broker_vanished() {
  goes_on vanish_and_restart
  expect path "$(jq -r '.brokers[0].streams[0].path' "$T/sent.json")" xdp
}
publisher_asleep() { goes_on fall_asleep; }

# The kernel tells of an interface through a socket: a broker that has no descriptor for one knows nothing,
# and not that the interface is gone.
out_of_descriptors() {
  start_broker 0 --topic penstock --mode xdp --iface eth0
  local pid
  pid=$(ip netns pids "$NET-b0" | head -n 1)
  prlimit --pid "$pid" --nofile="$(find "/proc/$pid/fd" -type l | wc -l):"
  # It looks twice a second.
  sleep 1.5
  prlimit --pid "$pid" --nofile=1024:
  publisher --brokers "$(at 0)" --mode xdp --total-size 4MiB --format json >"$T/sent.json"
  expect "path" "$(jq -r '.brokers[0].streams[0].path' "$T/sent.json")" xdp
  stop_broker 0
  ! grep 'is gone' "$T/broker-0.log" || fail "the broker takes its interface for gone"
}

run_test "xdp: four brokers, wire, contents verified" wire
run_test "xdp: four brokers, MTU 9000" jumbo
run_test "xdp: four brokers, offload profile" offload
run_test "xdp: generic mode" generic
run_test "xdp: the mode that suits driver and MTU" chosen_mode
run_test "xdp: generic mode, many packets in one buffer" uncut
run_test "xdp: busy polling" busy
run_test "xdp: the worker drives the queue" driven
run_test "xdp: several streams to each broker" many_streams
run_test "xdp: several workers on one receive queue" shared_queue
run_test "xdp: small messages without acks" small_messages
run_test "xdp: a real file, verified" real_file
run_test "a broker without xdp: refused, or over tcp and said why" tcp_only_broker
run_test "packets that nobody answers: an error, or over tcp" silent_path
run_test "a path that dies in mid-stream: over tcp, nothing lost or doubled" path_dies
run_test "an interface that takes no datagrams any more: likewise" shrunk
run_test "tcp and xdp publishers at once into one log" both_at_once
run_test "a broker without a free descriptor: its interface is still there afterwards" out_of_descriptors
run_test "a second broker on the interface is refused" second_broker
run_test "kill -9 and restart of the broker: the publisher goes on, nothing lost or doubled" broker_killed
run_test "an ordinary restart of the broker: likewise" broker_stopped
run_test "a broker that vanishes without a word and comes back: likewise" broker_vanished
run_test "a publisher that sleeps longer than the broker waits: likewise" publisher_asleep
finish
