#!/usr/bin/env bash
# Least privilege: what the broker needs, what it keeps, what works afterwards.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
XDP=(--mode xdp --iface eth0)
NET_ADMIN=0000000000001000
NONE=0000000000000000

# field NAME FILE: of a status file in /proc.
field() { awk -v name="$1:" '$1 == name { $1 = ""; print substr($0, 2) }' "$2"; }

# expect_threads USER ACCEPT: effective and permitted capabilities of every thread are none, those of
# the accept loop's ACCEPT; nothing can be gained any more.
expect_threads() {
  local task name wanted seen=0 user group
  user=$(id -u "$1")
  group=$(id -g "$1")
  for task in "/proc/${brokers_running[0]}/task/"*; do
    name=$(cat "$task/comm")
    wanted=$NONE
    [ "$name" != accept ] || wanted=$2
    for set in CapEff CapPrm; do
      expect "$set of thread $name" "$(field "$set" "$task/status")" "$wanted"
    done
    for set in CapInh CapAmb; do
      expect "$set of thread $name" "$(field "$set" "$task/status")" "$NONE"
    done
    expect "no_new_privs of thread $name" "$(field NoNewPrivs "$task/status")" 1
    expect "user of thread $name" "$(field Uid "$task/status")" "$user $user $user $user"
    expect "group of thread $name" "$(field Gid "$task/status")" "$group $group $group $group"
    seen=$((seen + 1))
  done
  [ "$seen" -ge 4 ] || fail "only $seen threads were seen"
}

# publish PATH TOPIC: eight mebibytes that are acked and, over PATH, in the log.
publish() {
  publisher --brokers "$(at 0)" --mode "$1" --topic "$2" --total-size 8MiB --format json >"$T/sent.json"
  expect "messages acked over $1" "$(jq .messages_acked "$T/sent.json")" 8192
  expect path "$(jq -r '[.brokers[].streams[].path] | unique | join(" ")' "$T/sent.json")" "$1"
}

attached() { ip -n "$NET-b0" -d link show eth0 | grep -c penstock_steer || true; }

all_is_given_up() {
  start_broker 0 "${XDP[@]}" --workers 1 --busy-poll 64
  expect_threads root "$NONE"
  publish xdp penstock
  publish tcp penstock
  publish xdp made-later
  stop_broker 0
  [ "$(jq .xdp.outcomes.steered "$T/broker-0.json")" -gt 1000 ] || fail "the report is without the program's counts"
  expect "programs attached after the end" "$(attached)" 0
}

tcp_too() {
  start_broker 0 --workers 2
  expect_threads root "$NONE"
  publish tcp penstock
  stop_broker 0
}

killed() {
  start_broker 0 "${XDP[@]}"
  expect "programs attached" "$(attached)" 1
  kill -KILL "${brokers_running[0]}"
  wait "${brokers_running[0]}" || true
  expect "programs attached after kill -9" "$(attached)" 0
  # The queue is free again.
  start_broker 0 "${XDP[@]}"
  publish xdp penstock
  stop_broker 0
}

# Each accepted socket takes CAP_NET_ADMIN: the accept loop keeps just that.
forced_buffers() {
  start_broker 0 "${XDP[@]}" --rcvbuf 64MiB --rcvbuf-force
  expect_threads root "$NET_ADMIN"
  publish tcp penstock
  publish xdp penstock
  stop_broker 0
  expect "effective buffers" "$(jq -c '[.connections[].rcvbuf_effective] | unique' "$T/broker-0.json")" "[$((128 << 20))]"
}

another_user() {
  start_broker 0 "${XDP[@]}" --user nobody --rcvbuf 64MiB --rcvbuf-force
  expect_threads nobody "$NET_ADMIN"
  expect "supplementary groups" "$(field Groups "/proc/${brokers_running[0]}/status" | xargs)" "$(id -G nobody)"
  publish xdp penstock
  publish tcp made-later
  stop_broker 0
  expect "owner of the logs" "$(stat -c %U "$BUFFERS/b0" "$BUFFERS/b0/penstock.log" "$BUFFERS/b0/made-later.log" | sort -u)" nobody
  # They are taken up again.
  start_broker 0 "${XDP[@]}" --user nobody
  publish xdp penstock
  stop_broker 0
  expect "messages in the log" "$(jq '.topics[0].messages' "$T/broker-0.json")" 16384
}

directory_of_another() {
  install -d -o root -m 755 "$BUFFERS/b0"
  refuses "user nobody cannot create logs in $BUFFERS/b0, which belongs to root" broker --user nobody --buffer-dir "$BUFFERS/b0"
  chown nobody "$BUFFERS/b0"
  refuses "user root cannot create logs in $BUFFERS/b0, which belongs to nobody" broker --buffer-dir "$BUFFERS/b0"
  start_broker 0 --user nobody
  publish tcp penstock
  stop_broker 0
  chown root "$BUFFERS/b0"
  refuses "penstock.log: cannot open for writing" broker --topic penstock --buffer-dir "$BUFFERS/b0"
  refuses 'no user "nobody-at-all"' broker --user nobody-at-all --buffer-dir "$BUFFERS/b0"
  refuses "$T/none/report.json" broker --report "$T/none/report.json" --buffer-dir "$BUFFERS/b0"
}

# without CAPABILITY... -- REGEX OPTIONS...: root, but for these; the message must say so.
without() {
  local lacking=()
  while [ "$1" != -- ]; do
    lacking+=("-$1")
    shift
  done
  shift
  local regex=$1
  shift
  AS=(setpriv --bounding-set "$(IFS=,; echo "${lacking[*]}")")
  refuses "$regex" broker --buffer-dir "$BUFFERS/b0" "$@"
  expect "lines of the message" "$(grep -Evc ' INFO |--auth-keys' "$T/refused")" 1
}

what_is_missing() {
  without bpf sys_admin -- ' needs CAP_BPF, which' "${XDP[@]}"
  without net_admin -- ' needs CAP_NET_ADMIN, which' "${XDP[@]}"
  without net_raw -- ' needs CAP_NET_RAW, which' "${XDP[@]}"
  without net_raw net_admin bpf sys_admin -- ' needs CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, which.*setcap cap_bpf,cap_net_admin,cap_net_raw\+ep /' "${XDP[@]}"
  without net_admin -- 'rcvbuf-force needs CAP_NET_ADMIN, which' --rcvbuf-force
  without setuid -- 'user needs CAP_SETUID, which' --user nobody
  ulimit -l 64
  without ipc_lock -- 'limit of locked memory.*CAP_IPC_LOCK' "${XDP[@]}"
}

# With --mode auto, a missing capability is no reason to stop: the broker serves over tcp.
auto_without() {
  AS=(setpriv --bounding-set -net_raw)
  start_broker 0 --mode auto --iface eth0
  grep -q 'tcp only.*CAP_NET_RAW' "$T/broker-0.log" || fail "the log does not say why"
  publish tcp penstock
  stop_broker 0
}

# may_run_as_nobody: a copy of the broker that an ordinary user can run, and places for what it writes.
may_run_as_nobody() {
  chmod 755 "$WORK" "$T"
  install -m 755 "$BROKER" "$T/penstock-broker"
  BROKER=$T/penstock-broker
  install -d -o nobody -m 755 "$BUFFERS/b0"
  install -o nobody -m 644 /dev/null "$T/broker-0.json"
  AS=(setpriv --reuid nobody --regid "$(id -g nobody)" --clear-groups)
}

file_capabilities() {
  command -v setcap >/dev/null || skip "setcap is missing; install libcap2-bin"
  may_run_as_nobody
  refuses 'needs CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW' broker "${XDP[@]}" --buffer-dir "$BUFFERS/b0"
  setcap cap_bpf,cap_net_admin,cap_net_raw,cap_ipc_lock+ep "$BROKER" || skip "no file capabilities in $T"
  start_broker 0 "${XDP[@]}" --busy-poll 64
  expect_threads nobody "$NONE"
  publish xdp penstock
  publish tcp made-later
  refuses 'eth0 has another XDP program|another penstock-broker' broker "${XDP[@]}" --listen 0.0.0.0:1300 --buffer-dir "$BUFFERS/b0"
  kill -KILL "${brokers_running[0]}"
  wait "${brokers_running[0]}" || true
  expect "programs attached after kill -9" "$(attached)" 0
  # Three are enough where the limit of locked memory is.
  setcap cap_bpf,cap_net_admin,cap_net_raw+ep "$BROKER"
  start_broker 0 "${XDP[@]}"
  publish xdp penstock
  stop_broker 0
}

# As a service manager gives them to its user.
ambient_capabilities() {
  may_run_as_nobody
  local all=+bpf,+net_admin,+net_raw,+ipc_lock
  AS+=(--inh-caps "$all" --ambient-caps "$all")
  start_broker 0 "${XDP[@]}"
  expect_threads nobody "$NONE"
  publish xdp penstock
  stop_broker 0
}

run_test "xdp: no thread keeps a capability, and all goes on" all_is_given_up
run_test "tcp: no thread keeps a capability" tcp_too
run_test "kill -9 leaves no program attached" killed
run_test "forced buffers: the accept loop keeps CAP_NET_ADMIN" forced_buffers
run_test "--user: another user, its groups, its logs" another_user
run_test "a directory that is another's: said at once" directory_of_another
run_test "a capability that is missing is named" what_is_missing
run_test "--mode auto without a capability: over tcp" auto_without
run_test "file capabilities instead of root" file_capabilities
run_test "ambient capabilities instead of root" ambient_capabilities
finish
