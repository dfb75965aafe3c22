#!/usr/bin/env bash
# Every check of the repository: format, lints, unit tests, concurrency models, end to end.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Runs every check and ends with a line: N passed, N failed, N skipped.

Usage: scripts/test.sh [--quick]

  --quick  skips long checks, and lists them; under five minutes on two cores, once built.

Installs what is missing (Debian packages, Rust). The end-to-end tests run in network namespaces and
need root; without root they run through sudo, or are skipped if sudo is not installed.
Exit code: 0 if nothing failed.

Examples:
  scripts/test.sh --quick
  scripts/test.sh
TEXT
}

quick=0
for argument in "$@"; do
  case $argument in
    -h | --help)
      help
      exit 0
      ;;
    --quick) quick=1 ;;
    *) usage_error "unknown option '$argument'" ;;
  esac
done

cd "$ROOT"
passed=0 failures=() skipped=()
out=$(mktemp)
trap 'rm -f "$out"' EXIT

# Prints the minutes and seconds since the start, to show which checks take long.
heading() { printf '\n== %d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

# step NAME COMMAND...: one check that passes or fails as a whole.
step() {
  local name=$1
  shift
  heading "$name"
  if "$@"; then
    echo "PASS $name"
    passed=$((passed + 1))
  else
    fail "$name"
  fi
}

fail() {
  echo "FAIL $1"
  failures+=("$1")
}

skip() {
  echo "SKIP $1: $2"
  skipped+=("$1: $2")
}

# cargo_tests NAME COMMAND...: counts each test that the command runs; none at all is a failure. Lists tests
# that say why they were skipped.
cargo_tests() {
  local name=$1 code=0 ok ignored bad left_out
  shift
  heading "$name"
  "$@" 2>&1 | tee "$out" || code=$?
  read -r ok ignored < <(awk '/^test result:/ { ok += $4; ignored += $8 }
    END { print ok + 0, ignored + 0 }' "$out")
  passed=$((passed + ok))
  mapfile -t left_out < <(sed -En "s/^test ([^ ]+) +\.\.\. ignored \((.*)\)$/$name: \1: \2/p" "$out")
  skipped+=("${left_out[@]}")
  ignored=$((ignored - ${#left_out[@]}))
  [ "$ignored" -eq 0 ] || skipped+=("$name: $ignored tests need root; run sudo scripts/test.sh")
  # The names of a program's failed tests are between its last "failures:" and its result.
  mapfile -t bad < <(awk '/^failures:$/ { names = "" } sub(/^    /, "") { names = names $0 "\n" }
    /^test result: FAILED/ { printf "%s", names }' "$out")
  failures+=("${bad[@]}")
  if [ "${#bad[@]}" -eq 0 ] && { [ "$code" -ne 0 ] || [ "$ok" -eq 0 ]; }; then
    fail "$name: it did not finish, or ran no test"
  fi
}

# The end-to-end tests. They are built with the features of the whole workspace, as the unit tests
# are, which shares what both depend on, and run as root.
end_to_end_tests() {
  local tests=() file host
  for file in e2e/tests/*.rs; do
    tests+=(--test "$(basename "$file" .rs)")
  done
  if [ "$(id -u)" -ne 0 ]; then
    host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${host}_RUNNER=sudo --preserve-env=PENSTOCK_QUICK,PENSTOCK_BIN"
  fi
  env PENSTOCK_QUICK="$quick" PENSTOCK_BIN="$BIN_DIR" \
    cargo test --locked --workspace --no-fail-fast "${tests[@]}"
}

# In a separate target directory, because the flag rebuilds everything.
loom() {
  RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$TARGET_DIR/loom" CARGO_PROFILE_DEV_DEBUG=false \
    cargo test --locked -p penstock-log --lib loom
}

install_deps
install_packages libcap2-bin python3 shellcheck strace systemd
# A server of another project, as a target for diagnose.
[ "$quick" -ne 0 ] || install_packages nats-server

step "rustfmt" cargo fmt --all -- --check
step "clippy" cargo clippy --locked --workspace --all-targets -- -D warnings
step "shellcheck" shellcheck -x scripts/*.sh scripts/vm/systemd-test .ci/run
step "licences, sources and versions of dependencies" scripts/check_dependencies.py
step "licences, sources and versions: the check itself" env PYTHONDONTWRITEBYTECODE=1 \
  python3 -m doctest scripts/check_dependencies.py
step "no import cycles, no long files" scripts/check_structure.py
step "import cycles and long files: the check itself" env PYTHONDONTWRITEBYTECODE=1 \
  python3 -m doctest scripts/check_structure.py
# Ignored tests load programs into the kernel.
ignored=()
[ "$(id -u)" -ne 0 ] || ignored=(-- --include-ignored)
cargo_tests "unit tests" cargo test --locked --workspace --exclude penstock-e2e --no-fail-fast "${ignored[@]}"
[ "$quick" -ne 0 ] || cargo_tests "fault schedules over tcp" \
  env PENSTOCK_SEEDS=1000 cargo test --locked --workspace --test broker schedules
cargo_tests "concurrency models (loom)" loom
step "release build" build_release

if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
  skip "end to end" "network namespaces need root, and sudo is not installed"
else
  cargo_tests "end to end" end_to_end_tests
fi

if [ "${#skipped[@]}" -gt 0 ]; then
  printf '\nSkipped:\n'
  printf '  %s\n' "${skipped[@]}"
fi
if [ "${#failures[@]}" -gt 0 ]; then
  printf '\nFailed:\n'
  printf '  %s\n' "${failures[@]}"
fi
heading "end"
printf '%d passed, %d failed, %d skipped\n' "$passed" "${#failures[@]}" "${#skipped[@]}"
[ "${#failures[@]}" -eq 0 ]
