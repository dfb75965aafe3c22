#!/usr/bin/env bash
# kill -9 of the broker at random moments, also of its start: it recovers, nothing that was acked is lost,
# and nothing of it stays. Usage: 90_kill.sh [KILLS [SEED]]
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

# Half of them over each path.
KILLS=${1:-200}
[ "$QUICK" -eq 0 ] || KILLS=${1:-10}
SEED=${2:-$(date +%s)}
# Milliseconds that a broker lives at most from when it serves; one of three only so long from its start,
# which meets starting and recovering.
LIFE=300
START=60
# One kill in so many is followed by a look at the log, before anybody recovers it.
LOOK=10

testbed 1

# spawn [options]: starts the broker and does not wait for it.
spawn() {
  ip netns exec "$NET-b0" "$BROKER" --buffer-dir "$BUFFERS/b0" --topic penstock \
    --report "$T/broker-0.json" "$@" >"$T/broker-0.log" 2>&1 &
  brokers_running[0]=$!
}

# publish MODE: numbered lines without end over one path, in the background.
publish() {
  # In the foreground, or it would pass a signal on twice.
  timeout --foreground 900 ip netns exec "$NET-pub" "$BIN/penstock-publisher" --brokers "$(at 0)" --mode "$1" --input - \
    --rate 500kB --batch-size 2KiB --format json < <(seq 1000000000) >"$T/sent-$1.json" 2>"$T/said-$1" &
  publishers+=($!)
}

# Waits until the broker serves.
served() {
  local _
  for _ in {1..500}; do
    ! grep -q 'ready on' "$T/broker-0.log" || return 0
    sleep 0.02
  done
  fail "the broker did not become ready: $(cat "$T/broker-0.log")"
}

kill_broker() {
  kill -KILL "${brokers_running[0]}" || fail "the broker had ended: $(cat "$T/broker-0.log")"
  # The shell would tell of each.
  { wait "${brokers_running[0]}" || true; } 2>/dev/null
  no_crash "$T/broker-0.log"
}

attached() { ip -n "$NET-b0" -d link show eth0 | grep -c 'prog/xdp' || true; }

# Of a broker that was killed nothing is left but its log.
nothing_stays() {
  expect "programs attached" "$(attached)" 0
  expect "processes" "$(ip netns pids "$NET-b0" | wc -l)" 0
  expect "AF_XDP sockets" "$(ip netns exec "$NET-b0" ss -H --xdp | wc -l)" 0
  expect "listeners" "$(ip netns exec "$NET-b0" ss -Hltn | wc -l)" 0
  expect "other files" "$(find "$BUFFERS/b0" -type f ! -name penstock.log ! -name penstock.readers \
    ! -name penstock.lock ! -name penstock.writer)" ""
}

# in_order SESSION...: whoever reads the log gets each session's lines from the first on, verified, and
# none twice; prints how many.
in_order() {
  local session count
  for session in "$@"; do
    subscriber --path "$BUFFERS/b0/penstock.log" --verify --session "$session" --output lines >"$T/back"
    count=$(wc -l <"$T/back")
    cmp "$T/back" <(seq "$count") >&2 || fail "session $session: lines are lost, doubled or out of order"
    echo "$count"
  done
}

sessions_in_log() {
  subscriber --path "$BUFFERS/b0/penstock.log" --stat --format json | jq -r '.streams[].session'
}
has_sessions() { [ "$(sessions_in_log | wc -l)" -eq "$1" ]; }

# killed_often KILLS PATHS [options of the broker]
killed_often() {
  local start=$SECONDS kills=$1 paths=$2 publishers=() sessions kill ready=0 mode count=0 total=0
  shift 2
  mkdir -p "$BUFFERS/b0"
  # Ring and index hold all of the longest run.
  local options=(--ring-size 128MiB --index-slots 131072 "$@")
  start_broker 0 --topic penstock "${options[@]}"
  for mode in $paths; do publish "$mode"; done
  within 30 has_sessions "$(wc -w <<<"$paths")"
  sessions=$(sessions_in_log)
  for ((kill = 1; kill <= kills; kill++)); do
    if ((kill % 3)); then
      served
      sleep "$(printf '0.%03d' $((RANDOM % LIFE)))"
    else
      sleep "$(printf '0.%03d' $((RANDOM % START)))"
    fi
    ! grep -q 'ready on' "$T/broker-0.log" || ready=$((ready + 1))
    kill_broker
    nothing_stays
    # shellcheck disable=SC2086 # a list
    ((kill % LOOK)) || in_order $sessions >/dev/null
    spawn "${options[@]}"
  done
  kill_broker
  start_broker 0 --topic penstock "${options[@]}"
  for publisher in "${publishers[@]}"; do kill -TERM "$publisher"; done
  for publisher in "${publishers[@]}"; do
    local code=0
    wait "$publisher" || code=$?
    expect "exit code of a publisher: $(tail -n 2 "$T"/said-*)" "$code" 130
  done
  stop_broker 0
  for mode in $paths; do
    expect "path" "$(jq -r '.brokers[0].streams[0].path' "$T/sent-$mode.json")" "$mode"
    local acked
    acked=$(jq .messages_acked "$T/sent-$mode.json")
    expect "acked of those sent over $mode" "$acked" "$(jq .messages_sent "$T/sent-$mode.json")"
    count=$(in_order "$(jq -r '.brokers[0].session' "$T/sent-$mode.json")")
    expect "lines in the log over $mode" "$count" "$acked"
    total=$((total + count))
    echo "$mode: $acked lines acked, $(jq '.brokers[0].streams[0].moves' "$T/sent-$mode.json") moves" >>"$REPORT"
  done
  echo "$kills kills, $ready of them after the broker was ready; $total lines; $((SECONDS - start)) s" >>"$REPORT"
}

tcp() { killed_often $((KILLS / 2)) tcp; }
xdp() { killed_often $((KILLS - KILLS / 2)) "xdp tcp" --mode xdp --iface eth0; }

REPORT=$WORK/report
RANDOM=$((SEED % 32768))
run_test "kill -9 at $((KILLS / 2)) random moments, tcp: nothing acked is lost, nothing stays" tcp
run_test "kill -9 at $((KILLS - KILLS / 2)) random moments, xdp and tcp: likewise" xdp
echo "seed $SEED"
cat "$REPORT"
finish
