//! Whether a file system is still the one its superblock speaks of.
//!
//! A superblock and its bitmaps may be all that is left of one. What lives has its copies of the superblock, and a root folder.
//!
//! Invariant: at most [`COPIES_MAX`] copies are read, and of the root folder one block.
//!
//! Not here: what else may be on the volume (`foreign`), whether it was unmounted (`superblock`).

use super::{
    super::source::{Stop, ensure, le16, le32},
    Fs,
};

/// Most copies of the superblock that are compared. With sparse copies there are never as many.
const COPIES_MAX: usize = 64;

const ROOT: u32 = 2;
const EXTENTS: u32 = 0x8_0000;
const INLINE: u32 = 0x1000_0000;

/// Deepest tree of extents.
const DEPTH_MAX: u16 = 5;

/// A doubt about what does not look like the file system in use.
pub(super) fn proven(fs: &mut Fs<'_, '_>) -> Result<(), Stop> {
    copies(fs)?;
    root(fs)
}

fn copies(fs: &mut Fs<'_, '_>) -> Result<(), Stop> {
    let groups: Vec<u64> = (1..fs.sb.groups).filter(|group| fs.sb.has_superblock(*group)).collect();
    for group in groups.iter().step_by(groups.len().div_ceil(COPIES_MAX).max(1)) {
        let (at, _) = fs.bytes(fs.sb.group_first(*group), 1).ok_or(Stop::Doubt("a group leaves it"))?;
        let copy = fs.source.bytes::<1024>(at)?;
        ensure(fs.sb.is_copy(&copy), "a copy of its superblock is another's")?;
    }
    Ok(())
}

/// The root folder has to be a folder that contains itself.
fn root(fs: &mut Fs<'_, '_>) -> Result<(), Stop> {
    let inode = fs.inode(ROOT)?;
    let (mode, deleted, flags) = (le16(&inode, 0), le32(&inode, 0x14), le32(&inode, 0x20));
    ensure(mode & 0xf000 == 0x4000 && deleted == 0 && le16(&inode, 0x1a) != 0, "it has no root folder")?;
    let map = inode.get(0x28..0x64).unwrap_or_default();
    if flags & INLINE != 0 {
        return ensure(le32(map, 0) == ROOT, "its root folder is damaged");
    }
    let place = if flags & EXTENTS != 0 { first_block(fs, map)? } else { le32(map, 0).into() };
    ensure(place > fs.sb.first_block, "its root folder is nowhere")?;
    let block = fs.block(place)?;
    let entry = |at: usize, name: &[u8]| {
        let said = block.get(at + 8..at + 8 + name.len());
        le32(&block, at) == ROOT && block.get(at + 6) == u8::try_from(name.len()).ok().as_ref() && said == Some(name)
    };
    ensure(entry(0, b".") && le16(&block, 4) == 12 && entry(12, b".."), "its root folder is damaged")
}

/// Where a file's first block lies, by its extents.
fn first_block(fs: &mut Fs<'_, '_>, root: &[u8]) -> Result<u64, Stop> {
    let mut node = root.to_vec();
    let mut above: Option<u16> = None;
    loop {
        let (magic, entries, depth) = (le16(&node, 0), le16(&node, 2), le16(&node, 6));
        let deeper = above.map_or(depth <= DEPTH_MAX, |above| depth.checked_add(1) == Some(above));
        let sound = magic == 0xf30a && entries > 0 && deeper && le32(&node, 12) == 0;
        ensure(sound && node.len() >= 24, "its root folder is damaged")?;
        if depth == 0 {
            return Ok(u64::from(le16(&node, 18)) << 32 | u64::from(le32(&node, 20)));
        }
        node = fs.block(u64::from(le16(&node, 20)) << 32 | u64::from(le32(&node, 16)))?;
        above = Some(depth);
    }
}
