#!/usr/bin/env bash
# Shows, raises and restores the kernel's limits on socket buffers.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

STATE=/run/penstock-sysctl.saved
PERSISTENT=/etc/sysctl.d/60-penstock.conf
# Limits of SO_RCVBUF and SO_SNDBUF, and of autotuning where these are not set.
SETTINGS=(net.core.rmem_max net.core.wmem_max net.ipv4.tcp_rmem net.ipv4.tcp_wmem)

help() {
  cat <<TEXT
Shows, raises and restores the kernel's limits on socket buffers: the largest SO_RCVBUF and SO_SNDBUF
(net.core.rmem_max, wmem_max), and the limit of autotuning for buffers that are not set (the third value
of net.ipv4.tcp_rmem, tcp_wmem).

Usage: scripts/tune_kernel_buffers.sh [plan] [--size SIZE]
       scripts/tune_kernel_buffers.sh show
       scripts/tune_kernel_buffers.sh set [--size SIZE] [--persist]
       scripts/tune_kernel_buffers.sh restore

  plan     shows what 'set' would do, and changes nothing; the default command.
  show     shows the current values, and the original values that 'set' saved.
  set      raises limits below SIZE (default 64MiB) for the whole host, and saves the original values
           in $STATE; a second 'set' keeps the saved values.
           With --persist, also writes the new values to $PERSISTENT, which the
           next boot reads.
  restore  restores the original values and removes $PERSISTENT.

It prints each change with the value before and after. Without --persist no change survives a reboot.
'set' and 'restore' need root.

Examples:
  scripts/tune_kernel_buffers.sh
  sudo scripts/tune_kernel_buffers.sh set --size 64MiB
  sudo scripts/tune_kernel_buffers.sh restore
TEXT
}

# Tabs separate the three values of tcp_rmem and tcp_wmem.
value_of() { tr '\t' ' ' <"/proc/sys/${1//.//}"; }

show() {
  local setting
  for setting in "${SETTINGS[@]}"; do
    echo "$setting = $(value_of "$setting")"
  done
  if [ -e "$STATE" ]; then
    echo "changed by 'set'; values from before, in $STATE:"
    sed 's/^/  /' "$STATE"
  fi
  [ ! -e "$PERSISTENT" ] || echo "set at each boot by $PERSISTENT"
}

# before SETTING: its value before any 'set'.
before() {
  local kept=''
  [ ! -e "$STATE" ] || kept=$(sed -n "s/^$1=//p" "$STATE")
  if [ -n "$kept" ]; then echo "$kept"; else value_of "$1"; fi
}

# wanted SETTING BYTES: its value with the limit raised to BYTES, or unchanged if it is higher.
wanted() {
  local least initial most
  read -r least initial most <<<"$(before "$1")"
  case $1 in
    net.core.*) echo $((least > $2 ? least : $2)) ;;
    *) echo "$least $initial $((most > $2 ? most : $2))" ;;
  esac
}

plan() {
  local setting now new changes=0
  for setting in "${SETTINGS[@]}"; do
    now=$(value_of "$setting") new=$(wanted "$setting" "$1")
    if [ "$now" = "$new" ]; then
      echo "$setting: stays $now"
    else
      echo "$setting: $now -> $new"
      changes=$((changes + 1))
    fi
  done
  if [ "$changes" -gt 0 ]; then
    echo "nothing was changed; to apply this: sudo $0 set --size $2"
  else
    echo "nothing to do"
  fi
}

# change SETTING VALUE: writes the value and prints the previous one.
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
    change "$setting" "$(wanted "$setting" "$1")"
  done
  [ "$persist" -eq 0 ] || keep
}

# Saves the current values for the next boot.
keep() {
  local setting
  {
    echo "# Created by Penstock's tune_kernel_buffers.sh; 'restore' removes it."
    sed 's/^/# before: /' "$STATE"
    for setting in "${SETTINGS[@]}"; do
      echo "$setting = $(value_of "$setting")"
    done
  } >"$PERSISTENT.new"
  chmod 644 "$PERSISTENT.new"
  mv "$PERSISTENT.new" "$PERSISTENT"
  echo "wrote $PERSISTENT"
}

restore() {
  local setting value kept=''
  if [ -e "$STATE" ]; then
    kept=$(cat "$STATE")
  elif [ -e "$PERSISTENT" ]; then
    kept=$(sed -n 's/^# before: //p' "$PERSISTENT")
  fi
  [ -n "$kept" ] || {
    echo "nothing to restore: 'set' has not changed anything"
    return
  }
  while IFS='=' read -r setting value; do
    change "$setting" "$value"
  done <<<"$kept"
  [ ! -e "$PERSISTENT" ] || echo "removes $PERSISTENT"
  rm -f "$STATE" "$PERSISTENT"
}

command=${1:-plan}
case $command in
  -h | --help)
    help
    exit 0
    ;;
  --*) command=plan ;;
  *) [ $# -eq 0 ] || shift ;;
esac
case $command in
  plan | set)
    size=64MiB persist=0
    while [ $# -gt 0 ]; do
      case $1 in
        --size)
          size=$(option_value "$@")
          shift 2
          ;;
        --persist)
          [ "$command" = set ] || usage_error "--persist works only with set"
          persist=1
          shift
          ;;
        *) usage_error "unknown option '$1'" ;;
      esac
    done
    bytes=$(bytes_of "$size")
    # 2^30 is the largest buffer that the kernel doubles without overflow.
    [[ $bytes -ge 4096 && $bytes -le 1073741824 ]] || usage_error "--size: 4KiB to 1GiB"
    if [ "$command" = plan ]; then
      plan "$bytes" "$size"
    else
      need_root "$command" "$command"
      set_to "$bytes"
    fi
    ;;
  show | restore)
    [ $# -eq 0 ] || usage_error "unknown option '$1'"
    [ "$command" = show ] || need_root "$command" "$command"
    "$command"
    ;;
  *) usage_error "unknown command '$command'; known: plan, show, set, restore" ;;
esac
