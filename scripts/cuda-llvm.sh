#!/usr/bin/env bash
# An LLVM for `--features cuda` on machines that cannot download the bundle of Burn's build (GitHub releases).
#
#   scripts/cuda-llvm.sh            install and set up
#   scripts/cuda-llvm.sh --check    say what is there and what is missing, change nothing
#
# Where the bundle can be downloaded, nothing of this is needed. The CUDA compilers of CubeCL are built against LLVM 23.1,
# which their build fetches into a folder of the user. The build asks that folder only for bin/llvm-config and a mark that the
# download is complete, and LLVM 22 has all that is used of it. So this script installs, through apt,
#   llvm-22-dev libpolly-22-dev                       LLVM as static libraries, 460 MB on disk
#   zlib1g-dev libzstd-dev libz3-dev libxml2-dev      what these link against
# and writes these two small files:
#   ~/.local/share/tracel/tracel-llvm-VERSION/bin/llvm-config       hands over to Debian's
#   ~/.local/share/tracel/tracel-llvm-VERSION/.tracel-llvm-installed
# To undo: remove that folder and the packages. Needs Debian or Ubuntu with a mirror that carries llvm-22-dev.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '\nhint: %s\n' "$2" >&2
    exit 1
}

packages=(llvm-22-dev libpolly-22-dev zlib1g-dev libzstd-dev libz3-dev libxml2-dev)
llvm=/usr/lib/llvm-22/bin/llvm-config
case ${1:-} in
'' | --check) ;;
*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac

# The version that the build looks for, from the lock file: a mark of another version would be ignored.
version=$(awk '/^name = "tracel-llvm-bundler"/ { getline; gsub(/[^0-9.-]/, ""); print; exit }' Cargo.lock)
version=${version##[!0-9]}
[ -n "$version" ] || fail "Cargo.lock names no tracel-llvm-bundler" "this Burn builds without it: no LLVM is needed"
prefix=${XDG_DATA_HOME:-$HOME/.local/share}/tracel/tracel-llvm-$version
mark=$prefix/.tracel-llvm-installed

# A bundle that Burn's build downloaded itself is left alone.
if [ -e "$mark" ] && ! grep -qs "$llvm" "$prefix/bin/llvm-config"; then
    echo "Burn's own LLVM bundle is in $prefix: nothing to do"
    exit 0
fi

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ "${1:-}" = --check ]; then
    [ ${#missing[@]} -eq 0 ] && [ -e "$mark" ] && echo "ready: LLVM $("$llvm" --version) stands in for $version" && exit 0
    [ ${#missing[@]} -eq 0 ] || echo "not installed: ${missing[*]}"
    [ -e "$mark" ] || echo "not set up: $prefix"
    exit 1
fi

if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "no apt-get here, and ${missing[*]} missing" \
        "install LLVM 22 with its static libraries by other means; llvm-config is expected at $llvm"
    sudo=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "installing ${missing[*]} needs root" "run this as root, or install them and run it again"
        sudo=(sudo)
    fi
    echo "installing ${missing[*]}"
    "${sudo[@]}" apt-get update -qq || fail "apt-get update failed" "is a package mirror reachable?"
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        fail "apt-get could not install ${missing[*]}" "apt-cache policy llvm-22-dev tells whether a mirror carries it"
fi
[ -x "$llvm" ] || fail "llvm-22-dev is installed, but $llvm is not there"

# Debian's llvm-config prints libz3 as a path, which the build would turn into the wrong name of a library.
mkdir -p "$prefix/bin"
cat >"$prefix/bin/llvm-config.new" <<WRAPPER
#!/bin/sh
$llvm "\$@" | sed -e 's#/usr/lib/[^ ]*/libz3\.so#-lz3#'
WRAPPER
chmod +x "$prefix/bin/llvm-config.new"
mv "$prefix/bin/llvm-config.new" "$prefix/bin/llvm-config"

libraries=$("$prefix/bin/llvm-config" --link-static --system-libs --libs nvptx) ||
    fail "$prefix/bin/llvm-config does not work" "does $llvm --version?"
case $libraries in
*LLVMNVPTX*) ;;
*) fail "this LLVM cannot generate code for NVIDIA cards (no NVPTX target): $libraries" ;;
esac
touch "$mark"
echo "ready: LLVM $("$llvm" --version) stands in for $version in $prefix; now cargo build --release --features cuda"
