#!/usr/bin/env bash
# The systemd unit: what systemd says of it, and whether the broker can live with what it allows.
# Starting it takes a systemd; scripts/vm_test.sh does that.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

UNIT=$ROOT/packaging/penstock-broker.service
# Exposure that systemd works out, times 10; above it something was forgotten.
EXPOSURE=25

testbed 1
XDP=(--mode xdp --iface eth0)

# setting NAME: its value in the unit.
setting() { sed -n "s/^$1=//p" "$UNIT"; }

need() { command -v "$1" >/dev/null || skip "$1 is missing; install it: apt-get install $2"; }

understood() {
  need systemd-analyze systemd
  # What it names must be there.
  sed "s|/usr/local/bin/penstock-broker|$BROKER|; s|^#LoadCredential|LoadCredential|" "$UNIT" \
    >"$T/penstock-broker.service"
  grep -q '^LoadCredential=' "$T/penstock-broker.service" || fail "nothing shows how to hand on secrets"
  systemd-analyze verify --man=no "$T/penstock-broker.service" 2>&1 | tee "$T/said"
  [ ! -s "$T/said" ] || fail "systemd objects to something"
}

hardened() {
  need systemd-analyze systemd
  systemd-analyze security --offline=true --no-pager --threshold="$EXPOSURE" "$UNIT" >"$T/said" \
    || fail "$(tail -n 1 "$T/said")"
  tail -n 1 "$T/said"
}

# as_in_unit [CAPABILITY TO LEAVE OUT]: the broker's user, capabilities and limits as the unit has them.
as_in_unit() {
  local all list
  all=$(setting AmbientCapabilities | tr ' ' '\n' | sed 's/^CAP_/+/' | grep -vix "+${1:-none}" | paste -sd,)
  list=${all,,}
  expect "bounding set" "$(setting CapabilityBoundingSet)" "$(setting AmbientCapabilities)"
  chmod 755 "$WORK" "$T"
  install -m 755 "$BIN/penstock-broker" "$T/penstock-broker"
  BROKER=$T/penstock-broker
  install -d -o nobody -m 755 "$BUFFERS/b0"
  install -o nobody -m 644 /dev/null "$T/broker-0.json"
  local memlock
  memlock=$(numfmt --from=iec "$(setting LimitMEMLOCK)")
  # Only root with CAP_SYS_RESOURCE may have more than there is.
  [ "$memlock" -le "$(ulimit -Hl | sed 's/unlimited/999999999/')000" ] || memlock=$(($(ulimit -Hl) * 1024))
  AS=(prlimit "--memlock=$memlock:$memlock" setpriv --reuid nobody --regid "$(id -g nobody)" --clear-groups
    --bounding-set "-all,$list" --inh-caps "$list" --ambient-caps "$list" --no-new-privs)
}

publish() {
  publisher --brokers "$(at 0)" --mode "$1" --topic "$2" --total-size 8MiB --format json >"$T/sent.json"
  expect "messages acked over $1" "$(jq .messages_acked "$T/sent.json")" 8192
  expect path "$(jq -r '[.brokers[].streams[].path] | unique | join(" ")' "$T/sent.json")" "$1"
}

enough() {
  as_in_unit
  start_broker 0 "${XDP[@]}"
  local set
  for set in CapEff CapPrm CapInh CapAmb; do
    expect "$set afterwards" "$(cat "/proc/${brokers_running[0]}/task/"*/status | awk -v n="$set:" '$1 == n { print $2 }' | sort -u)" 0000000000000000
  done
  publish xdp first
  publish tcp second
  stop_broker 0
}

not_too_much() {
  local one
  for one in $(setting AmbientCapabilities); do
    as_in_unit "${one#CAP_}"
    refuses "needs $one, which" broker "${XDP[@]}" --buffer-dir "$BUFFERS/b0"
  done
}

# members GROUP: the system calls of a group of systemd's, and of those inside it.
members() {
  local one
  for one in $(systemd-analyze syscall-filter "$1" | sed -n 's/^ *\([-@a-z0-9_]*\)$/\1/p' | grep -vx -- "$1"); do
    case $one in
      @*) members "$one" ;;
      *) echo "$one" ;;
    esac
  done
}

allowed() {
  local line one
  setting SystemCallFilter | grep -v '^~' | tr ' ' '\n' | while read -r one; do
    case $one in
      @*) members "$one" ;;
      *) echo "$one" ;;
    esac
  done | sort -u >"$T/listed"
  for line in $(setting SystemCallFilter | sed -n 's/^~//p'); do
    members "$line"
  done | sort -u >"$T/denied"
  comm -23 "$T/listed" "$T/denied"
}

# Every call that the broker makes on both paths is one that the unit allows. The first of them, execve,
# is not the broker's.
calls() {
  need systemd-analyze systemd
  need strace strace
  allowed >"$T/allowed"
  [ "$(wc -l <"$T/allowed")" -gt 100 ] || fail "the list of allowed calls is not understood"
  # As root: the calls are the same, and a traced program gets no ambient capabilities.
  AS=(strace -D -f -qq -c -o "$T/calls")
  start_broker 0 "${XDP[@]}" --workers 2 --rcvbuf-force
  publish xdp first
  publish tcp second
  publish xdp made-later
  stop_broker 0
  for _ in {1..100}; do
    grep -q total "$T/calls" && break
    sleep 0.1
  done
  awk '$1 ~ /^[0-9.]+$/ && $NF != "total" { print $NF }' "$T/calls" | sort -u >"$T/made"
  grep -qx bpf "$T/made" || fail "the calls were not seen: $(cat "$T/calls")"
  # A sysfs of the broker's own takes CAP_SYS_ADMIN, which the unit does not give: refused there, and /sys is
  # read instead, as the test of the unit's capabilities shows.
  grep -vx 'fsopen\|fsconfig\|fsmount' "$T/made" >"$T/judged"
  expect "calls that the unit does not allow" "$(comm -23 "$T/judged" "$T/allowed" | xargs)" ""
}

run_test "systemd understands the unit" understood
run_test "systemd finds little exposed" hardened
run_test "user, capabilities and limits of the unit are enough, and given up" enough
run_test "every capability of the unit is needed" not_too_much
run_test "every system call of the broker is allowed" calls
finish
