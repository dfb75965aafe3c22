#!/usr/bin/env bash
# A real file by lines to four brokers, read back by subscribers; stdin with awkward lines.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

BROKERS=4
INPUT_BYTES=120000000
testbed "$BROKERS"

# Text that is on this machine (sources, headers, documentation), about 120 MB.
make_input() {
  find "$ROOT" /usr/include /usr/lib/python3* /usr/share /usr/local "$HOME/.cargo/registry/src" \
    -type f \( -name '*.rs' -o -name '*.h' -o -name '*.py' -o -name '*.md' -o -name '*.txt' \
    -o -name '*.c' -o -name '*.pl' -o -name '*.pm' -o -name '*.html' \) \
    -not -path '*/target/*' -print0 2>/dev/null | sort -z | xargs -0 cat 2>/dev/null \
    | head -c "$INPUT_BYTES" >"$1" || true
  [ -s "$1" ] || fail "found no text on this machine"
  # A machine with little text gets it several times, each pass with a prefix of its own.
  cp "$1" "$1.once"
  local pass=0
  while [ "$(stat -c %s "$1")" -lt 100000000 ]; do
    pass=$((pass + 1))
    sed "s/^/$pass /" "$1.once" >>"$1"
  done
  rm "$1.once"
  # A file ends with a line end.
  [ -z "$(tail -c 1 "$1")" ] || echo >>"$1"
}

start_all() {
  local i
  for ((i = 0; i < BROKERS; i++)); do
    start_broker "$i"
  done
}

addresses() {
  local i list=""
  for ((i = 0; i < BROKERS; i++)); do
    list=$list,$(at "$i")
  done
  echo "${list#,}"
}

# Reads every log back as lines and by figures; leaves $T/back and $T/read-INDEX.json.
read_back() {
  local i
  for ((i = 0; i < BROKERS; i++)); do
    local path=$BUFFERS/b$i/penstock.log
    subscriber --path "$path" --from start --verify --output lines >"$T/lines-$i"
    subscriber --path "$path" --from start --verify --output none --stat --format json >"$T/read-$i.json"
    expect "batches lost to overwriting on broker $i" "$(jq .lost_batches "$T/read-$i.json")" 0
    [ -s "$T/lines-$i" ] || fail "broker $i got nothing"
  done
  cat "$T"/lines-? >"$T/back"
}

# "session stream messages sha256" of every stream, as sent and as read.
sent_streams() {
  jq -r '.brokers[] | .session as $s | .streams[] | select(.messages > 0)
    | "\($s) \(.stream) \(.messages) \(.sha256)"' "$1" | sort
}
read_streams() {
  jq -r '.streams[] | "\(.session) \(.stream) \(.messages) \(.sha256)"' "$@" | sort
}

# sorted_sum FILE: checksum over the lines whatever their order, to find lost and doubled ones.
sorted_sum() { LC_ALL=C sort -S 512M "$1" | sha256sum; }

# compare_with INPUT: what was published against what came back.
compare_with() {
  local lines
  lines=$(wc -l <"$1")
  expect messages_sent "$(jq .messages_sent "$T/sent.json")" "$lines"
  expect messages_acked "$(jq .messages_acked "$T/sent.json")" "$lines"
  read_back
  expect "lines read back" "$(wc -l <"$T/back")" "$lines"
  expect "sorted lines" "$(sorted_sum "$T/back")" "$(sorted_sum "$1")"
  expect "streams (session, number, messages, SHA-256)" \
    "$(read_streams "$T"/read-?.json)" "$(sent_streams "$T/sent.json")"
}

file_by_lines() {
  make_input "$T/input"
  start_all
  publisher --brokers "$(addresses)" --input "$T/input" --split lines --digest \
    --threads-per-broker 2 --format json >"$T/sent.json"
  compare_with "$T/input"
}

one_stream_is_the_file() {
  head -c 20000000 "$ROOT/Cargo.lock" >"$T/input"
  start_broker 0
  publisher --brokers "$(at 0)" --input "$T/input" --split lines --digest --format json >"$T/sent.json"
  local sum
  sum=$(sha256sum "$T/input")
  expect "SHA-256 of the only stream" "$(jq -r '.brokers[0].streams[0].sha256' "$T/sent.json")" "${sum%% *}"
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --output lines >"$T/back"
  cmp "$T/input" "$T/back"
}

awkward_stdin() {
  python3 - "$T/input" <<'PYTHON'
import random, sys
random.seed(1)
with open(sys.argv[1], "wb") as out:
    for number in range(60):
        out.write(bytes([97 + number % 26]) * (1 << 20) + b"\n")   # lines of 1 MiB
        out.write(b"\n" * random.randrange(5))                     # empty lines
        for _ in range(1000):
            out.write(b"%d \x00\xff\r\n" % random.getrandbits(64)) # any byte but the line end
PYTHON
  start_all
  publisher --brokers "$(addresses)" --input - --split lines --digest --batch-size 2MiB \
    --format json <"$T/input" >"$T/sent.json"
  compare_with "$T/input"
}

through_the_lab() {
  make_input "$T/input"
  lab throughput --brokers 4 --input "$T/input" --verify --results "$T/results" >"$T/stdout"
  local report
  report=$(tail -n 1 "$T/stdout")/report.json
  expect messages_in_logs "$(jq .messages_in_logs "$report")" "$(wc -l <"$T/input")"
  expect "streams verified" "$(jq '[.verification[] | select(.differences == [])] | length' "$report")" 4
}

run_test "a real file of 100 MB and more by lines to four brokers and back" file_by_lines
run_test "one stream's SHA-256 is that of the file, order kept" one_stream_is_the_file
run_test "stdin with empty lines, lines of 1 MiB and any byte" awkward_stdin
run_test "a real file through the lab, verified" through_the_lab
finish
