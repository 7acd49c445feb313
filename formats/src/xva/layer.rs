//! One disk of an export as a layer.

use std::sync::Arc;

use sha1::{Digest as _, Sha1};

use super::{BLOCK_BYTES, xxhash::xxh64};
use crate::{BlockRef, Codec, Content, Error, Layer, Result, tables::TableFile};

/// Longest checksum member, in bytes.
const SUM_BYTES_MAX: u64 = 64;

/// Where a block's checksum lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sum {
    None,
    /// 40 hexadecimal digits at this offset.
    Sha1(u64),
    /// Up to 16 hexadecimal digits at this offset.
    XxHash(u64),
}

impl Sum {
    /// The same, if a member of `len` bytes can be one.
    pub(super) fn within(self, len: u64) -> Option<Self> {
        let fits = match self {
            Self::None => false,
            Self::Sha1(_) => (40..=SUM_BYTES_MAX).contains(&len),
            Self::XxHash(_) => (1..=SUM_BYTES_MAX).contains(&len),
        };
        fits.then_some(self)
    }
}

/// A stored block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) number: u32,
    pub(super) len: u32,
    pub(super) offset: u64,
    pub(super) sum: Sum,
}

/// One disk of an export.
#[derive(Debug)]
pub struct XvaLayer {
    file: Arc<TableFile>,
    label: String,
    size: u64,
    /// By number.
    blocks: Vec<Block>,
}

impl XvaLayer {
    pub(super) fn new(file: Arc<TableFile>, name: &str, size: u64, blocks: Vec<Block>) -> Result<Self> {
        for block in &blocks {
            let start = u64::from(block.number) * BLOCK_BYTES;
            let holds = size.saturating_sub(start).min(BLOCK_BYTES);
            if holds == 0 || u64::from(block.len) < holds {
                let what =
                    format!("block {} of disk {name}, {} bytes, does not fit {size} bytes", block.number, block.len);
                return Err(Error::corrupt(file.label(), block.offset, what));
            }
        }
        let label = format!("{} ({name})", file.label());
        Ok(Self { file, label, size, blocks })
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let number = at / BLOCK_BYTES;
        let index = self.blocks.partition_point(|block| u64::from(block.number) < number);
        let Some(block) = self.blocks.get(index) else { return Ok((Content::Zero, end - at)) };
        let start = u64::from(block.number) * BLOCK_BYTES;
        if start > at {
            return Ok((Content::Zero, start.min(end) - at));
        }
        let (skip, len) = (at - start, (start + BLOCK_BYTES).min(end) - at);
        Ok(match block.sum {
            Sum::None => (Content::Plain { file: 0, offset: block.offset + skip }, len),
            Sum::Sha1(_) | Sum::XxHash(_) => {
                let block = BlockRef {
                    offset: block.offset,
                    logical: number,
                    stored_len: block.len,
                    raw_len: block.len,
                    check: 0,
                    file: 0,
                    codec: Codec::Raw,
                };
                (Content::Packed { block, skip: u32::try_from(skip).unwrap_or(u32::MAX) }, len)
            }
        })
    }

    /// The checksum member, without what follows its digits.
    fn sum_text(&self, offset: u64) -> Result<String> {
        let bytes = self.file.read(offset, SUM_BYTES_MAX.min(self.file.len.saturating_sub(offset)), "a checksum")?;
        let digits = bytes.iter().take_while(|byte| byte.is_ascii_hexdigit());
        Ok(digits.map(|byte| char::from(*byte).to_ascii_lowercase()).collect())
    }

    fn holds(&self, block: &Block, bytes: &[u8]) -> Result<bool> {
        Ok(match block.sum {
            Sum::None => true,
            Sum::Sha1(at) => {
                let sum: String = Sha1::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
                self.sum_text(at)? == sum
            }
            Sum::XxHash(at) => u64::from_str_radix(&self.sum_text(at)?, 16) == Ok(xxh64(bytes)),
        })
    }
}

impl Layer for XvaLayer {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        BLOCK_BYTES
    }

    crate::runs::layer_in_pieces!(file);

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("xva", self.size);
        hash.update(self.label.as_bytes());
        for block in &self.blocks {
            hash.update(&block.number.to_le_bytes()).update(&block.offset.to_le_bytes());
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let index = self.blocks.binary_search_by_key(&block.logical, |known| u64::from(known.number));
        let known = index.ok().and_then(|index| self.blocks.get(index)).filter(|known| known.offset == block.offset);
        let missing = || Error::corrupt(&self.label, block.offset, format!("the disk has no block {}", block.logical));
        let known = known.ok_or_else(missing)?;
        *out = self.file.read(known.offset, known.len.into(), "a block")?;
        let held = self.holds(known, out);
        if matches!(held, Ok(true)) {
            return Ok(());
        }
        // Bytes that are not proven are not left to anybody.
        out.clear();
        held?;
        Err(Error::BadBlock {
            path: self.label.clone(),
            offset: known.offset,
            len: known.len.into(),
            what: "its bytes do not give the checksum beside it".into(),
        })
    }
}
