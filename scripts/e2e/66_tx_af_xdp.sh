#!/usr/bin/env bash
# --tx af_xdp: contents verified, queues, routes, what is missing and what changes under way.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
XDP=(--mode xdp --iface eth0)
TX=(--mode xdp --tx af_xdp)

# lab_run ARGUMENTS...: the workload, verified; every stream's packets left through AF_XDP. Sets
# $packets and $calls, and $datagram.
lab_run() {
  local report
  transport() { jq -r "[.publisher.sessions[].streams[].transport.$1] | $2" "$report"; }
  lab throughput --mode xdp --tx af_xdp --profile wire --verify --results "$T/results" "$@" >"$T/stdout"
  report=$(tail -n 1 "$T/stdout")/report.json
  expect "messages in logs" "$(jq .messages_in_logs "$report")" "$(jq .messages_sent "$report")"
  expect "streams that differ" "$(jq '[.verification[] | select(.differences != [])] | length' "$report")" 0
  expect "paths" "$(jq -r '[.publisher.sessions[].streams[] | .path + " " + .tx] | unique | join(", ")' "$report")" "xdp af_xdp"
  expect "moves" "$(jq '[.publisher.sessions[].streams[].moves] | add' "$report")" 0
  packets=$(transport packets add)
  calls=$(transport send_calls add)
  datagram=$(transport datagram 'unique | join(" ")')
}

one_broker() {
  lab_run --brokers 1 --total-size 512MiB
  expect "payload of a packet" "$datagram" 1416
  [ "$packets" -gt $((2 * calls)) ] || fail "$calls calls for $packets packets"
}

one_broker_jumbo() {
  lab_run --brokers 1 --total-size 512MiB --mtu 9000
  expect "payload of a packet" "$datagram" 8916
}

four_brokers() { lab_run --brokers 4 --total-size 512MiB; }
four_brokers_jumbo() { lab_run --brokers 4 --total-size 512MiB --mtu 9000; }

# sent_over TX MESSAGES: what the publisher says in $T/sent.json.
sent_over() {
  expect "paths" "$(jq -r '[.brokers[].streams[] | .path + " " + .tx] | unique | join(", ")' "$T/sent.json")" "xdp $1"
  expect "acked" "$(jq .messages_acked "$T/sent.json")" "$2"
}

# publish OPTIONS...: eight mebibytes; writes $T/sent.json.
publish() { publisher --total-size 8MiB --format json "$@" >"$T/sent.json"; }

# as OPTIONS...: the publisher with fewer rights.
as() { publisher_as=(setpriv "$@"); }
publisher_as=()
publisher() { limited ip netns exec "$NET-pub" "${publisher_as[@]}" "$BIN/penstock-publisher" "$@"; }

# As the publisher sent them, byte for byte.
real_file() {
  head -c 30000000 "$BIN/penstock-lab" | base64 >"$T/input"
  start_broker 0 "${XDP[@]}"
  publisher "${TX[@]}" --brokers "$(at 0)" --input "$T/input" --format json >"$T/sent.json"
  sent_over af_xdp "$(wc -l <"$T/input")"
  stop_broker 0
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output lines >"$T/back"
  cmp "$T/input" "$T/back" || fail "lines are lost, doubled or out of order"
}

ipv6() {
  ip -n "$NET-pub" addr add fd00:214::1/64 dev b0 nodad
  ip -n "$NET-b0" addr add fd00:214::2/64 dev eth0 nodad
  start_broker 0 "${XDP[@]}" --listen '[::]:1214'
  publish "${TX[@]}" --brokers '[fd00:214::2]:1214'
  sent_over af_xdp 8192
  stop_broker 0
  [ "$(jq .xdp.outcomes.steered "$T/broker-0.json")" -gt 1000 ] || fail "the packets did not come as IPv6"
}

# The broker's address is behind its host's, as behind a router.
behind_a_router() {
  ip -n "$NET-b0" addr add 10.215.0.1/32 dev eth0
  ip -n "$NET-pub" route add 10.215.0.1/32 via 10.214.0.2
  start_broker 0 "${XDP[@]}"
  publish "${TX[@]}" --brokers 10.215.0.1:1214
  sent_over af_xdp 8192
  stop_broker 0
}

# set_queues N: on both ends; both are as they were when the test ends.
set_queues() {
  ip netns exec "$NET-b0" ethtool -L eth0 rx "$1" tx "$1"
  ip netns exec "$NET-pub" ethtool -L b0 rx "$1" tx "$1"
}

# The queue of a veth that packets come to is the one that they left through: through the UDP socket,
# another; so one worker serves both.
several_queues() {
  trap 'stop_brokers; set_queues 1' EXIT
  set_queues 2 || skip "veth has no second queue here"
  start_broker 0 "${XDP[@]}" --workers 1
  publish "${TX[@]}" --brokers "$(at 0)" --threads-per-broker 2 --tx-queue 0-1
  sent_over af_xdp 8192
  refuses 'transmit queues \[0\] of b0, and each needs one' publish "${TX[@]}" --brokers "$(at 0)" --threads-per-broker 2
  publish --mode auto --tx af_xdp --brokers "$(at 0)" --threads-per-broker 2 2>"$T/said"
  expect "ways" "$(jq -r '[.brokers[].streams[].tx] | join(" ")' "$T/sent.json")" "af_xdp udp"
  grep -q 'UDP socket: .*each needs one' "$T/said" || fail "the log does not say why"
  stop_broker 0
}

# A queue can be bound to that receives only; the kernel takes no packets from it, and says nothing.
a_queue_that_does_not_send() {
  trap 'stop_brokers; set_queues 1' EXIT
  ip netns exec "$NET-pub" ethtool -L b0 rx 2 tx 1 || skip "veth has no second queue here"
  start_broker 0 "${XDP[@]}"
  refuses 'queue 1 of b0 are not answered' publish "${TX[@]}" --brokers "$(at 0)" --tx-queue 1
  publish --mode auto --tx af_xdp --brokers "$(at 0)" --tx-queue 1
  sent_over udp 8192
  stop_broker 0
}

wrong_flags() {
  start_broker 0 "${XDP[@]}"
  refuses 'no interface "nosuch0"' publish "${TX[@]}" --brokers "$(at 0)" --tx-iface nosuch0
  refuses 'goes through b0, not through lo' publish "${TX[@]}" --brokers "$(at 0)" --tx-iface lo
  refuses 'b0 queue 9: .*no such queue' publish "${TX[@]}" --brokers "$(at 0)" --tx-queue 9
  refuses 'needs --mode xdp or auto' publish --tx af_xdp --brokers "$(at 0)"
  refuses 'lo, which is not an Ethernet' limited ip netns exec "$NET-b0" "$BIN/penstock-publisher" "${TX[@]}" --brokers 127.0.0.1:1214 --total-size 1MiB
  stop_broker 0
}

queue_of_another() {
  start_broker 0 "${XDP[@]}"
  yes | publisher "${TX[@]}" --brokers "$(at 0)" --input - --rate 1KB --format json >"$T/sent.json" 2>"$T/said" &
  local first=$!
  for _ in {1..100}; do
    ip netns exec "$NET-pub" ss --xdp --no-header | grep -q b0 && break
    sleep 0.1
  done
  refuses 'another AF_XDP socket has the queue' publish "${TX[@]}" --brokers "$(at 0)"
  kill -INT "$(ip netns pids "$NET-pub")"
  wait "$first" || true
  publish "${TX[@]}" --brokers "$(at 0)"
  sent_over af_xdp 8192
  stop_broker 0
}

privileges() {
  start_broker 0 "${XDP[@]}"
  as --bounding-set -net_raw
  refuses 'needs CAP_NET_RAW' publish "${TX[@]}" --brokers "$(at 0)"
  publish --mode auto --tx af_xdp --brokers "$(at 0)" 2>"$T/said"
  sent_over udp 8192
  grep -q 'through the UDP socket: .*CAP_NET_RAW' "$T/said" || fail "the log does not say why"
  # That is all, with the usual limit of locked memory.
  ulimit -l 8192
  as --bounding-set -all,+net_raw
  publish "${TX[@]}" --brokers "$(at 0)"
  sent_over af_xdp 8192
  ulimit -l 64
  refuses 'limit of locked memory' publish "${TX[@]}" --brokers "$(at 0)"
  stop_broker 0
}

# start_numbered: publishes numbered lines in the background; they are under way.
start_numbered() {
  publisher "$@" --tx af_xdp --brokers "$(at 0)" --input - --rate 1MB --batch-size 2KiB \
    --format json < <(numbered_lines) >"$T/sent.json" 2>"$T/said" &
  sending=$!
  until_messages 0 1000
}

# check_numbered MOVES: all came, once and in order.
check_numbered() {
  goes_further 0
  enough
  wait "$sending" || fail "the publisher did not go on: $(tail -n 2 "$T/said")"
  sent_over af_xdp "$(wc -l <"$T/input")"
  expect "moves" "$(jq '.brokers[0].streams[0].moves' "$T/sent.json")" "$1"
  stop_broker 0
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output lines >"$T/back"
  cmp "$T/input" "$T/back" || fail "lines are lost, doubled or out of order"
}

# ACKs go to the hardware address that packets came from: it must be the new one soon.
another_hardware_address() {
  start_broker 0 "${XDP[@]}"
  start_numbered --mode xdp
  ip -n "$NET-pub" link set dev b0 address 02:00:00:00:77:01
  check_numbered 0
}

broker_restarts() {
  start_broker 0 "${XDP[@]}" --topic penstock
  start_numbered --mode xdp
  kill -KILL "${brokers_running[0]}"
  wait "${brokers_running[0]}" || true
  start_broker 0 "${XDP[@]}" --topic penstock
  check_numbered 1
}

run_test "af_xdp: one broker, MTU 1500" one_broker
run_test "af_xdp: one broker, MTU 9000" one_broker_jumbo
run_test "af_xdp: four brokers, MTU 1500" four_brokers
run_test "af_xdp: four brokers, MTU 9000" four_brokers_jumbo
run_test "af_xdp: a real file, byte for byte" real_file
run_test "af_xdp: over IPv6" ipv6
run_test "af_xdp: through a router" behind_a_router
run_test "af_xdp: a transmit queue for each stream" several_queues
run_test "af_xdp: a queue that does not send" a_queue_that_does_not_send
run_test "af_xdp: wrong flags" wrong_flags
run_test "af_xdp: a queue that another has" queue_of_another
run_test "af_xdp: CAP_NET_RAW is what it needs, and all; else udp with --mode auto" privileges
run_test "af_xdp: the interface gets another hardware address" another_hardware_address
run_test "af_xdp: the broker is killed and restarted" broker_restarts
finish
