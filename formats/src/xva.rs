//! XVA, read-only: a machine's export by XenServer and XCP-ng, a tar file whose disks are members of 1 MiB.
//!
//! ```text
//! ova.xml                     which disks there are, how large, and how they are attached
//! Ref:11/00000000             the first MiB of a disk
//! Ref:11/00000000.checksum    its SHA-1, in hexadecimal digits; or
//! Ref:11/00000000.xxhash      its XXH64
//! Ref:11/00000007             what is not there between is zeros
//! ```
//!
//! Invariants
//! - One pass over the archive's headers tells where each block is; no block is read for it, and one costs 24 bytes.
//! - A block with a checksum is checked whole on every read. One that lies twice, or past the end of its disk, or is
//!   shorter than it must be, is damage.
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
    blocks: BTreeMap<String, Vec<Block>>,
}

impl Xva {
    /// Walks the archive's headers and reads its description. No block is read.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`], [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = Arc::new(TableFile::open(storage)?);
        let (mut text, mut blocks) = (None, BTreeMap::<String, Vec<Block>>::new());
        tar::walk(&file, MEMBERS_MAX, |member| {
            if member.name == "ova.xml" {
                text = Some(member);
                return Ok(());
            }
            note(&file, &mut blocks, &member)
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
        for (disk, found) in &mut blocks {
            found.sort_unstable_by_key(|block| block.number);
            if let Some(twice) = found.windows(2).find(|pair| matches!(pair, [a, b] if a.number == b.number)) {
                let [first, ..] = twice else { continue };
                let what = format!("block {} of {disk} is there twice", first.number);
                return Err(Error::corrupt(file.label(), first.offset, what));
            }
        }
        Ok(Self { file, described, blocks })
    }

    /// Names of the disks, in the order of the description.
    pub fn disks(&self) -> Vec<&str> {
        self.described.iter().map(|disk| disk.name.as_str()).collect()
    }

    /// The disk `name`.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if there is none; [`Error::Corrupt`] where its blocks do not fit its size.
    pub fn disk(&self, name: &str) -> Result<XvaLayer> {
        let found = self.described.iter().find(|disk| disk.name == name);
        let missing = || Error::ChainBroken { path: self.file.label().into(), what: format!("has no disk {name:?}") };
        let disk = found.ok_or_else(missing)?;
        let blocks = self.blocks.get(&disk.reference).cloned().unwrap_or_default();
        XvaLayer::new(self.file.clone(), name, disk.bytes, blocks)
    }
}

/// Notes a member that is a block or the checksum of the block before it.
fn note(file: &TableFile, blocks: &mut BTreeMap<String, Vec<Block>>, member: &Member) -> Result<()> {
    let Some((disk, rest)) = member.name.split_once('/').filter(|(disk, _)| disk.starts_with("Ref:")) else {
        return Ok(());
    };
    let (number, sum) = match rest.split_once('.') {
        None => (rest, None),
        Some((number, "checksum")) => (number, Some(Sum::Sha1(member.offset))),
        Some((number, "xxhash")) => (number, Some(Sum::XxHash(member.offset))),
        Some(_) => return Ok(()),
    };
    let bad = |what: String| Error::corrupt(file.label(), member.offset, format!("member {:?}: {what}", member.name));
    let number: u32 = number.parse().map_err(|_| bad("no number of a block".into()))?;
    let known = blocks.entry(disk.to_owned()).or_default();
    match sum {
        None if member.len == 0 => Ok(()),
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
