#!/usr/bin/env bash
# Addresses and names of brokers: names with several addresses, IPv6 with an interface, ways to write
# them.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
inside() { ip netns exec "$NET-b0" "$@"; }

# The names are valid in the publisher's namespace.
mkdir -p "/etc/netns/$NET-pub"
trap 'rm -rf "/etc/netns/$NET-pub"; cleanup' EXIT
cat >"/etc/netns/$NET-pub/hosts" <<HOSTS
fd99::9 swallowing
10.214.0.2 swallowing
10.214.0.2 both
10.214.0.3 both
HOSTS
# The first address of this name belongs to a neighbour that never answers.
ip -n "$NET-pub" addr add fd99::1/64 dev b0 nodad
ip -n "$NET-pub" neigh add fd99::9 lladdr 02:00:00:00:00:99 dev b0
# A second address of the broker's host, for a second broker.
ip -n "$NET-b0" addr add 10.214.0.3/24 dev eth0

# goes_to BROKERS PATH [OPTIONS]: everything is acknowledged over that path.
goes_to() {
  LIMIT=20 publisher --brokers "$1" --mode "$2" --synthetic --total-size 1MiB --timeout 600 \
    --format json "${@:3}" >"$T/sent.json"
  expect "acked of $1" "$(jq .messages_acked "$T/sent.json")" 1024
  expect "path of $1" "$(jq -r '[.brokers[].streams[].path] | unique | join(" ")' "$T/sent.json")" "$2"
}

# Trying one address after the other would take ten minutes.
swallowed() {
  start_broker 0 --mode xdp --iface eth0
  goes_to swallowing:1214 tcp
  goes_to swallowing:1214 xdp
  stop_broker 0
}

# All streams of a session reach the broker that knows it.
two_brokers() {
  start_broker 0 --listen 10.214.0.2:1214
  ip netns exec "$NET-b0" "$BROKER" --listen 10.214.0.3:1214 --create-topics any \
    --buffer-dir "$BUFFERS/second" \
    >"$T/second.log" 2>&1 &
  brokers_running[1]=$!
  for _ in {1..200}; do
    ! grep -q '^penstock-broker ready' "$T/second.log" || break
    sleep 0.05
  done
  # The name service decides which of them is first.
  goes_to both:1214 tcp --threads-per-broker 8
  stop_broker 0
}

link_local() {
  local address index
  # Nobody can bind to it before the kernel has looked for another host that has it (RFC 4862, 5.4).
  for _ in {1..100}; do
    ip -n "$NET-b0" -6 -o addr show dev eth0 tentative | grep -q . || break
    sleep 0.05
  done
  address=$(ip -n "$NET-b0" -6 -o addr show dev eth0 scope link | awk '{ sub("/.*", "", $4); print $4 }')
  index=$(ip -n "$NET-pub" -o link show b0 | cut -d: -f1)
  start_broker 0 --mode xdp --iface eth0 --listen "[$address%eth0]:1214"
  for way in tcp xdp; do
    goes_to "[$address%b0]:1214" "$way"
    goes_to "[$address%$index]:1214" "$way"
  done
  goes_to "[$address%b0]:1214" xdp --tx af_xdp
  refuses 'is a link-local address and needs an interface' \
    publisher --brokers "[$address]:1214" --synthetic
  stop_broker 0
}

ways_to_listen() {
  local listen
  for listen in :1214 '*:1214' '[::]:1214' '[::ffff:10.214.0.2]:1214'; do
    start_broker 0 --mode xdp --iface eth0 --listen "$listen"
    goes_to 10.214.0.2:1214 xdp
    goes_to '[::ffff:10.214.0.2]:1214' xdp
    stop_broker 0
  done
  refuses 'listen 127.0.0.1 accepts publishers on this host only.*use --mode tcp' \
    inside "$BROKER" --mode xdp --iface eth0 --listen localhost:1214 --buffer-dir "$BUFFERS/b0"
}

# The XDP program is on no interface unless --iface gives one.
auto_without_an_interface() {
  start_broker 0 --mode auto
  grep -q 'WARN.*serving over tcp only.*--iface eth0' "$T/broker-0.log" || fail "no warning"
  stop_broker 0
}

run_test "a name whose first address drops packets" swallowed
run_test "a name of two brokers: one session, one broker" two_brokers
run_test "IPv6 link-local addresses, by interface's name and number" link_local
run_test "ways to write where to listen" ways_to_listen
run_test "--mode auto without --iface: a warning that names interfaces" auto_without_an_interface
finish
