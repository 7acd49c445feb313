#!/usr/bin/env bash
# Makes a real bootable guest disk: Debian's cloud kernel, GRUB and a small user space on ext4 in a partition,
# started by firmware from the disk itself (nothing is handed to QEMU beside the disk).
#
# usage: scripts/make-guest.sh --out DISK.raw [--firmware uefi|bios] [--size MIB] [--noise MIB] [--tree DIR] [--cache DIR]
#   --firmware uefi  GPT, an EFI system partition with GRUB, ext4 root          (default)
#              bios  MBR, GRUB in the gap behind it, ext4 root
#   --size MIB       virtual size of the disk                                  (default 1024)
#   --noise MIB      incompressible data in /srv/data, so that backups weigh something (default 128)
#   --tree DIR       keep the folder the root file system was made from: what every file should be
#   --cache DIR      where downloaded packages are kept                        (default ~/.cache/aquifer-guest)
# Needs no root and no loop device. The guest: log in on the serial console as root, no password.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out='' firmware=uefi size_mib=1024 noise_mib=128 tree='' cache=${AQUIFER_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/aquifer-guest}
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;; --firmware) firmware=$2 ;; --size) size_mib=$2 ;; --noise) noise_mib=$2 ;;
        --tree) tree=$2 ;; --cache) cache=$2 ;;
        *) echo "make-guest: unknown option $1" >&2; exit 4 ;;
    esac
    shift 2
done
[ -n "$out" ] || { echo "make-guest: --out is needed" >&2; exit 4; }
case $firmware in uefi|bios) ;; *) echo "make-guest: --firmware is uefi or bios" >&2; exit 4 ;; esac

MIB=1048576 SECTOR=512
root_start_mib=2            # BIOS: the MBR gap holds GRUB. UEFI: the ESP lies before the root.
esp_mib=0
if [ "$firmware" = uefi ]; then esp_mib=16; root_start_mib=$((2 + esp_mib)); fi
root_mib=$((size_mib - root_start_mib - 1))   # the last MiB holds the backup GPT

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ -n "$tree" ] || tree=$scratch/tree
rm -rf "$tree"; mkdir -p "$tree" "$cache"
# shellcheck source=scripts/guest/kernel.sh
. "$here/guest/kernel.sh"

# What the initramfs must load before the disk can be seen, in order; ext4 is built into the kernel.
make_initramfs() {
    local dir=$scratch/initramfs
    mkdir -p "$dir/bin" "$dir/modules"
    cp /bin/busybox "$dir/bin/busybox"
    copy_modules "$tree" "$dir/modules" virtio_pci virtio_blk
    install -m 755 "$here/guest/init" "$dir/init"
    (cd "$dir" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) | gzip -1 > "$tree/boot/initrd.img"
}

make_user_space() {
    local applet
    mkdir -p "$tree"/{bin,sbin,usr/bin,usr/sbin,etc/init.d,proc,sys,dev,run,tmp,root,srv/data,var/log,boot/grub,lib}
    cp /bin/busybox "$tree/bin/busybox"
    while read -r applet; do
        [ "$applet" = bin/busybox ] || ln -s /bin/busybox "$tree/$applet"
    done < <(/bin/busybox --list-full | sed 's|^linuxrc$|sbin/linuxrc|')
    echo 'root::0:0:root:/root:/bin/sh' > "$tree/etc/passwd"
    echo 'root::19000:0:99999:7:::' > "$tree/etc/shadow"; chmod 600 "$tree/etc/shadow"
    echo 'root:x:0:' > "$tree/etc/group"
    echo aquifer-guest > "$tree/etc/hostname"
    printf 'Aquifer test guest, Debian kernel %s, started by %s from its own disk\n\n' "$release" "$firmware" > "$tree/etc/issue"
    echo 'LABEL=aquifer-root / ext4 noatime 0 1' > "$tree/etc/fstab"
    echo 0 > "$tree/etc/last-round"
    # The shell's history would be a file nobody expects.
    echo 'export HISTFILE=/tmp/history' > "$tree/etc/profile"
    install -m 755 "$here/guest/rcS" "$tree/etc/init.d/rcS"
    install -m 644 "$here/guest/inittab" "$tree/etc/inittab"
    install -m 755 "$here/guest/churn" "$tree/usr/sbin/churn"
    mkdir -p "$tree/etc/acpi/PWRF"
    printf '#!/bin/sh\npoweroff\n' > "$tree/etc/acpi/PWRF/00000080"; chmod 755 "$tree/etc/acpi/PWRF/00000080"
    cp -a "$scratch/kernel/lib/modules" "$tree/lib/"
    depmod -b "$tree" "$release"
    cp "$scratch/kernel/boot/vmlinuz-$release" "$tree/boot/vmlinuz"
    cat > "$tree/boot/grub/grub.cfg" <<GRUB
serial --unit=0 --speed=115200
terminal_output serial
echo "grub: starting Debian $release"
linux /boot/vmlinuz console=ttyS0,115200 quiet no_timer_check panic=-1 random.trust_cpu=on
initrd /boot/initrd.img
boot
GRUB
    # Noise from a cipher: incompressible, and the same on every machine.
    openssl enc -aes-256-ctr -nosalt -pbkdf2 -pass pass:aquifer -in /dev/zero 2>/dev/null \
        | head -c $((noise_mib * MIB)) > "$tree/srv/data/noise" || true
    local n
    for n in 1 2 3 4 5 6; do yes "old file $n" | head -c $((n * 900001)) > "$tree/srv/data/old-$n" || true; done
}

make_root_file_system() {
    # Owner and times are fixed so that the same inputs give the same disk.
    find "$tree" -exec touch -h -d @1700000000 {} +
    E2FSPROGS_FAKE_TIME=1700000000 mke2fs -q -F -t ext4 -L aquifer-root -U 3f1f4b5a-6c0e-4b0e-9a55-a0f1fe000001 \
        -E "root_owner=0:0,hash_seed=3f1f4b5a-6c0e-4b0e-9a55-a0f1fe000002,lazy_itable_init=0,offset=$((root_start_mib * MIB))" \
        -d "$tree" "$out" "${root_mib}M"
}

# Finds its configuration on the root file system, so that the kernel lies where a distribution puts it.
grub_image() {
    local format=$1 modules=$2 to=$3
    cat > "$scratch/early.cfg" <<'GRUB'
search --no-floppy --set=root --label aquifer-root
set prefix=($root)/boot/grub
configfile /boot/grub/grub.cfg
GRUB
    # shellcheck disable=SC2086
    grub-mkimage -O "$format" -p /boot/grub -c "$scratch/early.cfg" -o "$to" \
        ext2 part_gpt part_msdos search search_label configfile normal linux serial echo terminal boot minicmd $modules
}

partition_uefi() {
    sfdisk --quiet --no-tell-kernel "$out" <<PARTS
label: gpt
label-id: 3F1F4B5A-6C0E-4B0E-9A55-A0F1FE000003
first-lba: 2048
start=$((2 * MIB / SECTOR)), size=$((esp_mib * MIB / SECTOR)), type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=esp
start=$((root_start_mib * MIB / SECTOR)), size=$((root_mib * MIB / SECTOR)), type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root
PARTS
}

partition_bios() {
    sfdisk --quiet --no-tell-kernel "$out" <<PARTS
label: dos
label-id: 0xa0f1fe01
start=$((root_start_mib * MIB / SECTOR)), size=$((root_mib * MIB / SECTOR)), type=83, bootable
PARTS
}

install_uefi() {
    grub_image x86_64-efi efi_gop "$scratch/BOOTX64.EFI"
    truncate -s $((esp_mib * MIB)) "$scratch/esp"
    mkfs.vfat -F 16 -n ESP "$scratch/esp" >/dev/null
    mmd -i "$scratch/esp" ::EFI ::EFI/BOOT
    mcopy -i "$scratch/esp" "$scratch/BOOTX64.EFI" ::EFI/BOOT/BOOTX64.EFI
    dd if="$scratch/esp" of="$out" bs=$MIB seek=2 conv=notrunc,sparse status=none
}

install_bios() {
    grub_image i386-pc biosdisk "$scratch/core.img"
    # The boot sector (without the partition table's bytes) and, right behind it, the core: where each looks for the next.
    dd if=/usr/lib/grub/i386-pc/boot.img of="$out" bs=1 count=440 conv=notrunc status=none
    dd if="$scratch/core.img" of="$out" bs=$SECTOR seek=1 conv=notrunc status=none
}

rm -f "$out"; truncate -s $((size_mib * MIB)) "$out"
fetch_kernel
make_user_space
make_initramfs
"partition_$firmware"
make_root_file_system
"install_$firmware"
echo "make-guest: $out ($firmware, $size_mib MiB virtual, $(du -m "$out" | cut -f1) MiB used, kernel $release)" >&2
