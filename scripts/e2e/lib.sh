# shellcheck shell=bash
# Frame of the end-to-end tests; sourced by each of them.
#
# A test is a function that runs in a shell of its own with `set -e`, with a directory of its own
# as $T. It ends with 0 (PASS), with `skip REASON` (SKIP), or otherwise (FAIL, its output is shown).
# Namespaces: $NET-pub and $NET-b0 .. as made by `testbed N`; removed when the script ends.

# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
BIN=${PENSTOCK_BIN:-$BIN_DIR}
# shellcheck disable=SC2034 # used by the tests
QUICK=${PENSTOCK_QUICK:-0}
NET=pt$$
WORK=$(mktemp -d /tmp/penstock-e2e.XXXXXX)
BUFFERS=/dev/shm/penstock-e2e.$$
SKIP_CODE=77
failed=0
running=

need_root "this test"
for program in broker publisher subscriber lab; do
  [ -x "$BIN/penstock-$program" ] || die "penstock-$program is not in $BIN; cargo build --release"
done

cleanup() {
  if [ -n "$running" ]; then
    pkill -TERM -P "$running" || true
    kill "$running" 2>/dev/null || true
    wait "$running" || true
  fi
  "$ROOT/scripts/netns.sh" down --name "$NET" >/dev/null 2>&1 || true
  rm -rf "$WORK" "$BUFFERS"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# testbed BROKERS [options of netns.sh up]: the namespaces of this script.
testbed() {
  local brokers=$1
  shift
  "$ROOT/scripts/netns.sh" up --name "$NET" --brokers "$brokers" "$@" >/dev/null
}

# run_test NAME FUNCTION: runs one test and prints its verdict.
run_test() {
  T=$WORK/$2
  export T
  mkdir -p "$T"
  local code=0
  (
    set -e
    trap stop_brokers EXIT
    "$2"
  ) >"$T.out" 2>&1 &
  running=$!
  wait "$running" || code=$?
  running=
  case $code in
    0) echo "PASS $1" ;;
    "$SKIP_CODE") echo "SKIP $1: $(tail -n 1 "$T.out")" ;;
    *)
      echo "FAIL $1"
      sed 's/^/    /' "$T.out" | tail -n 40
      failed=$((failed + 1))
      ;;
  esac
  ! mountpoint -q "$T/mnt" || umount -l "$T/mnt"
  rm -rf "$T" "$BUFFERS"
}

# Ends the script with the verdict over its tests.
finish() { exit $((failed > 0)); }

skip() {
  echo "$*"
  exit "$SKIP_CODE"
}

fail() {
  echo "failed: $*"
  exit 1
}

# expect WHAT ACTUAL WANTED
expect() { [ "$2" = "$3" ] || fail "$1 is '$2', wanted '$3'"; }

# at INDEX: address of a broker.
at() { echo "10.214.$1.2:1214"; }

brokers_running=()
# How brokers are started: a program before it, such as setpriv, and which copy of it.
AS=()
BROKER=$BIN/penstock-broker

# start_broker INDEX [options]: runs in its namespace, where publishers from others may create topics;
# logs to $T/broker-INDEX.log.
start_broker() {
  local index=$1 log=$T/broker-$1.log
  shift
  # An earlier broker may have said that it is ready.
  : >"$log"
  ip netns exec "$NET-b$index" "${AS[@]}" "$BROKER" --buffer-dir "$BUFFERS/b$index" \
    --report "$T/broker-$index.json" --create-topics any "$@" >"$log" 2>&1 &
  brokers_running[index]=$!
  for _ in {1..200}; do
    grep -q '^penstock-broker ready on' "$log" && return 0
    kill -0 "${brokers_running[index]}" 2>/dev/null || break
    sleep 0.1
  done
  cat "$log"
  fail "broker $index did not become ready"
}

# stop_broker INDEX: SIGTERM; it must exit with success and have written its report.
stop_broker() {
  kill "${brokers_running[$1]}"
  local code=0
  wait "${brokers_running[$1]}" || code=$?
  unset "brokers_running[$1]"
  no_crash "$T/broker-$1.log"
  expect "exit code of broker $1" "$code" 0
  [ -s "$T/broker-$1.json" ] || fail "broker $1 wrote no report"
}

# within SECONDS COMMAND...: waits until the command succeeds.
within() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || fail "waited in vain for: $*"
    sleep 0.02
  done
}

stop_brokers() {
  local pid
  for pid in "${brokers_running[@]}"; do
    kill -KILL "$pid" 2>/dev/null || true
    # Its port and interface are free only once it is gone.
    wait "$pid" 2>/dev/null || true
  done
}

# Programs that end by themselves, each with a limit so that one that hangs fails its test.
limited() { timeout "${LIMIT:-600}" "$@"; }
broker() { limited ip netns exec "$NET-b0" "${AS[@]}" "$BROKER" "$@"; }
publisher() { limited ip netns exec "$NET-pub" "$BIN/penstock-publisher" "$@"; }
subscriber() { limited "$BIN/penstock-subscriber" "$@"; }
lab() { limited "$BIN/penstock-lab" "$@"; }

# buffers_of PID: the buffer directory of the lab with this pid, if there is one.
buffers_of() { compgen -G "/dev/shm/penstock-$1-shm.*" || true; }

# no_crash FILE: nothing panicked there.
no_crash() {
  ! grep -n 'panicked\|SIGSEGV\|SIGABRT' "$1" || fail "a crash in $1"
}

# refuses REGEX COMMAND...: it must fail within 30 s, not by a crash, and say something like REGEX.
refuses() {
  local regex=$1 code=0
  shift
  LIMIT=30 "$@" >"$T/refused" 2>&1 </dev/null || code=$?
  cat "$T/refused"
  no_crash "$T/refused"
  [ "$code" -ne 0 ] || fail "succeeded, but must be refused: $*"
  [ "$code" -lt 124 ] || fail "ended with $code (124: took longer than 30 s): $*"
  grep -Eiq -- "$regex" "$T/refused" || fail "the message says nothing like '$regex': $*"
}
