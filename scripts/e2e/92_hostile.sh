#!/usr/bin/env bash
# Floods of foreign, damaged and repeated packets, of handshakes and of claims: the honest publisher gets
# everything through, each is counted, and the broker does not grow.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
# The attacker is another host of the publisher's network.
ATTACKER=10.214.0.66
ip -n "$NET-pub" addr add "$ATTACKER/24" dev b0
# And more of them.
for host in {100..111}; do
  ip -n "$NET-pub" addr add "10.214.0.$host/24" dev b0
done
XDP=(--mode xdp --iface eth0 --ring-size 64MiB --topic penstock)
# What a broker may need more than before: connections, what is kept of those that ended.
GROWTH=$((8 << 20))
# Seconds of a flood at least, and messages that are published beneath it.
SECONDS_LONG=2 TOTAL=128MiB
[ "$QUICK" -ne 0 ] || SECONDS_LONG=8 TOTAL=512MiB

PORT=1214
hostile() { limited ip netns exec "$NET-pub" python3 "$E2E/hostile.py" "$ATTACKER" 10.214.0.2 "$PORT" "$@"; }

rss() { awk '/^VmRSS/ { print $2 * 1024 }' "/proc/${brokers_running[0]}/status"; }

# grew_little BEFORE
grew_little() {
  local now
  now=$(rss)
  echo "resident: $1 before, $now after"
  [ $((now - $1)) -le "$GROWTH" ] || fail "the broker grew from $1 to $now bytes"
}

# publish NAME: an honest publisher over xdp gets everything through, and stays on its path.
publish() {
  publisher --brokers "$(at 0)" --mode xdp --total-size "$TOTAL" --format json >"$T/$1.json"
  expect "acked ($1)" "$(jq .messages_acked "$T/$1.json")" "$(($(bytes_of "$TOTAL") / 1024))"
  # A flood on two cores may silence the path for so long that the stream is opened anew.
  expect "path ($1)" "$(jq -r '.brokers[0].streams[0].path' "$T/$1.json")" xdp
}

# in_order NAME...: the rings' readers find nothing but what these publishers sent.
in_order() {
  local name sessions
  stop_broker 0
  subscriber --path "$BUFFERS/b0/penstock.log" --verify --allow-loss --stat --format json >"$T/read.json"
  sessions=$(for name in "$@"; do jq -r '.brokers[0].session' "$T/$name.json"; done | sort)
  expect "sessions in the log" \
    "$(jq -r '.streams[].session' "$T/read.json" | sort -u | comm -23 - <(echo "$sessions"))" ""
  expect "messages" "$(jq '[.topics[].messages] | add' "$T/broker-0.json")" \
    "$(($# * $(bytes_of "$TOTAL") / 1024))"
}

# count JQ: a figure of the broker's report.
count() { jq "$1" "$T/broker-0.json"; }

at_least() { [ "$2" -ge "$3" ] || fail "$1: $2, wanted at least $3"; }

# beneath KIND COUNTED: an honest publisher alone, then beneath a flood of which so many are counted.
beneath() {
  local kind=$1 counted=$2 before flood sent came
  start_broker 0 "${XDP[@]}"
  publish alone
  before=$(rss)
  hostile "$kind" "$SECONDS_LONG" >"$T/hostile.json" 2>"$T/said" &
  flood=$!
  for _ in {1..200}; do
    ! grep -q ready "$T/said" || break
    sleep 0.05
  done
  publish beneath
  kill "$(sed -n 's/^ready //p' "$T/said" | tail -n 1)"
  wait "$flood" || fail "the attacker failed: $(cat "$T/said")"
  grew_little "$before"
  in_order alone beneath
  sent=$(jq .packets "$T/hostile.json")
  jq -c . "$T/hostile.json"
  jq -c .xdp "$T/broker-0.json"
  # What the receive queue had no room for is dropped; of the rest each is counted.
  came=$(count ".xdp | $counted")
  at_least "$counted" "$came" $((sent / 20))
  printf '%s: alone %.0f MB/s, beneath %.0f MB/s; %.0f packets/s of %d bytes were sent, %.0f %% came through\n' \
    "${FUNCNAME[1]}" "$(jq .bandwidth_mb_per_s "$T/alone.json")" "$(jq .bandwidth_mb_per_s "$T/beneath.json")" \
    "$(jq '.packets / .seconds' "$T/hostile.json")" "$(jq .bytes "$T/hostile.json")" \
    "$((came * 100 / sent))" >>"$REPORT"
}

# The XDP program drops them: no worker sees one. What was sent again for the honest stream may pass the
# program before its stream ends, and reach the worker after it.
guessed() {
  local seen
  beneath guessed .outcomes.unknown_stream
  seen=$(count .xdp.unknown_stream)
  [ "$seen" -le 100 ] || fail "seen by workers: $seen"
}

# For comparison: the same packets to a port that nobody serves.
elsewhere() {
  PORT=1300
  beneath guessed .outcomes.other_port
}

# These have the key of an honest stream, so a worker must look at them; when it has ended, no more.
damaged() {
  beneath damaged '.corrupt + .outcomes.unknown_stream'
  at_least "seen by workers" "$(count .xdp.corrupt)" 1000
}

repeated() {
  beneath repeated '.duplicates + .outcomes.unknown_stream'
  at_least "seen by workers" "$(count .xdp.duplicates)" 1000
}

# More refusals than lines may be written about; those that come later are only counted.
refusals() {
  start_broker 0 "${XDP[@]}"
  publish alone
  local before lines
  before=$(rss)
  hostile refused 5000 | tee "$T/hostile.json"
  expect "refused" "$(jq .refused "$T/hostile.json")" 5000
  publish later
  grew_little "$before"
  in_order alone later
  expect "counted" "$(count .counters.streams_refused)" 5000
  lines=$(grep -c 'stream refused' "$T/broker-0.log")
  echo "$lines lines"
  [ "$lines" -lt 4000 ] || fail "$lines lines were written about 5000 refusals"
}

half_open() {
  start_broker 0 "${XDP[@]}" --max-handshakes 64 --handshake-timeout 1
  publish alone
  local before
  before=$(rss)
  hostile unanswered 500 >"$T/hostile.json" &
  local attack=$!
  publish beneath
  wait "$attack" || fail "the attacker failed"
  expect "closed" "$(jq .closed "$T/hostile.json")" 500
  hostile slow 50 | tee "$T/slow.json"
  expect "slow ones closed" "$(jq .closed "$T/slow.json")" 50
  grew_little "$before"
  in_order alone beneath
  jq -c .counters "$T/broker-0.json"
  at_least "made room" "$(count .counters.handshake_evictions)" 300
  at_least "out of time" "$(count .counters.handshake_timeouts)" 50
}

# Streams that no publisher uses: a host has its share of them, and its oldest give way to the next
# ones. Meanwhile another host publishes.
left_open() {
  [ "$QUICK" -eq 0 ] || skip "not in a quick run"
  start_broker 0 "${XDP[@]}" --max-connections 100
  local before
  publish alone
  before=$(rss)
  hostile left_open 150 >"$T/hostile.json" 2>"$T/said" &
  local attack=$!
  for _ in {1..200}; do
    ! grep -q ready "$T/said" || break
    sleep 0.05
  done
  publish beneath
  wait "$attack" || fail "the attacker failed: $(cat "$T/said")"
  cat "$T/hostile.json"
  at_least "opened" "$(jq .opened "$T/hostile.json")" 50
  expect "closed" "$(jq .closed "$T/hostile.json")" "$(jq .opened "$T/hostile.json")"
  grew_little "$before"
  in_order alone beneath
  at_least "made room" "$(count .counters.stream_evictions)" 1
}

claims() {
  start_broker 0 "${XDP[@]}"
  publish alone
  local before
  before=$(rss)
  hostile claims 500 | tee "$T/hostile.json"
  expect "refusals" "$(jq -c '.codes | map_values(. // "closed")' "$T/hostile.json")" \
    '{"no streams":2,"streams":2,"stream":2,"batches":4,"topic":3,"another folder":3}'
  publish later
  grew_little "$before"
  in_order alone later
  jq -c .xdp "$T/broker-0.json"
  # Three kinds break a limit of the stream, three contradict themselves; a few are within the credit.
  at_least "refused" "$(count .xdp.refused)" 1000
  at_least "contradictions" "$(count .xdp.corrupt)" 1000
}

# Twelve hosts claim and send as much as the broker accepts, over both paths at once: they reach the
# bound in docs/operations.md, and it holds.
hoarded() {
  start_broker 0 "${XDP[@]}" --segment-size 16MiB
  publish alone
  local before now most flood streams
  # Anonymous memory only: the ring is a file.
  anonymous() { awk '/^RssAnon/ { print $2 * 1024 }' "/proc/${brokers_running[0]}/status"; }
  before=$(anonymous)
  hostile hoarded 20 >"$T/hostile.json" 2>"$T/said" &
  flood=$!
  for _ in {1..600}; do
    ! grep -q ready "$T/said" || break
    sleep 0.05
  done
  most=$(anonymous)
  publish beneath
  now=$(anonymous)
  [ "$now" -le "$most" ] || most=$now
  publisher --brokers "$(at 0)" --mode tcp --total-size "$TOTAL" --format json >"$T/tcp.json"
  now=$(anonymous)
  [ "$now" -le "$most" ] || most=$now
  kill "$(sed -n 's/^ready //p' "$T/said" | tail -n 1)"
  wait "$flood" || fail "the attacker failed: $(cat "$T/said")"
  streams=$(jq .streams "$T/hostile.json")
  jq -c . "$T/hostile.json"
  echo "hoarded: anonymous memory: $before before, $most at most, with $streams streams" | tee -a "$REPORT"
  [ $((most - before)) -le $(((32 << 20) + streams * (24 << 10) + (4 << 20))) ] || fail "more than the bound"
  at_least "memory that was taken" $((most - before)) $((20 << 20))
  expect "acked over tcp" "$(jq .messages_acked "$T/tcp.json")" "$(($(bytes_of "$TOTAL") / 1024))"
  in_order alone beneath tcp
  jq -c '.counters, .xdp' "$T/broker-0.json"
}

# A host that opens a stream cannot make the broker send ACKs to other hosts.
reflected() {
  start_broker 0 "${XDP[@]}"
  hostile reflected 200 | tee "$T/hostile.json"
  expect "ACKs" "$(jq -c . "$T/hostile.json")" '{"own":200,"victim":0}'
  stop_broker 0
  # Overtaken packets are not checked as strictly.
  at_least "from another host" "$(count .xdp.foreign_source)" 100
}

REPORT=$WORK/report
run_test "a flood of packets of streams that nobody has: nothing changes" guessed
run_test "the same flood to a port that nobody serves: nothing changes" elsewhere
run_test "a flood of damaged packets: nothing changes" damaged
run_test "a flood of repeated packets: nothing changes" repeated
run_test "5,000 refused handshakes: counted, and told at a limited rate" refusals
run_test "half and slow handshakes: bounded, and given up" half_open
run_test "streams that are opened and not used: bounded, and given up" left_open
run_test "claims that cannot be: refused" claims
run_test "batches that are claimed and half sent by many hosts over both paths: memory is bounded" hoarded
run_test "packets with a spoofed source address: no host gets an ACK" reflected
cat "$REPORT"
finish
