#!/usr/bin/env bash
# tcp streams go on after their connection or their broker died: nothing lost, doubled or out of order.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1

# goes_on DISTURBANCE [MOVES, a pattern]: a publisher of numbered lines is disturbed, and gets everything
# through, in order.
goes_on() {
  start_broker 0 --topic penstock --stall-timeout 2
  publisher --brokers "$(at 0)" --input - --rate 1MB --batch-size 2KiB \
    --format json < <(numbered_lines) >"$T/sent.json" 2>"$T/said" &
  local sending=$!
  until_messages 0 1000
  "$1"
  goes_further 0
  enough
  wait "$sending" || fail "the publisher did not go on: $(tail -n 2 "$T/said")"
  expect "acked" "$(jq .messages_acked "$T/sent.json")" "$(wc -l <"$T/input")"
  expect "paths" "$(jq -r '.brokers[0].streams[0].path' "$T/sent.json")" tcp
  local moves
  moves=$(jq '.brokers[0].streams[0].moves' "$T/sent.json")
  grep -qx "${2:-1}" <<<"$moves" || fail "the stream moved $moves times, wanted ${2:-1}"
  stop_broker 0
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output lines >"$T/back"
  cmp "$T/input" "$T/back" || fail "lines are lost, doubled or out of order"
}

# restart SIGNAL: ends the broker by it and starts another on its log.
restart() {
  local ended=${brokers_running[0]}
  kill "-$1" "$(ip netns pids "$NET-b0" | head -n 1)"
  wait "$ended" || true
  start_broker 0 --topic penstock --stall-timeout 2
}
kill_and_restart() { restart KILL; }
stop_and_restart() { restart TERM; }
restart_three_times() {
  local signal
  for signal in KILL TERM KILL; do
    restart "$signal"
    # Each time over a connection to the broker that runs now.
    goes_further 0
  done
}

# The kernel ends the connection under both.
reset_connection() {
  local killed
  killed=$(ip netns exec "$NET-pub" ss -HtnK state established dport = :1214) || true
  [ -n "$killed" ] || skip "this kernel does not let ss close sockets (INET_DIAG_DESTROY)"
}

vanish_and_restart() {
  vanish 0 0
  start_broker 0 --topic penstock --stall-timeout 2
}

# Longer than the broker's stall timeout; whether the publisher is inside a batch is chance.
fall_asleep() {
  local pid
  pid=$(ip netns pids "$NET-pub" | head -n 1)
  kill -STOP "$pid"
  sleep 4
  kill -CONT "$pid"
}

broker_killed() { goes_on kill_and_restart; }
broker_stopped() { goes_on stop_and_restart; }
broker_restarted_often() { goes_on restart_three_times 3; }
broker_vanished() { goes_on vanish_and_restart; }
connection_reset() { goes_on reset_connection; }

# Asleep between batches it is not missed; inside of one the broker ends it, and it goes on.
publisher_asleep() { goes_on fall_asleep '[01]'; }

# With the line full most of the time is spent inside of a batch.
full_speed() {
  start_broker 0 --topic penstock --ring-size 4GiB
  publisher --brokers "$(at 0)" --threads-per-broker 4 --total-size 3GiB --format json >"$T/sent.json" 2>"$T/said" &
  local sending=$!
  until_messages 0 1
  local ended=${brokers_running[0]}
  kill -KILL "$(ip netns pids "$NET-b0" | head -n 1)"
  wait "$ended" || true
  start_broker 0 --topic penstock --ring-size 4GiB
  wait "$sending" || fail "the publisher did not go on: $(tail -n 2 "$T/said")"
  expect "streams that moved" "$(jq '[.brokers[0].streams[] | select(.moves == 1)] | length' "$T/sent.json")" 4
  stop_broker 0
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output none --stat --format json >"$T/read.json"
  expect "messages read" "$(jq .messages "$T/read.json")" 3145728
  expect "messages acked" "$(jq .messages_acked "$T/sent.json")" 3145728
}

gone_for_good() {
  start_broker 0 --topic penstock
  publisher --brokers "$(at 0)" --total-size 64MiB --rate 4MB --timeout 2 >"$T/sent" 2>"$T/said" &
  local sending=$!
  until_messages 0 1
  stop_broker 0
  ! wait "$sending" || fail "the publisher ended well without its broker"
  grep -q 'could not continue' "$T/said" || fail "the publisher does not say why: $(cat "$T/said")"
}

run_test "tcp: kill -9 and restart of the broker: the publisher goes on" broker_killed
run_test "tcp: an ordinary restart of the broker: likewise" broker_stopped
run_test "tcp: three restarts in a row: likewise" broker_restarted_often
run_test "tcp: a broker that vanishes without a word and comes back: likewise" broker_vanished
run_test "tcp: a connection that is reset: likewise" connection_reset
run_test "tcp: a publisher that sleeps longer than the broker waits: likewise" publisher_asleep
run_test "tcp: kill -9 at full speed, four streams: nothing lost or doubled" full_speed
run_test "tcp: a broker that is gone for good is named" gone_for_good
finish
