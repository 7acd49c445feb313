//! Tables of image files: read inside the file's bounds, and cached in pieces.
//!
//! Invariants
//! - Nothing is allocated for a structure that would not fit into the file.
//! - Cached pieces are the file's bytes as they are; every entry is checked each time it is used.
//! - One budget, [`CACHE_BYTES`], for the tables of all images of the process.
//!
//! Not here: what an entry means.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::RwLock;

use crate::{
    Error, FileSlot, Result, Storage, codec,
    raw::{file_id, next_file_id},
};

/// Budget of the cache of table pieces, in bytes.
const CACHE_BYTES: usize = 32 << 20;

/// The image file and its length when it was opened; a file that shrinks later fails its reads.
#[derive(Clone, Debug)]
pub(crate) struct TableFile {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) len: u64,
    /// Equal for the same file in the same state, as far as the storage can tell.
    pub(crate) id: u64,
    /// This opening's own: cached tables are not shared with another one, whose file may have been
    /// changed within one tick of its clock.
    pub(crate) tables: u64,
}

impl TableFile {
    /// Takes the storage's present length as the file's.
    pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let len = storage.len().map_err(|e| Error::io(storage.label(), "stat", 0, e))?;
        let id = file_id(&*storage);
        Ok(Self { storage, len, id, tables: next_file_id() })
    }

    pub(crate) fn label(&self) -> &str {
        self.storage.label()
    }

    /// The storage in slot 0; a layer of one file has no other.
    pub(crate) fn only(&self, slot: FileSlot) -> Result<&Arc<dyn Storage>> {
        match slot {
            0 => Ok(&self.storage),
            _ => Err(Error::corrupt(self.label(), 0, format!("the disk has one file, and no file {slot}"))),
        }
    }

    /// What the fingerprint of a layer of one file begins with: its kind, the disk's size, the file's length.
    pub(crate) fn fingerprint(&self, kind: &str, size: u64) -> blake3::Hasher {
        let mut hash = blake3::Hasher::new();
        hash.update(kind.as_bytes()).update(&size.to_le_bytes()).update(&self.len.to_le_bytes());
        hash
    }

    /// Adds the first megabyte of a table to a fingerprint.
    pub(crate) fn add_table(&self, hash: &mut blake3::Hasher, offset: u64, len: u64) -> Result<()> {
        hash.update(&self.read(offset, len.min(1 << 20), "the block table")?);
        Ok(())
    }

    /// Reads `len` bytes of a structure called `what`, which must lie inside the file.
    pub(crate) fn read(&self, offset: u64, len: u64, what: &str) -> Result<Vec<u8>> {
        self.check_inside(offset, len, what)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.storage.read_at(offset, &mut bytes).map_err(|e| Error::io(self.label(), "read", offset, e))?;
        Ok(bytes)
    }

    pub(crate) fn check_inside(&self, offset: u64, len: u64, what: &str) -> Result<()> {
        match offset.checked_add(len) {
            Some(need) if need <= self.len => Ok(()),
            need => Err(Error::Truncated {
                path: self.label().into(),
                len: self.len,
                need: need.unwrap_or(u64::MAX),
                what: format!("{what} at {offset}"),
            }),
        }
    }

    /// Hands the `len` bytes of table at `offset`, checked to lie inside the file by the caller, to
    /// `work`, from the cache or into it.
    pub(crate) fn with_table<R>(&self, offset: u64, len: usize, work: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
        let (cache, key) = (PieceCache::shared(), (self.tables, offset));
        if let Some(bytes) = cache.get(key) {
            return work(&bytes);
        }
        codec::with_stored(self.storage.as_ref(), offset, len, |bytes| {
            cache.put(key, &Arc::from(bytes));
            work(bytes)
        })
    }
}

/// Which of `places` occurred before, in order. Tables that two entries share belong to the first: no
/// valid image has that, and it would let a small file describe any amount of work.
pub(crate) fn duplicates(places: impl Iterator<Item = Option<u64>>) -> Vec<usize> {
    let mut known: Vec<(u64, usize)> = places.enumerate().filter_map(|(i, place)| Some((place?, i))).collect();
    known.sort_unstable();
    let again = known.windows(2).filter_map(|pair| match pair {
        [(first, _), (second, index)] if first == second => Some(*index),
        _ => None,
    });
    let mut again: Vec<usize> = again.collect();
    again.sort_unstable();
    again
}

/// A piece of a table: the opening it belongs to and its byte offset.
type PieceKey = (u64, u64);

#[derive(Debug)]
struct Cached {
    bytes: Arc<[u8]>,
    /// Looked at since the clock hand last passed.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Shard {
    pieces: HashMap<PieceKey, Cached>,
    /// Keys in the order the clock hand visits them.
    ring: VecDeque<PieceKey>,
    bytes: usize,
}

/// Pieces under a byte budget, second-chance eviction. The lock of a shard guards only the map;
/// nothing is read under it, so two threads may read one piece twice and the first is kept.
#[derive(Debug)]
pub(crate) struct PieceCache {
    shards: [RwLock<Shard>; 16],
    shard_bytes_max: usize,
}

impl PieceCache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        let shards = std::array::from_fn(|_| RwLock::default());
        Self { shard_bytes_max: bytes_max / shards.len(), shards }
    }

    /// The cache of this process.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: LazyLock<PieceCache> = LazyLock::new(|| PieceCache::new(CACHE_BYTES));
        &SHARED
    }

    /// A cheap mix is good enough here: who aims at one shard gets a smaller cache.
    fn shard(&self, key: &PieceKey) -> &RwLock<Shard> {
        let [first, ..] = &self.shards;
        let mixed = (key.0 ^ (key.1 >> 9)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        let index = usize::try_from(mixed).unwrap_or_default() % self.shards.len();
        self.shards.get(index).unwrap_or(first)
    }

    pub(crate) fn get(&self, key: PieceKey) -> Option<Arc<[u8]>> {
        let shard = self.shard(&key).read();
        let cached = shard.pieces.get(&key)?;
        cached.used.store(true, Ordering::Relaxed);
        Some(cached.bytes.clone())
    }

    /// Keeps `bytes`, unless that key is kept already or the budget of a shard is less than one piece.
    pub(crate) fn put(&self, key: PieceKey, bytes: &Arc<[u8]>) {
        if bytes.len() > self.shard_bytes_max {
            return;
        }
        let mut guard = self.shard(&key).write();
        let shard = &mut *guard;
        if shard.pieces.contains_key(&key) {
            return;
        }
        while shard.bytes + bytes.len() > self.shard_bytes_max {
            let Some(oldest) = shard.ring.pop_front() else { break };
            match shard.pieces.get(&oldest) {
                Some(cached) if cached.used.swap(false, Ordering::Relaxed) => shard.ring.push_back(oldest),
                _ => {
                    if let Some(gone) = shard.pieces.remove(&oldest) {
                        shard.bytes -= gone.bytes.len();
                    }
                }
            }
        }
        shard.bytes += bytes.len();
        shard.ring.push_back(key);
        shard.pieces.insert(key, Cached { bytes: bytes.clone(), used: AtomicBool::new(false) });
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.shards.iter().map(|s| s.read().bytes).sum()
    }
}
