#!/usr/bin/env bash
# From a fresh clone to a measured result: install, build, run, show.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Installs missing packages, builds the release, publishes 2 GiB to four brokers in network namespaces
in both profiles, compares one broker with iperf3 and the xdp path with the tcp path, and shows the
results.

Usage: scripts/quickstart.sh

Takes about four minutes once built. Needs root for the namespaces (uses sudo if available). At the
end it removes everything that it created outside results/ and target/, except installed packages.

Example:
  scripts/quickstart.sh
TEXT
}

case ${1:-} in
  '') ;;
  -h | --help)
    help
    exit 0
    ;;
  *) usage_error "unknown option '$1'" ;;
esac

# lab ARGUMENTS...: runs penstock-lab; its last output line, the result folder, goes to $folder.
lab() {
  local out
  out=$(mktemp)
  as_root "$BIN_DIR/penstock-lab" "$@" --results "$ROOT/results" | tee "$out" || {
    rm -f "$out"
    die "penstock-lab $1 failed; its output is above, and its logs are in the folder named last"
  }
  folder=$(tail -n 1 "$out")
  rm -f "$out"
}

say "== installing missing packages"
install_deps
say "== building"
build_release

folders=()
for profile in wire offload; do
  say "== 2 GiB in 1 KiB messages to four brokers, profile $profile"
  lab throughput --profile "$profile" --brokers 4 --total-size 2GiB --message-size 1KiB
  folders+=("$folder")
done
say "== one broker against iperf3"
lab baseline --runs 3 --size 512MiB
baseline=$folder
say "== xdp and tcp compared, one broker"
lab compare --quick
compare=$folder

figures() { # FOLDER
  jq -r '[.profile, "\(.mtu)", "\(.bandwidth_mb_per_s * 10 | round / 10)", "\(.seconds * 100 | round / 100)",
    "\(.messages_acked) of \(.messages_sent)", "\(.messages_in_logs)",
    "\([.brokers[].cpu_seconds_per_gb] | add / length * 1000 | round / 1000)"] | @tsv' "$1/report.json"
}

printf '\nPublish to four brokers (1 MB = 10^6 bytes of messages):\n\n'
{
  printf 'profile\tMTU\tMB/s\tseconds\tacked\tin the logs\tbroker CPU s/GB\n'
  for folder in "${folders[@]}"; do
    figures "$folder"
  done
} | column -t -s $'\t'
printf '\nOne broker against iperf3 on the same link (medians):\n\n'
{
  printf 'profile\tconnections\tpenstock MB/s\tiperf3 MB/s\tratio\n'
  jq -r '.rows[] | [.profile, "\(.connections)", "\(.penstock.median | round)",
    "\(.iperf3.median | round)", "\(.ratio * 1000 | round / 1000)"] | @tsv' "$baseline/report.json"
} | column -t -s $'\t'
printf '\nxdp and tcp compared, one broker (medians):\n\n'
{
  printf 'profile\tMTU\tmetric\tbatches/s\txdp\tmode\ttcp\txdp / tcp\n'
  jq -r 'def figure: if . >= 100 then round else . * 1000 | round / 1000 end;
    .rows[] | select(.metric | IN("payload_mb_per_s", "host_cpu_s_per_gb", "ack_latency_us_p50", "ack_latency_us_p99"))
    | [.profile, "\(.mtu)", .metric, "\(.rate // "full speed")", "\(.xdp.median | figure)", .xdp_mode,
      "\(.tcp.median | figure)", "\(.ratio | figure)"] | @tsv' "$compare/report.json"
} | column -t -s $'\t'
warnings=$(jq -rs '[.[].warnings[]?] | unique[]' "$baseline/report.json" "$compare/report.json")
if [ -n "$warnings" ]; then
  printf '\nReliability of these figures:\n\n'
  printf -- '- %s\n' "${warnings//$'\n'/$'\n- '}" | fold -s -w 80
fi
printf '\nReports:\n'
printf '  %s/report.md\n' "${folders[@]}" "$baseline" "$compare"
