//! A new qcow2 image, written once: data in the order it comes, all tables at the end.
//!
//! ```text
//! cluster 0   zeros until everything else is durable, then the header
//! cluster 1.. data, appended
//! then        second-level tables, the first-level table, reference blocks, the reference table
//! ```
//!
//! Invariants
//! - A file is an image only once it is whole: before the header is written it has not even the magic.
//! - Every cluster is used once and counted once; nothing is leaked and nothing shared.
//! - After a crash the writer goes on from the last [`NewQcow2::checkpoint`]: bytes were durable before the map that
//!   names them was handed out.
//!
//! Not here: changing an image that exists; compressed clusters; where the map of a checkpoint is kept.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use crate::{Error, Result, Storage};

/// Bytes of a cluster.
pub const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;

/// Bytes of one entry of a checkpoint's map.
pub const MAP_ENTRY_BYTES: u64 = 16;

const CLUSTER_BITS: u32 = 16;
const ENTRIES: u64 = CLUSTER_BYTES / 8;
const COPIED: u64 = 1 << 63;
const ZERO: u64 = 1;
const HEADER_BYTES: u32 = 104;
const SECTOR_BYTES: u64 = 512;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const BACKING_NAME_MAX: usize = 1023;
/// Reference counts of 16 bits that fit in a cluster.
const COUNTS: u64 = CLUSTER_BYTES / 2;
/// Largest disk: the first-level table of the reader's limit, 32 MiB.
const SIZE_MAX: u64 = (32 << 20) / 8 * ENTRIES * CLUSTER_BYTES;

/// What an image falls back to: a name relative to its own folder, and its format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// File name.
    pub name: String,
    /// `qcow2` or `raw`.
    pub format: String,
}

/// An image under way.
#[derive(Debug)]
pub struct NewQcow2 {
    storage: Arc<dyn Storage>,
    size: u64,
    backing: Option<BackingName>,
    next: AtomicU64,
    map: Mutex<Map>,
}

#[derive(Debug, Default)]
struct Map {
    /// Second-level tables by number.
    tables: BTreeMap<u64, Vec<u64>>,
    /// Entries since the last checkpoint: number of the guest's cluster, table entry.
    fresh: Vec<(u64, u64)>,
}

/// Where a writer stands, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Clusters of the file in use.
    pub clusters: u64,
}

impl NewQcow2 {
    /// Begins an image of `size` bytes in an empty storage.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a disk or a name that is too long; [`Error::Io`].
    pub fn create(storage: Arc<dyn Storage>, size: u64, backing: Option<BackingName>) -> Result<Self> {
        let refuse = |what: String| Err(Error::unsupported(storage.label(), what));
        if size > SIZE_MAX {
            return refuse(format!("a qcow2 disk of {size} bytes (at most {SIZE_MAX})"));
        }
        if let Some(backing) = backing.as_ref().filter(|b| b.name.len() > BACKING_NAME_MAX || b.format.len() > 16) {
            return refuse(format!("a backing file's name of {} bytes", backing.name.len()));
        }
        storage.set_len(CLUSTER_BYTES).map_err(|e| Error::io(storage.label(), "extend", 0, e))?;
        Ok(Self { storage, size, backing, next: AtomicU64::new(1), map: Mutex::default() })
    }

    /// Goes on after a crash: `maps` is what all checkpoints up to `at` handed out, one after the other.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a map that names clusters out of the file; those of [`NewQcow2::create`].
    pub fn resume(
        storage: Arc<dyn Storage>,
        size: u64,
        backing: Option<BackingName>,
        at: Checkpoint,
        maps: &[u8],
    ) -> Result<Self> {
        let corrupt = |offset: usize, what: &str| Error::corrupt(storage.label(), offset as u64, what);
        let len = storage.len().map_err(|e| Error::io(storage.label(), "measure", 0, e))?;
        let end = at.clusters.checked_mul(CLUSTER_BYTES).filter(|end| *end <= len && at.clusters > 0);
        let Some(end) = end else { return Err(corrupt(0, "the file is shorter than its checkpoint")) };
        let mut tables: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        let (entries, rest) = maps.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(corrupt(maps.len(), "a checkpoint's map ends within an entry"));
        }
        for (number, entry) in entries.iter().enumerate() {
            let (guest, host) = entry.split_at(8);
            let (guest, host) = (number_of(guest), number_of(host));
            let good = host == ZERO || (host & COPIED != 0 && (CLUSTER_BYTES..end).contains(&(host & !COPIED)));
            if !good || guest.checked_mul(CLUSTER_BYTES).is_none_or(|at| at >= size) {
                return Err(corrupt(number * 16, "a checkpoint's map names a cluster that cannot be"));
            }
            put(&mut tables, guest, host);
        }
        storage.set_len(end).map_err(|e| Error::io(storage.label(), "cut", end, e))?;
        let map = Mutex::new(Map { tables, fresh: Vec::new() });
        Ok(Self { storage, size, backing, next: AtomicU64::new(at.clusters), map })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Stores whole clusters from `offset` on; only the disk's end may cut the last one. Any number of threads, each
    /// cluster once.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for anything but whole clusters; [`Error::Io`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        self.check(offset, len)?;
        let clusters = len.div_ceil(CLUSTER_BYTES);
        let first = self.next.fetch_add(clusters, Ordering::Relaxed);
        let host = first.saturating_mul(CLUSTER_BYTES);
        let failed = |e| Error::io(self.storage.label(), "write", host, e);
        self.storage.write_at(host, bytes).map_err(failed)?;
        if !len.is_multiple_of(CLUSTER_BYTES) {
            // The rest of the last cluster exists and is zeros.
            let pad = vec![0; usize::try_from(CLUSTER_BYTES - len % CLUSTER_BYTES).unwrap_or_default()];
            self.storage.write_at(host + len, &pad).map_err(failed)?;
        }
        let mut map = self.map.lock();
        for index in 0..clusters {
            map.set(offset / CLUSTER_BYTES + index, (host + index * CLUSTER_BYTES) | COPIED);
        }
        Ok(())
    }

    /// Lets whole clusters read as zeros, whatever the backing file has.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for anything but whole clusters.
    pub fn write_zeros(&self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len)?;
        let mut map = self.map.lock();
        for index in 0..len.div_ceil(CLUSTER_BYTES) {
            map.set(offset / CLUSTER_BYTES + index, ZERO);
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size);
        let whole = |at: u64| at.is_multiple_of(CLUSTER_BYTES);
        match end {
            Some(end) if whole(offset) && (whole(end) || end == self.size) => Ok(()),
            _ => Err(Error::OutOfRange { path: self.storage.label().into(), offset, len, size: self.size }),
        }
    }

    /// Makes everything written so far durable and hands out the map of what is new since the last call. Nobody writes
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`]: nothing written since the last checkpoint counts.
    pub fn checkpoint(&self) -> Result<(Checkpoint, Vec<u8>)> {
        let fresh = std::mem::take(&mut self.map.lock().fresh);
        self.sync()?;
        let bytes = fresh.iter().flat_map(|(guest, host)| [guest.to_le_bytes(), host.to_le_bytes()]);
        Ok((Checkpoint { clusters: self.next.load(Ordering::Relaxed) }, bytes.flatten().collect()))
    }

    /// Writes the tables and, once they are durable, the header.
    ///
    /// # Errors
    /// [`Error::Io`]; the file is no image then.
    pub fn finish(self) -> Result<()> {
        let tables = std::mem::take(&mut self.map.lock().tables);
        let mut next = self.next.load(Ordering::Relaxed);
        let l1_entries = self.size.div_ceil(ENTRIES * CLUSTER_BYTES).max(1);
        let mut l1 = vec![0u64; usize::try_from(l1_entries).unwrap_or_default()];
        for (number, table) in &tables {
            self.put_table(next, table)?;
            if let Some(entry) = usize::try_from(*number).ok().and_then(|n| l1.get_mut(n)) {
                *entry = (next * CLUSTER_BYTES) | COPIED;
            }
            next += 1;
        }
        let l1_at = next;
        self.put_table(l1_at, &l1)?;
        next += (l1_entries * 8).div_ceil(CLUSTER_BYTES);
        let counted = self.put_counts(next)?;
        self.sync()?;
        let header = self.header(l1_entries, l1_at, counted);
        self.storage.write_at(0, &header).map_err(|e| Error::io(self.storage.label(), "write", 0, e))?;
        self.sync()
    }

    fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(|e| Error::io(self.storage.label(), "sync", 0, e))
    }

    /// Writes a table of 8-byte entries, filled up to whole clusters.
    fn put_table(&self, cluster: u64, table: &[u64]) -> Result<()> {
        let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.put(cluster, &mut bytes)
    }

    fn put(&self, cluster: u64, bytes: &mut Vec<u8>) -> Result<()> {
        let step = usize::try_from(CLUSTER_BYTES).unwrap_or_default();
        bytes.resize(bytes.len().next_multiple_of(step), 0);
        let at = cluster.saturating_mul(CLUSTER_BYTES);
        self.storage.write_at(at, bytes).map_err(|e| Error::io(self.storage.label(), "write", at, e))
    }

    /// Writes a count of one for each cluster up to `used` and for those the counts take themselves. Answers where the
    /// table of the counts is and how many clusters it has.
    fn put_counts(&self, used: u64) -> Result<(u64, u64)> {
        let (mut blocks, mut table) = (1, 1);
        loop {
            let all = used + blocks + table;
            let (b, t) = (all.div_ceil(COUNTS), all.div_ceil(COUNTS).div_ceil(ENTRIES));
            if (b, t) == (blocks, table) {
                break;
            }
            (blocks, table) = (b.max(blocks), t.max(table));
        }
        let all = used + blocks + table;
        for block in 0..blocks {
            let counted = all.saturating_sub(block * COUNTS).min(COUNTS);
            let mut bytes: Vec<u8> = (0..counted).flat_map(|_| 1u16.to_be_bytes()).collect();
            self.put(used + block, &mut bytes)?;
        }
        let entries: Vec<u64> = (0..blocks).map(|block| (used + block) * CLUSTER_BYTES).collect();
        self.put_table(used + blocks, &entries)?;
        Ok((used + blocks, table))
    }

    fn header(&self, l1_entries: u64, l1_at: u64, (counts_at, counts): (u64, u64)) -> Vec<u8> {
        let mut extensions = Vec::new();
        if let Some(backing) = &self.backing {
            let len = u32::try_from(backing.format.len()).unwrap_or_default();
            extensions.extend(BACKING_FORMAT.to_be_bytes());
            extensions.extend(len.to_be_bytes());
            extensions.extend(backing.format.as_bytes());
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        extensions.extend([0; 8]);
        let name = self.backing.as_ref().map(|b| b.name.as_bytes()).unwrap_or_default();
        let name_at = if name.is_empty() { 0 } else { u64::from(HEADER_BYTES) + extensions.len() as u64 };
        let mut out = Vec::new();
        let short = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
        out.extend(0x5146_49fb_u32.to_be_bytes());
        out.extend(3u32.to_be_bytes());
        out.extend(name_at.to_be_bytes());
        out.extend(short(name.len() as u64));
        out.extend(CLUSTER_BITS.to_be_bytes());
        // A hypervisor counts a disk in sectors, and would cut one that ends within the last.
        out.extend(self.size.next_multiple_of(SECTOR_BYTES).to_be_bytes());
        out.extend(0u32.to_be_bytes());
        out.extend(short(l1_entries));
        out.extend((l1_at * CLUSTER_BYTES).to_be_bytes());
        out.extend((counts_at * CLUSTER_BYTES).to_be_bytes());
        out.extend(short(counts));
        // No snapshots, no features.
        out.extend([0; 4 + 8 + 8 + 8 + 8]);
        out.extend(4u32.to_be_bytes());
        out.extend(HEADER_BYTES.to_be_bytes());
        out.extend(extensions);
        out.extend(name);
        out
    }
}

impl Map {
    fn set(&mut self, guest: u64, entry: u64) {
        put(&mut self.tables, guest, entry);
        self.fresh.push((guest, entry));
    }
}

fn put(tables: &mut BTreeMap<u64, Vec<u64>>, guest: u64, entry: u64) {
    let table = tables.entry(guest / ENTRIES).or_insert_with(|| vec![0; usize::try_from(ENTRIES).unwrap_or_default()]);
    if let Some(slot) = usize::try_from(guest % ENTRIES).ok().and_then(|at| table.get_mut(at)) {
        *slot = entry;
    }
}

fn number_of(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

#[cfg(test)]
mod tests;
