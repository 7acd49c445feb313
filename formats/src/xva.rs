//! XVA, read-only: a machine's export by XenServer and XCP-ng, a tar file whose disks are members of 1 MiB.
//!
//! ```text
//! ova.xml                     which disks there are, how large, and how they are attached
//! Ref:11/00000000             the first MiB of a disk
//! Ref:11/00000000.checksum    its SHA-1, in hexadecimal digits; or
//! Ref:11/00000000.xxhash      its XXH64
//! Ref:11/00000007             what is not there between is zeros
//! Ref:11/00000009             an empty one says that the export goes on: it takes a number, and no place on the disk
//! Ref:11/00000010             so this is what belongs at 9 MiB
//! ```
//!
//! Invariants
//! - One pass over the archive's headers tells where each block is; no block is read for it, and one costs 24 bytes.
//! - A block with a checksum is checked whole on every read. Where one block has a checksum, all have: the last bytes of an
//!   archive may be lost, a checksum with them. One that lies twice, or past the end of its disk, or is
//!   shorter than it must be, is damage.
//! - A disk's first and last block are there, zeros too, as xapi writes them: an export that was cut short is told from one
//!   whose rest is zeros.
//! - Entities and document types in `ova.xml` are refused, its size and its nodes are bounded.
//!
//! Not here: compressed archives, which are refused by name; what `ova.xml` says of the machine besides its disks.

mod description;
mod layer;
mod xxhash;

use std::{collections::BTreeMap, sync::Arc};

pub use layer::XvaLayer;

use self::{
    description::Described,
    layer::{Block, Sum},
};
use crate::{
    Error, Result, Storage,
    tables::TableFile,
    tar::{self, Member},
};

/// Bytes of a block.
const BLOCK_BYTES: u64 = 1 << 20;
/// Most members that are looked at: a disk of 8 TiB with its checksums.
const MEMBERS_MAX: usize = 1 << 24;
/// Longest description, in bytes.
const DESCRIPTION_BYTES_MAX: u64 = 16 << 20;

/// An archive, its blocks known.
#[derive(Debug)]
pub struct Xva {
    file: Arc<TableFile>,
    described: Vec<Described>,
    stored: BTreeMap<String, Stored>,
}

/// What there is of a disk.
#[derive(Debug, Default)]
struct Stored {
    blocks: Vec<Block>,
    /// Numbers of members that hold nothing.
    empty: Vec<u32>,
}

/// A block that has no checksum although others of these disks have theirs.
fn unproven(stored: &BTreeMap<String, Stored>) -> Option<(&str, &Block)> {
    let blocks =
        || stored.iter().flat_map(|(disk, stored)| stored.blocks.iter().map(move |block| (disk.as_str(), block)));
    if blocks().all(|(_, block)| block.sum == Sum::None) {
        return None;
    }
    blocks().find(|(_, block)| block.sum == Sum::None)
}

impl Stored {
    /// Sorts the blocks, and takes from their numbers those that hold nothing: xapi writes such a member where it has sent
    /// nothing for some seconds, and goes on at the same place of the disk with the next number. Answers a number that two
    /// members bear, and where one of them lies.
    fn put_in_place(&mut self) -> Option<(u32, u64)> {
        self.blocks.sort_unstable_by_key(|block| block.number);
        self.empty.sort_unstable();
        let mut before: Option<u32> = None;
        for block in &mut self.blocks {
            let (number, less) = (block.number, self.empty.partition_point(|empty| *empty < block.number));
            if before.replace(number) == Some(number) || self.empty.get(less) == Some(&number) {
                return Some((number, block.offset));
            }
            block.number = number.saturating_sub(u32::try_from(less).unwrap_or(u32::MAX));
        }
        let twice = self.empty.windows(2).find(|pair| matches!(pair, [a, b] if a == b));
        twice.and_then(|pair| pair.first()).map(|number| (*number, 0))
    }
}

impl Xva {
    /// Walks the archive's headers and reads its description. No block is read.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`], [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = Arc::new(TableFile::open(storage)?);
        let (mut text, mut stored) = (None, BTreeMap::<String, Stored>::new());
        tar::walk(&file, MEMBERS_MAX, |member| {
            if member.name == "ova.xml" {
                member.check_file(file.label())?;
                text = Some(member);
                return Ok(());
            }
            note(&file, &mut stored, &member)
        })?;
        let text = text.ok_or_else(|| Error::corrupt(file.label(), 0, "an archive without ova.xml"))?;
        if text.len > DESCRIPTION_BYTES_MAX {
            return Err(Error::unsupported(file.label(), format!("a description of {} bytes", text.len)));
        }
        let described = description::disks(&file.read(text.offset, text.len, "ova.xml")?)
            .map_err(|what| Error::corrupt(file.label(), text.offset, format!("ova.xml: {what}")))?;
        if described.is_empty() {
            return Err(Error::unsupported(file.label(), "an export without disks"));
        }
        for (disk, found) in &mut stored {
            if let Some((number, offset)) = found.put_in_place() {
                return Err(Error::corrupt(file.label(), offset, format!("block {number} of {disk} is there twice")));
            }
        }
        if let Some((disk, block)) = unproven(&stored) {
            let what = format!("block {} of {disk} has no checksum, and others have", block.number);
            return Err(Error::corrupt(file.label(), block.offset, what));
        }
        Ok(Self { file, described, stored })
    }

    /// Names of the disks, in the order of the description.
    pub fn disks(&self) -> Vec<&str> {
        self.described.iter().map(|disk| disk.name.as_str()).collect()
    }

    /// The disk `name`.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if there is none; [`Error::Truncated`] where its first or last block is missing;
    /// [`Error::Corrupt`] where its blocks do not fit its size.
    pub fn disk(&self, name: &str) -> Result<XvaLayer> {
        let found = self.described.iter().find(|disk| disk.name == name);
        let missing = || Error::ChainBroken { path: self.file.label().into(), what: format!("has no disk {name:?}") };
        let disk = found.ok_or_else(missing)?;
        let blocks = self.stored.get(&disk.reference).map(|stored| stored.blocks.clone()).unwrap_or_default();
        let last = disk.bytes.div_ceil(BLOCK_BYTES).saturating_sub(1);
        let (first, end) =
            (blocks.first().map(|block| block.number), blocks.last().map(|block| u64::from(block.number)));
        if first != Some(0) || end.is_none_or(|end| end < last) {
            return Err(Error::Truncated {
                path: self.file.label().into(),
                len: end.map_or(0, |end| (end + 1) * BLOCK_BYTES),
                need: disk.bytes,
                what: format!("the disk {name}, whose first and last block are always there"),
            });
        }
        XvaLayer::new(self.file.clone(), name, disk.bytes, blocks)
    }
}

/// Notes a member that is a block or the checksum of the block before it.
fn note(file: &TableFile, stored: &mut BTreeMap<String, Stored>, member: &Member) -> Result<()> {
    let Some((disk, rest)) = member.name.split_once('/').filter(|(disk, _)| disk.starts_with("Ref:")) else {
        return Ok(());
    };
    member.check_file(file.label())?;
    let (number, sum) = match rest.split_once('.') {
        None => (rest, None),
        Some((number, "checksum")) => (number, Some(Sum::Sha1(member.offset))),
        Some((number, "xxhash")) => (number, Some(Sum::XxHash(member.offset))),
        Some(_) => return Ok(()),
    };
    let bad = |what: String| Error::corrupt(file.label(), member.offset, format!("member {:?}: {what}", member.name));
    let number: u32 = number.parse().map_err(|_| bad("no number of a block".into()))?;
    let Stored { blocks: known, empty } = stored.entry(disk.to_owned()).or_default();
    match sum {
        None if member.len == 0 => {
            empty.push(number);
            Ok(())
        }
        None => {
            let len = u32::try_from(member.len).ok().filter(|len| u64::from(*len) <= BLOCK_BYTES);
            let len = len.ok_or_else(|| bad(format!("a block of {} bytes", member.len)))?;
            known.push(Block { number, len, offset: member.offset, sum: Sum::None });
            Ok(())
        }
        // A checksum follows its block; that of an empty one has none before it.
        Some(sum) => {
            if let Some(block) = known.last_mut().filter(|block| block.number == number) {
                block.sum = sum.within(member.len).ok_or_else(|| bad(format!("a checksum of {} bytes", member.len)))?;
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
