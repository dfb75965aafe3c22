#!/usr/bin/env bash
# Tests the xdp path on NIC drivers, in a virtual machine.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Drivers, and qemu's names for their devices.
declare -A DEVICES=([virtio_net]=virtio-net-pci [igb]=igb [e1000e]=e1000e [vmxnet3]=vmxnet3)

help() {
  cat <<TEXT
Boots a Debian kernel in qemu with two connected interfaces of one driver, and publishes over the xdp path
from one to the other: in generic mode, in native copy mode, in the best native mode of the driver, and
with the worker driving the queue. A reader verifies all messages. With --systemd it boots Debian instead,
and runs the broker as a service.

Usage: scripts/vm_test.sh [options]

  --drivers LIST  of: virtio_net igb e1000e vmxnet3 (default: virtio_net,igb,e1000e)
  --suite NAME    Debian suite of the kernel and qemu (default: trixie, Linux 6.12)
  --mirror URL    Debian mirror (default: the one in this machine's apt configuration)
  --kernel NAME   kernel package (default: the one that the suite's linux-image-amd64 depends on)
  --size SIZE     bytes to publish in each case (default: 16MiB)
  --mtu BYTES     MTU of both interfaces (default: 1500)
  --stacked       instead tests a VLAN, a bond, a team and a VRF on the first driver's interfaces
  --systemd       starts packaging/penstock-broker.service as docs/operations.md says, publishes, kills
                  and stops it, with interfaces of the first driver

Downloads packages to target/vm (about 150 MB) and unpacks them there; it installs nothing. The processor
is emulated, so performance figures mean nothing. Needs root for two taps in a namespace of its own, and
changes nothing else in the host's network. Takes a minute per driver, or a few on a busy machine. Prints
one line per case. Exit code: 0 if nothing failed; a driver that could not be tested counts as a failure.

Examples:
  sudo scripts/vm_test.sh
  sudo scripts/vm_test.sh --drivers igb,virtio_net --suite trixie-backports
  sudo scripts/vm_test.sh --drivers e1000e --stacked
  sudo scripts/vm_test.sh --systemd
TEXT
}

drivers=virtio_net,igb,e1000e suite=trixie mirror='' kernel='' size=16MiB mtu=1500 systemd=0 stacked=0
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      help
      exit 0
      ;;
    --drivers) drivers=$(option_value "$@") ;;
    --suite) suite=$(option_value "$@") ;;
    --mirror) mirror=$(option_value "$@") ;;
    --kernel) kernel=$(option_value "$@") ;;
    --size) size=$(option_value "$@") ;;
    --mtu) mtu=$(option_value "$@") ;;
    --stacked)
      stacked=1
      shift
      continue
      ;;
    --systemd)
      systemd=1
      shift
      continue
      ;;
    *) usage_error "unknown option '$1'" ;;
  esac
  shift 2
done
for driver in ${drivers//,/ }; do
  [ -n "${DEVICES[$driver]:-}" ] || usage_error "--drivers: unknown driver '$driver'; known: ${!DEVICES[*]}"
done
[[ $suite =~ ^[a-z-]+$ ]] || usage_error "--suite: invalid suite name '$suite'"
[[ $mtu =~ ^[0-9]+$ && $mtu -ge 576 && $mtu -le 9000 ]] || usage_error "--mtu: 576 to 9000"
bytes_of "$size" >/dev/null
need_root "the test" "$@"
for program in apt-get dpkg-deb ethtool ip jq ldd xz; do
  command -v "$program" >/dev/null || die "$program is missing"
done
BIN=${PENSTOCK_BIN:-$BIN_DIR}
for program in broker publisher subscriber lab; do
  [ -x "$BIN/penstock-$program" ] || die "penstock-$program is not in $BIN; build it: cargo build --release"
done

VM=$TARGET_DIR/vm
SUITE=$VM/$suite
NET=pvm$$
RUN=$(mktemp -d /tmp/penstock-vm.XXXXXX)
qemu_pid=
cleanup() {
  if [ -n "$qemu_pid" ]; then
    kill "$qemu_pid" 2>/dev/null || true
    wait "$qemu_pid" || true
  fi
  ip netns del "$NET" 2>/dev/null || true
  rm -rf "$RUN"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# apt COMMAND...: apt with separate lists, status and downloads, as if nothing were installed.
apt() {
  "$1" -qq -o Dir::Etc::sourcelist="$SUITE/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::State::lists="$SUITE/lists" -o Dir::State::status="$SUITE/status" -o Dir::Cache="$SUITE" \
    -o Dir::Cache::archives="$SUITE/archives" -o APT::Sandbox::User=root -o APT::Get::List-Cleanup=0 "${@:2}"
}

# debian_mirror: the first Debian mirror in this machine's apt configuration.
debian_mirror() {
  # shellcheck disable=SC2016 # for apt-get
  apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null \
    | sed -n 's/^Debian|Debian|//p' | sed -n 1p
}

# Packages of the suite: qemu with its dependencies, busybox, the kernel.
download() {
  local base=${suite%-backports} package parts
  [ -n "$mirror" ] || mirror=$(debian_mirror)
  [ -n "$mirror" ] || die "apt has no Debian mirror configured on this machine; give one: --mirror URL"
  mkdir -p "$SUITE"/{lists,archives}/partial "$SUITE/root"
  for package in "$base" $([ "$base" = "$suite" ] || echo "$suite"); do
    echo "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $package main"
  done >"$SUITE/sources.list"
  : >"$SUITE/status"
  say "packages of $suite"
  apt apt-get update >&2 || die "cannot fetch the index of $suite from $mirror"
  if [ -z "$kernel" ]; then
    kernel=$(apt apt-cache show -t "$suite" linux-image-amd64 | sed -n 's/^Depends: .*\(linux-image-[0-9][^ ,]*\).*/\1/p; s/^Depends: \(linux-image-[0-9][^ ,]*\).*/\1/p' | sort -V | tail -n 1)
    [ -n "$kernel" ] || die "$suite has no linux-image-amd64"
  fi
  if [ ! -e "$SUITE/root/.whole" ]; then
    apt apt-get install -y --no-install-recommends --download-only qemu-system-x86 busybox-static >&2
    for package in "$SUITE"/archives/*.deb; do
      dpkg-deb -x "$package" "$SUITE/root"
    done
    touch "$SUITE/root/.whole"
  fi
  KERNEL=$SUITE/$kernel
  if [ ! -e "$KERNEL/.whole" ]; then
    mkdir -p "$KERNEL"
    # Newer kernels have their modules in a package of its own.
    mapfile -t parts < <(apt apt-cache depends "$kernel" | sed -n 's/^ *Depends: \(linux-modules-[0-9].*\)/\1/p')
    (cd "$KERNEL" && apt apt-get download -t "$suite" "$kernel" "${parts[@]}" >&2)
    for package in "$KERNEL"/*.deb; do
      dpkg-deb -x "$package" "$KERNEL"
      rm "$package"
    done
    touch "$KERNEL/.whole"
  fi
}

# Debian with systemd, unpacked and not configured: what a package's scripts would have made is made here.
download_systemd() {
  local os=$SUITE/os package
  [ ! -e "$os/.whole" ] || return 0
  mkdir -p "$SUITE/os-archives/partial" "$os"
  apt apt-get -o Dir::Cache::archives="$SUITE/os-archives" install -y --no-install-recommends --download-only \
    base-files systemd-sysv iproute2 libelf1t64 bash coreutils util-linux grep sed >&2
  for package in "$SUITE"/os-archives/base-files_*.deb "$SUITE"/os-archives/*.deb; do
    dpkg-deb -x "$package" "$os"
  done
  [ -e "$os/usr/bin/sh" ] || ln -s bash "$os/usr/bin/sh"
  mkdir -p "$os"/{etc/sysusers.d,etc/tmpfiles.d,opt/penstock,usr/local/bin}
  echo 'root:x:0:0:root:/root:/bin/bash' >"$os/etc/passwd"
  echo 'root:x:0:' >"$os/etc/group"
  echo vm >"$os/etc/hostname"
  tr -d - </proc/sys/kernel/random/uuid >"$os/etc/machine-id"
  touch "$os/.whole"
}

# The qemu of the suite, with its own loader, libraries and modules. It would also find the modules of
# the host's qemu, whose other version makes it exit: that directory is empty for this process.
LIBRARIES=$SUITE/root/usr/lib/x86_64-linux-gnu
# shellcheck disable=SC2016 # for the inner shell
QEMU=(env QEMU_MODULE_DIR="$LIBRARIES/qemu" unshare --mount
  sh -c '[ ! -d "$0" ] || mount -t tmpfs tmpfs "$0"; exec "$@"' /usr/lib/x86_64-linux-gnu/qemu
  "$SUITE/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$LIBRARIES"
  "$SUITE/root/usr/bin/qemu-system-x86_64")

# has_device NAME: whether the suite's qemu supports it; other output is in $RUN/qemu.
has_device() {
  "${QEMU[@]}" -machine none -device "$1,help" >"$RUN/qemu" 2>&1 || return 1
  # It exits with 0 even without the device.
  grep -q "^$1 options:" "$RUN/qemu"
}

# install_program FILE: with the libraries that it needs, into the initial file system.
install_program() {
  local library
  install -m 755 "$1" "$RUN/root/bin/"
  for library in $(ldd "$1" | grep -o '/[^ ]*'); do
    install -D -m 755 "$library" "$RUN/root$library"
  done
}

# add_module NAME: and before it those that it depends on; fails if the kernel has no such module.
add_module() {
  local file name=${1//-/_} dependency
  grep -qx "$name.ko" "$RUN/root/modules/order" && return 0
  file=$(find "$KERNEL" -name "${name//_/[-_]}.ko.xz")
  [ -n "$file" ] || return 1
  xz -dc "$file" >"$RUN/root/modules/$name.ko"
  for dependency in $(tr '\0' '\n' <"$RUN/root/modules/$name.ko" | sed -n 's/^depends=//p' | tr ',' ' '); do
    add_module "$dependency"
  done
  echo "$name.ko" >>"$RUN/root/modules/order"
}

# initramfs DRIVER
initramfs() {
  rm -rf "$RUN/root"
  mkdir -p "$RUN/root"/{bin,modules,proc,sys,dev,run,tmp}
  install -m 755 "$SUITE/root/usr/bin/busybox" "$RUN/root/bin/"
  install -m 755 "$ROOT/scripts/vm/init" "$RUN/root/init"
  local program
  for program in broker publisher subscriber lab; do
    install_program "$BIN/penstock-$program"
  done
  install_program "$(command -v ip)"
  install_program "$(command -v ethtool)"
  pack "$1"
}

# pack DRIVER: its modules beside what is there already; fails if the kernel has none.
pack() {
  local module
  : >"$RUN/root/modules/order"
  add_module "$1" || return 1
  if [ "$stacked" -ne 0 ]; then
    for module in 8021q bonding team vrf; do
      add_module "$module" || die "the kernel has no module $module"
    done
  fi
  (cd "$RUN/root" && find . | "$SUITE/root/usr/bin/busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$RUN/initramfs"
}

# initramfs_systemd DRIVER
initramfs_systemd() {
  local os=$RUN/root/os
  mkdir -p "$RUN/root"/{bin,modules,proc,dev}
  install -m 755 "$SUITE/root/usr/bin/busybox" "$RUN/root/bin/"
  install -m 755 "$ROOT/scripts/vm/init-systemd" "$RUN/root/init"
  cp -a "$SUITE/os" "$os"
  install -m 755 "$BIN"/penstock-{broker,publisher,subscriber} "$os/opt/penstock/"
  install -m 644 "$ROOT"/packaging/* "$os/opt/penstock/"
  install -m 755 "$ROOT/scripts/vm/systemd-test" "$os/opt/penstock/test"
  cat >"$os/etc/systemd/system/vm-test.service" <<'UNIT'
[Unit]
Description=Test of the broker's unit
After=basic.target
[Service]
Type=oneshot
ExecStart=/opt/penstock/test
UNIT
  pack "$1"
}

# network DRIVER: qemu's options for two interfaces, joined.
network() {
  local device=${DEVICES[$1]} queues=''
  case $1 in
    # Several queues take a tap.
    virtio_net)
      # Without iommu_platform the driver does without the kernel's DMA interface, and zero-copy with it.
      queues=',mq=on,vectors=6,disable-legacy=on,iommu_platform=on'
      echo "-netdev tap,id=a,ifname=a,script=no,downscript=no,queues=2"
      echo "-netdev tap,id=b,ifname=b,script=no,downscript=no,queues=2"
      ;;
    *) echo "-netdev hubport,id=a,hubid=0 -netdev hubport,id=b,hubid=0" ;;
  esac
  # On ports of their own: two of igb's have too many virtual functions for one bus.
  echo "-device pcie-root-port,id=port-a,chassis=1,slot=1 -device pcie-root-port,id=port-b,chassis=2,slot=2"
  echo "-device $device,netdev=a,bus=port-a,mac=52:54:00:00:00:01$queues"
  echo "-device $device,netdev=b,bus=port-b,mac=52:54:00:00:00:02$queues"
}

# taps: joined by a bridge, in a namespace of this run.
taps() {
  local tap
  ip netns add "$NET"
  ip -n "$NET" link add bridge type bridge
  for tap in a b; do
    ip -n "$NET" tuntap add dev "$tap" mode tap multi_queue vnet_hdr
    ip -n "$NET" link set dev "$tap" mtu "$mtu" master bridge up
  done
  ip -n "$NET" link set dev bridge mtu "$mtu" up
}

# boot DRIVER: writes the output of the virtual machine to $RUN/said.
boot() {
  local options
  read -ra options < <(network "$1" | xargs)
  ip netns list | grep -q "^$NET" || taps
  : >"$RUN/said"
  ip netns exec "$NET" timeout 1500 "${QEMU[@]}" \
    -L "$SUITE/root/usr/share/qemu" -L "$SUITE/root/usr/share/seabios" -L "$SUITE/root/usr/lib/ipxe/qemu" \
    -accel tcg,thread=multi -cpu max -smp 2 -m 3072 -machine q35 -nodefaults -no-user-config -no-reboot \
    -display none -serial "file:$RUN/console" -serial "file:$RUN/said" "${options[@]}" \
    -kernel "$KERNEL"/boot/vmlinuz-* -initrd "$RUN/initramfs" \
    -append "console=ttyS0 quiet systemd.unit=vm-test.service no_timer_check panic=-1 rdinit=/init driver=$1 size=$size mtu=$mtu$([ "$stacked" -eq 0 ] || echo " stacked=1")" >"$RUN/qemu" 2>&1 &
  qemu_pid=$!
  wait "$qemu_pid" || true
  qemu_pid=
}

# value NAME: its last value in $RUN/case.
value() { sed -n "s/^$1 //p" "$RUN/case" | tail -n 1; }

# judge DRIVER CASE: prints the verdict on $RUN/case.
judge() {
  local name="$1, Linux $version, $2" refused wrong=() mode
  refused=$(value refused)
  if [[ $2 = *-refused ]]; then
    if [ -n "$refused" ]; then
      echo "PASS $name: $refused"
      passed=$((passed + 1))
    else
      echo "FAIL $name: it was not refused"
      failed=$((failed + 1))
    fi
    return
  fi
  if [ -n "$refused" ]; then
    # Native mode is skipped only if the driver itself reports that it has none.
    if [[ $2 = native* ]] && [ "$native" = false ]; then
      echo "SKIP $name: the driver has no native XDP ($refused)"
      skipped=$((skipped + 1))
      return
    fi
    echo "FAIL $name: $refused"
    failed=$((failed + 1))
    return
  fi
  [ "$(value publisher)$(value reader)$(value broker)" = 000 ] \
    || wrong+=("exit codes of publisher, reader, broker: $(value publisher) $(value reader) $(value broker)")
  [ "$(value attached)" = 0 ] || wrong+=("the program stayed attached")
  value sent >"$RUN/sent"
  value read >"$RUN/read"
  value report >"$RUN/report"
  local sent acked paths
  sent=$(jq .messages_sent "$RUN/sent") acked=$(jq .messages_acked "$RUN/sent")
  # An emulated processor may stall for longer than a stream waits, so a stream that moved is no failure.
  paths=$(jq -r '[.brokers[].streams[].path] | unique | join(" ")' "$RUN/sent")
  [ "${acked:-0}" -gt 0 ] && [ "$sent" = "$acked" ] || wrong+=("$acked of $sent messages acked")
  [ "$paths" = xdp ] || wrong+=("paths: $paths")
  [ "$(jq -S '[.brokers[].streams[] | {stream, messages, sha256}] | sort' "$RUN/sent")" = \
    "$(jq -S '[.streams[] | {stream, messages, sha256}] | sort' "$RUN/read")" ] || wrong+=("the log differs from what was sent")
  [ "$(jq .xdp.placed "$RUN/report")" -gt 0 ] || wrong+=("no packet was placed")
  mode=$(jq -r '.xdp | .xdp_mode + (if .zero_copy then ", zero-copy" else ", copy" end) + ", \(.queues | length) queues"' "$RUN/report")
  if [ "${#wrong[@]}" -gt 0 ]; then
    echo "FAIL $name: ${wrong[*]}"
    sed -n 's/^log /    /p' "$RUN/case" | tail -n 5
    failed=$((failed + 1))
  else
    echo "PASS $name: $mode; $acked messages verified"
    passed=$((passed + 1))
  fi
}

# judge_all DRIVER
judge_all() {
  local broken case native version
  broken=$(sed -n 's/^broken //p' "$RUN/said" | head -n 1)
  if [ -n "$broken" ] || ! grep -q '^end$' "$RUN/said"; then
    echo "FAIL $1: ${broken:-the virtual machine did not finish}"
    tail -n 5 "$RUN/qemu" "$RUN/console" | sed 's/^/    /'
    failed=$((failed + 1))
  fi
  version=$(sed -n 's/^kernel //p' "$RUN/said")
  native=$(sed -n 's/^doctor //p' "$RUN/said" | jq '.interface.checks | any(.name == "native_xdp" and .level == "ok")')
  # shellcheck disable=SC2013 # names of cases hold no blanks
  for case in $(sed -n 's/^case //p' "$RUN/said"); do
    sed -n "/^case $case\$/,/^case\|^end/p" "$RUN/said" | sed '1d' >"$RUN/case"
    judge "$1" "$case"
  done
}

# judge_systemd: prints a verdict on each check in $RUN/said.
judge_systemd() {
  local line count=0
  while IFS= read -r line; do
    count=$((count + 1))
    case $line in
      *" ok")
        echo "PASS systemd, ${line% ok}"
        passed=$((passed + 1))
        ;;
      *)
        echo "FAIL systemd, $line"
        failed=$((failed + 1))
        ;;
    esac
  done < <(sed -n 's/^check //p' "$RUN/said")
  if [ "$count" -eq 0 ] || ! grep -q '^end$' "$RUN/said"; then
    echo "FAIL systemd: the virtual machine did not finish"
    failed=$((failed + 1))
  fi
  [ "$failed" -eq 0 ] || {
    tail -n 5 "$RUN/qemu" "$RUN/console"
    sed -n 's/^log //p' "$RUN/said"
  } | sed 's/^/    /'
}

# keep NAME: keeps the output of the virtual machine.
keep() {
  mkdir -p "$VM/last"
  cp "$RUN/said" "$VM/last/$1.said"
  cp "$RUN/console" "$VM/last/$1.console"
}

passed=0 failed=0 skipped=0
download
if [ "$systemd" -ne 0 ]; then
  driver=${drivers%%,*}
  download_systemd
  initramfs_systemd "$driver" || die "the kernel has no module $driver"
  say "systemd with interfaces of $driver"
  boot "$driver"
  judge_systemd
  keep systemd
  printf '%d passed, %d failed\n' "$passed" "$failed"
  exit $((failed > 0))
fi
version=$(cd "$KERNEL/boot" && echo vmlinuz-*)
[ "$stacked" -eq 0 ] || drivers=${drivers%%,*}
for driver in ${drivers//,/ }; do
  if ! has_device "${DEVICES[$driver]}"; then
    echo "FAIL $driver: this qemu has no ${DEVICES[$driver]}"
    sed 's/^/    /' "$RUN/qemu" | tail -n 5
    failed=$((failed + 1))
    continue
  fi
  if ! initramfs "$driver"; then
    echo "FAIL $driver: ${version#vmlinuz-} has no such module"
    failed=$((failed + 1))
    continue
  fi
  say "$driver with ${version#vmlinuz-}"
  boot "$driver"
  judge_all "$driver"
  keep "$driver$([ "$stacked" -eq 0 ] || echo -stacked)"
done
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" -eq 0 ]
