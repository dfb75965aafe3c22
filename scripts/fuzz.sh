#!/usr/bin/env bash
# Fuzzes parsers and state machines: scripts/fuzz.sh [SECONDS] [TARGET...]
#
# SECONDS (60) is for each target; without TARGETs all are run. Found inputs stay in fuzz/artifacts,
# new coverage in fuzz/target/corpus; fuzz/corpus holds what is kept. Needs cargo-fuzz, which it
# installs, and no nightly toolchain: without a sanitizer stable does, given RUSTC_BOOTSTRAP.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

seconds=${1:-60}
[[ $seconds =~ ^[0-9]+$ ]] || {
  echo "fuzz.sh: '$seconds' is not a number of seconds; usage: scripts/fuzz.sh [SECONDS] [TARGET...]" >&2
  exit 2
}
shift || true
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
export RUSTC_BOOTSTRAP=1
[ $# -gt 0 ] || mapfile -t targets < <(cargo fuzz list)
[ $# -eq 0 ] || targets=("$@")

for target in "${targets[@]}"; do
  grown=target/corpus/$target
  mkdir -p "$grown"
  echo "== $target, $seconds s"
  # Debug assertions and overflow checks are on, as always with cargo-fuzz.
  nice -n 15 cargo fuzz run --sanitizer none "$target" "$grown" "corpus/$target" -- \
    -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 2>&1 |
    grep -E '^(==|stat::number|stat::peak)|DONE|cov:.*(NEW|INITED)|panicked|ERROR|SUMMARY|^error|^thread|artifact' |
    awk '/NEW|INITED/ {last = $0; next} {print} END {print last}'
done
