#!/usr/bin/env bash
# Fuzzes every parser and state machine with libFuzzer, one target after another.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Fuzzes every parser and state machine, one target after another, and prints a table of executions and
coverage.

Usage: scripts/fuzz.sh [--seconds N] [TARGET...]

  --seconds N  seconds for each target (default 60)
  --list       lists the targets; without TARGET, all run

An input that fails goes to fuzz/artifacts and ends the target. Inputs that reach new code go to
fuzz/target/corpus, where the next run continues. The repository keeps fuzz/corpus, which `cargo test`
replays. Coverage is the control-flow edges reached, of all edges in the program.
Installs cargo-fuzz if it is missing, and needs no nightly toolchain. Runs at the lowest priority.
Exit codes: 0 no finding, 1 findings, 2 wrong usage.

Examples:
  scripts/fuzz.sh --seconds 360
  scripts/fuzz.sh packets receiver
TEXT
}

seconds=60 targets=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      help
      exit 0
      ;;
    --seconds)
      seconds=$(option_value "$@")
      [[ $seconds =~ ^[1-9][0-9]*$ ]] || usage_error "--seconds '$seconds' is not a positive whole number"
      shift
      ;;
    --list) targets=(--list) ;;
    -*) usage_error "unknown option '$1'" ;;
    *) targets+=("$1") ;;
  esac
  shift
done

install_rust
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
cd "$ROOT/fuzz"
mapfile -t all < <(cargo fuzz list)
if [ "${targets[*]}" = --list ]; then
  printf '%s\n' "${all[@]}"
  exit 0
fi
[ "${#targets[@]}" -gt 0 ] || targets=("${all[@]}")
for target in "${targets[@]}"; do
  [[ " ${all[*]} " == *" $target "* ]] || usage_error "no target '$target'; there are: ${all[*]}"
done

# Without a sanitizer, the stable compiler suffices if this is set.
export RUSTC_BOOTSTRAP=1
# Debug assertions and overflow checks are on, as always with cargo-fuzz.
cargo fuzz build --sanitizer none || die "the build failed"

out=$(mktemp)
trap 'rm -f "$out"' EXIT
found=0
printf '%-16s %8s %14s %20s  %s\n' target seconds executions 'edges reached' findings
for target in "${targets[@]}"; do
  mkdir -p "target/corpus/$target"
  code=0 start=$SECONDS
  nice -n 19 cargo fuzz run --sanitizer none "$target" "target/corpus/$target" "corpus/$target" -- \
    -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
    >"$out" 2>&1 || code=$?
  finding=none
  if [ "$code" -ne 0 ]; then
    finding=$(grep -o 'fuzz/artifacts/.*\|artifacts/.*' "$out" | tail -n 1) || true
    finding=${finding:-"ended with $code"}
    found=1
  fi
  executions=$(awk '/number_of_executed_units/ { print $2 }' "$out")
  reached=$(grep -o 'cov: [0-9]*' "$out" | tail -n 1 | cut -d ' ' -f 2) || true
  edges=$(sed -n 's/.*Loaded 1 modules *(\([0-9]*\) inline.*/\1/p' "$out")
  printf '%-16s %8s %14s %20s  %s\n' "$target" "$((SECONDS - start))" "${executions:-?}" \
    "${reached:-?} of ${edges:-?}" "$finding"
  [ "$code" -eq 0 ] || grep -A 3 'panicked\|ERROR: ' "$out" | head -n 12 || true
done
exit "$found"
