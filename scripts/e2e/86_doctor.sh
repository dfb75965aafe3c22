#!/usr/bin/env bash
# The preflight: what it says of interfaces and of processes in different states.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
here() { ip netns exec "$NET-b0" "$@"; }

# link_up QUEUES [MTU]: a second link, with so many queues at the broker's end.
link_up() {
  ip link add eth1 netns "$NET-b0" numrxqueues "$1" numtxqueues "$1" type veth \
    peer name m0 netns "$NET-pub" numrxqueues "$1" numtxqueues "$1"
  ip -n "$NET-b0" addr add 10.215.0.2/24 dev eth1
  ip -n "$NET-b0" link set eth1 mtu "${2:-1500}" up
  ip -n "$NET-pub" link set m0 mtu "${2:-1500}" up
  has_carrier
}

link_down() { ip -n "$NET-b0" link del eth1 2>/dev/null || true; }

# doctor CODE [PROGRAM BEFORE IT...] -- [OPTIONS]: its report goes to $T/report.json.
doctor() {
  local wanted=$1 code=0 before=()
  shift
  while [ "$1" != -- ]; do
    before+=("$1")
    shift
  done
  shift
  limited ip netns exec "$NET-b0" "${before[@]}" "${LAB:-$BIN/penstock-lab}" doctor --format json "$@" \
    >"$T/report.json" 2>"$T/said" || code=$?
  no_crash "$T/said"
  cat "$T/said" "$T/report.json"
  expect "exit code" "$code" "$wanted"
  expect "failures" "$([ "$(jq .fail "$T/report.json")" -gt 0 ] && echo 1 || echo 0)" "$wanted"
}

# says NAME LEVEL [REGEX]: that check's level, and something in what it found or advises.
says() {
  local check
  check=$(jq -c --arg name "$1" '.host + (.interface.checks // []) | .[] | select(.name == $name)' "$T/report.json")
  expect "level of $1" "$(jq -r .level <<<"$check")" "$2"
  jq -r '.found, .fix' <<<"$check" | grep -Eq -- "${3:-.}" || fail "$1 says nothing like '$3': $check"
}

# Commands that are told can be typed.
typed() {
  local command
  command=$(jq -r --arg name "$1" '.host + .interface.checks | .[] | select(.name == $name).fix' "$T/report.json")
  here sh -ec "$command"
}

all_is_well() {
  link_up 4
  doctor 0 -- --iface eth1
  says kernel ok "$(uname -r)"
  says capabilities ok
  says link ok 'veth'
  says addresses ok '10\.215\.0\.2'
  says xdp_program ok
  says native_xdp ok
  says zero_copy warn 'copy mode'
  says queues ok '4 of at most 4'
  says steering warn 'leave --queues out'
  says mtu ok 'in one buffer'
  says interrupts ok
  [ "$(jq '[.host[], .interface.checks[] | select(.level != "ok" and .fix == null)] | length' "$T/report.json")" -eq 0 ] \
    || fail "something is wrong, but not what to do"
}

one_queue() {
  link_up 1
  doctor 0 -- --iface eth1
  says queues ok '1 of at most 1'
  says steering ok
}

# The limit counts only without CAP_IPC_LOCK.
small_memlock() {
  link_up 1
  doctor 0 prlimit --memlock=65536:65536 -- --iface eth1
  says memlock ok CAP_IPC_LOCK
  doctor 1 prlimit --memlock=65536:65536 setpriv --bounding-set -ipc_lock -- --iface eth1
  says memlock fail 'ulimit -l 2560'
  # What it tells is what the broker needs.
  doctor 0 prlimit --memlock=2621440:2621440 setpriv --bounding-set -ipc_lock -- --iface eth1
  says memlock ok
  AS=(prlimit --memlock=2621440:2621440 setpriv --bounding-set -ipc_lock)
  start_broker 0 --mode xdp --iface eth1
  stop_broker 0
  AS=(prlimit --memlock=2617344:2617344 setpriv --bounding-set -ipc_lock)
  refuses 'limit of locked memory' broker --mode xdp --iface eth1 --buffer-dir "$BUFFERS/b0"
}

jumbo() {
  link_up 2 9000
  doctor 0 -- --iface eth1
  says mtu ok 'several buffers'
}

another_program() {
  link_up 2
  start_broker 0 --mode xdp --iface eth1
  doctor 0 -- --iface eth1
  says xdp_program warn 'another penstock-broker'
  stop_broker 0
  doctor 0 -- --iface eth1
  says xdp_program ok
  # Any other program: one that passes all packets.
  command -v clang >/dev/null || skip "clang is missing"
  echo 'int pass(void *c) { return 2; } char _license[] __attribute__((section("license"))) = "GPL";' \
    | sed 's/^int/__attribute__((section("xdp"))) int/' >"$T/pass.c"
  clang -O2 -g -target bpf -c "$T/pass.c" -o "$T/pass.o"
  ip -n "$NET-b0" link set dev eth1 xdpgeneric obj "$T/pass.o" sec xdp
  doctor 1 -- --iface eth1
  says xdp_program fail 'ip link set dev eth1 xdpgeneric off'
  doctor 1 setpriv --bounding-set -sys_admin -- --iface eth1
  says xdp_program fail
  refuses 'XDP program .*ip link set dev eth1 xdpgeneric off' broker --mode xdp --iface eth1 --buffer-dir "$BUFFERS/b0"
  ip -n "$NET-b0" link set dev eth1 xdpgeneric off
  doctor 0 -- --iface eth1
}

down_and_nameless() {
  link_up 2
  ip -n "$NET-b0" link set eth1 down
  doctor 1 -- --iface eth1
  says link fail
  typed link
  ip -n "$NET-b0" addr flush dev eth1
  doctor 1 -- --iface eth1
  says addresses fail 'ip addr add'
}

interrupts_deferred() {
  link_up 1
  here sh -c 'echo 2 > /sys/class/net/eth1/napi_defer_hard_irqs'
  doctor 0 -- --iface eth1
  says interrupts warn
  typed interrupts
  doctor 0 -- --iface eth1
  says interrupts ok
}

unprivileged() {
  link_up 2
  chmod 755 "$WORK" "$T"
  install -m 755 "$BIN/penstock-lab" "$BIN/penstock-broker" "$BIN/penstock-publisher" "$BIN/penstock-subscriber" "$T"
  local LAB=$T/penstock-lab nobody=(setpriv --reuid nobody --regid "$(id -g nobody)" --clear-groups)
  doctor 0 "${nobody[@]}" -- --iface eth1
  says capabilities warn "sudo setcap .* $T/penstock-broker"
  says link ok
  # Somebody's program, but not whose.
  start_broker 0 --mode xdp --iface eth1
  doctor 1 "${nobody[@]}" -- --iface eth1
  says xdp_program fail 'only root may see'
  expect "what was not seen" "$(jq '[.not_seen[] | select(test("XDP program.*sudo"))] | length' "$T/report.json")" 1
  stop_broker 0
  command -v setcap >/dev/null || skip "setcap is missing; install libcap2-bin"
  # What it tells makes it ready.
  setcap cap_bpf,cap_net_admin,cap_net_raw,cap_ipc_lock+ep "$T/penstock-broker" || skip "no file capabilities in $T"
  doctor 0 "${nobody[@]}" prlimit --memlock=65536:65536 -- --iface eth1
  says capabilities ok "$T/penstock-broker"
  says memlock ok CAP_IPC_LOCK
}

contained() {
  doctor 1 setpriv --bounding-set -bpf,-sys_admin -- --iface eth0
  says capabilities fail cap_bpf
}

interfaces_are_listed() {
  link_up 4
  doctor 0 --
  expect "interfaces" "$(jq -r '[.interfaces[] | "\(.name) \(.driver) \(.queues) \(.native_xdp)"] | join(", ")' "$T/report.json")" \
    "eth0 veth 1 true, eth1 veth 4 true"
  here "$BIN/penstock-lab" doctor >"$T/text"
  grep -Eq '^  eth1 +veth, up, MTU 1500, 4 queues, native XDP' "$T/text" || fail "not listed: $(cat "$T/text")"
  ! grep -q $'\x1b' "$T/text" || fail "colours in a file"
}

wrong_usage() {
  refuses 'no interface eth9 here' here "$BIN/penstock-lab" doctor --iface eth9
  refuses 'possible values: text, json' lab doctor --format xml
  # /sys may belong to another namespace.
  nsenter --net="/run/netns/$NET-b0" "$BIN/penstock-lab" doctor --iface eth0 | grep '^Interface eth0'
}

# Every test makes its own link.
on_a_link() { run_test "$1" "$2"; link_down; }

on_a_link "several queues: nothing fails" all_is_well
on_a_link "one queue" one_queue
on_a_link "locked memory: what it says is what the broker needs" small_memlock
on_a_link "large MTUs" jumbo
on_a_link "other XDP programs" another_program
on_a_link "an interface that is down, or has no address" down_and_nameless
on_a_link "deferred interrupts" interrupts_deferred
on_a_link "an ordinary user: what can be seen, and file capabilities" unprivileged
on_a_link "root without capabilities" contained
on_a_link "without --iface: the interfaces that there are" interfaces_are_listed
on_a_link "wrong usage" wrong_usage
finish
