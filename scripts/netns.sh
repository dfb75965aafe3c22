#!/usr/bin/env bash
# Namespaces for running Penstock by hand: one publisher and several brokers, each on its own veth pair.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

help() {
  cat <<'TEXT'
Creates, removes and shows network namespaces for running Penstock by hand.

Usage: scripts/netns.sh up [--brokers N] [--profile wire|offload] [--mtu BYTES] [--name NAME]
       scripts/netns.sh down [--name NAME]
       scripts/netns.sh status

  up      creates NAME-pub and NAME-b0 .. NAME-b<N-1> (NAME: penstock); broker I has 10.214.I.2,
          the publisher 10.214.I.1 on that link. Defaults: 4 brokers, profile wire, MTU 1500.
  down    stops all processes in these namespaces and removes them, and also those that a killed
          penstock-lab left behind, but not those of a running lab.
  status  shows all namespaces of Penstock with their addresses and processes.

Needs root. It changes nothing outside these namespaces.

Examples:
  sudo scripts/netns.sh up --brokers 1 --profile offload
  sudo ip netns exec penstock-b0 target/release/penstock-broker --topic penstock &
  sudo ip netns exec penstock-pub target/release/penstock-publisher \
      --brokers 10.214.0.2:1214 --total-size 1GiB
  sudo scripts/netns.sh down
TEXT
}

# Offloads that the wire profile switches off, so that each packet costs what it would on a wire.
WIRE=(tso off gso off gro off tx-udp-segmentation off)

namespaces() { ip netns list | awk '{ print $1 }'; }

# Namespaces whose name is NAME-pub, NAME-mid or NAME-b<number>.
namespaces_of() { namespaces | grep -E "^$1-(pub|mid|b[0-9]+)\$" || true; }

# Namespaces of labs that no longer run.
stale_namespaces() {
  local name pid
  for name in $(namespaces_of 'penstock-[0-9]+'); do
    pid=${name#penstock-}
    pid=${pid%%-*}
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = penstock-lab ] || echo "$name"
  done
}

# bring_up NAMESPACE DEVICE ADDRESS: configures one end of a link.
bring_up() {
  ip -n "$1" addr add "$3/24" dev "$2"
  [ "$profile" = offload ] || ip netns exec "$1" ethtool -K "$2" "${WIRE[@]}"
  ip -n "$1" link set dev "$2" mtu "$mtu" up
}

# The kernel drops packets that are sent before a new device is up.
wait_for_carrier() {
  for _ in {1..100}; do
    ip -n "$1" -o link show dev eth0 | grep -q 'state UP' && return 0
    sleep 0.05
  done
  die "eth0 in $1 has no carrier"
}

add() {
  ip netns add "$1"
  ip -n "$1" link set lo up
}

up() {
  [ -z "$(namespaces_of "$name")" ] || die "$name-* exist already; remove them first: $0 down --name $name"
  # shellcheck disable=SC2046 # names of ours hold no blanks
  trap 'say "failed; removing the namespaces created so far"; down_all $(namespaces_of "$name")' EXIT
  add "$name-pub"
  local i
  for ((i = 0; i < brokers; i++)); do
    add "$name-b$i"
    ip link add "b$i" netns "$name-pub" type veth peer name eth0 netns "$name-b$i"
    bring_up "$name-pub" "b$i" "10.214.$i.1"
    bring_up "$name-b$i" eth0 "10.214.$i.2"
  done
  for ((i = 0; i < brokers; i++)); do
    wait_for_carrier "$name-b$i"
  done
  trap - EXIT
  status
}

# Stops all processes in the given namespaces, then removes the namespaces.
down_all() {
  local namespace pids
  for namespace in "$@"; do
    pids=$(ip netns pids "$namespace")
    if [ -n "$pids" ]; then
      # shellcheck disable=SC2086 # a list of numbers
      kill $pids 2>/dev/null || true
      for _ in {1..50}; do
        [ -n "$(ip netns pids "$namespace")" ] || break
        sleep 0.1
      done
      # shellcheck disable=SC2046
      kill -KILL $(ip netns pids "$namespace") 2>/dev/null || true
    fi
    ip netns del "$namespace"
    say "removed $namespace"
  done
}

status() {
  local namespace pid
  for namespace in $(namespaces | grep '^penstock-' || true) $(namespaces_of "$name" | grep -v '^penstock-' || true); do
    echo "$namespace"
    ip -n "$namespace" -brief addr show | sed 's/^/  /'
    for pid in $(ip netns pids "$namespace"); do
      echo "  process $pid: $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null || true)"
    done
  done
}

command=${1:-}
case $command in
  up | down | status) shift ;;
  -h | --help)
    help
    exit 0
    ;;
  '') usage_error "a command is missing: up, down or status" ;;
  *) usage_error "unknown command '$command'; known: up, down, status" ;;
esac
name=penstock brokers=4 profile=wire mtu=1500
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      help
      exit 0
      ;;
    --brokers) brokers=$(option_value "$@") ;;
    --profile) profile=$(option_value "$@") ;;
    --mtu) mtu=$(option_value "$@") ;;
    --name) name=$(option_value "$@") ;;
    *) usage_error "unknown option '$1'" ;;
  esac
  shift 2
done
[[ $brokers =~ ^[0-9]+$ && $brokers -ge 1 && $brokers -le 200 ]] || usage_error "--brokers: 1 to 200"
[[ $profile =~ ^(wire|offload)$ ]] || usage_error "--profile: wire or offload"
[[ $mtu =~ ^[0-9]+$ && $mtu -ge 576 && $mtu -le 65535 ]] || usage_error "--mtu: 576 to 65535"
[[ $name =~ ^[a-z][a-z0-9]{0,30}$ ]] || usage_error "--name: a lower-case letter, then lower-case letters and digits"
command -v ip >/dev/null || die "ip is missing; install it: apt-get install iproute2"
command -v ethtool >/dev/null || die "ethtool is missing; install it: apt-get install ethtool"
need_root "$command" "$command"

case $command in
  up) up ;;
  down)
    # shellcheck disable=SC2046 # names of ours hold no blanks
    down_all $(namespaces_of "$name") $(stale_namespaces)
    ;;
  status) status ;;
esac
