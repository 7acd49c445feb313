//! Marks of other owners: what says that a volume is a member of an array, a container, or another file system.
//!
//! Old superblocks outlive their file system: whoever makes an array or a pool over it writes to a few places of his own and
//! leaves the rest. So an ext4 superblock alone proves nothing while somebody else's mark is there too.
//!
//! Invariants
//! - A mark is looked for in each place that its owner writes it to; one that is found is a doubt, whatever else fits.
//! - What is read is bounded: some 60 small places and the four labels of ZFS, less than 2 MiB.
//!
//! Not here: which of two owners is right. Everything is copied then.

use std::ops::Range;

use super::source::{Source, Stop};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Bytes at a place, counted from the start of the volume, and whose they are.
type Mark = (u64, &'static [u8], &'static str);

const RAID: &str = "it is a member of a RAID";
const LVM: &str = "it is a volume of LVM";
const LUKS: &str = "it is encrypted by LUKS";
const BITLOCKER: &str = "it is encrypted by BitLocker";
const FAT: &str = "it has a boot sector of FAT";
const BTRFS: &str = "it has a superblock of Btrfs";
const UFS: &str = "it has a superblock of UFS";
const SWAP: &str = "it is swap space";
const F2FS: &str = "it has a superblock of F2FS";
const DRBD: &str = "it is a device of DRBD";
const ZFS: &str = "it is a device of ZFS";
const OPTICAL: &str = "it has a file system of optical discs";
const OCFS2: &str = "it has a superblock of OCFS2";
const MAPPED: &str = "it is a part of a mapped device";

const MD: [&[u8]; 2] = [&[0xfc, 0x4e, 0x2b, 0xa9], &[0xa9, 0x2b, 0x4e, 0xfc]];
const UBERBLOCK: [[u8; 8]; 2] = [[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0xba, 0xb1, 0x0c]];

/// Marks whose places are counted from the start.
const HEAD: &[Mark] = &[
    (0, b"XFSB", "it has a superblock of XFS"),
    (0, b"LUKS\xba\xbe", LUKS),
    (0, b"dmvdo001", MAPPED),
    (0, b"integrt\0", MAPPED),
    (0, b"verity\0\0", MAPPED),
    (0, b"SnAp", MAPPED),
    (0, b"HM\x01\0", LVM),
    (516, b"!Stra0tis", MAPPED),
    (0, b"bluestore block device", "it is a device of Ceph"),
    (3, b"-FVE-FS-", BITLOCKER),
    (3, b"NTFS    ", "it has a boot sector of NTFS"),
    (3, b"ReFS\0\0\0\0", "it has a boot sector of ReFS"),
    (3, b"EXFAT   ", FAT),
    (54, b"FAT", FAT),
    (82, b"FAT32", FAT),
    (32, b"NXSB", "it is a container of APFS"),
    (0, b"LABELONE", LVM),
    (512, b"LABELONE", LVM),
    (1024, b"LABELONE", LVM),
    (1536, b"LABELONE", LVM),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], F2FS),
    (5120, &[0x10, 0x20, 0xf5, 0xf2], F2FS),
    // bcache and bcachefs begin alike.
    (4 * KIB + 24, &[0xc6, 0x85, 0x73, 0xf6], "it is a device of bcache"),
    (2 * KIB, b"OCFSV2", OCFS2),
    (4 * KIB, b"OCFSV2", OCFS2),
    (8 * KIB, b"OCFSV2", OCFS2),
    (8 * KIB, &[0x49, 0xe8, 0x95, 0xf9], "it has a superblock of HPFS"),
    (8 * KIB, &[0x22, 0x11, 0x19, 0x68], "it has a superblock of QNX"),
    (8 * KIB + 52, b"ReIsEr", "it has a superblock of ReiserFS"),
    (64 * KIB + 52, b"ReIsEr", "it has a superblock of ReiserFS"),
    (64 * KIB, b"ReIsEr4", "it has a superblock of Reiser4"),
    // UDF and ISO 9660: their makers may leave what lies before, an old superblock too.
    (32 * KIB + 1, b"BEA01", OPTICAL),
    (32 * KIB + 1, b"BOOT2", OPTICAL),
    (32 * KIB + 1, b"NSR0", OPTICAL),
    (32 * KIB + 1, b"CD001", OPTICAL),
    (32 * KIB + 9, b"CDROM", OPTICAL),
    (32 * KIB, b"JFS1", "it has a superblock of JFS"),
    (64 * KIB, &[0x01, 0x16, 0x19, 0x70], "it has a superblock of GFS2"),
    (64 * KIB + 64, b"_BHRfS_M", BTRFS),
    (64 * MIB + 64, b"_BHRfS_M", BTRFS),
    (256 * GIB + 64, b"_BHRfS_M", BTRFS),
    (MIB, &[0x0d, 0xd0, 0x01, 0xc0], "it is a device of VMFS"),
];

/// Where a superblock of UFS may lie, and its magics of both versions.
const UFS_PLACES: [u64; 3] = [8 * KIB, 64 * KIB, 256 * KIB];
const UFS_MAGICS: [u32; 2] = [0x0001_1954, 0x1954_0119];

/// Says whose mark a volume bears, as a doubt.
pub(super) fn none(source: &mut Source<'_>, volume: &Range<u64>) -> Result<(), Stop> {
    let mut look = Look { source, volume: volume.clone() };
    for (at, magic, whose) in HEAD {
        look.no(*at, magic, whose)?;
    }
    for at in [0, 4 * KIB] {
        look.no_raid(at)?;
    }
    // LUKS2 keeps a second header behind the first, whose size is one of these.
    for shift in 0..9 {
        look.no((16 * KIB) << shift, b"SKUL\xba\xbe", LUKS)?;
    }
    for page in (0..5).map(|shift| (4 * KIB) << shift) {
        for magic in [&b"SWAP-SPACE"[..], b"SWAPSPACE2", b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001"] {
            look.no(page - 10, magic, SWAP)?;
        }
    }
    for at in UFS_PLACES.map(|at| at + 1372) {
        for magic in UFS_MAGICS {
            look.no(at, &magic.to_le_bytes(), UFS)?;
            look.no(at, &magic.to_be_bytes(), UFS)?;
        }
    }
    look.tail()?;
    look.zfs()
}

struct Look<'s, 'a> {
    source: &'s mut Source<'a>,
    volume: Range<u64>,
}

impl Look<'_, '_> {
    fn size(&self) -> u64 {
        self.volume.end - self.volume.start
    }

    /// Bytes of the volume; `None` where it is too short to hold them.
    fn bytes(&mut self, at: u64, len: usize) -> Result<Option<Vec<u8>>, Stop> {
        match at.checked_add(len as u64) {
            Some(end) if end <= self.size() => self.source.vec(self.volume.start + at, len).map(Some),
            _ => Ok(None),
        }
    }

    /// A doubt where these bytes are.
    fn no(&mut self, at: u64, magic: &[u8], whose: &'static str) -> Result<(), Stop> {
        match self.bytes(at, magic.len())? {
            Some(found) if found == magic => Err(Stop::Doubt(whose)),
            _ => Ok(()),
        }
    }

    fn no_raid(&mut self, at: u64) -> Result<(), Stop> {
        MD.into_iter().try_for_each(|magic| self.no(at, magic, RAID))
    }

    /// What lies near the end.
    fn tail(&mut self) -> Result<(), Stop> {
        let size = self.size();
        // md: version 0.90 in the last whole 64 KiB but one, version 1.0 between 8 and 12 KiB before the end.
        for at in [(size & !0xffff).checked_sub(64 * KIB), size.checked_sub(8 * KIB).map(|at| at & !0xfff)] {
            at.map_or(Ok(()), |at| self.no_raid(at))?;
        }
        for (back, magic) in [(1024, &b"Intel Raid ISM"[..]), (512, &[0xde, 0x11, 0xde, 0x11])] {
            size.checked_sub(back).map_or(Ok(()), |at| self.no(at, magic, RAID))?;
        }
        // All its versions begin like this.
        for at in [size.checked_sub(4 * KIB), (size & !0xfff).checked_sub(4 * KIB)].into_iter().flatten() {
            self.no(at.saturating_add(60), &[0x83, 0x74, 0x02], DRBD)?;
        }
        Ok(())
    }

    /// Two labels at the start, two at the end; each ends with a ring of uberblocks, of which one is enough.
    fn zfs(&mut self) -> Result<(), Stop> {
        const LABEL: u64 = 256 * KIB;
        let end = self.size() / LABEL * LABEL;
        let labels = [Some(0), Some(LABEL), end.checked_sub(2 * LABEL), end.checked_sub(LABEL)];
        for at in labels.into_iter().flatten() {
            for half in [128 * KIB, 192 * KIB] {
                let Some(ring) = self.bytes(at + half, 64 << 10)? else { continue };
                let (slots, _) = ring.as_chunks::<1024>();
                let is_one = |slot: &[u8; 1024]| UBERBLOCK.iter().any(|magic| slot.starts_with(magic));
                if slots.iter().any(is_one) {
                    return Err(Stop::Doubt(ZFS));
                }
            }
        }
        Ok(())
    }
}
