#!/usr/bin/env bash
# Wrong input: a clear message or a drop that is counted; no crash, no leaked space, others go on.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
RING=64MiB
# More than the ring, so that space that leaked would be missed.
AFTER=$((256 * 1024 * 1024))

misbehave() { limited ip netns exec "$NET-pub" python3 "$E2E/misbehave.py" 10.214.0.2 1214 "$@"; }

# publish_all: a well-behaved publisher gets everything through.
publish_all() {
  publisher --brokers "$(at 0)" --total-size "$AFTER" --message-size 1KiB --format json >"$T/good.json"
  expect "messages acked" "$(jq .messages_acked "$T/good.json")" $((AFTER / 1024))
}

# in_log MESSAGES: stops the broker; its log must hold exactly these and check out.
in_log() {
  stop_broker 0
  expect "messages in the log" "$(jq '.topics[] | select(.topic == "penstock") | .messages' "$T/broker-0.json")" "$1"
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output none --stat --format json >"$T/read.json"
}

# counted AT_LEAST COUNTER...: the broker's report counts that many of these events together.
counted() {
  local wanted=$1 sum
  shift
  sum=$(jq '. as $r | [$ARGS.positional[] | $r.counters[.]] | add' "$T/broker-0.json" --args "$@")
  jq -c .counters "$T/broker-0.json"
  [ "$sum" -ge "$wanted" ] || fail "counted $sum of $*, wanted at least $wanted"
}

unknown_mode() {
  refuses 'possible values: tcp, xdp, auto' broker --mode udp --buffer-dir "$BUFFERS/x"
  refuses '--iface' broker --mode xdp --buffer-dir "$BUFFERS/x"
  refuses 'no interface eth7' broker --mode xdp --iface eth7 --buffer-dir "$BUFFERS/x"
  refuses 'possible values: tcp, xdp, auto' publisher --mode udp --brokers "$(at 0)" --total-size 1MiB
  refuses 'supported: 0' publisher --ack 2 --brokers "$(at 0)" --total-size 1MiB
  refuses 'supported: 0' publisher --order 3 --brokers "$(at 0)" --total-size 1MiB
  refuses 'tcp, xdp, auto' lab throughput --mode udp
}

port_in_use() {
  start_broker 0
  refuses '1214.*in use|in use.*1214' broker --buffer-dir "$BUFFERS/other"
}

buffers_in_use() {
  start_broker 0 --topic penstock
  refuses 'penstock|lock|use' broker --listen 0.0.0.0:1300 --topic penstock --buffer-dir "$BUFFERS/b0"
}

no_broker() {
  refuses '10\.214\.0\.2:1214' publisher --brokers "$(at 0)" --total-size 1MiB --timeout 3
}

not_writable() {
  mkdir "$T/mnt"
  mount -t tmpfs -o ro,size=1m tmpfs "$T/mnt"
  refuses "$T/mnt" broker --topic penstock --buffer-dir "$T/mnt/buffers"
  umount "$T/mnt"
}

full_disk() {
  mkdir "$T/mnt"
  mount -t tmpfs -o size=64m tmpfs "$T/mnt"
  refuses 'no room|space' broker --topic penstock --ring-size 256MiB --buffer-dir "$T/mnt"
  # A topic that comes later is refused to its publisher; the broker goes on.
  BUFFERS=$T/mnt start_broker 0 --ring-size 32MiB --topic small
  refuses 'no room|space' publisher --brokers "$(at 0)" --topic second --total-size 1MiB
  publisher --brokers "$(at 0)" --topic small --total-size 128MiB --format json >"$T/good.json"
  expect "messages acked" "$(jq .messages_acked "$T/good.json")" $((128 * 1024))
  stop_broker 0
  local bytes
  bytes=$(stat -c %s "$T/mnt/b0/small.log")
  umount "$T/mnt"
  # Space for the log and the lock files, but not for the registry of readers.
  mount -t tmpfs -o "size=$((bytes + 4096))" tmpfs "$T/mnt"
  refuses 'readers: no room for [0-9]+ bytes; free some space' broker --topic small --ring-size 32MiB --buffer-dir "$T/mnt"
  umount "$T/mnt"
}

# make_log: an ordinary log at $BUFFERS/b0/penstock.log, its broker stopped.
make_log() {
  start_broker 0 --ring-size "$RING" --topic penstock
  publisher --brokers "$(at 0)" --total-size 4MiB >/dev/null
  stop_broker 0
}

# poke OFFSET HEX: overwrites bytes of the log.
poke() { printf "%b" "$2" | dd of="$BUFFERS/b0/penstock.log" bs=1 seek="$1" conv=notrunc status=none; }

other_version() {
  make_log
  poke 8 '\x63'
  refuses 'version' broker --ring-size "$RING" --topic penstock --buffer-dir "$BUFFERS/b0"
  refuses 'version' subscriber --path "$BUFFERS/b0/penstock.log" --stat
}

other_geometry() {
  make_log
  refuses 'ring|geometry|size' broker --ring-size 128MiB --topic penstock --buffer-dir "$BUFFERS/b0"
}

foreign_file() {
  make_log
  poke 0 'not a log at all'
  refuses 'not a Penstock log' broker --ring-size "$RING" --topic penstock --buffer-dir "$BUFFERS/b0"
  refuses 'not a Penstock log' subscriber --path "$BUFFERS/b0/penstock.log" --stat
  refuses 'no such|not found|missing|does not exist' subscriber --path "$T/none.log" --stat
}

damaged_header() {
  make_log
  poke 20 '\xff\xff'
  refuses 'damaged|checksum' broker --ring-size "$RING" --topic penstock --buffer-dir "$BUFFERS/b0"
  truncate -s 100000 "$BUFFERS/b0/penstock.log"
  refuses 'damaged|checksum|bytes' subscriber --path "$BUFFERS/b0/penstock.log" --stat
}

oversized_message() {
  start_broker 0 --ring-size "$RING" --segment-size 1MiB
  refuses 'message|batch|larger|segment' publisher --brokers "$(at 0)" \
    --message-size 8MiB --batch-size 256KiB --total-size 32MiB
  publish_all
  in_log $((AFTER / 1024))
}

# survives KIND COUNT COUNTER...: misbehaviour, alone and beside a publisher; each case is counted,
# and nothing is lost or leaked.
survives() {
  local kind=$1 count=$2
  shift 2
  start_broker 0 --ring-size "$RING"
  misbehave "$kind" "$count"
  publish_all &
  local good=$!
  misbehave "$kind" "$count"
  wait "$good"
  in_log $((AFTER / 1024))
  counted $((2 * count)) "$@"
}

half_hello() { survives half_hello 100 handshake_closed; }
half_header() { survives half_header 100 streams_cut; }
mid_batch() { survives mid_batch 200 streams_cut; }
huge_claim() { survives huge_claim 20 protocol_errors; }
garbage() { survives garbage 100 garbage handshake_closed; }
wrong_protocol_version() { survives other_version 20 streams_refused; }

idle_connections() {
  local wanted=10000 limit count
  limit=$(ulimit -Hn)
  ulimit -n "$limit"
  count=$wanted
  [ "$limit" = unlimited ] || [ "$limit" -ge $((wanted + 256)) ] || count=$((limit - 256))
  echo "idle connections: $count (file descriptor limit $limit)"
  start_broker 0 --ring-size "$RING"
  # Not through the function: its pid would be that of a shell around it.
  ip netns exec "$NET-pub" python3 "$E2E/misbehave.py" 10.214.0.2 1214 idle "$count" 600 >"$T/idle" &
  local holder=$!
  for _ in {1..600}; do
    grep -q '^open' "$T/idle" && break
    kill -0 "$holder" || fail "could not open $count connections"
    sleep 0.1
  done
  expect "connections open" "$(cat "$T/idle")" "open $count"
  publish_all
  kill "$holder"
  publish_all
  in_log $((2 * AFTER / 1024))
  counted "$count" handshake_timeouts handshake_evictions handshake_closed
  [ "$count" -eq "$wanted" ] || skip "passed with $count connections: the limit of $limit files forbids $wanted"
}

# escapes ENVIRONMENT COMMAND...: number of escape characters that a command sends to a terminal.
escapes() { script -qec "env -u NO_COLOR $*" /dev/null </dev/null | tr -cd '\033' | wc -c; }

# Colours only on terminals that support them, for users who want them (no-color.org).
colours() {
  local program what
  for program in broker publisher subscriber lab; do
    what="$BIN/penstock-$program --help"
    [ "$(escapes TERM=xterm "$what")" -gt 0 ] || fail "$program has no colours"
    expect "escapes of $program with NO_COLOR" "$(escapes TERM=xterm NO_COLOR=1 "$what")" 0
    expect "escapes of $program, dumb terminal" "$(escapes TERM=dumb "$what")" 0
    expect "escapes of $program, wrong flag" "$(escapes TERM=dumb "$BIN/penstock-$program" --nope)" 0
    expect "escapes of $program in a pipe" "$($what | tr -cd '\033' | wc -c)" 0
  done
  [ "$(escapes TERM=xterm "$BIN/penstock-lab" doctor)" -gt 0 ] || fail "doctor has no colours"
  expect "escapes of doctor with NO_COLOR" "$(escapes TERM=xterm NO_COLOR=1 "$BIN/penstock-lab" doctor)" 0
  expect "lines of doctor that are too long" "$("$BIN/penstock-lab" doctor | grep -cE '^.{81}' || true)" 0
}

run_test "colours only on terminals that support them" colours
run_test "unknown mode, ack or order level" unknown_mode
run_test "port in use" port_in_use
run_test "buffers that another broker uses" buffers_in_use
run_test "no broker there" no_broker
run_test "buffer directory not writable" not_writable
run_test "full disk" full_disk
run_test "log of another version" other_version
run_test "log of another geometry" other_geometry
run_test "a file that is no log" foreign_file
run_test "a damaged log header" damaged_header
run_test "message larger than a batch" oversized_message
run_test "half a Hello" half_hello
run_test "half a batch header" half_header
run_test "close in mid-batch leaks no space" mid_batch
run_test "claims that cannot be" huge_claim
run_test "garbage on the port" garbage
run_test "another protocol version" wrong_protocol_version
run_test "10,000 connections that send nothing" idle_connections
finish
