#!/usr/bin/env bash
# The workload on four brokers through the lab, both profiles, contents verified; the baseline.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

# lab_report ARGUMENTS...: runs the lab, checks that its last line is the folder, and sets $report.
lab_report() {
  lab "$@" --results "$T/results" >"$T/stdout"
  local folder
  folder=$(tail -n 1 "$T/stdout")
  report=$folder/report.json
  [ -s "$report" ] || fail "no report.json in '$folder', the last line printed"
  [ -s "$folder/report.md" ] || fail "no report.md in $folder"
}

workload() {
  local profile=$1 mtu=$2
  lab_report throughput --profile "$profile" --mtu "$mtu" --brokers 4 --total-size 512MiB --verify
  expect kind "$(jq -r .kind "$report")" throughput
  expect profile "$(jq -r .profile "$report")" "$profile"
  expect mtu "$(jq -r .mtu "$report")" "$mtu"
  for name in messages_sent messages_acked messages_in_logs; do
    expect "$name" "$(jq ".$name" "$report")" $((512 * 1024))
  done
  expect payload_bytes "$(jq .payload_bytes "$report")" $((512 * 1024 * 1024))
  expect "streams verified" "$(jq '[.verification[] | select(.differences == [])] | length' "$report")" 4
  expect "brokers that got a share" "$(jq '[.brokers[] | select(.messages_in_log > 0)] | length' "$report")" 4
  expect "connections with figures" "$(jq '[.brokers[].connections[]
    | select(.rcvbuf_requested > 0 and .rcvbuf_effective > 0 and .window_scale != null)] | length' "$report")" 4
  expect "publisher's stages" "$(jq -r '[.publisher.stages[].name] | join(" ")' "$report")" \
    "BufferWrite SendPayload WaitAck"
  expect "broker's stages" "$(jq -r '[.brokers[0].stages[:5][].name] | join(" ")' "$report")" \
    "DrainHeader ReserveLogSpace DrainPayloadToBuffer Commit SendAck"
  for log in broker-{0..3}.log publisher.log; do
    [ -e "$(dirname "$report")/$log" ] || fail "$log is not in the result folder"
  done
}

wire() { workload wire 1500; }
offload() { workload offload 1500; }
jumbo() { workload wire 9000; }

streams() {
  lab_report throughput --brokers 2 --threads-per-broker 3 --workers 2 --total-size 256MiB --verify
  expect "streams verified" "$(jq '[.verification[] | select(.differences == [])] | length' "$report")" 6
}

without_acks() {
  lab_report throughput --brokers 2 --ack 0 --total-size 128MiB --message-size 100 --verify
  expect messages_in_logs "$(jq .messages_in_logs "$report")" "$(jq .messages_sent "$report")"
}

variables() {
  ORDER=0 ACK=1 TEST_TYPE=5 TOTAL_MESSAGE_SIZE=134217728 MESSAGE_SIZE=1024 NUM_BROKERS=2 \
    "$ROOT/scripts/run_throughput.sh" --results "$T/results" >"$T/stdout"
  report=$(tail -n 1 "$T/stdout")/report.json
  expect messages_in_logs "$(jq .messages_in_logs "$report")" 131072
}

wrong_variables() {
  local variable code
  for variable in TEST_TYPE=1 ORDER=9 ACK=2 MODE=x PROFILE=x MESSAGE_SIZE=x NUM_BROKERS=0; do
    code=0
    env "$variable" "$ROOT/scripts/run_throughput.sh" >"$T/stdout" 2>&1 || code=$?
    expect "exit code for $variable" "$code" 2
    grep -q "${variable%%=*}" "$T/stdout" || fail "the message does not name $variable"
  done
}

baseline() {
  lab_report baseline --runs 1 --size 128MiB
  expect kind "$(jq -r .kind "$report")" baseline
  expect cases "$(jq -r '[.rows[] | "\(.profile)-\(.connections)"] | join(" ")' "$report")" \
    "wire-1 wire-4 offload-1 offload-4"
  expect "rows with figures" \
    "$(jq '[.rows[] | select(.penstock.median > 0 and .iperf3.median > 0 and .ratio > 0)] | length' "$report")" 4
}

run_test "four brokers, wire profile, verified" wire
run_test "four brokers, offload profile, verified" offload
run_test "four brokers, MTU 9000, verified" jumbo
run_test "several streams and workers per broker, verified" streams
run_test "ack level 0, verified" without_acks
run_test "run_throughput.sh takes the original's variables" variables
run_test "run_throughput.sh refuses wrong variables" wrong_variables
run_test "baseline against iperf3" baseline
finish
