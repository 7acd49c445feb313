//! Decoded blocks under one byte budget, shared by all exports of a process.
//!
//! A block is kept as its decoded *prefix*: the first read decodes as far as it has to, a later read
//! past that decodes the rest. Blocks stored raw are kept like all others: a hit then needs no
//! second checksum over the whole block, and nothing is served that was not checked since it was read.
//!
//! Invariants
//! - One decode however many wait: while a block is decoded, others that want it wait for that one.
//! - Errors are not kept. Each waiter tries for itself, so each gets the error of its own attempt.
//! - An entry answers only for the very reference it was decoded by (place, length, checksum, index):
//!   a wrong pointer to a good block is still found out by its layer.
//! - At most the budget is kept. A block too large for that is decoded, handed out and not kept.
//! - Bytes of one block never show through in another, though their memory is used again (`page`).
//!
//! Not here: reading, decoding and checking (`Layer::unpack`); which reads are worth an entry (`Chain`).

mod page;

use std::{
    cell::{Cell, RefCell},
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use aquifer_formats::{
    BlockRef, Error, Layer, Result, codec,
    planted::{Bug, planted},
};
use quick_cache::{
    DefaultHashBuilder, OptionsBuilder, Weighter,
    sync::{Cache, DefaultLifecycle, EntryAction, EntryResult, GuardResult, PlaceholderGuard},
};

use self::page::{PAGE_BYTES, PagePool, Paged};

/// Larger than any block of a supported format; what claims more is not decoded.
const BLOCK_BYTES_MAX: u32 = 64 * 1024 * 1024;
/// Smallest share of the budget a shard may have: eight of the largest native blocks.
const SHARD_BYTES_MIN: u64 = 32 * 1024 * 1024;
const SHARDS_MAX: u64 = 64;
/// Part of a shard for blocks that were read more than once. The rest has to hold two of the largest native blocks: what does not
/// fit there is gone before it is read a second time, and each part of such a block that is read is a decode of all of it.
const AGAIN_SHARE: f64 = 0.75;
/// What an entry takes beside its bytes: key, reference, list and table places.
const ENTRY_BYTES: u64 = 256;

thread_local! {
    /// Where blocks are decoded to. It stays in the processor's cache, which a fresh buffer for each
    /// block would not. Only what a decode has just put there is ever copied out.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// Stored bytes this thread has decoded from.
    static FETCHED: Cell<u64> = const { Cell::new(0) };
}

/// Stored bytes the calling thread has decoded from so far: the difference over a call is what that call fetched.
pub(crate) fn fetched_here() -> u64 {
    FETCHED.get()
}

/// Where a block is stored: the file's process-wide identity and the byte offset in it. The index is
/// part of it for the sake of blocks that are used twice: a format may refer to the second use
/// differently, and each reference has to prove itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct BlockKey {
    file_id: u64,
    offset: u64,
    logical: u64,
}

impl BlockKey {
    fn of(layer: &dyn Layer, block: &BlockRef) -> Self {
        let file_id = if planted(Bug::CacheMixesFiles) { 0 } else { layer.file_id(block.file) };
        Self { file_id, offset: block.offset, logical: block.logical }
    }
}

/// A decoded prefix and the reference it was decoded by.
#[derive(Debug)]
pub(crate) struct Decoded {
    block: BlockRef,
    bytes: Paged,
}

/// A reference without its file's number, which differs from layer to layer for one and the same file.
fn reference(block: &BlockRef) -> BlockRef {
    BlockRef { file: 0, ..*block }
}

impl Decoded {
    fn is(&self, block: &BlockRef) -> bool {
        self.block == reference(block)
    }

    /// Fills `out` with the decoded bytes from `start` on; `false` where there are fewer.
    pub(crate) fn copy_to(&self, start: usize, out: &mut [u8]) -> bool {
        self.bytes.copy_to(start, out)
    }
}

#[derive(Clone)]
struct Weigh;

impl Weighter<BlockKey, Arc<Decoded>> for Weigh {
    fn weight(&self, _key: &BlockKey, value: &Arc<Decoded>) -> u64 {
        value.bytes.weight() + ENTRY_BYTES
    }
}

type Blocks = Cache<BlockKey, Arc<Decoded>, Weigh>;
type Guard<'a> =
    PlaceholderGuard<'a, BlockKey, Arc<Decoded>, Weigh, DefaultHashBuilder, DefaultLifecycle<BlockKey, Arc<Decoded>>>;

/// Cache of decoded blocks.
pub struct BlockCache {
    blocks: Blocks,
    pool: Arc<PagePool>,
    bytes_max: u64,
    hits: AtomicU64,
    waits: AtomicU64,
    decodes: AtomicU64,
    decoded_bytes: AtomicU64,
}

/// What a cache has done so far, and what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Reads answered from a kept block.
    pub hits: u64,
    /// Reads that waited for another thread's decode of the same block, or came just behind it.
    pub waits: u64,
    /// Blocks decoded (whole or in part), kept or not.
    pub decodes: u64,
    /// Bytes decoded.
    pub decoded_bytes: u64,
    /// Blocks held.
    pub blocks: u64,
    /// Bytes held, with what the entries themselves take.
    pub resident_bytes: u64,
}

impl BlockCache {
    /// A cache that keeps at most `bytes_max` bytes of decoded blocks. With 0 nothing is kept.
    pub fn new(bytes_max: u64) -> Self {
        let shards = (bytes_max / SHARD_BYTES_MIN).clamp(1, SHARDS_MAX);
        // Rounded down to a power of two: the cache would round up, and shares would shrink below a block.
        let shards = usize::try_from(1u64 << shards.ilog2()).unwrap_or(1);
        let items = usize::try_from(bytes_max / PAGE_BYTES as u64).unwrap_or(usize::MAX).max(32 * shards);
        let options = OptionsBuilder::new()
            .shards(shards)
            .estimated_items_capacity(items)
            .weight_capacity(bytes_max)
            .hot_allocation(AGAIN_SHARE)
            .build();
        let blocks = match options {
            Ok(options) => {
                Cache::with_options(options, Weigh, DefaultHashBuilder::default(), DefaultLifecycle::default())
            }
            Err(_) => Cache::with_weighter(items, bytes_max, Weigh),
        };
        Self {
            blocks,
            pool: Arc::default(),
            bytes_max,
            hits: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            decodes: AtomicU64::new(0),
            decoded_bytes: AtomicU64::new(0),
        }
    }

    /// The budget in bytes.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Counters since the start, and what is held now.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.load(Relaxed),
            waits: self.waits.load(Relaxed),
            decodes: self.decodes.load(Relaxed),
            decoded_bytes: self.decoded_bytes.load(Relaxed),
            blocks: self.blocks.len() as u64,
            resident_bytes: self.blocks.weight(),
        }
    }

    /// Whether a block of `len` bytes can be kept without another having to go.
    pub(crate) fn has_room(&self, len: u32) -> bool {
        // Shards fill unevenly; the last eighth is left to reads that need it.
        self.blocks.weight() + u64::from(len) <= self.bytes_max / 8 * 7
    }

    /// At least the first `need` bytes of a block of `layer`, if they are kept. Never waits for a decode.
    pub(crate) fn peek(&self, layer: &dyn Layer, block: &BlockRef, need: usize) -> Option<Arc<Decoded>> {
        let kept = self.blocks.get(&BlockKey::of(layer, block))?;
        if !kept.is(block) || kept.bytes.len() < need {
            return None;
        }
        self.hits.fetch_add(1, Relaxed);
        Some(kept)
    }

    /// At least the first `need` bytes of a block of `layer`, decoded if they are not kept.
    ///
    /// # Errors
    /// Those of [`Layer::unpack`]; [`Error::BadBlock`] if it delivers less than asked for, or if the
    /// block claims to be larger than any can be.
    pub(crate) fn get(&self, layer: &dyn Layer, block: &BlockRef, need: usize) -> Result<Arc<Decoded>> {
        if let Some(kept) = self.peek(layer, block, need) {
            return Ok(kept);
        }
        self.get_within(None, layer, block, need)
    }

    /// As [`BlockCache::get`], if that takes no more than a decode: the stored bytes are in memory, and nobody
    /// else is at the block. `None` leaves it to a thread that may wait, and whatever is wrong as well.
    pub(crate) fn get_soon(&self, layer: &dyn Layer, block: &BlockRef, need: usize) -> Option<Arc<Decoded>> {
        if let Some(kept) = self.peek(layer, block, need) {
            return Some(kept);
        }
        codec::in_memory_only(|| self.get_within(Some(Duration::ZERO), layer, block, need)).ok()
    }

    /// `patience` is how long another thread's decode is waited for, `None` for as long as it takes.
    fn get_within(
        &self,
        patience: Option<Duration>,
        layer: &dyn Layer,
        block: &BlockRef,
        need: usize,
    ) -> Result<Arc<Decoded>> {
        let want = prefix(block, need);
        let kept = match self.blocks.get_value_or_guard(&BlockKey::of(layer, block), patience) {
            GuardResult::Guard(guard) => return self.decode_and_keep(guard, layer, block, want),
            GuardResult::Value(kept) => kept,
            GuardResult::Timeout => return Err(busy(layer, block)),
        };
        if !kept.is(block) {
            return self.decode(layer, block, want);
        }
        if kept.bytes.len() >= need {
            self.waits.fetch_add(1, Relaxed);
            return Ok(kept);
        }
        drop(kept);
        self.extend(patience, layer, block, need)
    }

    /// The second touch, past the kept prefix: decodes all, once.
    fn extend(
        &self,
        patience: Option<Duration>,
        layer: &dyn Layer,
        block: &BlockRef,
        need: usize,
    ) -> Result<Arc<Decoded>> {
        let entry = self.blocks.entry(&BlockKey::of(layer, block), patience, |_, kept: &mut Arc<Decoded>| {
            if kept.is(block) && kept.bytes.len() < need {
                EntryAction::ReplaceWithGuard
            } else {
                EntryAction::Retain(kept.clone())
            }
        });
        let whole = raw_len(block).max(need);
        match entry {
            EntryResult::Retained(kept) if kept.is(block) => {
                self.waits.fetch_add(1, Relaxed);
                Ok(kept)
            }
            EntryResult::Vacant(guard) | EntryResult::Replaced(guard, _) => {
                self.decode_and_keep(guard, layer, block, whole)
            }
            EntryResult::Timeout => Err(busy(layer, block)),
            EntryResult::Retained(_) | EntryResult::Removed(..) => self.decode(layer, block, whole),
        }
    }

    /// On an error the guard is dropped, and the next waiter becomes the one that tries.
    fn decode_and_keep(
        &self,
        guard: Guard<'_>,
        layer: &dyn Layer,
        block: &BlockRef,
        want: usize,
    ) -> Result<Arc<Decoded>> {
        let decoded = self.decode(layer, block, want)?;
        // Refused where somebody removed the place meanwhile; the block is good all the same.
        let _ = guard.insert(decoded.clone());
        Ok(decoded)
    }

    fn decode(&self, layer: &dyn Layer, block: &BlockRef, want: usize) -> Result<Arc<Decoded>> {
        self.with_decoded(layer, block, want, |bytes| {
            // Of what came beyond, whole pages are worth keeping.
            let len = if bytes.len() < raw_len(block) {
                want.max(bytes.len() / PAGE_BYTES * PAGE_BYTES)
            } else {
                bytes.len()
            };
            let bytes = Paged::of(bytes.get(..len).unwrap_or(bytes), &self.pool);
            Arc::new(Decoded { block: reference(block), bytes })
        })
    }

    /// Decodes a whole block into `out`, which is as long as it, and keeps nothing.
    ///
    /// # Errors
    /// As [`BlockCache::get`].
    pub(crate) fn decode_once(&self, layer: &dyn Layer, block: &BlockRef, out: &mut [u8]) -> Result<()> {
        self.with_decoded(layer, block, out.len(), |bytes| {
            if let Some(bytes) = bytes.get(..out.len()) {
                out.copy_from_slice(bytes);
            }
        })
    }

    /// Hands at least the first `want` decoded bytes of a block to `work`.
    fn with_decoded<R>(
        &self,
        layer: &dyn Layer,
        block: &BlockRef,
        want: usize,
        work: impl FnOnce(&[u8]) -> R,
    ) -> Result<R> {
        let bad = |what: String| Error::BadBlock {
            path: layer.file(block.file).map_or(layer.label(), |f| f.label()).into(),
            offset: block.offset,
            len: block.stored_len.into(),
            what,
        };
        if block.raw_len > BLOCK_BYTES_MAX || want > raw_len(block) {
            return Err(bad(format!("{want} bytes are wanted of {} decoded bytes", block.raw_len)));
        }
        let mut scratch = SCRATCH.take();
        scratch.clear();
        let unpacked = layer.unpack(block, want, &mut scratch);
        FETCHED.set(FETCHED.get() + u64::from(block.stored_len));
        let done = unpacked.and_then(|()| match scratch.len() {
            len if len < want => Err(bad(format!("decodes to {len} bytes, {want} are wanted"))),
            len => {
                self.decodes.fetch_add(1, Relaxed);
                self.decoded_bytes.fetch_add(len as u64, Relaxed);
                Ok(work(&scratch))
            }
        });
        SCRATCH.set(scratch);
        done
    }
}

/// Another thread decodes this block, and it was not to be waited for.
fn busy(layer: &dyn Layer, block: &BlockRef) -> Error {
    Error::io(layer.label(), "read", block.offset, io::ErrorKind::WouldBlock.into())
}

/// How far a first touch decodes.
fn prefix(block: &BlockRef, need: usize) -> usize {
    need.checked_next_multiple_of(PAGE_BYTES).unwrap_or(need).min(raw_len(block)).max(need)
}

fn raw_len(block: &BlockRef) -> usize {
    usize::try_from(block.raw_len).unwrap_or(usize::MAX)
}

impl fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockCache").field("bytes_max", &self.bytes_max).field("stats", &self.stats()).finish()
    }
}
