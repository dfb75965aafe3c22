#!/usr/bin/env bash
# Who may read the logs, and who may register: by mode and group of the files, as users that have neither.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
getent passwd nobody >/dev/null || die "there is no user nobody here"
# A group that nobody is in; brokers that are to use it get it.
GROUP=$(getent group | awk -F: '$1 == "games" || $1 == "daemon" {print $1; exit}')
GID=$(getent group "$GROUP" | cut -d: -f3)
LOG=$BUFFERS/b0/penstock.log

# as GID COMMAND...: as nobody with that one group.
as() {
  local gid=$1
  shift
  limited setpriv --reuid nobody --regid "$gid" --clear-groups "$@"
}
read_as() {
  local gid=$1
  shift
  as "$gid" "$T/penstock-subscriber" --path "$LOG" --from start --stat --format json --output none "$@"
}

# served [broker's options]: a log with something in it, and a copy of the program where nobody may run it.
served() {
  chmod 755 "$WORK" "$T"
  install -m 755 "$BIN/penstock-subscriber" "$T/penstock-subscriber"
  start_broker 0 --topic penstock "$@"
  chmod 755 "$BUFFERS"
  publisher --brokers "$(at 0)" --total-size 1MiB >"$T/sent"
}

reads() {
  read_as "$@" >"$T/read.json"
  expect "messages read" "$(jq .messages "$T/read.json")" 1024
}

modes() { expect "modes" "$(stat -c %a:%G "$LOG" "${LOG%.log}.readers" | paste -sd ' ')" "$1"; }

by_default() {
  served
  modes "640:root 660:root"
  refuses "may not read it; the broker's --buffer-mode and --buffer-group" read_as 65534
  stop_broker 0
}

by_group() {
  AS=(setpriv --groups "$GID")
  served --buffer-group "$GROUP"
  modes "640:$GROUP 660:$GROUP"
  reads "$GID"
  reads "$GID" --register
  refuses 'Permission denied' as "$GID" sh -c ": >>$LOG"
  refuses 'may not read it' read_as 65534
  stop_broker 0
}

by_anybody() {
  AS=(setpriv --groups "$GID")
  served --buffer-mode 644 --buffer-group "$GROUP"
  modes "644:$GROUP 660:$GROUP"
  reads 65534
  refuses 'may not register in it' read_as 65534 --register
  refuses 'Permission denied' as 65534 sh -c ": >>$LOG"
  stop_broker 0
}

# The files stay; the next broker's settings hold for them.
changed() {
  served --buffer-mode 644
  reads 65534
  stop_broker 0
  start_broker 0 --topic penstock --buffer-mode 600
  modes "600:root 600:root"
  refuses 'may not read it' read_as 65534
  stop_broker 0
}

not_the_brokers() {
  install -d -m 755 "$BUFFERS"
  install -d -o nobody "$BUFFERS/b0"
  refuses 'must be in that group' broker --user nobody --buffer-dir "$BUFFERS/b0" --topic penstock --buffer-group "$GROUP"
}

run_test "default: the broker's group reads, others are told why they may not" by_default
run_test "--buffer-group: its members read and register, and cannot write" by_group
run_test "--buffer-mode 644: anybody reads, the group alone registers" by_anybody
run_test "a log of an earlier broker gets the mode of this one" changed
run_test "a group that the broker's user is not in is refused" not_the_brokers
finish
