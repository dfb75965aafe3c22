#!/usr/bin/env bash
# Registered readers that stop or die, over both paths: whether the broker waits, how long, and who
# learns of it.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1

# figures FILTER: of the running broker.
figures() {
  python3 -c 'import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
print(s.makefile().read())' "$BUFFERS/b0/broker-1214.sock" | jq "$1"
}

# until_true WHAT COMMAND...: waits until the command succeeds.
until_true() {
  local what=$1
  shift
  for _ in {1..200}; do
    "$@" && return 0
    sleep 0.05
  done
  fail "never: $what"
}

is_registered() { [ "$(figures '.topics[0].readers')" = 1 ]; }
is_reported() { grep -q 'is alive but has read nothing' "$T/broker-0.log"; }

# reader_broker MODE [options]: starts one with a small ring.
reader_broker() {
  local path=()
  [ "$1" = tcp ] || path=(--mode xdp --iface eth0)
  start_broker 0 "${path[@]}" --topic penstock --ring-size 4MiB --segment-size 256KiB \
    --reader-timeout 200ms "${@:2}"
}

# publish_in_background MODE: sets $sending.
publish_in_background() {
  ip netns exec "$NET-pub" "$BIN/penstock-publisher" --mode "$1" --brokers "$(at 0)" --total-size 32MiB \
    --format json >"$T/sent.json" 2>"$T/said" &
  sending=$!
}

# stopped_reader MODE [options]: a broker with a log that a stopped reader ($reader) blocks, and a
# publisher ($sending) that waits for it; the broker has reported the reader.
stopped_reader() {
  reader_broker "$@"
  "$BIN/penstock-subscriber" --path "$BUFFERS/b0/penstock.log" --register --follow --output none >"$T/read" 2>&1 &
  reader=$!
  until_true "the reader is registered" is_registered
  kill -STOP "$reader"
  publish_in_background "$1"
  until_true "the broker reports the reader" is_reported
}

all_sent() {
  wait "$sending" || fail "the publisher did not go on: $(tail -n 2 "$T/said")"
  expect acked "$(jq .messages_acked "$T/sent.json")" 32768
}

# The reader dies while the broker waits for it; another one dies together with the broker.
dies() {
  stopped_reader "$1"
  expect "process of the reader" "$(figures '.topics[0].registered[0].process')" "$reader"
  expect "waited for" "$(figures '.topics[0].registered[0].holds_up')" true
  kill -KILL "$reader"
  all_sent
  expect "readers lost" "$(figures .counters.readers_lost)" 1
  "$BIN/penstock-subscriber" --path "$BUFFERS/b0/penstock.log" --register --follow --output none >"$T/read" 2>&1 &
  reader=$!
  until_true "the reader is registered" is_registered
  kill -STOP "$reader"
  kill -KILL "${brokers_running[0]}"
  wait "${brokers_running[0]}" || true
  kill -KILL "$reader"
  reader_broker "$1"
  expect readers "$(figures '.topics[0].readers')" 0
  publish_in_background "$1"
  all_sent
  stop_broker 0
}

evicted() {
  stopped_reader "$1" --reader-timeout-action evict
  all_sent
  kill -CONT "$reader"
  until_true "the reader learns of it" grep -q 'the broker evicted this reader' "$T/read"
  stop_broker 0
  wait "$reader" || true
  expect "readers evicted" "$(jq .counters.readers_evicted "$T/broker-0.json")" 1
}

given_up() {
  local code=0
  stopped_reader "$1"
  kill -TERM "$sending"
  wait "$sending" || code=$?
  expect "exit code of an interrupted publisher" "$code" 130
  expect "its acked messages" "$(jq '.messages_acked > 0 and .messages_acked < .messages_sent' "$T/sent.json")" true
  refuses 'registered reader blocks' publisher --mode "$1" --brokers "$(at 0)" --total-size 32MiB --timeout 1
  kill -KILL "$reader"
  stop_broker 0
}

dies_tcp() { dies tcp; }
dies_xdp() { dies xdp; }
evicted_tcp() { evicted tcp; }
evicted_xdp() { evicted xdp; }
given_up_tcp() { given_up tcp; }
given_up_xdp() { given_up xdp; }

# The error of a publisher whose topic's log is deleted.
log_deleted() {
  local mode=$1
  reader_broker "$mode"
  # Without end, and slowly.
  ip netns exec "$NET-pub" "$BIN/penstock-publisher" --mode "$mode" --brokers "$(at 0)" --total-size 1GiB \
    --rate 1MB --format json >"$T/sent.json" 2>"$T/said" &
  sending=$!
  until_true "there is something in the log" has_messages
  rm "$BUFFERS/b0/penstock.log"
  ! wait "$sending" || fail "a publisher whose log was deleted ended with success"
  grep -q 'was deleted' "$T/said" || fail "the publisher says: $(cat "$T/said")"
  grep -q 'ERROR.*was deleted' "$T/broker-0.log" || fail "the broker's log does not say so"
  publish_in_background "$mode"
  all_sent
  expect "messages in the new log" "$(figures '.topics[0].messages')" 32768
  stop_broker 0
}
has_messages() { [ "$(figures '.topics[0].messages')" -gt 0 ]; }
log_deleted_tcp() { log_deleted tcp; }
log_deleted_xdp() { log_deleted xdp; }

run_test "tcp: the broker does not wait for a dead reader, also after a restart" dies_tcp
run_test "xdp: the broker does not wait for a dead reader, also after a restart" dies_xdp
run_test "tcp: the broker evicts a stopped reader if configured, and the reader learns of it" evicted_tcp
run_test "xdp: the broker evicts a stopped reader if configured, and the reader learns of it" evicted_xdp
run_test "tcp: a publisher that waits for a reader ends at a signal, and at its timeout" given_up_tcp
run_test "xdp: a publisher that waits for a reader ends at a signal, and at its timeout" given_up_xdp
run_test "tcp: a deleted log ends its streams, and there is a new one" log_deleted_tcp
run_test "xdp: a deleted log ends its streams, and there is a new one" log_deleted_xdp
finish
