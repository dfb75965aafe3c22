#!/usr/bin/env bash
# A run that is diagnosed, run again without its cause, and shown: as report, page, and in the terminal.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

# throughput OPTIONS...: sets $folder, the last line printed, and $report.
throughput() {
  lab throughput --brokers 1 --results "$T/results" "$@" >"$T/stdout" 2>"$T/stderr" || {
    tail -n 5 "$T/stderr"
    fail "penstock-lab throughput $*"
  }
  folder=$(tail -n 1 "$T/stdout")
  report=$folder/report.json
}

# in_order FILE HEADING...: these lines, one behind the other.
in_order() {
  local file=$1 wanted
  shift
  wanted=$(printf '%s\n' "$@")
  expect "headings of $file" "$(grep -Fx "$wanted" "$file")" "$wanted"
}

# whole_page FILE: self-contained, its pictures drawn.
whole_page() {
  grep -q '</html>' "$1" || fail "$1 is no whole page"
  expect "what $1 would load" "$(grep -Eo '(src|href)="[^"]*"|<script|@import|url\(' "$1")" 'href="data:,"'
  [ "$(grep -o '<svg' "$1" | wc -l)" -ge "$2" ] || fail "$1 has not $2 pictures"
}

# A window far too small for a line of 10 ms: about 5 MB/s, whatever else the host does.
diagnosed() {
  throughput --rcvbuf 32KiB --rcvbuf-on both --delay 10ms --total-size 24MB --diagnose \
    --diagnose-seconds 1 --fix
  expect cause "$(jq -r '.diagnosis.verdicts[0].cause' "$report")" receive-window-limited
  expect "evidence" "$(jq '.diagnosis.verdicts[0].evidence_for | length > 0' "$report")" true
  expect "the cause that the fix is for" "$(jq -r .rerun.cause "$report")" receive-window-limited
  expect "the fix" "$(jq -r .rerun.fix "$report")" \
    "brokers with --rcvbuf 67108864 --rcvbuf-on both --rcvbuf-force"
  expect "problems" "$(jq -c '.problems + .rerun.problems' "$report")" "[]"
  expect "the second run's buffer" \
    "$(jq '.brokers[0].connections[0].rcvbuf_effective' "$folder/after-fix/report.json")" $((2 * 67108864))
  expect "its rate" "$(jq .bandwidth_mb_per_s "$folder/after-fix/report.json")" \
    "$(jq .rerun.bandwidth_mb_per_s "$report")"
  in_order "$folder/report.md" '## Phase 1-2: what was measured' '## Phase 3: interpretation' \
    '## Root cause' '## Re-run after the fix' '## Next steps' '# The run in full'
  grep -q '^1. receive-window-limited' "$folder/diagnosis.txt" || fail "diagnosis.txt names no cause"
  timeline
  whole_page "$folder/report.html" 6
  whole_page "$folder/after-fix/report.html" 2
  shown
}

# What report.json tells over time adds up to what was published.
timeline() {
  expect "points that are not whole" "$(jq '[.timeline.points[] | select((.mb_per_s | length) != 1
    or .publisher_cores < 0 or .broker_cores < 0 or (.host | keys) != ["idle", "softirq", "steal",
    "system", "user"])] | length' "$report")" 0
  expect "time goes on" "$(jq '[.timeline.points[].seconds] | . == (unique)' "$report")" true
  expect "payload over time" "$(jq '(reduce .timeline.points[] as $p ({at: 0, mb: 0};
    {at: $p.seconds, mb: (.mb + ($p.seconds - .at) * $p.mb_per_s[0])})).mb as $mb
    | .payload_bytes / 1e6 | $mb > 0.5 * . and $mb < 1.01 * .' "$report")" true
  expect "windows offered" "$(jq '[.timeline.points[].connections[] | select(.broker == 0
    and .rcv_wnd > 0 and .rcv_wnd <= 65536 and .cwnd_bytes > 0)] | length > 0' "$report")" true
}

# The same again from the file, with nothing else at hand and nobody's rights.
shown() {
  local as_nobody=(setpriv --reuid 65534 --regid 65534 --clear-groups "$BIN/penstock-lab")
  cp "$report" "$T/copy.json"
  chmod 755 "$WORK" "$T"
  chmod 644 "$T/copy.json"
  "${as_nobody[@]}" report "$T/copy.json" >"$T/text"
  grep -q 'receive-window-limited' "$T/text" || fail "the terminal view names no cause"
  grep -q '[▁▂▃▄▅▆▇█]' "$T/text" || fail "the terminal view has no curve"
  "${as_nobody[@]}" report "$T/copy.json" --format html --output - >"$T/page.html"
  cmp "$T/page.html" "$folder/report.html" || fail "the page is another one"
  rm "$folder/report.html"
  expect "where it is" "$(lab report "$folder" --format html)" "$folder/report.html"
  cmp "$T/page.html" "$folder/report.html" || fail "the page of the folder is another one"
}

# Names come from people: they must not become part of the page.
hostile() {
  local file="$T/<script>alert(1)<script>.txt"
  seq 1 1000 >"$file"
  throughput --input "$file"
  grep -q '&lt;script&gt;' "$folder/report.html" || fail "the file's name is not on the page"
  whole_page "$folder/report.html" 1
}

# Nothing to fix, and too short: both are told.
honest() {
  throughput --total-size 60MB --publisher-option=--rate=15MB --diagnose --diagnose-seconds 1 --fix
  expect fix "$(jq -r .rerun.fix "$report")" null
  expect "a reason" "$(jq '.rerun.why_not | length > 0' "$report")" true
  [ ! -e "$folder/after-fix" ] || fail "there was a second run"
  grep -q '^None: the lab has no fix' "$folder/report.md" || fail "report.md does not tell it"
  throughput --total-size 1MiB --diagnose --fix
  expect diagnosis "$(jq -c '[.diagnosis, .rerun]' "$report")" "[null,null]"
  grep -q 'Not diagnosed: the run was too short' "$folder/report.md" || fail "report.md does not tell it"
}

other_reports() {
  lab limits --runs 1 --seconds 1 --profile wire --mtu 1500 --results "$T/results" >"$T/stdout"
  folder=$(tail -n 1 "$T/stdout")
  lab report "$folder" | grep -q raw_af_xdp_native || fail "limits are not shown"
  lab report "$folder" --format html >/dev/null
  grep -q raw_af_xdp_native "$folder/report.html" || fail "limits are not on the page"
}

wrong() {
  echo '{"kind": "else"}' >"$T/else.json"
  echo '{"kind": "throughput"}' >"$T/old.json"
  echo 'text' >"$T/text.json"
  refuses 'give a result folder' lab report "$T/nothing"
  refuses 'give a result folder' lab report "$T"
  refuses 'is not JSON' lab report "$T/text.json"
  refuses 'not a report of penstock-lab' lab report "$T/else.json"
  refuses 'another version' lab report "$T/old.json"
  refuses 'text, html' lab report "$T/old.json" --format pdf
  refuses '--diagnose' lab throughput --fix
  refuses 'TEST_TYPE' env TEST_TYPE=4 "$ROOT/scripts/run_throughput_with_diagnostics.sh"
  "$ROOT/scripts/run_throughput_with_diagnostics.sh" --help | grep -q 'after-fix' ||
    fail "run_throughput_with_diagnostics.sh --help"
}

run_test "a run is diagnosed, fixed, reported and shown" diagnosed
run_test "hostile names stay text on the page" hostile
run_test "what cannot be fixed or diagnosed is told" honest
run_test "reports of other kinds are shown" other_reports
run_test "report refuses what is none" wrong
finish
