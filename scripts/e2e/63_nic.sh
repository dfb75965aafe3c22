#!/usr/bin/env bash
# Settings of the interface: the broker prints or applies them, and reverts them however it ends. Links that change.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
XDP=(--mode xdp --iface eth1)
# One receive queue for each transmit queue of the other end is the least that veth takes.
MANY=10.215.0.2:1214
inside() { ip netns exec "$NET-b0" "$@"; }

# link_up [QUEUES]: a second link with several queues at the broker's end, all of which the other end
# sends on if QUEUES is 4.
link_up() {
  ip link add eth1 netns "$NET-b0" numrxqueues 4 numtxqueues 4 type veth \
    peer name m0 netns "$NET-pub" numrxqueues "${1:-1}" numtxqueues "${1:-1}"
  ip -n "$NET-b0" addr add 10.215.0.2/24 dev eth1
  ip -n "$NET-pub" addr add 10.215.0.1/24 dev m0
  ip netns exec "$NET-pub" ethtool -K m0 tso off gso off gro off tx-udp-segmentation off
  ip -n "$NET-b0" link set eth1 up
  ip -n "$NET-pub" link set m0 up
  has_carrier
}

link_down() {
  local name
  for name in br1 uplink7 tun1 eth1; do
    ip -n "$NET-b0" link del "$name" 2>/dev/null || true
  done
}

queues() { inside sh -c 'ls -d /sys/class/net/eth1/queues/rx-*' | wc -l; }
deferred() { inside cat /sys/class/net/eth1/napi_defer_hard_irqs /sys/class/net/eth1/gro_flush_timeout | xargs; }
keeper() { pgrep -P "${brokers_running[0]}" -f -- '--restore-nic eth1' || true; }
said() { grep -Eq -- "$1" "$T/broker-0.log" || fail "the log says nothing like '$1'"; }
quiet_about() { ! grep -v -- --auth-keys "$T/broker-0.log" | grep -E -- "$1" || fail "the log need not say this"; }
notes() { ls "/run/penstock/nic-$(stat -Lc %i "/run/netns/$NET-b0")-eth1.json" 2>/dev/null || true; }

# eventually WHAT WANTED COMMAND...: its output becomes so.
eventually() {
  local what=$1 wanted=$2
  shift 2
  for _ in {1..200}; do
    [ "$("$@")" != "$wanted" ] || return 0
    sleep 0.1
  done
  fail "$what is '$("$@")', wanted '$wanted'"
}

end_broker() {
  kill "-$1" "${brokers_running[0]}"
  wait "${brokers_running[0]}" || true
  unset "brokers_running[0]"
}

# publish PATH [OPTIONS]
publish() {
  publisher --brokers "$MANY" --mode auto --total-size 8MiB --format json "${@:2}" >"$T/sent.json"
  expect acked "$(jq .messages_acked "$T/sent.json")" 8192
  expect path "$(jq -r '[.brokers[].streams[].path] | unique | join(" ")' "$T/sent.json")" "$1"
}

nothing_to_say() {
  link_up
  start_broker 0 "${XDP[@]}" --configure-nic
  publish xdp
  expect "helper process that reverts changes" "$(keeper)" ""
  stop_broker 0
  quiet_about 'WARN|ethtool|revert'
}

interrupts_are_deferred() {
  link_up
  for signal in TERM INT KILL; do
    start_broker 0 "${XDP[@]}" --busy-poll 64
    expect "deferred interrupts" "$(deferred)" "2 200000"
    publish xdp
    end_broker "$signal"
    eventually "what is left after SIG$signal" "0 0" deferred
    eventually "file after SIG$signal" "" notes
  done
  # A broker that starts at once finds the settings reverted, and applies them again.
  start_broker 0 "${XDP[@]}" --busy-poll 64
  end_broker KILL
  start_broker 0 "${XDP[@]}" --busy-poll 64
  expect "deferred interrupts" "$(deferred)" "2 200000"
  stop_broker 0
  expect "after the second" "$(deferred)" "0 0"
}

somebody_chose() {
  link_up
  inside sh -c 'echo 7 > /sys/class/net/eth1/napi_defer_hard_irqs; echo 30000 > /sys/class/net/eth1/gro_flush_timeout'
  start_broker 0 "${XDP[@]}" --busy-poll 64
  expect "deferred interrupts" "$(deferred)" "7 30000"
  stop_broker 0
  expect "afterwards" "$(deferred)" "7 30000"
}

# The process that takes changes back can do nothing else, and outlives what ends the broker.
keeper_is_humble() {
  link_up
  AS=(setsid)
  start_broker 0 "${XDP[@]}" --busy-poll 64
  local keeper status
  keeper=$(keeper)
  [ -n "$keeper" ] || fail "nobody watches"
  status=/proc/$keeper/status
  eventually "its capabilities" 0000000000001000 sh -c "awk '/^CapPrm/ { print \$2 }' $status"
  expect "effective ones" "$(awk '/^CapEff/ { print $2 }' "$status")" 0000000000001000
  expect "no_new_privs" "$(awk '/^NoNewPrivs/ { print $2 }' "$status")" 1
  for set in CapEff CapPrm; do
    expect "$set of the broker" "$(awk -v n="$set:" '$1 == n { print $2 }' "/proc/${brokers_running[0]}/status")" 0000000000000000
  done
  kill -TERM "$keeper"
  kill -HUP "$keeper"
  # Ctrl-C goes to the whole group.
  kill -INT -- "-${brokers_running[0]}"
  wait "${brokers_running[0]}" || fail "the broker failed"
  unset "brokers_running[0]"
  expect "deferred interrupts" "$(deferred)" "0 0"
}

both_killed() {
  link_up
  for way in restart by-hand; do
    start_broker 0 "${XDP[@]}" --busy-poll 64
    refuses 'a broker is using eth1' broker --restore-nic eth1
    expect "deferred interrupts" "$(deferred)" "2 200000"
    kill -KILL "$(keeper)"
    # Without it, the broker can only say so.
    [ "$way" = restart ] || end_broker TERM
    [ "$way" = by-hand ] || end_broker KILL
    [ "$way" = restart ] || said 'ended with signal: 9.*; run penstock-broker --restore-nic eth1'
    expect "what is left" "$(deferred)" "2 200000"
    [ -n "$(notes)" ] || fail "nothing tells how to undo it"
    if [ "$way" = restart ]; then
      start_broker 0 "${XDP[@]}"
      said 'reverting the changes of an earlier broker'
      expect "deferred interrupts" "$(deferred)" "0 0"
      stop_broker 0
    else
      broker --restore-nic eth1
      expect "deferred interrupts" "$(deferred)" "0 0"
      broker --restore-nic eth1 2>&1 | grep 'nothing to revert'
    fi
    expect "file" "$(notes)" ""
  done
}

# The interface is another one by now, and has what its owner gave it.
another_interface() {
  link_up
  start_broker 0 "${XDP[@]}" --busy-poll 64
  kill -KILL "$(keeper)"
  end_broker KILL
  link_down
  link_up
  inside sh -c 'echo 5 > /sys/class/net/eth1/napi_defer_hard_irqs'
  broker --restore-nic eth1
  expect "settings of another interface" "$(deferred)" "5 0"
  expect "file" "$(notes)" ""
}

told_only() {
  link_up
  start_broker 0 "${XDP[@]}" --queues 0,1
  said 'WARN .*other queues than 0, 1.*run: ethtool -L eth1 rx 2'
  said 'configure-nic makes these changes'
  expect queues "$(queues)" 4
  stop_broker 0
  expect queues "$(queues)" 4
  start_broker 0 "${XDP[@]}" --queues 2
  said 'driver \(veth\) steers nothing; leave --queues out'
  stop_broker 0
}

configured() {
  link_up
  for signal in TERM KILL; do
    start_broker 0 "${XDP[@]}" --queues 0,1 --workers 2 --configure-nic
    said 'ethtool -L eth1 rx 2; reverted at the end'
    expect queues "$(queues)" 2
    publish xdp
    end_broker "$signal"
    eventually "queues after SIG$signal" 4 queues
  done
}

queues_are_made() {
  link_up
  eventually "channels" 0 sh -c "ip netns exec $NET-b0 ethtool -L eth1 rx 2 2>/dev/null; echo \$?"
  refuses 'no receive queue 3 yet; run ethtool -L eth1 rx 4, or use --configure-nic' \
    broker "${XDP[@]}" --queues 0-3 --buffer-dir "$BUFFERS/b0"
  expect queues "$(queues)" 2
  start_broker 0 "${XDP[@]}" --queues 0-3 --configure-nic
  expect queues "$(queues)" 4
  publish xdp
  stop_broker 0
  expect queues "$(queues)" 2
  start_broker 0 "${XDP[@]}" --workers 2 --configure-nic
  expect queues "$(queues)" 2
  stop_broker 0
  refuses 'no receive queue 4: it has 2, numbered from 0, and can have 4' \
    broker "${XDP[@]}" --queues 4 --configure-nic --buffer-dir "$BUFFERS/b0"
}

# Somebody changes the interface while the broker serves all of its queues.
queues_are_added() {
  link_up
  inside ethtool -L eth1 rx 2
  start_broker 0 "${XDP[@]}"
  inside ethtool -L eth1 rx 4
  eventually "told" 1 sh -c "grep -c 'eth1 now has 4 receive queues, but only 2 have a socket' '$T/broker-0.log'"
  publish xdp
  stop_broker 0
}

# The broker also reverts what it changed before a failure.
failure_in_between() {
  link_up 4
  refuses 'as many receive queues as its other end has transmit queues' \
    broker "${XDP[@]}" --queues 0 --configure-nic --buffer-dir "$BUFFERS/b0"
  grep -q 'reverted: ethtool -L eth1 rx 4' "$T/refused" || fail "the broker does not say so"
  expect queues "$(queues)" 4
  expect "file" "$(notes)" ""
}

not_permitted() {
  link_up
  chmod 755 "$WORK" "$T"
  install -d -o nobody -m 755 "$BUFFERS/b0"
  install -o nobody -m 644 /dev/null "$T/broker-0.json"
  install -m 755 "$BROKER" "$T/penstock-broker"
  BROKER=$T/penstock-broker
  local all=+bpf,+net_admin,+net_raw,+ipc_lock
  AS=(setpriv --reuid nobody --regid "$(id -g nobody)" --clear-groups --inh-caps "$all" --ambient-caps "$all")
  start_broker 0 "${XDP[@]}" --busy-poll 64
  said 'as root: echo 2 > /sys/class/net/eth1/napi_defer_hard_irqs; echo 200000 > /sys/class/net/eth1/gro_flush_timeout'
  publish xdp
  stop_broker 0
  refuses 'configure-nic: cannot configure eth1.*/run/penstock.*[Pp]ermission denied' \
    broker "${XDP[@]}" --queues 0 --configure-nic --buffer-dir "$BUFFERS/b0"
}

checks() {
  link_up
  ip -n "$NET-b0" link set eth1 down
  refuses 'eth1 is down; ip link set dev eth1 up' broker "${XDP[@]}" --buffer-dir "$BUFFERS/b0"
  refuses 'no interface eth9 here' broker --mode xdp --iface eth9 --buffer-dir "$BUFFERS/b0"
  refuses 'no interface eth9 here' broker --mode xdp --iface eth9 --configure-nic --buffer-dir "$BUFFERS/b0"
  refuses 'driver has no native XDP: use --xdp-mode generic' \
    broker --mode xdp --iface lo --xdp-mode native --buffer-dir "$BUFFERS/b0"
  # The other end is off.
  ip -n "$NET-b0" link set eth1 up
  ip -n "$NET-pub" link set m0 down
  eventually "link" 1 sh -c "ip -n $NET-b0 -o link show dev eth1 | grep -c NO-CARRIER"
  start_broker 0 "${XDP[@]}"
  said 'eth1: no carrier'
  ip -n "$NET-pub" link set m0 up
  eventually "told" 1 sh -c "grep -c 'eth1 is up' '$T/broker-0.log'"
  quiet_about 'eth1 has no carrier'
  publish xdp
  stop_broker 0
}

# The broker reads and changes its own namespace's interface, although /sys belongs to another one.
sys_of_another_namespace() {
  link_up
  nsenter --net="/run/netns/$NET-b0" "$BROKER" "${XDP[@]}" --busy-poll 64 --create-topics any \
    --buffer-dir "$BUFFERS/b0" \
    >"$T/broker-0.log" 2>&1 &
  brokers_running[0]=$!
  eventually "ready" 1 sh -c "grep -c '^penstock-broker ready' '$T/broker-0.log'"
  expect "deferred interrupts" "$(deferred)" "2 200000"
  publish xdp
  kill "${brokers_running[0]}"
  wait "${brokers_running[0]}" || fail "the broker failed"
  unset "brokers_running[0]"
  expect "afterwards" "$(deferred)" "0 0"
}

# The broker reverts a change on the interface that it changed, even if that was renamed.
renamed() {
  link_up
  ip -n "$NET-b0" link property add dev eth1 altname payload-network-of-rack-12
  start_broker 0 --mode xdp --iface payload-network-of-rack-12 --busy-poll 64
  publish xdp
  ip -n "$NET-b0" link set eth1 name uplink7
  eventually "told" 1 sh -c "grep -c 'eth1 was renamed to uplink7' '$T/broker-0.log'"
  publish xdp --topic later
  stop_broker 0
  expect "deferred interrupts" "$(inside cat /sys/class/net/uplink7/napi_defer_hard_irqs)" 0
  ip -n "$NET-b0" link del uplink7
}

# A virtual address with a label appears and disappears, and an address of the loopback interface.
addresses_change() {
  link_up
  start_broker 0 "${XDP[@]}" --listen '[::]:1214'
  publish xdp
  local to
  ip -n "$NET-b0" addr add 10.215.0.9/24 dev eth1 label eth1:1
  ip -n "$NET-b0" addr add fd15::9/64 dev eth1 nodad
  ip -n "$NET-b0" addr add 10.216.0.1/32 dev lo
  ip -n "$NET-pub" addr add fd15::1/64 dev m0 nodad
  ip -n "$NET-pub" route add 10.216.0.1/32 via 10.215.0.2
  eventually "told" 1 sh -c "grep -c 'added=.*10.216.0.1' '$T/broker-0.log'"
  for to in 10.215.0.9:1214 '[fd15::9]:1214' 10.216.0.1:1214; do
    MANY=$to publish xdp
  done
  ip -n "$NET-b0" addr del 10.215.0.9/24 dev eth1
  eventually "told" 1 sh -c "grep -c 'removed=.*10.215.0.9' '$T/broker-0.log'"
  publish xdp
  stop_broker 0
  expect "packets to other addresses" "$(jq .xdp.outcomes.other_address "$T/broker-0.json")" 0
}

# Interfaces with ports run in generic mode; ports and interfaces without Ethernet are refused, by
# doctor too.
devices() {
  link_up
  ip -n "$NET-b0" addr flush dev eth1
  ip -n "$NET-b0" link add br1 type bridge
  ip -n "$NET-b0" link set eth1 master br1
  ip -n "$NET-b0" addr add 10.215.0.2/24 dev br1
  ip -n "$NET-b0" link set br1 up
  refuses 'eth1 is a port of br1.*use --iface br1' broker "${XDP[@]}" --buffer-dir "$BUFFERS/b0"
  refuses 'br1 runs the program in generic mode only' \
    broker --mode xdp --iface br1 --xdp-mode native --buffer-dir "$BUFFERS/b0"
  refuses 'eth1 is a port of br1' inside "$BIN/penstock-lab" doctor --iface eth1
  start_broker 0 --mode xdp --iface br1
  said 'br1 runs the program in generic mode'
  publish xdp
  stop_broker 0
  [ -c /dev/net/tun ] || { mkdir -p /dev/net && mknod /dev/net/tun c 10 200; }
  ip -n "$NET-b0" tuntap add mode tun tun1
  ip -n "$NET-b0" link set tun1 up
  refuses 'tun1 carries no Ethernet frames' broker --mode xdp --iface tun1 --buffer-dir "$BUFFERS/b0"
  refuses 'tun1 carries no Ethernet frames' inside "$BIN/penstock-lab" doctor --iface tun1
  ip -n "$NET-b0" link del tun1
  ip -n "$NET-b0" link del br1
}

large_datagrams() {
  expect "datagrams of more than 50,000 bytes" \
    "$(jq '.brokers[0].streams[0].transport.datagram > 50000' "$T/sent.json")" true
}

# 18 frames of a page take every packet that the interface does.
large_packets() {
  link_up
  ip -n "$NET-b0" link set eth1 mtu 60000
  ip -n "$NET-pub" link set m0 mtu 60000
  start_broker 0 "${XDP[@]}" --xdp-mode native
  publish xdp
  large_datagrams
  stop_broker 0
  start_broker 0 "${XDP[@]}" --xdp-mode generic
  publish xdp
  large_datagrams
  stop_broker 0
}

# start_numbered: numbered lines, so that what is lost or doubled shows, on their way
# for some seconds; sets $sending.
start_numbered() {
  seq 300000 >"$T/input"
  publisher --mode auto --brokers "$MANY" --input "$T/input" --rate 500kB --batch-size 2KiB \
    --format json >"$T/sent.json" 2>"$T/said" &
  sending=$!
  eventually "streams" 1 sh -c "grep -c 'path=\"xdp\"' '$T/broker-0.log'"
}

all_arrived() {
  wait "$sending" || fail "the publisher did not go on: $(tail -n 2 "$T/said")"
  expect acked "$(jq .messages_acked "$T/sent.json")" 300000
  stop_broker 0
  subscriber --path "$BUFFERS/b0/penstock.log" --from start --verify --output lines >"$T/back"
  cmp "$T/input" "$T/back" || fail "lines are lost, doubled or out of order"
}

link_blinks() {
  link_up
  start_broker 0 "${XDP[@]}" --busy-poll 64
  start_numbered
  ip -n "$NET-b0" link set eth1 down
  eventually "told" 1 sh -c "grep -c 'eth1 is down' '$T/broker-0.log'"
  ip -n "$NET-b0" link set eth1 up
  eventually "told" 1 sh -c "grep -c 'eth1 is up' '$T/broker-0.log'"
  all_arrived
  # Another stream takes the path again.
  start_broker 0 "${XDP[@]}"
  publish xdp --topic later
  stop_broker 0
}

interface_goes() {
  link_up
  for polling in adaptive busy; do
    rm -rf "$BUFFERS/b0"
    start_broker 0 "${XDP[@]}" --poll "$polling" --workers 2
    start_numbered
    link_down
    eventually "told" 1 sh -c "grep -c 'eth1 is gone: the broker serves over tcp only' '$T/broker-0.log'"
    eventually "threads of the path" 0 sh -c "grep -l '^xdp-' /proc/${brokers_running[0]}/task/*/comm | wc -l"
    # The address comes back, on another interface of the same name.
    link_up
    publish tcp --topic other
    all_arrived
    said 'stream refused: this broker takes payload over tcp only'
    expect "exit" "$(jq -r .xdp.interface "$T/broker-0.json")" eth1
    link_down
    link_up
  done
}

# Every test makes its own link.
on_a_link() { run_test "$1" "$2"; link_down; }

on_a_link "nothing is said or done when all is well" nothing_to_say
on_a_link "busy polling: deferred interrupts are set, and taken back after TERM, INT and KILL" interrupts_are_deferred
on_a_link "busy polling: values that somebody chose stay" somebody_chose
on_a_link "the process that takes changes back keeps CAP_NET_ADMIN only, and outlives signals" keeper_is_humble
on_a_link "broker and watcher killed: the next broker, or --restore-nic, takes changes back" both_killed
on_a_link "another interface of the same name is left alone" another_interface
on_a_link "without --configure-nic the commands are told" told_only
on_a_link "--configure-nic: fewer queues, and back after TERM and KILL" configured
on_a_link "queues that do not exist: refused, or made" queues_are_made
on_a_link "queues that are added while the broker runs are reported" queues_are_added
on_a_link "a failure in between: what was changed is taken back" failure_in_between
on_a_link "without permission: the commands are told" not_permitted
on_a_link "interfaces that are down, missing, without native XDP" checks
on_a_link "/sys of another namespace: the broker uses its own namespace's interface" sys_of_another_namespace
on_a_link "an alternative name, and a new name while the broker runs" renamed
on_a_link "addresses that come and go while the broker runs" addresses_change
on_a_link "bridges, their ports, and interfaces without Ethernet" devices
on_a_link "an MTU above what buffers take: smaller datagrams" large_packets
on_a_link "a link that goes down and up: told, nothing lost or doubled" link_blinks
on_a_link "an interface that is deleted: told, on over tcp, nothing lost or doubled" interface_goes
finish
