# shellcheck shell=bash
# Functions that the scripts share; sourced, never run.

# Root of the repository, and cargo's target directory.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET_DIR=${CARGO_TARGET_DIR:-$ROOT/target}
# shellcheck disable=SC2034 # used by the scripts that source this
BIN_DIR=$TARGET_DIR/release

# Debian packages needed to build, run and compare.
PACKAGES=(bsdextrautils build-essential clang ethtool iperf3 iproute2 jq libelf-dev llvm m4
  pkg-config procps zlib1g-dev)
# Debian's newer Rust; its programs land in /usr/bin under their usual names.
RUST_PACKAGES=(cargo-web rustc-web rustfmt-web rust-web-clippy)

say() { printf '%s\n' "$*" >&2; }

die() {
  say "${0##*/}: $*"
  exit 1
}

# Wrong usage: says what is wrong and how to get help; exit code 2.
usage_error() {
  say "${0##*/}: $*"
  say "Try: ${0##*/} --help"
  exit 2
}

# Runs a command as root: directly, or with sudo.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "this needs root, and sudo is not installed; run it as root: $*"
  fi
}

need_root() {
  [ "$(id -u)" -eq 0 ] || die "$1 needs root; run with sudo: sudo $0 ${*:2}"
}

# The value after an option, or exit code 2 if it is missing.
option_value() {
  [ "$#" -ge 2 ] || usage_error "$1 needs a value"
  printf '%s' "$2"
}

# Packages in the list that are not installed.
missing_packages() {
  local package
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
  done
}

apt_install() {
  say "installing: $*"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >&2
}

# Installs those of the given packages that are missing.
install_packages() {
  if ! command -v apt-get >/dev/null; then
    say "apt-get is missing; install these packages under the names of your distribution: $*"
    return 0
  fi
  local missing
  mapfile -t missing < <(missing_packages "$@")
  [ "${#missing[@]}" -eq 0 ] && return 0
  as_root apt-get update >&2
  apt_install "${missing[@]}"
}

# Oldest Rust version that the workspace accepts, from Cargo.toml.
rust_wanted() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml"; }

# Whether version $1 is at least version $2.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

rust_is_there() {
  local have
  have=$(cargo --version 2>/dev/null | awk '{ print $2 }') || return 1
  [ -n "$have" ] && at_least "$have" "$(rust_wanted)" && command -v rustc >/dev/null
}

# Provides a cargo that is new enough: the installed one, else Debian's.
install_rust() {
  [ -d "$HOME/.cargo/bin" ] && PATH=$PATH:$HOME/.cargo/bin
  rust_is_there && return 0
  local wanted candidate
  wanted=$(rust_wanted)
  candidate=$(apt-cache policy cargo-web 2>/dev/null | awk '/Candidate:/ { print $2 }')
  if [ -n "$candidate" ] && [ "$candidate" != "(none)" ] && at_least "$candidate" "$wanted"; then
    apt_install "${RUST_PACKAGES[@]}"
    PATH=/usr/bin:$PATH
    hash -r
  fi
  rust_is_there || die "Rust $wanted or newer is needed; install it from https://rustup.rs"
}

install_deps() {
  install_packages "${PACKAGES[@]}"
  install_rust
}

build_release() {
  install_rust
  (cd "$ROOT" && cargo build --release --locked) || die "the build failed"
}

# Bytes in a size such as 64MiB, 10GB or 4096.
bytes_of() {
  local number=${1%B}
  numfmt --from=auto "$number" 2>/dev/null || usage_error "not a size: '$1' (such as 64MiB or 4096)"
}
