#!/usr/bin/env bash
# Other users of the host: what they make beforehand in places that everybody can write to, what they do to
# files that they may read or register in. Nothing of root's is touched, and no broker ends or is kept out.
set -euo pipefail
# shellcheck source=scripts/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

testbed 1
STRANGER=54321
MEMBER=54322
GROUP=54323
LOG=$BUFFERS/b0/penstock.log
SMALL=(--ring-size 1MiB --segment-size 64KiB --topic penstock)

# as UID GID COMMAND...
as() {
  local uid=$1 gid=$2
  shift 2
  setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"
}

# precious NAME MODE: a file of root that must not change, with a copy to compare it with.
precious() {
  head -c 9000 /dev/urandom >"$BUFFERS/$1"
  chmod "$2" "$BUFFERS/$1"
  cp -p "$BUFFERS/$1" "$T/$1.copy"
}

untouched() {
  local name
  for name in "$@"; do
    cmp "$BUFFERS/$name" "$T/$name.copy" || fail "$name was changed"
    expect "mode of $name" "$(stat -c %a "$BUFFERS/$name")" "$(stat -c %a "$T/$name.copy")"
  done
}

# A place such as /dev/shm, where a stranger was first.
public_place() {
  chmod 755 "$WORK" "$T"
  install -d -m 1777 "$BUFFERS"
  precious public 644
  precious private 600
}

made_by_another() {
  public_place
  as "$STRANGER" "$STRANGER" bash -c "mkdir $BUFFERS/b0 && chmod 777 $BUFFERS/b0 &&
    ln -s $BUFFERS/public $BUFFERS/b0/penstock.new && ln -s $BUFFERS/private $BUFFERS/b0/penstock.readers &&
    ln -s $BUFFERS/private $BUFFERS/b0/penstock.lock && ln -s $BUFFERS/private $BUFFERS/b0/broker-1214.sock"
  refuses "user $STRANGER, who could replace" broker --buffer-dir "$BUFFERS/b0" "${SMALL[@]}"
  as "$STRANGER" "$STRANGER" ln -s "$BUFFERS/own" "$BUFFERS/link"
  install -d "$BUFFERS/own"
  refuses "link that user $STRANGER made" broker --buffer-dir "$BUFFERS/link" "${SMALL[@]}"
  refuses "link that user $STRANGER made" broker --buffer-dir "$BUFFERS/link/logs" "${SMALL[@]}"
  chmod 777 "$BUFFERS/own"
  refuses "chmod go-w $BUFFERS/own" broker --buffer-dir "$BUFFERS/own" "${SMALL[@]}"
  # With --shared-buffer-dir, files are checked one by one.
  install -d -m 777 "$BUFFERS/own/b0"
  BUFFERS=$BUFFERS/own start_broker 0 --shared-buffer-dir "${SMALL[@]}"
  stop_broker 0
  refuses "symbolic link" broker --buffer-dir "$BUFFERS/b0" --shared-buffer-dir "${SMALL[@]}"
  touch "$BUFFERS/file"
  refuses "not a directory" broker --buffer-dir "$BUFFERS/file" "${SMALL[@]}"
  untouched public private
}

# The default directory, in a /dev/shm of this test's own: what a stranger made there is renamed, unless a
# program that runs has a lock in it.
default_directory() {
  ip netns exec "$NET-b0" bash -euo pipefail -s "$STRANGER" "$BIN/penstock-broker" "$T" <<'INSIDE'
mount -t tmpfs -o mode=1777,size=64m tmpfs /dev/shm
stranger=(setpriv --reuid "$1" --regid "$1" --clear-groups)
"${stranger[@]}" bash -c 'mkdir -m 777 /dev/shm/penstock && echo mine >/dev/shm/penstock/t.lock'
mkfifo "$3/locked" "$3/ready"
"${stranger[@]}" flock /dev/shm/penstock/t.lock bash -c 'echo locked && exec sleep 60' >"$3/locked" &
holder=$!
read -r _ <"$3/locked"
small=(--ring-size 1MiB --segment-size 64KiB --topic t)
! timeout 30 "$2" "${small[@]}" >"$3/refused" 2>&1 || exit 1
grep -q "user $1, and a running program has locked files there" "$3/refused" || { cat "$3/refused"; exit 1; }
pkill -KILL -P "$holder"
wait "$holder" || true
"$2" "${small[@]}" --ready-fd 3 3>"$3/ready" >"$3/log" 2>&1 &
broker=$!
[ "$(timeout 30 cat "$3/ready")" = READY=1 ] || { cat "$3/log"; exit 1; }
grep "penstock belonged to user $1, .*: renamed it to /dev/shm/penstock.of-$1-1\$" "$3/log"
[ "$(stat -c %u:%a /dev/shm/penstock)" = 0:750 ]
[ "$(cat "/dev/shm/penstock.of-$1-1/t.lock")" = mine ]
kill "$broker"
wait "$broker"
INSIDE
}

reports_and_keys() {
  public_place
  as "$STRANGER" "$STRANGER" ln -s "$BUFFERS/public" "$BUFFERS/report.json"
  refuses "report.json" broker --buffer-dir "$BUFFERS/b0" --report "$BUFFERS/report.json"
  as "$STRANGER" "$STRANGER" mkfifo "$BUFFERS/fifo.json"
  refuses "fifo.json" broker --buffer-dir "$BUFFERS/b0" --report "$BUFFERS/fifo.json"
  refuses "fifo.json" broker --buffer-dir "$BUFFERS/b0" --auth-keys "$BUFFERS/fifo.json"
  refuses "fifo.json" publisher --brokers "$(at 0)" --auth-key "$BUFFERS/fifo.json" --synthetic
  "$BIN/penstock-broker" --keygen "$BUFFERS/theirs.key" >/dev/null
  chown "$STRANGER" "$BUFFERS/theirs.key"
  refuses "$STRANGER's, who could change it" broker --buffer-dir "$BUFFERS/b0" --auth-keys "$BUFFERS/theirs.key"
  untouched public private
}

# Of a log that a stranger made, root's subscriber at most reads what is not there.
a_strangers_log() {
  public_place
  start_broker 0 "${SMALL[@]}" --buffer-mode 644
  stop_broker 0
  as "$STRANGER" "$STRANGER" bash -c "mkdir $BUFFERS/evil && cp $LOG $BUFFERS/evil/t.log &&
    ln -s $BUFFERS/private $BUFFERS/evil/t.readers && mkfifo $BUFFERS/evil/fifo.log $BUFFERS/evil/t.writer"
  refuses "t.readers" subscriber --path "$BUFFERS/evil/t.log" --register --stat
  refuses "not a regular file" subscriber --path "$BUFFERS/evil/fifo.log" --stat
  LIMIT=30 subscriber --path "$BUFFERS/evil/t.log" --stat >"$T/read"
  untouched private
}

modes_without_umask() {
  install -d -m 755 "$BUFFERS"
  (
    umask 0
    start_broker 0 "${SMALL[@]}"
    expect "mode of the directory" "$(stat -c %a "$BUFFERS/b0")" 750
    expect "modes of the files" "$(cd "$BUFFERS/b0" && stat -c %n:%a ./* | sort | xargs)" \
      "./broker-1214.sock:600 ./penstock.lock:600 ./penstock.log:640 ./penstock.readers:660 ./penstock.writer:640"
    stop_broker 0
  )
}

# A member of the broker's group, who may read and register, does what it can while a publisher is at work.
hostile_member() {
  chmod 755 "$WORK" "$T"
  install -d -m 1777 "$BUFFERS"
  install -m 755 "$BIN/penstock-broker" "$T/penstock-broker"
  install -o "$STRANGER" -m 644 /dev/null "$T/broker-0.json"
  BROKER=$T/penstock-broker AS=(setpriv --reuid "$STRANGER" --regid "$GROUP" --clear-groups)
  start_broker 0 "${SMALL[@]}"
  local registry=${LOG%.log}.readers pid round
  publisher --brokers "$(at 0)" --synthetic --total-size 256MiB --rate 200MB --format json >"$T/sent.json" &
  pid=$!
  for round in {1..20}; do
    as "$MEMBER" "$GROUP" truncate -s 0 "$registry"
    as "$MEMBER" "$GROUP" dd if=/dev/urandom of="$registry" bs=4096 count=1 conv=notrunc status=none
    as "$MEMBER" "$GROUP" truncate -s $((round * 100)) "$registry"
  done
  wait "$pid" || fail "the publisher failed: $(cat "$T/broker-0.log")"
  expect "messages acked" "$(jq .messages_acked "$T/sent.json")" $((256 * 1024))
  # Operations that must fail.
  ! as "$MEMBER" "$GROUP" bash -c ": >>$LOG" 2>"$T/denied" || fail "it writes the log"
  ! as "$MEMBER" "$GROUP" bash -c ": <${LOG%.log}.lock" 2>"$T/denied" || fail "it opens the lock"
  # Read locks on every file that it may open, held as long as it lives, keep no broker out.
  as "$MEMBER" "$GROUP" /usr/bin/python3 - "$LOG" "$registry" "${LOG%.log}.writer" >"$T/locked" <<'PY' &
import fcntl, sys, time
files = [open(path, "rb") for path in sys.argv[1:]]
for file in files:
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        pass
print("locked", flush=True)
time.sleep(60)
PY
  pid=$!
  for _ in {1..100}; do
    grep -q locked "$T/locked" && break
    sleep 0.05
  done
  kill -KILL "${brokers_running[0]}"
  { wait "${brokers_running[0]}" || true; } 2>/dev/null
  start_broker 0 "${SMALL[@]}"
  stop_broker 0
  # Such a lock does not count as a broker either.
  LIMIT=30 subscriber --path "$LOG" --follow --output none --allow-loss
  kill -KILL "$pid"
}

# A copy with holes, on a file system that has filled up since.
holes() {
  mkdir "$T/mnt"
  mount -t tmpfs -o size=40m tmpfs "$T/mnt"
  BUFFERS=$T/mnt start_broker 0 --ring-size 16MiB --segment-size 1MiB --topic penstock
  stop_broker 0
  cp --sparse=always "$T/mnt/b0/penstock.log" "$T/saved"
  rm "$T/mnt/b0/penstock.log"
  cp --sparse=always "$T/saved" "$T/mnt/b0/penstock.log"
  head -c 100M /dev/zero >"$T/mnt/others" 2>/dev/null || true
  refuses 'penstock.log: no room for [0-9]+ bytes' broker --ring-size 16MiB --segment-size 1MiB \
    --topic penstock --buffer-dir "$T/mnt/b0"
  umount "$T/mnt"
}

run_test "a directory that another user made, or may change, is refused" made_by_another
run_test "another user who took the default directory's name does not keep root's broker out" default_directory
run_test "reports and keys: no links, no FIFOs, nothing of another user's" reports_and_keys
run_test "root's subscriber on a log that another user made" a_strangers_log
run_test "modes do not depend on the umask" modes_without_umask
run_test "a member of the group neither ends a broker nor keeps one out" hostile_member
run_test "a log with holes on a full file system is refused" holes
finish
