#!/usr/bin/env bash
# Makes a guest that lives in memory and attaches a network disk with the kernel's own NBD client: Debian's cloud
# kernel, its nbd and virtio_net modules, busybox and Debian's nbd-client. QEMU starts it with -kernel and -initrd.
#
# usage: scripts/make-nbd-guest.sh --out DIR [--cache DIR]
#   --out DIR    gets vmlinuz and initrd
#   --cache DIR  where downloaded packages are kept (default ~/.cache/aquifer-guest)
# Needs no root. What the guest does is scripts/guest/nbd-init; it is told where the door is by door=HOST:PORT:EXPORT
# on the kernel's command line.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out='' cache=${AQUIFER_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/aquifer-guest}
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;; --cache) cache=$2 ;;
        *) echo "make-nbd-guest: unknown option $1" >&2; exit 4 ;;
    esac
    shift 2
done
[ -n "$out" ] || { echo "make-nbd-guest: --out is needed" >&2; exit 4; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out" "$cache"
# shellcheck source=scripts/guest/kernel.sh
. "$here/guest/kernel.sh"

dir=$scratch/initramfs
mkdir -p "$dir/bin" "$dir/modules"
fetch_kernel
depmod -b "$scratch/kernel" "$release"
copy_modules "$scratch/kernel" "$dir/modules" virtio_pci virtio_net nbd
cp /bin/busybox "$dir/bin/busybox"
install_program "$(command -v nbd-client || echo /usr/sbin/nbd-client)" "$dir"
install -m 755 "$here/guest/nbd-init" "$dir/init"
(cd "$dir" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) | gzip -1 > "$out/initrd"
cp "$scratch/kernel/boot/vmlinuz-$release" "$out/vmlinuz"
