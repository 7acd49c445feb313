//! Digests of a disk, block by block: what lets two chains that share nothing be compared without moving either.
//!
//! ```text
//! "AQDIGEST"  version u32  block u32  size u64  one BLAKE3-256 for each block  BLAKE3-256 of all before
//! ```
//!
//! Invariants
//! - A file of digests is made once and never changed; one that does not prove itself is as good as lost.
//! - Lost digests cost reading the replica's own disks, never a wrong decision.
//!
//! Not here: which file belongs to which restore point.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use aquifer_vdisk::{Delta, Disk};
use parking_lot::Mutex;

use super::build::{Moved, Pace};
use crate::{
    copy::{Piece, sweep},
    fail::{Code, Fail, Result},
};

const MAGIC: &[u8; 8] = b"AQDIGEST";
const VERSION: u32 = 1;
const HEAD: usize = 24;
const SUM: usize = 32;

/// Smallest block, bytes.
pub const BLOCK_MIN: u64 = 64 << 10;
/// Largest block, bytes.
pub const BLOCK_MAX: u64 = 1 << 20;

/// A digest.
pub type Sum = [u8; SUM];

/// The digests of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    block: u64,
    size: u64,
    zero: Sum,
    sums: Vec<Sum>,
}

impl Digests {
    /// Those of a disk of zeros.
    pub fn zero(size: u64, block: u64) -> Self {
        let block = block.clamp(BLOCK_MIN, BLOCK_MAX).next_power_of_two();
        let zero = zero_sum(block);
        let count = usize::try_from(size.div_ceil(block)).unwrap_or_default();
        let mut sums = vec![zero; count];
        if let (Some(last), rest @ 1..) = (sums.last_mut(), size % block) {
            *last = zero_sum(rest);
        }
        Self { block, size, zero, sums }
    }

    /// Those of a disk, read whole; `pace` is told how far that is.
    ///
    /// # Errors
    /// The disk's, and what `pace` says.
    pub fn of(disk: &Disk, block: u64, pace: Pace<'_>) -> Result<Self> {
        let mut digests = Self::zero(disk.size(), block);
        pace(Moved::Ahead(disk.size()))?;
        digests.take(disk, &Delta::full(disk.size()), pace)?;
        Ok(digests)
    }

    /// Bytes of a block.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// The digest of block `index`.
    pub fn sum(&self, index: u64) -> Option<&Sum> {
        self.sums.get(usize::try_from(index).ok()?)
    }

    /// Puts the digest of block `index`.
    pub fn set(&mut self, index: u64, sum: Sum) {
        if let Some(slot) = usize::try_from(index).ok().and_then(|at| self.sums.get_mut(at)) {
            *slot = sum;
        }
    }

    /// The digest of a block of zeros at `index`.
    pub fn zero_at(&self, index: u64) -> Sum {
        let len = self.block.min(self.size.saturating_sub(index.saturating_mul(self.block)));
        if len == self.block { self.zero } else { zero_sum(len) }
    }

    /// Cuts or extends with zeros. A block that is not whole before or after has to be made anew by the caller.
    pub fn resize(&mut self, size: u64) {
        let fresh = Self::zero(size, self.block);
        let keep = usize::try_from(size.min(self.size) / self.block).unwrap_or_default();
        let sums = std::mem::replace(&mut self.sums, fresh.sums);
        for (slot, sum) in self.sums.iter_mut().zip(sums).take(keep) {
            *slot = sum;
        }
        self.size = size;
    }

    /// Makes the digests of every block that `ranges` touch anew, from what the disk holds.
    ///
    /// # Errors
    /// The disk's.
    pub fn refresh(&mut self, disk: &Disk, ranges: &Delta) -> Result<()> {
        self.take(disk, ranges, &|_| Ok(()))
    }

    fn take(&mut self, disk: &Disk, ranges: &Delta, pace: Pace<'_>) -> Result<()> {
        let ranges = ranges.round_out(self.block).clip(0..self.size.min(disk.size()));
        let this = Mutex::new(&mut *self);
        let block = this.lock().block;
        let taker = |offset: u64, piece: Piece<'_>| {
            pace(Moved::Checked(match piece {
                Piece::Bytes(bytes) => bytes.len() as u64,
                Piece::Zeros(len) => len,
            }))?;
            each_block(offset, piece, block, &mut |index, bytes| {
                // Computed before the lock is taken: other threads do theirs meanwhile.
                let sum = bytes.map(sum_of);
                let mut this = this.lock();
                let sum = sum.unwrap_or_else(|| this.zero_at(index));
                this.set(index, sum);
                Ok(())
            })
        };
        sweep(disk, &ranges, block, &taker).map(drop)
    }

    /// Writes them under a name that does not exist yet; one that does has the same content.
    ///
    /// # Errors
    /// I/O.
    pub fn store(&self, path: &Path) -> Result<()> {
        let mut bytes = Vec::with_capacity(HEAD + (self.sums.len() + 1) * SUM);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::try_from(self.block).unwrap_or_default().to_le_bytes());
        bytes.extend(self.size.to_le_bytes());
        self.sums.iter().for_each(|sum| bytes.extend(sum));
        let proof = *blake3::hash(&bytes).as_bytes();
        bytes.extend(proof);
        put_file(path, &bytes)
    }

    /// Reads them; `None` where there are none, or none that prove themselves for a disk of this size.
    ///
    /// # Errors
    /// I/O, other than that there is no such file.
    pub fn load(path: &Path, size: u64) -> Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Fail::io(path.display(), "read", &error)),
        };
        Ok(Self::parse(&bytes).filter(|digests| digests.size == size))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (content, proof) = bytes.split_at_checked(bytes.len().checked_sub(SUM)?)?;
        if blake3::hash(content).as_bytes() != proof {
            return None;
        }
        let (head, sums) = content.split_at_checked(HEAD)?;
        let word = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
        let block = u64::from(word(12)?);
        let size = u64::from_le_bytes(head.get(16..24)?.try_into().ok()?);
        let good = head.starts_with(MAGIC) && word(8)? == VERSION && block.is_power_of_two();
        let (sums, rest) = sums.as_chunks::<SUM>();
        let whole = rest.is_empty() && good && (BLOCK_MIN..=BLOCK_MAX).contains(&block);
        let whole = whole && sums.len() as u64 == size.div_ceil(block);
        whole.then(|| Self { block, size, zero: zero_sum(block), sums: sums.to_vec() })
    }
}

/// The digest of bytes.
pub fn sum_of(bytes: &[u8]) -> Sum {
    *blake3::hash(bytes).as_bytes()
}

fn zero_sum(len: u64) -> Sum {
    sum_of(&vec![0; usize::try_from(len).unwrap_or_default()])
}

/// Takes the number and the bytes of a block; `None` are zeros.
pub type EachBlock<'a> = &'a mut dyn FnMut(u64, Option<&[u8]>) -> Result<()>;

/// Calls `each` with every block of a piece.
///
/// # Errors
/// Those of `each`.
pub fn each_block(offset: u64, piece: Piece<'_>, block: u64, each: EachBlock<'_>) -> Result<()> {
    let first = offset / block;
    match piece {
        Piece::Bytes(bytes) => {
            let step = usize::try_from(block).unwrap_or(usize::MAX);
            (first..).zip(bytes.chunks(step)).try_for_each(|(index, bytes)| each(index, Some(bytes)))
        }
        Piece::Zeros(len) => (first..first + len.div_ceil(block)).try_for_each(|index| each(index, None)),
    }
}

/// Writes a file under its name at once: durable before it has it, replaced if it is there.
///
/// # Errors
/// I/O.
pub(crate) fn put_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |e: io::Error| Fail::io(path.display(), "write", &e);
    let folder = path.parent().ok_or_else(|| Fail::new(Code::Bug, "a file without a folder"))?;
    fs::create_dir_all(folder).map_err(failed)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = folder.join(name);
    let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
    file.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all())).map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)?;
    sync_folder(folder)
}

/// Makes names in a folder durable.
///
/// # Errors
/// I/O.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    fs::File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Fail::io(folder.display(), "sync", &e))
}

#[cfg(test)]
mod tests;
