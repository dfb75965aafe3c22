#!/usr/bin/env bash
# Shows, raises and restores the kernel's limits of socket buffers.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

STATE=/run/penstock-sysctl.saved
SETTINGS=(net.core.rmem_max net.core.wmem_max)

help() {
  cat <<TEXT
Shows, raises and restores the limits up to which SO_RCVBUF and SO_SNDBUF are granted.

Usage: scripts/tune_kernel_buffers.sh show
       scripts/tune_kernel_buffers.sh set [--size SIZE]     (default 64MiB)
       scripts/tune_kernel_buffers.sh restore

  set      raises ${SETTINGS[*]} for the whole host and keeps the
           values from before in $STATE; a second set keeps the first values.
  restore  puts those values back.

Each change is printed with the value before and after. Nothing survives a reboot.
'set' and 'restore' need root.

Examples:
  scripts/tune_kernel_buffers.sh show
  sudo scripts/tune_kernel_buffers.sh set --size 64MiB
  sudo scripts/tune_kernel_buffers.sh restore
TEXT
}

value_of() { cat "/proc/sys/${1//.//}"; }

show() {
  local setting
  for setting in "${SETTINGS[@]}" net.ipv4.tcp_rmem net.ipv4.tcp_wmem; do
    echo "$setting = $(value_of "$setting")"
  done
  if [ -e "$STATE" ]; then
    echo "changed by 'set'; values from before, in $STATE:"
    sed 's/^/  /' "$STATE"
  fi
}

# change SETTING VALUE: writes it and says what it was.
change() {
  local before
  before=$(value_of "$1")
  if [ "$before" = "$2" ]; then
    echo "$1: is $2 already"
    return
  fi
  echo "$2" >"/proc/sys/${1//.//}" || die "cannot set $1; in a container, set it on the host"
  echo "$1: $before -> $(value_of "$1")"
}

set_to() {
  local setting
  if [ ! -e "$STATE" ]; then
    for setting in "${SETTINGS[@]}"; do
      echo "$setting=$(value_of "$setting")"
    done >"$STATE.new"
    mv "$STATE.new" "$STATE"
  fi
  for setting in "${SETTINGS[@]}"; do
    change "$setting" "$1"
  done
}

restore() {
  [ -e "$STATE" ] || {
    echo "nothing to restore: 'set' has not changed anything"
    return
  }
  local setting value
  while IFS='=' read -r setting value; do
    change "$setting" "$value"
  done <"$STATE"
  rm "$STATE"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  -h | --help) help ;;
  show) show ;;
  set)
    size=64MiB
    while [ $# -gt 0 ]; do
      case $1 in
        --size) size=$(option_value "$@") ;;
        *) usage_error "unknown option '$1'" ;;
      esac
      shift 2
    done
    bytes=$(bytes_of "$size")
    # 2^30 is the largest buffer that the kernel doubles without overflow.
    [[ $bytes -ge 4096 && $bytes -le 1073741824 ]] || usage_error "--size: 4KiB to 1GiB"
    need_root "$command" "$command"
    set_to "$bytes"
    ;;
  restore)
    need_root "$command" "$command"
    restore
    ;;
  '') usage_error "say what to do: show, set or restore" ;;
  *) usage_error "unknown command '$command'; known: show, set, restore" ;;
esac
