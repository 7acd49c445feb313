//! Group descriptors: where a group's tables lie, and whether its bitmap is the one that is meant.
//!
//! Invariant: a [`Descriptor`] has matched its checksum, where there is one, and its tables lie in the file system.

use super::{
    super::source::{Stop, ensure, le16, le32},
    superblock::{Checks, Superblock, crc},
};

const BLOCK_UNINIT: u16 = 0x2;

/// What a group says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Block of the block bitmap.
    pub(super) bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    free: u32,
    flags: u16,
    /// Checksum of the block bitmap, and how many bits of it are kept.
    bitmap_crc: u32,
    wide: bool,
    uninitialised: bool,
}

impl Descriptor {
    /// Reads the descriptor of a group; `bytes` has the length the superblock names.
    pub(super) fn parse(sb: &Superblock, group: u64, bytes: &[u8]) -> Result<Self, Stop> {
        let stored = le16(bytes, 0x1e);
        match checksum(sb, group, bytes) {
            Some(counted) => ensure(counted == stored, "a descriptor that is damaged")?,
            None => ensure(bytes.iter().any(|b| *b != 0), "a descriptor of nothing")?,
        }
        let wide = bytes.len() >= 64;
        let high = |at: usize| if wide { u64::from(le32(bytes, at)) << 32 } else { 0 };
        let high16 = |at: usize| if wide { u32::from(le16(bytes, at)) << 16 } else { 0 };
        let flags = le16(bytes, 0x12);
        let out = Self {
            bitmap: high(0x20) | u64::from(le32(bytes, 0)),
            inode_bitmap: high(0x24) | u64::from(le32(bytes, 4)),
            inode_table: high(0x28) | u64::from(le32(bytes, 8)),
            free: high16(0x2c) | u32::from(le16(bytes, 0xc)),
            flags,
            bitmap_crc: high16(0x38) | u32::from(le16(bytes, 0x18)),
            wide,
            uninitialised: sb.may_be_uninitialised() && flags & BLOCK_UNINIT != 0,
        };
        let inside = |(block, count): (u64, u64)| {
            block > sb.first_block && block.checked_add(count).is_some_and(|end| end <= sb.blocks)
        };
        ensure(out.metadata(sb).into_iter().all(inside), "a group's tables leave it")?;
        Ok(out)
    }

    /// Its tables, as first block and count.
    pub(super) fn metadata(&self, sb: &Superblock) -> [(u64, u64); 3] {
        [(self.bitmap, 1), (self.inode_bitmap, 1), (self.inode_table, sb.inode_table_blocks())]
    }

    /// Block of the inode table.
    pub(super) fn inode_table(&self) -> u64 {
        self.inode_table
    }

    /// Whether another state of the group has its tables in the same places.
    pub(super) fn same_places(&self, other: &Self) -> bool {
        (self.bitmap, self.inode_bitmap, self.inode_table) == (other.bitmap, other.inode_bitmap, other.inode_table)
    }

    /// Whether the group has never been used, so that its bitmap was never written.
    pub(super) fn is_uninitialised(&self) -> bool {
        self.uninitialised
    }

    /// Whether `bits` are the bitmap this descriptor speaks of; `blocks` are the group's.
    pub(super) fn fits(&self, sb: &Superblock, bits: &[u8], blocks: u64) -> bool {
        let checked = match sb.checks {
            Checks::All(seed) => {
                let counted = crc(seed, bits);
                self.bitmap_crc == if self.wide { counted } else { counted & 0xffff }
            }
            Checks::Counts | Checks::Groups => true,
        };
        checked && free_bits(bits, blocks) == u64::from(self.free)
    }
}

/// Free blocks among the first `blocks`.
fn free_bits(bits: &[u8], blocks: u64) -> u64 {
    let whole = usize::try_from(blocks / 8).unwrap_or(usize::MAX).min(bits.len());
    let (front, rest) = bits.split_at(whole);
    let free: u64 = front.iter().map(|byte| u64::from(byte.count_zeros())).sum();
    let odd = blocks % 8;
    let last = rest.first().copied().unwrap_or(0xff);
    free + (0..odd).filter(|bit| last >> bit & 1 == 0).count() as u64
}

/// How many blocks at the start of a group that was never used its copies of superblock and descriptors may take.
pub(super) fn base_blocks(sb: &Superblock, group: u64) -> u64 {
    let copies = sb.table_blocks() + sb.reserved_table_blocks;
    match (sb.has_meta_groups(), sb.has_superblock(group)) {
        // More than there may be: a block of descriptors may follow, in any group.
        (true, _) => 2 + copies,
        (false, true) => 1 + copies,
        (false, false) => 0,
    }
}

fn checksum(sb: &Superblock, group: u64, bytes: &[u8]) -> Option<u16> {
    let number = u32::try_from(group).unwrap_or(u32::MAX).to_le_bytes();
    let (head, tail) = (bytes.get(..0x1e).unwrap_or_default(), bytes.get(0x20..).unwrap_or_default());
    match sb.checks {
        Checks::Counts => None,
        Checks::Groups => {
            let start = crc16(crc16(!0, &sb.uuid), &number);
            Some(crc16(crc16(start, head), tail))
        }
        Checks::All(seed) => {
            let sum = crc(crc(crc(crc(seed, &number), head), &[0, 0]), tail);
            Some(u16::try_from(sum & 0xffff).unwrap_or(0))
        }
    }
}

/// CRC-16 (ANSI), as descriptors without metadata checksums have it.
fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    let step = |crc: u16, _| if crc & 1 == 1 { (crc >> 1) ^ 0xa001 } else { crc >> 1 };
    bytes.iter().fold(seed, |crc, byte| (0..8).fold(crc ^ u16::from(*byte), step))
}
