//! A guest of 512 bytes: it starts in a second, reads, checks and copies sectors, and says on the serial port what
//! it saw. Enough of a machine to prove that one runs, goes on, and reads and writes the right bytes.
//!
//! What it says: its banner, then for each sector `.` (right, and copied), `X` (the wrong bytes) or `E` (the firmware
//! reported an error); `R` after a whole round. A `q` on the serial port turns it off, answered by `Q`.
//!
//! The disk: boot sector; [`SECTORS`] sectors from [`FIRST_LBA`], each beginning with its own number; as many from
//! [`FIRST_LBA`] + [`AWAY_SECTORS`], which the guest fills with copies of those (so each begins with the number of
//! the other). What else is on the disk it does not touch.
//!
//! Invariants
//! - [`put_on`] changes the boot sector and the guest's own sectors and nothing else.

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;

/// First sector the guest reads.
pub const FIRST_LBA: u32 = 2048;

/// Sectors it goes through in one round, about one in 55 ms.
pub const SECTORS: u32 = 16;

/// Distance to the copies, in sectors.
pub const AWAY_SECTORS: u32 = 4096;

/// Smallest disk that has room for its areas, bytes.
pub const DISK_BYTES_MIN: usize = 8 << 20;

/// Longest banner, bytes.
pub const BANNER_BYTES_MAX: usize = SECTOR_BYTES - 2 - BANNER_AT - 1;

/// Where the code keeps its variables: drive, current, first, count, away.
const DATA_AT: usize = 0x158;

/// Where the packet of the BIOS's extended read is.
const PACKET_AT: usize = DATA_AT + 20;

/// Where the banner is, with a zero behind it.
const BANNER_AT: usize = PACKET_AT + 16;

/// Real mode, loaded at 0x7c00. Variables from 0x7d58: drive, current, first, count, away, disk packet, text.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0x31, 0xc0, // 7c00: xor ax,ax
    0x8e, 0xd8, // 7c02: mov ds,ax
    0x8e, 0xc0, // 7c04: mov es,ax
    0x8e, 0xd0, // 7c06: mov ss,ax
    0xbc, 0x00, 0x7c, // 7c08: mov sp,0x7c00
    0xfc, // 7c0b: cld
    0xfb, // 7c0c: sti
    0x88, 0x16, 0x58, 0x7d, // 7c0d: mov BYTE PTR ds:0x7d58,dl
    0xbe, 0x7c, 0x7d, // 7c11: mov si,0x7d7c
    0xac, // 7c14: lods al,BYTE PTR ds:[si]
    0x84, 0xc0, // 7c15: test al,al
    0x74, 0x05, // 7c17: je 0x7c1e
    0xe8, 0x82, 0x00, // 7c19: call 0x7c9e
    0xeb, 0xf6, // 7c1c: jmp 0x7c14
    0x66, 0xa1, 0x5c, 0x7d, // 7c1e: mov eax,ds:0x7d5c
    0x66, 0x03, 0x06, 0x60, 0x7d, // 7c22: add eax,DWORD PTR ds:0x7d60
    0x66, 0xa3, 0x74, 0x7d, // 7c27: mov ds:0x7d74,eax
    0xb4, 0x42, // 7c2b: mov ah,0x42
    0xe8, 0x64, 0x00, // 7c2d: call 0x7c94
    0x72, 0x5a, // 7c30: jb 0x7c8c
    0x66, 0xa1, 0x00, 0x80, // 7c32: mov eax,ds:0x8000
    0x66, 0x3b, 0x06, 0x74, 0x7d, // 7c36: cmp eax,DWORD PTR ds:0x7d74
    0x75, 0x53, // 7c3b: jne 0x7c90
    0x66, 0x03, 0x06, 0x68, 0x7d, // 7c3d: add eax,DWORD PTR ds:0x7d68
    0x66, 0xa3, 0x74, 0x7d, // 7c42: mov ds:0x7d74,eax
    0xb8, 0x00, 0x43, // 7c46: mov ax,0x4300
    0xe8, 0x48, 0x00, // 7c49: call 0x7c94
    0x72, 0x3e, // 7c4c: jb 0x7c8c
    0xb0, 0x2e, // 7c4e: mov al,0x2e
    0xe8, 0x4b, 0x00, // 7c50: call 0x7c9e
    0x66, 0xa1, 0x5c, 0x7d, // 7c53: mov eax,ds:0x7d5c
    0x66, 0x40, // 7c57: inc eax
    0x66, 0x3b, 0x06, 0x64, 0x7d, // 7c59: cmp eax,DWORD PTR ds:0x7d64
    0x72, 0x08, // 7c5e: jb 0x7c68
    0xb0, 0x52, // 7c60: mov al,0x52
    0xe8, 0x39, 0x00, // 7c62: call 0x7c9e
    0x66, 0x31, 0xc0, // 7c65: xor eax,eax
    0x66, 0xa3, 0x5c, 0x7d, // 7c68: mov ds:0x7d5c,eax
    0xf4, // 7c6c: hlt
    0xba, 0xfd, 0x03, // 7c6d: mov dx,0x3fd
    0xec, // 7c70: in al,dx
    0xa8, 0x01, // 7c71: test al,0x1
    0x74, 0xa9, // 7c73: je 0x7c1e
    0xba, 0xf8, 0x03, // 7c75: mov dx,0x3f8
    0xec, // 7c78: in al,dx
    0x3c, 0x71, // 7c79: cmp al,0x71
    0x75, 0xa1, // 7c7b: jne 0x7c1e
    0xb0, 0x51, // 7c7d: mov al,0x51
    0xe8, 0x1c, 0x00, // 7c7f: call 0x7c9e
    0xba, 0x04, 0x06, // 7c82: mov dx,0x604
    0xb8, 0x00, 0x20, // 7c85: mov ax,0x2000
    0xef, // 7c88: out dx,ax
    0xf4, // 7c89: hlt
    0xeb, 0xfd, // 7c8a: jmp 0x7c89
    0xb0, 0x45, // 7c8c: mov al,0x45
    0xeb, 0xc0, // 7c8e: jmp 0x7c50
    0xb0, 0x58, // 7c90: mov al,0x58
    0xeb, 0xbc, // 7c92: jmp 0x7c50
    0x8a, 0x16, 0x58, 0x7d, // 7c94: mov dl,BYTE PTR ds:0x7d58
    0xbe, 0x6c, 0x7d, // 7c98: mov si,0x7d6c
    0xcd, 0x13, // 7c9b: int 0x13
    0xc3, // 7c9d: ret
    0xba, 0xf8, 0x03, // 7c9e: mov dx,0x3f8
    0xee, // 7ca1: out dx,al
    0xc3, // 7ca2: ret
];

/// Puts the guest on a disk; it greets with `banner`, of which [`BANNER_BYTES_MAX`] bytes are kept.
/// A disk smaller than [`DISK_BYTES_MIN`] is left as it is.
pub fn put_on(disk: &mut [u8], banner: &str) {
    if disk.len() < DISK_BYTES_MIN {
        return;
    }
    put(disk, 0, &boot_sector(banner));
    for lba in FIRST_LBA..FIRST_LBA + SECTORS {
        put(disk, lba as usize * SECTOR_BYTES, &lba.to_le_bytes());
    }
}

fn boot_sector(banner: &str) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    put(&mut sector, 0, CODE);
    for (at, value) in (DATA_AT + 8..).step_by(4).zip([FIRST_LBA, SECTORS, AWAY_SECTORS]) {
        put(&mut sector, at, &value.to_le_bytes());
    }
    // Its own length, one sector, to 0000:8000.
    put(&mut sector, PACKET_AT, &[16, 0, 1, 0, 0x00, 0x80]);
    put(&mut sector, BANNER_AT, banner.as_bytes().get(..BANNER_BYTES_MAX).unwrap_or(banner.as_bytes()));
    put(&mut sector, SECTOR_BYTES - 2, &[0x55, 0xaa]);
    sector
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + what.len()) {
        place.copy_from_slice(what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_banner_leaves_the_signature() {
        let sector = boot_sector(&"x".repeat(600));
        assert_eq!(sector[BANNER_AT + BANNER_BYTES_MAX..], [0, 0x55, 0xaa]);
        assert_eq!(CODE.len(), DATA_AT.min(CODE.len()), "the code ends before its variables");
    }
}
