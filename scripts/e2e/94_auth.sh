#!/usr/bin/env bash
# Keys: who gets in, over tcp, xdp and when falling back; streams that go on after kill -9; files of keys.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
XDP=(--mode xdp --iface eth0)
LINES=200000

# make_keys: keys eu (topics penstock and trades.*) and us (audit); $KEYS is the broker's file.
make_keys() {
  local name topics
  KEYS=$T/keys
  install -m 600 /dev/null "$KEYS"
  while read -r name topics; do
    limited "$BROKER" --keygen "$T/$name.key" >"$T/made"
    sed "s/ \*\$/ $topics/" "$T/$name.key" >>"$KEYS"
  done <<<"eu penstock trades.*
us audit"
}

counter() { jq ".counters.$1" "$T/broker-0.json"; }

# gets_through PATH [publisher's options]: with its key a publisher of numbered lines gets all of them into the log.
gets_through() {
  local path=$1
  shift
  seq "$LINES" >"$T/input"
  publisher --brokers "$(at 0)" --auth-key "$T/eu.key" --input "$T/input" --format json "$@" >"$T/sent.json" 2>"$T/said"
  expect acked "$(jq .messages_acked "$T/sent.json")" "$LINES"
  expect path "$(jq -r '[.brokers[0].streams[].path] | unique | join(" ")' "$T/sent.json")" "$path"
}

same_lines() {
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output lines >"$T/back"
  cmp "$T/input" "$T/back" || fail "lines are lost, doubled or out of order"
}

keys_in_force() {
  make_keys
  start_broker 0 --auth-keys "$KEYS" "$@"
  local mode=tcp
  [ $# -eq 0 ] || mode=xdp
  gets_through "$mode" --mode "$mode"
  refuses 'with a key only: use --auth-key' publisher --mode "$mode" --brokers "$(at 0)" --total-size 1MiB
  refuses 'key us may not publish to topic "penstock"' \
    publisher --mode "$mode" --brokers "$(at 0)" --auth-key "$T/us.key" --total-size 1MiB
  limited "$BROKER" --keygen "$T/other.key" >"$T/made"
  refuses 'does not accept the key' \
    publisher --mode "$mode" --brokers "$(at 0)" --auth-key "$T/other.key" --total-size 1MiB
  ! grep -q 'eu' "$T/refused" || fail "a stranger is told of another key"
  publisher --mode "$mode" --brokers "$(at 0)" --auth-key "$T/us.key" --topic audit --total-size 1MiB >"$T/sent"
  stop_broker 0
  same_lines
  expect "refused without a key that is taken" "$(counter unauthenticated)" 2
  expect "refused by topic" "$(counter not_permitted)" 1
  ! grep -q 'everybody' "$T/broker-0.log" || fail "a broker with keys says that it has none"
}

over_tcp() { keys_in_force; }
over_xdp() { keys_in_force "${XDP[@]}"; }

# Every packet with a tag, because the broker or the publisher wants it so.
sealed_by_broker() {
  keys_in_force "${XDP[@]}" --packet-auth
}
# Over tcp each frame carries a tag; a publisher that does not ask for tags does what the broker
# requires.
sealed_tcp() {
  make_keys
  start_broker 0 --auth-keys "$KEYS" --packet-auth
  gets_through tcp
  stop_broker 0
  same_lines
  rm -r "$BUFFERS/b0"
  start_broker 0 --auth-keys "$KEYS"
  gets_through tcp --packet-auth --threads-per-broker 2
  stop_broker 0
  # When no datagram gets through, the frames over tcp carry tags as well.
  start_broker 0 --auth-keys "$KEYS" --mode xdp --iface lo --listen 0.0.0.0:1214 --packet-auth
  gets_through tcp --mode auto --packet-auth
  stop_broker 0
  expect forged "$(counter forged)" 0
}
sealed_by_publisher() {
  make_keys
  start_broker 0 --auth-keys "$KEYS" "${XDP[@]}"
  gets_through xdp --mode xdp --packet-auth --threads-per-broker 1
  stop_broker 0
  same_lines
}
sealed_af_xdp() {
  make_keys
  start_broker 0 --auth-keys "$KEYS" "${XDP[@]}" --packet-auth
  gets_through xdp --mode xdp --tx af_xdp
  stop_broker 0
  same_lines
}
sealed_bad_link() {
  make_keys
  lab throughput --mode xdp --brokers 1 --total-size 64MiB --verify --results "$T/results" \
    --faults loss=1%,reorder=1%,corrupt=0.5%,duplicate=1% --broker-option=--auth-keys="$KEYS" \
    --broker-option=--packet-auth --publisher-option=--auth-key="$T/eu.key" >"$T/stdout"
  local report
  report=$(tail -n 1 "$T/stdout")/report.json
  expect "messages in logs" "$(jq .messages_in_logs "$report")" 65536
  expect "differences" "$(jq '[.verification[].differences[]] | length' "$report")" 0
  [ "$(jq '.brokers[0].xdp.corrupt' "$report")" -gt 0 ] || fail "no damaged packet was noticed"
}

# The packets come in on another interface than the broker looks at.
fallback() {
  make_keys
  start_broker 0 --auth-keys "$KEYS" --mode xdp --iface lo --listen 0.0.0.0:1214
  gets_through tcp --mode auto
  grep -q 'payload goes over tcp' "$T/said" || fail "the log does not say why"
  stop_broker 0
  same_lines
}

no_keys() {
  make_keys
  start_broker 0
  grep -q 'anyone who can reach this address may publish; use --auth-keys' "$T/broker-0.log" ||
    fail "nothing is said about having no keys"
  refuses 'started without keys' publisher --brokers "$(at 0)" --auth-key "$T/eu.key" --total-size 1MiB
  publisher --brokers "$(at 0)" --total-size 1MiB >"$T/sent"
  stop_broker 0
  expect unauthenticated "$(counter unauthenticated)" 1
  start_broker 0 --listen 127.0.0.1:1214
  ! grep -q everybody "$T/broker-0.log" || fail "a loopback address is warned of"
  stop_broker 0
}

# goes_on MODE [broker's options]: kill -9 of the broker in the middle; the same key takes the session up.
goes_on() {
  local mode=$1
  shift
  make_keys
  start_broker 0 --topic penstock --auth-keys "$KEYS" "$@"
  publisher --brokers "$(at 0)" --auth-key "$T/eu.key" --mode "$mode" --input - --rate 600KB --batch-size 2KiB \
    --format json < <(numbered_lines) >"$T/sent.json" 2>"$T/said" &
  local sending=$!
  until_messages 0 1000
  local ended=${brokers_running[0]}
  kill -KILL "$(ip netns pids "$NET-b0" | head -n 1)"
  wait "$ended" || true
  start_broker 0 --topic penstock --auth-keys "$KEYS" "$@"
  goes_further 0
  enough
  wait "$sending" || fail "the publisher did not go on: $(tail -n 2 "$T/said")"
  expect acked "$(jq .messages_acked "$T/sent.json")" "$(wc -l <"$T/input")"
  expect moves "$(jq '.brokers[0].streams[0].moves' "$T/sent.json")" 1
  expect path "$(jq -r '.brokers[0].streams[0].path' "$T/sent.json")" "$mode"
  stop_broker 0
  same_lines
}
resumed_tcp() { goes_on tcp; }
resumed_xdp() { goes_on xdp "${XDP[@]}"; }
resumed_sealed() { goes_on xdp "${XDP[@]}" --packet-auth; }
resumed_sealed_tcp() { goes_on tcp --packet-auth; }

# A broker that comes back without the key does not get the stream.
key_taken_away() {
  make_keys
  start_broker 0 --topic penstock --auth-keys "$KEYS"
  publisher --brokers "$(at 0)" --auth-key "$T/eu.key" --total-size 64MiB --rate 4MB >"$T/sent" 2>"$T/said" &
  local sending=$!
  until_messages 0 1
  stop_broker 0
  sed -i '/^eu/d' "$KEYS"
  start_broker 0 --topic penstock --auth-keys "$KEYS"
  ! wait "$sending" || fail "the publisher went on without its key"
  grep -q 'could not continue.*does not accept the key' "$T/said" || fail "the publisher does not say why: $(cat "$T/said")"
  stop_broker 0
}

read_again() {
  make_keys
  start_broker 0 --auth-keys "$KEYS"
  sed -i '/^eu/d' "$KEYS"
  kill -HUP "$(ip netns pids "$NET-b0" | head -n 1)"
  within 30 grep -q 'keys reloaded' "$T/broker-0.log"
  refuses 'does not accept the key' publisher --brokers "$(at 0)" --auth-key "$T/eu.key" --total-size 1MiB
  publisher --brokers "$(at 0)" --auth-key "$T/us.key" --topic audit --total-size 1MiB >"$T/sent"
  stop_broker 0
}

exposed_files() {
  make_keys
  chmod 640 "$KEYS" "$T/eu.key"
  refuses "chmod 600 $KEYS" broker --buffer-dir "$BUFFERS/b0" --auth-keys "$KEYS"
  refuses "chmod 600 $T/eu.key" publisher --brokers "$(at 0)" --auth-key "$T/eu.key" --total-size 1MiB
  refuses 'exists' broker --keygen "$T/eu.key"
  refuses 'No such file' publisher --brokers "$(at 0)" --auth-key "$T/none.key" --total-size 1MiB
  expect "mode of a new key" "$(stat -c %a "$T/us.key")" 600
}

# Many strangers: each is counted, and a publisher is served nevertheless.
flood() {
  make_keys
  start_broker 0 --auth-keys "$KEYS"
  ip netns exec "$NET-pub" bash -c '
    for _ in {1..300}; do
      exec 3<>/dev/tcp/10.214.0.2/1214
      printf "PNSN\1\0\0\0%064d" 0 >&3
      cat <&3 >/dev/null
      exec 3>&-
    done'
  gets_through tcp
  stop_broker 0
  expect unauthenticated "$(counter unauthenticated)" 300
  same_lines
}

run_test "keys over tcp: the right one gets in, others are told so once" over_tcp
run_test "keys over xdp: likewise" over_xdp
run_test "authenticated packets, because the broker requires it" sealed_by_broker
run_test "authenticated frames over tcp, also when falling back" sealed_tcp
run_test "authenticated packets, because the publisher wants it" sealed_by_publisher
run_test "authenticated packets past the publisher's kernel" sealed_af_xdp
run_test "authenticated packets over a bad link: each message once, damaged ones noticed" sealed_bad_link
run_test "keys with --mode auto: tcp, where no datagram comes through" fallback
run_test "no keys: said at the start, and to a publisher that has one" no_keys
run_test "tcp: kill -9 and restart of a broker with keys: the stream goes on" resumed_tcp
run_test "xdp: likewise" resumed_xdp
run_test "xdp with authenticated packets: likewise" resumed_sealed
run_test "tcp with authenticated frames: likewise" resumed_sealed_tcp
run_test "a key that is taken away: its stream does not go on" key_taken_away
run_test "keys are read again on SIGHUP" read_again
run_test "files that others may read are refused, with the command" exposed_files
run_test "300 strangers: counted, in nobody's way" flood
finish
