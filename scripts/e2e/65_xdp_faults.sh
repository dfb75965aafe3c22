#!/usr/bin/env bash
# The xdp path over links that lose, reorder, damage, double and delay packets: every byte arrives, once.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

BROKERS=4
FAULTS=loss=1%,reorder=1%,corrupt=0.1%,duplicate=1%

# lab_run ARGUMENTS...: a verified run of the lab over xdp; sets $report.
lab_run() {
  lab throughput --mode xdp --brokers "$BROKERS" --verify "$@" --results "$T/results" >"$T/stdout"
  report=$(tail -n 1 "$T/stdout")/report.json
}

# all_there MESSAGES: every message is acked and in the logs, and every stream came over xdp and reads
# back as it was sent.
all_there() {
  local name
  for name in messages_sent messages_acked messages_in_logs; do
    expect "$name" "$(jq ".$name" "$report")" "$1"
  done
  expect "messages verified" "$(jq '[.verification[].messages] | add' "$report")" "$1"
  expect "streams verified" "$(jq '[.verification[] | select(.differences == [])] | length' "$report")" "$BROKERS"
  expect "paths" "$(jq -r '[.publisher.sessions[].streams[].path] | unique | join(" ")' "$report")" xdp
  jq -r '"\(.bandwidth_mb_per_s | round) MB/s"' "$report"
}

# happened EVENT PERCENT: packets met this fault as often as asked for, either way; five standard
# deviations are let pass.
happened() {
  local way packets count
  for way in to_broker to_publisher; do
    read -r packets count < <(jq -r "[.faults.links[] | select(.direction == \"$way\")]
      | \"\(map(.packets) | add) \(map(.$1) | add)\"" "$report")
    echo "$way: $count of $packets $1, asked for $2 %"
    awk -v n="$packets" -v k="$count" -v p="$2" \
      'BEGIN { m = n * p / 100; exit !(n > 0 && (k - m) ^ 2 <= 25 * (m + 1)) }' \
      || fail "$1 $way: not as often as asked for"
  done
}

all_faults_happened() {
  happened lost 1
  happened held 1
  happened corrupted 0.1
  happened duplicated 1
  # A packet that was held comes late, unless the run is over.
  expect "packets still held" "$(jq '[.faults.links[] | .held - .let_out <= 8] | all' "$report")" true
  # The brokers saw what the links did.
  [ "$(jq '[.brokers[].xdp.corrupt] | add' "$report")" -gt 0 ] || fail "no broker saw a damaged packet"
  [ "$(jq '[.brokers[].xdp.duplicates] | add' "$report")" -gt 0 ] || fail "no broker saw a double"
  [ "$(jq '[.publisher.sessions[].streams[].transport.retransmits] | add' "$report")" -gt 0 ] \
    || fail "nothing was sent again"
}

real_file() {
  local bytes=100000000
  [ "$QUICK" -eq 0 ] || bytes=30000000
  # Programs in base64 and numbered, so that no two lines are alike.
  { cat "$BIN"/penstock-* | base64 -w 100 | nl; } 2>/dev/null | head -c "$bytes" >"$T/input" || true
  expect "bytes of the file" "$(stat -c %s "$T/input")" "$bytes"
  echo >>"$T/input"
  lab_run --input "$T/input" --faults "$FAULTS,seed=1"
  all_there "$(wc -l <"$T/input")"
  all_faults_happened
}

synthetic() {
  lab_run --total-size 512MiB --faults "$FAULTS,seed=2"
  all_there $((512 * 1024))
  all_faults_happened
}

# Small windows: reordering and loss where there is little to tell them by.
jumbo() {
  lab_run --total-size 256MiB --mtu 9000 --faults "$FAULTS,truncate=0.1%,seed=3"
  all_there $((256 * 1024))
  happened lost 1
}

# Nothing larger gets through than what is left of the MTU.
black_hole() {
  lab_run --total-size 64MiB --faults largest=1300,seed=4
  all_there $((64 * 1024))
  [ "$(jq '[.faults.links[].swallowed] | add' "$report")" -gt 0 ] || fail "nothing was swallowed"
}

# slow MICROSECONDS: every link carried packets, dropped none, and no round trip was shorter.
slow() {
  jq -c '.delay, [.publisher.sessions[].streams[].transport.rtt_us]' "$report"
  expect "lines that carried all" "$(jq '[.delay.links[] | select(.packets > 0 and .dropped == 0)] | length' "$report")" "$BROKERS"
  expect "round trips long enough" \
    "$(jq "[.publisher.sessions[].streams[].transport.rtt_us >= $1] | all" "$report")" true
}

delayed() {
  lab_run --total-size 128MiB --delay 5ms
  all_there $((128 * 1024))
  slow 5000
}

delayed_with_faults() {
  lab_run --total-size 16MiB --delay 1ms --faults "$FAULTS,seed=7"
  all_there $((16 * 1024))
  slow 1000
  happened lost 1
}

# Over tcp the kernel repairs it; what it does not notice, verification does.
tcp() {
  lab throughput --mode tcp --brokers 1 --total-size 64MiB --verify \
    --faults "$FAULTS,protocol=tcp,seed=5" --results "$T/results" >"$T/stdout"
  report=$(tail -n 1 "$T/stdout")/report.json
  expect messages_in_logs "$(jq .messages_in_logs "$report")" $((64 * 1024))
  expect "streams verified" "$(jq '[.verification[] | select(.differences == [])] | length' "$report")" 1
  [ "$(jq '[.faults.links[] | .lost * .corrupted] | add' "$report")" -gt 0 ] || fail "no faults"
}

# The large workload; its bytes pass rings that do not hold it, so subscribers follow.
whole() {
  [ "$QUICK" -eq 0 ] || skip "not in a quick run"
  LIMIT=1200 MODE=xdp MTU=1500 NUM_BROKERS=$BROKERS limited "$ROOT/scripts/run_throughput.sh" \
    --verify --bin-dir "$BIN" --results "$T/results" "$@" >"$T/stdout"
  report=$(tail -n 1 "$T/stdout")/report.json
  all_there $((10 * 1024 * 1024))
}

whole_with_faults() {
  whole --faults "$FAULTS,seed=6"
  all_faults_happened
}

refused() {
  refuses 'possible: loss' lab throughput --faults noise=1%
  refuses '0.1%' lab throughput --faults loss=1
  refuses '--profile wire' lab throughput --mode xdp --profile offload --faults loss=1%
  refuses '100us to 200 ms' lab throughput --delay 1s
  refuses 'protocol=tcp' lab throughput --mode tcp --faults loss=1%
}

run_test "xdp, faults: a real file by lines to four brokers, verified" real_file
run_test "xdp, faults: 512 MiB to four brokers, verified" synthetic
run_test "xdp, faults: MTU 9000, verified" jumbo
run_test "xdp: a path that takes less than its MTU, verified" black_hole
run_test "xdp: 5 ms more for a round trip, verified" delayed
run_test "xdp, faults: 1 ms more for a round trip, verified" delayed_with_faults
run_test "tcp, faults: verified" tcp
run_test "faults that cannot be are refused" refused
run_test "xdp: 10 GiB to four brokers, verified by readers that follow" whole
run_test "xdp, faults: 10 GiB to four brokers, verified by readers that follow" whole_with_faults
finish
