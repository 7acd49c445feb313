//! What an ext2, ext3 or ext4 file system does not use, by its own block bitmaps.
//!
//! Where the journal is to be replayed, what is on disk is not the last word: the last word on a block is one of the copies
//! in the log or the one in its place. So a block counts as unused only if *every* copy of its group's bitmap that could come
//! true says so. No replay is needed for that, and one that ends early cannot be got wrong.
//!
//! Invariants
//! - With checksums each bitmap and descriptor that is believed has matched one; without them the number of free blocks has.
//! - Features that are not known here, clusters (bigalloc), snapshots, shared blocks, errors noted by the system itself:
//!   doubt.
//! - It has to be alive: copies of its superblock that agree, a root folder that is one (`alive`).
//! - Descriptors, bitmaps and inode tables of all groups are used, whatever a bitmap says.
//!
//! Not here: files, names, repair.

mod alive;
mod group;
mod journal;
mod superblock;

use std::ops::Range;

use self::{
    group::{Descriptor, base_blocks},
    journal::Log,
    superblock::Superblock,
};
use super::{
    RUNS_MAX,
    source::{Source, Stop, ensure},
};
use crate::Delta;

/// Reads the file system in `volume`; returns what it does not use, in bytes of the disk.
pub(super) fn unused(source: &mut Source<'_>, volume: &Range<u64>) -> Result<Delta, Stop> {
    let mut fs = Fs::open(source, volume)?;
    alive::proven(&mut fs)?;
    let mut runs = Runs::default();
    let mut metadata: Vec<(u64, u64)> = Vec::new();
    let per_block = fs.sb.descriptors_per_block();
    for table_block in 0..fs.sb.table_blocks() {
        let place = fs.sb.table_place(table_block).ok_or(Stop::Doubt("its descriptors leave it"))?;
        // Each copy of this block of descriptors that could come true.
        let copies = fs.copies(place)?;
        let first = table_block * per_block;
        for group in first..(first + per_block).min(fs.sb.groups) {
            let descriptors = fs.descriptors(&copies, group, group - first)?;
            let Some(now) = descriptors.first() else { return Err(Stop::Doubt("a group without a descriptor")) };
            for (block, count) in now.metadata(&fs.sb) {
                metadata.push(fs.bytes(block, count).ok_or(Stop::Doubt("a group's tables leave it"))?);
            }
            let used = fs.used_bits(group, &descriptors)?;
            runs.add(&fs, group, &used)?;
        }
    }
    let metadata = Delta::try_from(metadata).map_err(|_| Stop::Doubt("a group's tables leave it"))?;
    Ok(runs.finish()?.subtract(&metadata))
}

/// An open file system.
struct Fs<'s, 'a> {
    source: &'s mut Source<'a>,
    start: u64,
    sb: Superblock,
    log: Log,
}

impl<'s, 'a> Fs<'s, 'a> {
    fn open(source: &'s mut Source<'a>, volume: &Range<u64>) -> Result<Self, Stop> {
        let raw = source.bytes::<1024>(volume.start.saturating_add(1024))?;
        let sb = Superblock::parse(&raw, volume.end - volume.start)?;
        let mut fs = Self { source, start: volume.start, sb, log: Log::default() };
        if fs.sb.needs_recovery {
            fs.log = journal::read(&mut fs)?;
            let place = fs.sb.superblock_place();
            for copy in fs.copies(place)? {
                let at = if fs.sb.block_bytes == 1024 { 0 } else { 1024 };
                let copy = copy.get(at..at + 1024).ok_or(Stop::Doubt("a superblock cut short"))?;
                let same = fs.sb.same_shape(copy.try_into().map_err(|_| Stop::Doubt("a superblock cut short"))?);
                ensure(same, "its shape changes in the journal")?;
            }
        }
        Ok(fs)
    }

    /// A block, as it lies in its place.
    fn block(&mut self, block: u64) -> Result<Vec<u8>, Stop> {
        let (at, len) = self.bytes(block, 1).ok_or(Stop::Doubt("a block lies outside of it"))?;
        self.source.vec(at, usize::try_from(len).unwrap_or(0))
    }

    /// The first 128 bytes of an inode, as it lies in its place.
    fn inode(&mut self, number: u32) -> Result<Vec<u8>, Stop> {
        let number = u64::from(number).checked_sub(1).ok_or(Stop::Doubt("an inode that is nowhere"))?;
        let (group, index) = (number / self.sb.inodes_per_group.max(1), number % self.sb.inodes_per_group.max(1));
        ensure(group < self.sb.groups, "an inode that is nowhere")?;
        let per_block = self.sb.descriptors_per_block();
        let table = self.sb.table_place(group / per_block).ok_or(Stop::Doubt("its descriptors leave it"))?;
        let table = self.block(table)?;
        let size = self.sb.descriptor_bytes;
        let at = usize::try_from(group % per_block).unwrap_or(0) * size;
        let bytes = table.get(at..at + size).ok_or(Stop::Doubt("a descriptor cut short"))?;
        let descriptor = Descriptor::parse(&self.sb, group, bytes)?;
        let offset = index * self.sb.inode_bytes;
        let block = self.block(descriptor.inode_table() + offset / self.sb.block_bytes)?;
        let at = usize::try_from(offset % self.sb.block_bytes).unwrap_or(0);
        Ok(block.get(at..at + 128).ok_or(Stop::Doubt("an inode cut short"))?.to_vec())
    }

    /// A block in its place, and every copy of it in the log.
    fn copies(&mut self, block: u64) -> Result<Vec<Vec<u8>>, Stop> {
        let mut out = vec![self.block(block)?];
        for (place, escaped) in self.log.copies_of(block) {
            let mut copy = self.block(place)?;
            if escaped && let Some(head) = copy.get_mut(..4) {
                head.copy_from_slice(&journal::MAGIC.to_be_bytes());
            }
            out.push(copy);
        }
        Ok(out)
    }

    /// Bytes of the disk that `count` blocks take, as offset and length; `None` outside of the file system.
    fn bytes(&self, block: u64, count: u64) -> Option<(u64, u64)> {
        block.checked_add(count).filter(|end| *end <= self.sb.blocks)?;
        let bytes = self.sb.block_bytes;
        Some((self.start.checked_add(block.checked_mul(bytes)?)?, count.checked_mul(bytes)?))
    }

    /// A group's descriptor in each copy of its block, the one in place first.
    fn descriptors(&self, copies: &[Vec<u8>], group: u64, index: u64) -> Result<Vec<Descriptor>, Stop> {
        let size = self.sb.descriptor_bytes;
        let at = usize::try_from(index).unwrap_or(usize::MAX).saturating_mul(size);
        let mut out: Vec<Descriptor> = Vec::new();
        for copy in copies {
            let bytes = copy.get(at..at.saturating_add(size)).ok_or(Stop::Doubt("a descriptor cut short"))?;
            let descriptor = Descriptor::parse(&self.sb, group, bytes)?;
            if let Some(first) = out.first() {
                ensure(first.same_places(&descriptor), "a group's tables move in the journal")?;
            }
            if !out.contains(&descriptor) {
                out.push(descriptor);
            }
        }
        Ok(out)
    }

    /// The group's blocks that any state it may have uses, as bits.
    fn used_bits(&mut self, group: u64, descriptors: &[Descriptor]) -> Result<Vec<u8>, Stop> {
        let blocks = self.sb.group_blocks(group);
        let mut used = vec![0u8; usize::try_from(self.sb.blocks_per_group / 8).unwrap_or(0)];
        if descriptors.iter().any(Descriptor::is_uninitialised) {
            for bit in 0..base_blocks(&self.sb, group).min(blocks) {
                set(&mut used, bit);
            }
        }
        if descriptors.iter().all(Descriptor::is_uninitialised) {
            return Ok(used);
        }
        let place = descriptors.first().map_or(0, |d| d.bitmap);
        let in_place_counts = descriptors.first().is_some_and(|d| !d.is_uninitialised());
        for (number, copy) in self.copies(place)?.iter().enumerate() {
            let bits = copy.get(..used.len()).ok_or(Stop::Doubt("a bitmap cut short"))?;
            let known = descriptors.iter().any(|d| !d.is_uninitialised() && d.fits(&self.sb, bits, blocks));
            // In its place lies what was there before the group was first used.
            if number == 0 && !known && !in_place_counts {
                continue;
            }
            ensure(known, "a bitmap that is not what its group says")?;
            used.iter_mut().zip(bits).for_each(|(used, bits)| *used |= bits);
        }
        Ok(used)
    }
}

fn set(bits: &mut [u8], bit: u64) {
    if let Some(byte) = usize::try_from(bit / 8).ok().and_then(|at| bits.get_mut(at)) {
        *byte |= 1 << (bit % 8);
    }
}

/// Unused runs, collected in order of the disk.
#[derive(Debug, Default)]
struct Runs {
    open: Option<Range<u64>>,
    done: Vec<Range<u64>>,
}

impl Runs {
    fn add(&mut self, fs: &Fs<'_, '_>, group: u64, used: &[u8]) -> Result<(), Stop> {
        let first = fs.sb.group_first(group);
        let blocks = fs.sb.group_blocks(group);
        let mut bit = 0;
        while bit < blocks {
            let byte = usize::try_from(bit / 8).ok().and_then(|at| used.get(at)).copied().unwrap_or(0xff);
            // Eight at once where they are alike.
            let (is_used, count) = match byte {
                0 if bit.is_multiple_of(8) => (false, 8),
                0xff if bit.is_multiple_of(8) => (true, 8),
                byte => (byte >> (bit % 8) & 1 == 1, 1),
            };
            let count = u64::min(count, blocks - bit);
            if !is_used {
                let (at, len) = fs.bytes(first + bit, count).ok_or(Stop::Doubt("a group leaves it"))?;
                self.push(at..at + len)?;
            }
            bit += count;
        }
        Ok(())
    }

    fn push(&mut self, range: Range<u64>) -> Result<(), Stop> {
        match &mut self.open {
            Some(open) if open.end == range.start => open.end = range.end,
            _ => {
                self.close()?;
                self.open = Some(range);
            }
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), Stop> {
        if let Some(run) = self.open.take().filter(|r| r.end - r.start >= super::RUN_BYTES_MIN) {
            ensure(self.done.len() < RUNS_MAX, "its free space is in too many pieces")?;
            self.done.push(run);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Delta, Stop> {
        self.close()?;
        Ok(self.done.into_iter().collect())
    }
}
