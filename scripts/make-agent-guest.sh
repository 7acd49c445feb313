#!/usr/bin/env bash
# Makes the bootable disk of a small guest with a network, a page at port 80 and QEMU's own guest agent: Debian's cloud
# kernel and busybox in memory, started by BIOS firmware from the disk itself, and one ext4 file system to be frozen.
#
# usage: scripts/make-agent-guest.sh --out DISK.raw [--cache DIR]
#   --cache DIR    where downloaded packages are kept (default ~/.cache/aquifer-guest)
# Needs no root and no loop device.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out='' cache=${AQUIFER_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/aquifer-guest}
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;; --cache) cache=$2 ;;
        *) echo "make-agent-guest: unknown option $1" >&2; exit 4 ;;
    esac
    shift 2
done
[ -n "$out" ] || { echo "make-agent-guest: --out is needed" >&2; exit 4; }

MIB=1048576 SECTOR=512 start_mib=1 size_mib=40
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$cache"
# shellcheck source=scripts/guest/agent.sh
. "$here/guest/agent.sh"
fetch_agent

tree=$scratch/tree
mkdir -p "$tree"/{boot/grub,etc,srv,www/cgi-bin}
echo ready > "$tree/www/index.html"
printf '#!/bin/sh\nstart-agent >/dev/null 2>&1\nprintf "Content-Type: text/plain\\r\\n\\r\\nstarted\\n"\n' > "$tree/www/cgi-bin/start"
chmod 755 "$tree/www/cgi-bin/start"
"$here/make-memory-guest.sh" --cache "$cache" --out "$tree/boot" --init "$here/guest/agent-init" \
    --with "$agent:/usr/sbin/qemu-ga" --file "$here/guest/fsfreeze-hook:/etc/qemu/fsfreeze-hook" \
    --module virtio_net --module virtio_console
cat > "$tree/boot/grub/grub.cfg" <<'GRUB'
linux /boot/vmlinuz console=ttyS0,115200 quiet no_timer_check panic=-1 random.trust_cpu=on
initrd /boot/initrd
boot
GRUB

rm -f "$out"; truncate -s $((size_mib * MIB)) "$out"
sfdisk --quiet --no-tell-kernel "$out" <<PARTS
label: dos
label-id: 0xa0f1fe02
start=$((start_mib * MIB / SECTOR)), type=83, bootable
PARTS
mke2fs -q -F -t ext4 -L aquifer-agent -E "root_owner=0:0,lazy_itable_init=0,offset=$((start_mib * MIB))" \
    -d "$tree" "$out" "$((size_mib - start_mib))M"
cat > "$scratch/early.cfg" <<'GRUB'
search --no-floppy --set=root --label aquifer-agent
set prefix=($root)/boot/grub
configfile /boot/grub/grub.cfg
GRUB
grub-mkimage -O i386-pc -p /boot/grub -c "$scratch/early.cfg" -o "$scratch/core.img" \
    ext2 part_msdos search search_label configfile normal linux boot minicmd biosdisk
dd if=/usr/lib/grub/i386-pc/boot.img of="$out" bs=1 count=440 conv=notrunc status=none
dd if="$scratch/core.img" of="$out" bs=$SECTOR seek=1 conv=notrunc status=none
