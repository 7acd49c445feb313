//! One version as a layer: names of objects by their place.

use std::{path::Path, sync::Arc};

use md5::{Digest as _, Md5};
use sha2::{Sha256, Sha512};

use super::{
    blake2b::blake2b,
    list::{Block, Blocks, Sum},
    object::Meta,
    version::Version,
};
use crate::{
    BlockRef, Codec, Content, Error, Layer, Result, SECTOR_BYTES, Storage,
    codec::BLOCK_BYTES_MAX,
    objects::{self, Folder, VOLUME_BYTES_MAX, from_hexadecimal, hexadecimal},
    tables::TableFile,
};

/// One version of a volume.
#[derive(Debug)]
pub struct BenjiLayer {
    file: TableFile,
    label: String,
    folder: Folder,
    size: u64,
    block_bytes: u64,
    /// By index, each once and inside the volume.
    blocks: Arc<Blocks>,
}

impl Sum {
    /// Whether `bytes` have this checksum. BLAKE2b is what Benji uses unless it is told otherwise, SHA-2 the other family
    /// of these lengths; neither can be mistaken for the other.
    fn holds(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Short(sum) => blake2b(bytes, 32) == sum || Sha256::digest(bytes)[..] == sum[..],
            Self::Long(sum) => blake2b(bytes, 64) == sum || Sha512::digest(bytes)[..] == sum[..],
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Short(sum) => sum,
            Self::Long(sum) => sum,
        }
    }
}

impl BenjiLayer {
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        folder: &Path,
        version: &Version,
        blocks: Arc<Blocks>,
    ) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let label = format!("{} ({})", file.label(), version.uid());
        if let Some(why) = version.refusal() {
            return Err(Error::unsupported(label, format!("a version that cannot be relied on: {why}")));
        }
        let (size, block_bytes) = (version.size, version.block_bytes);
        if size == 0 || i64::try_from(size).is_err() || !size.is_multiple_of(SECTOR_BYTES) {
            return Err(Error::corrupt(label, 0, format!("a volume of {size} bytes")));
        }
        if size > VOLUME_BYTES_MAX {
            return Err(Error::unsupported(label, format!("a volume of {size} bytes (at most {VOLUME_BYTES_MAX})")));
        }
        let is_grid = block_bytes.is_power_of_two() && block_bytes >= 4096;
        if !is_grid || block_bytes > BLOCK_BYTES_MAX as u64 {
            return Err(Error::unsupported(label, format!("blocks of {block_bytes} bytes")));
        }
        // Where the document says its sizes only behind the list.
        if blocks.entries > size.div_ceil(block_bytes) {
            return Err(Error::corrupt(label, 0, format!("{} blocks in a volume of {size} bytes", blocks.entries)));
        }
        for block in &blocks.stored {
            let start = block.index.checked_mul(block_bytes).filter(|start| *start < size);
            let due = start.map(|start| (size - start).min(block_bytes));
            if due != Some(block.len.into()) {
                let what = format!("block {} of {} bytes in a volume of {size}", block.index, block.len);
                return Err(Error::corrupt(label, 0, what));
            }
        }
        let layer = Self { file, label, folder: Folder::open(folder)?, size, block_bytes, blocks };
        // Encryption is said now, not when a guest first reads.
        if let Some(first) = layer.blocks.stored.first()
            && let Some(description) = layer.folder.find(format!("{}.meta", name_of(first)))?
        {
            Meta::read(&description)?;
        }
        Ok(layer)
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let (index, skip) = (at / self.block_bytes, at % self.block_bytes);
        let found = self.blocks.stored.partition_point(|block| block.index < index);
        let Some(block) = self.blocks.stored.get(found) else { return Ok((Content::Zero, end - at)) };
        let start = block.index * self.block_bytes;
        if block.index > index {
            return Ok((Content::Zero, start.min(end) - at));
        }
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let packed = BlockRef {
            offset: start,
            logical: index,
            // What is stored is known only when the object is opened.
            stored_len: small(self.block_bytes),
            raw_len: small(self.block_bytes),
            check: block.sum.bytes().first_chunk().map_or(0, |first| u32::from_le_bytes(*first)),
            file: 0,
            codec: Codec::Zstd,
        };
        Ok((Content::Packed { block: packed, skip: small(skip) }, (self.block_bytes - skip).min(end - at)))
    }
}

/// `blocks/8b/de/0000000000000001-0000000000000002`.
fn name_of(block: &Block) -> String {
    let key = format!("{:016x}-{:016x}", block.uid.0, block.uid.1);
    let place = hexadecimal(&Md5::digest(key.as_bytes()));
    let part = |at: usize| place.get(at..at + 2).unwrap_or_default();
    format!("blocks/{}/{}/{key}", part(0), part(2))
}

impl Layer for BenjiLayer {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        self.block_bytes
    }

    crate::runs::layer_in_pieces!(file);

    /// The list names every byte of the volume by its checksum.
    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("benji", self.size);
        for block in &self.blocks.stored {
            hash.update(&block.index.to_le_bytes()).update(block.sum.bytes());
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let known = self.blocks.stored.binary_search_by_key(&block.logical, |known| known.index).ok();
        let missing = || Error::corrupt(&self.label, block.offset, "the version has no block there");
        let known = known.and_then(|index| self.blocks.stored.get(index)).ok_or_else(missing)?;
        let name = name_of(known);
        let object = self.folder.object(&name, &self.label)?;
        let meta = Meta::read(&self.folder.object(format!("{name}.meta"), &self.label)?)?;
        let whole = usize::try_from(self.block_bytes).unwrap_or(usize::MAX);
        meta.undo(&object, whole, out)?;
        // The description may be of another object that was put in this one's place: the version's own word counts.
        let told = meta.checksum.as_deref();
        let is_other = match known.sum {
            Sum::Short(sum) => told.and_then(from_hexadecimal::<32>) != Some(sum),
            Sum::Long(sum) => told.and_then(from_hexadecimal::<64>) != Some(sum),
        };
        if is_other || out.len() as u64 != u64::from(known.len) || !known.sum.holds(out) {
            let len = object.len().unwrap_or_default();
            out.clear();
            return Err(objects::damaged(&object, len, "its bytes do not give the checksum that the version has"));
        }
        out.resize(whole, 0);
        Ok(())
    }
}
