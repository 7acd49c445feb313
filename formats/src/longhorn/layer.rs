//! One backup as a layer: digests of blocks by their place.

use sha2::{Digest as _, Sha512};

use super::{BLOCK_BYTES, Backup, Block, Digest, Method};
use crate::{
    BlockRef, Codec, Content, Error, Layer, Result, lz4_frame,
    objects::{self, Folder, hexadecimal},
    storage::FileStorage,
    tables::TableFile,
    unzip,
};

/// One backup.
#[derive(Debug)]
pub struct LonghornLayer {
    file: TableFile,
    label: String,
    folder: Folder,
    method: Method,
    size: u64,
    block_bytes: u64,
    /// By offset; no two overlap.
    blocks: Vec<Block>,
}

impl LonghornLayer {
    pub(super) fn new(backup: &Backup) -> Result<Self> {
        let file = TableFile::open(backup.storage.clone())?;
        let mut blocks = backup.config.blocks.clone().unwrap_or_default();
        blocks.sort_unstable_by_key(|block| block.offset);
        let folder = Folder::open(&backup.folder)?;
        let label = file.label().to_owned();
        let [smallest, ..] = BLOCK_BYTES;
        let mut layer =
            Self { file, label, folder, method: backup.method, size: backup.size, block_bytes: smallest, blocks };
        layer.block_bytes = layer.found_size()?;
        let mut from = 0;
        for block in &layer.blocks {
            if block.offset < from || block.offset >= layer.size || !block.offset.is_multiple_of(layer.block_bytes) {
                let what = format!("a block at {} of a volume of {} bytes", block.offset, layer.size);
                return Err(Error::corrupt(&layer.label, 0, what));
            }
            from = block.offset.saturating_add(layer.block_bytes);
        }
        Ok(layer)
    }

    /// Nothing but a block itself tells for sure how large the blocks are. Without one it does not matter.
    fn found_size(&self) -> Result<u64> {
        let [smallest, .., largest] = BLOCK_BYTES;
        let Some(first) = self.blocks.first() else { return Ok(smallest) };
        let mut out = Vec::new();
        self.decode(&first.digest, largest, &mut out)?;
        let found = BLOCK_BYTES.into_iter().find(|len| *len == out.len() as u64);
        found.ok_or_else(|| Error::unsupported(&self.label, format!("blocks of {} bytes", out.len())))
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let index = self.blocks.partition_point(|block| block.offset + self.block_bytes <= at);
        let Some(block) = self.blocks.get(index).filter(|block| block.offset < end) else {
            return Ok((Content::Zero, end - at));
        };
        if block.offset > at {
            return Ok((Content::Zero, block.offset - at));
        }
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let packed = BlockRef {
            // Its own file's; no other block of this backup has the same.
            offset: block.offset,
            logical: block.offset / self.block_bytes,
            // What is stored is known only when the block is opened.
            stored_len: small(self.block_bytes),
            raw_len: small(self.block_bytes),
            check: block.digest.first_chunk().map_or(0, |first| u32::from_le_bytes(*first)),
            file: 0,
            codec: Codec::Lz4,
        };
        let len = (block.offset + self.block_bytes).min(end) - at;
        Ok((Content::Packed { block: packed, skip: small(at - block.offset) }, len))
    }

    fn object(&self, digest: &Digest) -> Result<FileStorage> {
        let name = hexadecimal(digest);
        let (a, b) = (name.get(..2).unwrap_or_default(), name.get(2..4).unwrap_or_default());
        self.folder.object(format!("blocks/{a}/{b}/{name}.blk"), &self.label)
    }

    /// A block's bytes into `out`, proven by its digest; at most `bytes_max`.
    fn decode(&self, digest: &Digest, bytes_max: u64, out: &mut Vec<u8>) -> Result<()> {
        let object = self.object(digest)?;
        let place = usize::try_from(bytes_max).unwrap_or(usize::MAX);
        objects::whole(&object, bytes_max + bytes_max / 128 + 4096, |stored| {
            let holds = |bytes: &[u8]| Sha512::digest(bytes).starts_with(digest);
            let done = self.methods(stored).into_iter().any(|method| {
                let decoded = match method {
                    Method::Gzip => unzip::gzip(stored, place, out),
                    Method::Lz4 => lz4(stored, place, out),
                    Method::Plain => {
                        out.clear();
                        out.extend_from_slice(stored);
                        Ok(())
                    }
                };
                decoded.is_ok() && holds(out)
            });
            if done {
                return Ok(());
            }
            // Bytes that are not proven are not left to anybody.
            out.clear();
            Err(objects::damaged(&object, stored.len() as u64, "it does not decode to the bytes of its name's digest"))
        })
    }

    /// A block may have been stored for another backup, whose method was another one. The digest tells which it was.
    fn methods(&self, stored: &[u8]) -> Vec<Method> {
        let can_be = |method: &Method| match method {
            Method::Plain => true,
            Method::Gzip => stored.starts_with(&unzip::GZIP_MAGIC),
            Method::Lz4 => stored.starts_with(&lz4_frame::MAGIC_BYTES),
        };
        let mut methods = vec![self.method, Method::Lz4, Method::Gzip, Method::Plain];
        methods.dedup();
        methods.retain(can_be);
        methods
    }
}

/// A frame whose length is one of those that blocks have.
fn lz4(stored: &[u8], bytes_max: usize, out: &mut Vec<u8>) -> Result<(), String> {
    let lens = BLOCK_BYTES.iter().filter_map(|len| usize::try_from(*len).ok()).filter(|len| *len <= bytes_max);
    let mut failed = Err("no length fits".to_owned());
    for len in lens {
        failed = lz4_frame::decode(stored, len, out);
        if failed.is_ok() {
            break;
        }
    }
    failed
}

impl Layer for LonghornLayer {
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

    /// The list names every byte of the volume by its digest.
    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("longhorn", self.size);
        for block in &self.blocks {
            hash.update(&block.offset.to_le_bytes()).update(&block.digest);
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let known = self.blocks.binary_search_by_key(&block.offset, |known| known.offset).ok();
        let known = known.and_then(|index| self.blocks.get(index));
        let missing = || Error::corrupt(&self.label, block.offset, "the backup has no block there");
        let known = known.ok_or_else(missing)?;
        self.decode(&known.digest, self.block_bytes, out)?;
        if out.len() as u64 != self.block_bytes {
            let what = format!("a block of {} bytes, where the others have {}", out.len(), self.block_bytes);
            out.clear();
            return Err(Error::corrupt(&self.label, block.offset, what));
        }
        Ok(())
    }
}
