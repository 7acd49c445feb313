#!/usr/bin/env bash
# Makes a guest that lives in memory: Debian's cloud kernel, some of its modules, busybox, and one script that it runs.
# QEMU starts it with -kernel and -initrd.
#
# usage: scripts/make-memory-guest.sh --out DIR --init FILE [--with PROGRAM[:PATH]]... [--file FILE:PATH]... [--module NAME]... [--cache DIR]
#   --out DIR      gets vmlinuz and initrd
#   --init FILE    what the guest does
#   --with PROGRAM a program of this machine to take along, with its libraries; and where it is found there
#   --file FILE:PATH  a file to take along, and where it is found there
#   --module NAME  a kernel module besides virtio_pci and virtio_blk
#   --cache DIR    where downloaded packages are kept (default ~/.cache/aquifer-guest)
# Needs no root.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out='' init='' programs=() files=() modules=(virtio_pci virtio_blk)
cache=${AQUIFER_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/aquifer-guest}
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;; --cache) cache=$2 ;; --init) init=$2 ;; --with) programs+=("$2") ;; --file) files+=("$2") ;; --module) modules+=("$2") ;;
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
for program in "${programs[@]}"; do
    path=$(PATH=$PATH:/usr/sbin command -v "${program%%:*}")
    install_program "$path" "$dir" "$(case $program in *:*) echo "${program#*:}" ;; *) echo "$path" ;; esac)"
done
for file in "${files[@]}"; do install -D -m 755 "${file%%:*}" "$dir${file#*:}"; done
install -m 755 "$init" "$dir/init"
(cd "$dir" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) | gzip -1 > "$out/initrd"
cp "$scratch/kernel/boot/vmlinuz-$release" "$out/vmlinuz"
