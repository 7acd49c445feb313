#!/usr/bin/env bash
# Makes a guest that lives in memory: Debian's cloud kernel, some of its modules, busybox, and one script that it runs.
# QEMU starts it with -kernel and -initrd.
#
# usage: scripts/make-memory-guest.sh --out DIR --init FILE [--with PROGRAM]... [--module NAME]... [--cache DIR]
#   --out DIR      gets vmlinuz and initrd
#   --init FILE    what the guest does
#   --with PROGRAM a program of this machine to take along, with its libraries
#   --module NAME  a kernel module besides virtio_pci and virtio_blk
#   --cache DIR    where downloaded packages are kept (default ~/.cache/aquifer-guest)
# Needs no root.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out='' init='' programs=() modules=(virtio_pci virtio_blk)
cache=${AQUIFER_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/aquifer-guest}
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;; --cache) cache=$2 ;; --init) init=$2 ;; --with) programs+=("$2") ;; --module) modules+=("$2") ;;
        *) echo "make-memory-guest: unknown option $1" >&2; exit 4 ;;
    esac
    shift 2
done
[ -n "$out" ] && [ -n "$init" ] || { echo "make-memory-guest: --out and --init are needed" >&2; exit 4; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out" "$cache"
# shellcheck source=scripts/guest/kernel.sh
. "$here/guest/kernel.sh"

dir=$scratch/initramfs
mkdir -p "$dir/bin" "$dir/modules"
fetch_kernel
depmod -b "$scratch/kernel" "$release"
copy_modules "$scratch/kernel" "$dir/modules" "${modules[@]}"
cp /bin/busybox "$dir/bin/busybox"
for program in "${programs[@]}"; do install_program "$(PATH=$PATH:/usr/sbin command -v "$program")" "$dir"; done
install -m 755 "$init" "$dir/init"
(cd "$dir" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) | gzip -1 > "$out/initrd"
cp "$scratch/kernel/boot/vmlinuz-$release" "$out/vmlinuz"
