//! The superblock: the shape of the file system, and every reason not to trust it.
//!
//! Invariant: the fields of a [`Superblock`] fit each other and the volume; whoever has one may count with them.

use super::super::source::{Stop, ensure, le16, le32};

const COMPAT_KNOWN: u32 =
    0x1 | 0x2 | 0x4 | 0x8 | COMPAT_RESIZE | 0x20 | COMPAT_SPARSE2 | COMPAT_FAST_COMMIT | 0x800 | 0x1000;
const COMPAT_JOURNAL: u32 = 0x4;
const COMPAT_RESIZE: u32 = 0x10;
const COMPAT_SPARSE2: u32 = 0x200;
const COMPAT_FAST_COMMIT: u32 = 0x400;
/// File types, recovery, meta groups, extents, 64 bits, MMP, flexible groups, attributes in inodes, seed of checksums,
/// large folders, data in inodes, encryption, case folding.
const INCOMPAT_KNOWN: u32 = 0x2
    | INCOMPAT_RECOVER
    | INCOMPAT_META_BG
    | 0x40
    | INCOMPAT_64BIT
    | 0x100
    | 0x200
    | 0x400
    | INCOMPAT_SEED
    | 0x4000
    | 0x8000
    | 0x1_0000
    | 0x2_0000;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_SEED: u32 = 0x2000;
/// Sparse copies, large and huge files, checksums of groups, link counts, large inodes, quota, checksums of metadata,
/// read-only, projects, verity, orphans in a file.
const RO_KNOWN: u32 =
    RO_SPARSE | 0x2 | 0x8 | RO_GROUP_CSUM | 0x20 | 0x40 | 0x100 | RO_CSUM | 0x1000 | 0x2000 | 0x8000 | 0x1_0000;
const RO_SPARSE: u32 = 0x1;
const RO_GROUP_CSUM: u32 = 0x10;
const RO_BIGALLOC: u32 = 0x200;
const RO_CSUM: u32 = 0x400;

/// Most groups: 128 TiB of the usual size, and 64 MiB of descriptors.
const GROUPS_MAX: u64 = 1 << 20;

/// How descriptors and bitmaps are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checks {
    /// Only by the number of free blocks.
    Counts,
    /// Descriptors by CRC-16.
    Groups,
    /// Descriptors and bitmaps by CRC-32C from this seed.
    All(u32),
}

/// The shape of a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) block_bytes: u64,
    pub(super) blocks: u64,
    pub(super) first_block: u64,
    pub(super) blocks_per_group: u64,
    pub(super) groups: u64,
    pub(super) descriptor_bytes: usize,
    pub(super) inodes_per_group: u64,
    pub(super) inode_bytes: u64,
    pub(super) reserved_table_blocks: u64,
    pub(super) uuid: [u8; 16],
    pub(super) checks: Checks,
    pub(super) needs_recovery: bool,
    pub(super) journal_inode: u32,
    first_meta_group: Option<u64>,
    compat: u32,
    incompat: u32,
    ro: u32,
    backup_groups: [u64; 2],
}

/// CRC-32C as this file system counts it: no inversion at either end.
pub(super) fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

impl Superblock {
    /// Reads a superblock of a volume of `size` bytes.
    pub(super) fn parse(raw: &[u8; 1024], size: u64) -> Result<Self, Stop> {
        ensure(le16(raw, 0x38) == 0xef53, "no superblock")?;
        ensure(le32(raw, 0x4c) == 1, "an old revision")?;
        let (compat, incompat, ro) = (le32(raw, 0x5c), le32(raw, 0x60), le32(raw, 0x64));
        ensure(ro & RO_BIGALLOC == 0, "it counts in clusters")?;
        let known = compat & !COMPAT_KNOWN == 0 && incompat & !INCOMPAT_KNOWN == 0 && ro & !RO_KNOWN == 0;
        ensure(known, "a feature that is not known here")?;
        let uuid = raw.get(0x68..0x78).and_then(|u| u.try_into().ok()).unwrap_or_default();
        let checks = checks(raw, incompat, ro, &uuid)?;
        let needs_recovery = incompat & INCOMPAT_RECOVER != 0;
        let state = le16(raw, 0x3a);
        ensure(state & 2 == 0, "it has noted errors")?;
        ensure(needs_recovery || state & 1 != 0, "it was not unmounted")?;
        let log = le32(raw, 0x18);
        ensure(log <= 6, "blocks of a size nobody uses")?;
        let block_bytes = 1024u64 << log;
        let is_64 = incompat & INCOMPAT_64BIT != 0;
        let high = if is_64 { u64::from(le32(raw, 0x150)) } else { 0 };
        let sb = Self {
            block_bytes,
            blocks: high << 32 | u64::from(le32(raw, 0x4)),
            first_block: le32(raw, 0x14).into(),
            blocks_per_group: le32(raw, 0x20).into(),
            groups: 0,
            descriptor_bytes: if is_64 { le16(raw, 0xfe).into() } else { 32 },
            inodes_per_group: le32(raw, 0x28).into(),
            inode_bytes: le16(raw, 0x58).into(),
            reserved_table_blocks: if compat & COMPAT_RESIZE != 0 { le16(raw, 0xce).into() } else { 0 },
            uuid,
            checks,
            needs_recovery,
            journal_inode: if compat & COMPAT_JOURNAL != 0 { le32(raw, 0xe0) } else { 0 },
            first_meta_group: (incompat & INCOMPAT_META_BG != 0).then(|| le32(raw, 0x104).into()),
            compat,
            incompat,
            ro,
            backup_groups: [le32(raw, 0x24c).into(), le32(raw, 0x250).into()],
        };
        sb.bounded(size, is_64, le32(raw, 0x24), le32(raw, 0x1c) == log)
    }

    /// Checks that the fields fit each other, and counts the groups.
    fn bounded(self, size: u64, is_64: bool, clusters: u32, same_clusters: bool) -> Result<Self, Stop> {
        let fits = self.blocks.checked_mul(self.block_bytes).is_some_and(|bytes| bytes <= size);
        ensure(fits, "it is larger than its partition")?;
        ensure(self.first_block == u64::from(self.block_bytes == 1024), "it begins at another block")?;
        ensure(self.blocks > self.first_block, "it has no blocks")?;
        let per_group = self.blocks_per_group;
        let sound = per_group >= 256 && per_group <= 8 * self.block_bytes && per_group.is_multiple_of(8);
        ensure(sound && u64::from(clusters) == per_group && same_clusters, "groups of a size nobody uses")?;
        let sound = (128..=self.block_bytes).contains(&self.inode_bytes) && self.inode_bytes.is_power_of_two();
        ensure(sound && self.inodes_per_group <= 8 * self.block_bytes, "inodes of a size nobody uses")?;
        let size = self.descriptor_bytes;
        let sound = !is_64 || (64..=1024).contains(&size) && size.is_power_of_two();
        ensure(sound, "descriptors of a size nobody uses")?;
        let groups = (self.blocks - self.first_block).div_ceil(per_group);
        ensure(groups <= GROUPS_MAX, "more groups than are looked at")?;
        Ok(Self { groups, ..self })
    }

    /// Whether a copy of the superblock says the same of everything that is counted with here.
    pub(super) fn same_shape(&self, raw: &[u8; 1024]) -> bool {
        let high = if self.incompat & INCOMPAT_64BIT != 0 { u64::from(le32(raw, 0x150)) } else { 0 };
        le16(raw, 0x38) == 0xef53
            && high << 32 | u64::from(le32(raw, 0x4)) == self.blocks
            && le32(raw, 0x5c) == self.compat
            && le32(raw, 0x60) | INCOMPAT_RECOVER == self.incompat | INCOMPAT_RECOVER
            && le32(raw, 0x64) == self.ro
            && (self.first_meta_group.is_none_or(|first| u64::from(le32(raw, 0x104)) == first))
    }

    /// Whether a copy of the superblock is one of this. Features are left out, for a kernel that begins to use one notes it
    /// in the first only; and after growing, copies may say the old size and, of older kernels, the wrong group.
    pub(super) fn is_copy(&self, raw: &[u8; 1024]) -> bool {
        let high = if self.incompat & INCOMPAT_64BIT != 0 { u64::from(le32(raw, 0x150)) } else { 0 };
        le16(raw, 0x38) == 0xef53
            && (1..=self.blocks).contains(&(high << 32 | u64::from(le32(raw, 0x4))))
            && u64::from(le32(raw, 0x14)) == self.first_block
            && 1024u64.checked_shl(le32(raw, 0x18)) == Some(self.block_bytes)
            && u64::from(le32(raw, 0x20)) == self.blocks_per_group
            && u64::from(le32(raw, 0x28)) == self.inodes_per_group
            && raw.get(0x68..0x78) == Some(&self.uuid[..])
    }

    /// Whether the journal may hold changes that are no blocks.
    pub(super) fn has_fast_commits(&self) -> bool {
        self.compat & COMPAT_FAST_COMMIT != 0
    }

    /// Block that the superblock lies in.
    pub(super) fn superblock_place(&self) -> u64 {
        self.first_block
    }

    pub(super) fn descriptors_per_block(&self) -> u64 {
        self.block_bytes / self.descriptor_bytes.max(32) as u64
    }

    /// Blocks of descriptors.
    pub(super) fn table_blocks(&self) -> u64 {
        self.groups.div_ceil(self.descriptors_per_block().max(1))
    }

    /// Where a block of descriptors lies.
    pub(super) fn table_place(&self, number: u64) -> Option<u64> {
        match self.first_meta_group {
            Some(first) if number >= first => {
                let group = number.checked_mul(self.descriptors_per_block())?;
                Some(self.group_first(group) + u64::from(self.has_superblock(group)))
            }
            _ => self.first_block.checked_add(1)?.checked_add(number),
        }
    }

    /// Whether groups keep the descriptors of their own neighbours.
    pub(super) fn has_meta_groups(&self) -> bool {
        self.first_meta_group.is_some()
    }

    /// First block of a group.
    pub(super) fn group_first(&self, group: u64) -> u64 {
        // Both are bounded: groups by the blocks there are.
        self.first_block + group * self.blocks_per_group
    }

    /// Blocks of a group; the last one may have fewer.
    pub(super) fn group_blocks(&self, group: u64) -> u64 {
        self.blocks.saturating_sub(self.group_first(group)).min(self.blocks_per_group)
    }

    /// Whether a group begins with a copy of superblock and descriptors.
    pub(super) fn has_superblock(&self, group: u64) -> bool {
        if self.compat & COMPAT_SPARSE2 != 0 {
            return group == 0 || self.backup_groups.contains(&group);
        }
        let power = |base: u64| {
            let mut at = base;
            while at < group {
                at *= base;
            }
            at == group
        };
        group <= 1 || self.ro & RO_SPARSE == 0 || [3, 5, 7].into_iter().any(power)
    }

    /// Blocks of each group's inode table.
    pub(super) fn inode_table_blocks(&self) -> u64 {
        (self.inodes_per_group * self.inode_bytes).div_ceil(self.block_bytes)
    }

    /// Whether a group may be marked as never used.
    pub(super) fn may_be_uninitialised(&self) -> bool {
        self.checks != Checks::Counts
    }
}

fn checks(raw: &[u8; 1024], incompat: u32, ro: u32, uuid: &[u8; 16]) -> Result<Checks, Stop> {
    if ro & RO_CSUM == 0 {
        return Ok(if ro & RO_GROUP_CSUM == 0 { Checks::Counts } else { Checks::Groups });
    }
    ensure(ro & RO_GROUP_CSUM == 0, "two kinds of checksums")?;
    let known = raw.get(0x175) == Some(&1);
    ensure(known && crc(!0, raw.get(..0x3fc).unwrap_or_default()) == le32(raw, 0x3fc), "its superblock is damaged")?;
    let seed = if incompat & INCOMPAT_SEED != 0 { le32(raw, 0x270) } else { crc(!0, uuid) };
    Ok(Checks::All(seed))
}
