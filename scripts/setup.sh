#!/usr/bin/env bash
# Installs what building, testing and the demo need on Debian 12: the peers we are judged by
# (QEMU 10 from backports, nbdkit, libnbd, fio), file system tools and a boot firmware.
# Runs again without effect once everything is there. Does nothing on a machine that has it all.
set -euo pipefail

QEMU=(qemu-system-x86 qemu-utils qemu-block-extra)
PLAIN=(build-essential pkg-config ca-certificates curl git make python3 python3-pip
       nbdkit libnbd-bin python3-libnbd fio nbd-client ovmf gdisk fdisk dosfstools mtools
       e2fsprogs xfsprogs btrfs-progs debootstrap grub-common grub-pc-bin grub-efi-amd64-bin busybox-static cpio kmod iproute2 fuse3 zstd lz4 xz-utils openssl postgresql socat jq strace tmux rsync b3sum)

missing() { local p; for p in "$@"; do dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || echo "$p"; done; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

install_packages() {
    local want; want=$(missing "$@"); [ -z "$want" ] && return 0
    echo "setup: installing $(echo "$want" | tr '\n' ' ')" >&2
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${APT_SUITE[@]}" $want >/tmp/aquifer-setup.log 2>&1 \
        || { tail -20 /tmp/aquifer-setup.log >&2; exit 1; }
}

main() {
    if [ ! -e /etc/debian_version ]; then echo "setup: this script knows Debian only; install by hand: ${QEMU[*]} ${PLAIN[*]}" >&2; exit 1; fi
    if [ -n "$(missing "${QEMU[@]}" "${PLAIN[@]}")" ]; then
        # QEMU 7.2 of plain Debian 12 is too old for what the tests compare with; backports carry 10.
        if ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
            as_root sh -c 'echo "deb http://deb.debian.org/debian bookworm-backports main" > /etc/apt/sources.list.d/aquifer-backports.list'
        fi
        as_root apt-get update >/tmp/aquifer-setup.log 2>&1 || { tail -20 /tmp/aquifer-setup.log >&2; exit 1; }
    fi
    APT_SUITE=(-t bookworm-backports); install_packages "${QEMU[@]}"
    APT_SUITE=();                      install_packages "${PLAIN[@]}"
    if ! command -v cargo >/dev/null; then
        echo "setup: no cargo found. Install Rust 1.94 or newer from your distribution or https://rustup.rs, then run this again." >&2
        exit 1
    fi
}
main "$@"
