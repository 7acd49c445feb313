//! Which parts of a disk no file system uses, so that hydration need not copy them.
//!
//! A partition table is read, and in each partition the file system's own record of free blocks. ext2, ext3 and ext4
//! are read today; every other content counts as used. XFS and NTFS have their place in [`volume`].
//!
//! Invariants
//! - Everything read is a guest's work: lengths are bounded before they are allocated, arithmetic is checked, every loop
//!   ends by a bound of ours.
//! - A doubt about a volume makes all of it used, a doubt about the partition table all of the disk. What lies in no
//!   partition is used.
//! - A file system is believed only where the table says there is one, nobody else has left a mark (`foreign`), and it is
//!   alive: a superblock and its bitmaps outlive what they describe.
//! - A range is unused only if nothing that could still come true (a journal that is to be replayed) uses it.
//!
//! Not here: what is done with it (`hydrate`), and what a guest has changed since.

mod ext4;
mod foreign;
mod partition;
mod source;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub(crate) use self::source::Stop;
use self::{
    partition::{Owner, Partition},
    source::{Source, ensure},
};
use crate::{Delta, Result};

/// Reads the restore point.
pub type ReadAt<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<()>;

/// Shorter unused runs are not worth a range, in bytes.
const RUN_BYTES_MIN: u64 = 64 << 10;

/// Most unused runs of a disk; more fragmented ones are copied whole.
const RUNS_MAX: usize = 1 << 20;

/// Kinds of content that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileSystem {
    /// ext2, ext3 or ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// NTFS.
    Ntfs,
    /// Anything else: swap, LVM, encrypted, nothing.
    Other,
}

/// What was found in one partition, or on a disk without partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Where it lies on the disk, in bytes.
    pub range: Range<u64>,
    /// What it holds.
    pub file_system: FileSystem,
    /// Bytes of it that are not used, in the runs that are worth skipping.
    pub unused: u64,
    /// Why all of it counts as used although its file system could be read.
    pub doubt: Option<&'static str>,
}

/// What a disk does not use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unused {
    /// Whole blocks of 4 KiB of the disk.
    pub ranges: Delta,
    /// What it was learned from.
    pub volumes: Vec<Volume>,
    /// Why nothing was looked for.
    pub doubt: Option<&'static str>,
}

/// Looks for what a disk of `size` bytes does not use. Reads a few KiB for each 128 MiB, and less than 2 MiB more
/// of each volume and of the disk.
///
/// # Errors
/// A read that failed and may succeed later. Everything else that is wrong is a doubt.
pub fn find(size: u64, read: ReadAt<'_>) -> Result<Unused> {
    let mut source = Source::new(size, read);
    let partitions = match partition::partitions(&mut source) {
        Ok(partitions) => partitions,
        Err(Stop::Doubt(doubt)) => return Ok(Unused { doubt: Some(doubt), ..Unused::default() }),
        Err(Stop::Read(error)) => return Err(error),
    };
    let mut found = Unused::default();
    let mut disk_is_free = partitions.iter().any(|p| p.owner == Owner::Unsaid);
    for partition in partitions {
        let file_system = match kind(&mut source, &partition.range) {
            Ok(kind) => kind,
            Err(Stop::Doubt(_)) => FileSystem::Other,
            Err(Stop::Read(error)) => return Err(error),
        };
        if file_system == FileSystem::Ext4 && !disk_is_free {
            // Somebody may own the disk as a whole, with its table.
            match foreign::none(&mut source, &(0..size)) {
                Ok(()) => disk_is_free = true,
                Err(Stop::Doubt(doubt)) => return Ok(Unused { doubt: Some(doubt), ..Unused::default() }),
                Err(Stop::Read(error)) => return Err(error),
            }
        }
        let (ranges, doubt) = match volume(&mut source, &partition, file_system) {
            Ok(ranges) => (ranges, None),
            Err(Stop::Doubt(doubt)) => (Delta::new(), Some(doubt)),
            Err(Stop::Read(error)) => return Err(error),
        };
        found.volumes.push(Volume { range: partition.range, file_system, unused: ranges.bytes(), doubt });
        found.ranges = found.ranges.union(&ranges);
    }
    Ok(found)
}

/// What a volume holds, by its magic.
fn kind(source: &mut Source<'_>, range: &Range<u64>) -> Result<FileSystem, Stop> {
    let head = source.bytes::<16>(range.start)?;
    let magic = source.bytes::<2>(range.start.saturating_add(1080))?;
    Ok(if magic == [0x53, 0xef] {
        FileSystem::Ext4
    } else if head.starts_with(b"XFSB") {
        FileSystem::Xfs
    } else if head.get(3..11) == Some(b"NTFS    ") {
        FileSystem::Ntfs
    } else {
        FileSystem::Other
    })
}

/// What a volume does not use, in whole blocks of the disk.
fn volume(source: &mut Source<'_>, partition: &Partition, file_system: FileSystem) -> Result<Delta, Stop> {
    let range = &partition.range;
    match file_system {
        FileSystem::Ext4 => {
            ensure(partition.owner != Owner::Other, "its partition is meant for something else")?;
            foreign::none(source, range)?;
            if partition.owner == Owner::Linux {
                partition::none_inside(source, range)?;
            }
            Ok(runs(ext4::unused(source, range)?, range))
        }
        FileSystem::Xfs | FileSystem::Ntfs | FileSystem::Other => Ok(Delta::new()),
    }
}

/// Unused bytes of a volume as whole blocks of the disk, without runs that are too short.
fn runs(unused: Delta, volume: &Range<u64>) -> Delta {
    const BLOCK: u64 = crate::overlay::OVERLAY_BLOCK_BYTES;
    let inwards = |r: Range<u64>| r.start.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX)..r.end - r.end % BLOCK;
    let long = |r: &Range<u64>| r.start < r.end && r.end - r.start >= RUN_BYTES_MIN;
    unused.clip(volume.clone()).iter().map(inwards).filter(long).collect()
}
