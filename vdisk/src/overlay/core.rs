//! The overlay's shared heart: its files, the locked regions, and the lists that tie them together.
//!
//! Lock order, outermost first; a lock is taken only while holding none that comes after it:
//! 0. `paying`: the one write that syncs what it stored, see `paid`.
//! 1. `map`: whoever settles (one at a time). Held during I/O.
//! 2. a stripe: states and pages of its regions. Held during I/O on `disk.raw` that changes those blocks.
//! 3. `pending`, `intents`, `unsealed`, `owed`, `map_dirty`, `failure`: lists, held for a moment.
//!
//! `group` (who leads a flush) and `journal` (where the next record goes) are taken alone, or by whoever
//! settles; the leader of a flush holds neither while it waits for anything. `raw_syncs` is taken alone or by whoever
//! settles, and nothing but `failure` while it is held.

use std::collections::BTreeSet;

use aquifer_formats::{
    Storage,
    planted::{Bug, planted},
};

use super::{
    OverlayFiles, OverlayOf, OverlayOptions,
    ahead::Ahead,
    failure::{Failure, io_failed},
    journal::Journal,
    mapfile::MapFile,
    region::{BlockState, Line, OVERLAY_BLOCK_BYTES, Page, REGION_BLOCKS, REGION_BYTES, Region, STRIPES, Stripe, View},
};
use crate::{
    Delta, LocalProgress, Result,
    sync::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering, RwLock},
};

/// Everything the threads of one overlay share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) files: OverlayFiles,
    pub(super) of: OverlayOf,
    pub(super) options: OverlayOptions,
    stripes: Vec<RwLock<Stripe>>,
    /// Bytes in each state.
    bytes: [AtomicU64; 4],
    /// Bytes of pages in memory.
    pub(super) page_bytes: AtomicU64,
    /// Bytes that became pending as pages since the last flush took them.
    pub(super) unflushed: AtomicU64,
    /// What waits for a flush.
    pub(super) ahead: Ahead,
    /// Held by the one write that pays.
    pub(super) paying: Mutex<u64>,
    /// Regions with pending blocks.
    pub(super) pending: Mutex<Vec<u32>>,
    /// Runs of blocks that are to be marked as written before bytes go over their hydrated ones.
    pub(super) intents: Mutex<Vec<(u64, u64)>>,
    /// Regions with hydrated blocks that no map page knows of.
    pub(super) unsealed: Mutex<BTreeSet<u32>>,
    /// For each half of the journal the regions it has bytes or trims for that are not in `disk.raw`.
    pub(super) owed: [Mutex<BTreeSet<u32>>; 2],
    /// Map pages whose marks have changed.
    pub(super) map_dirty: Mutex<BTreeSet<u32>>,
    pub(super) group: Mutex<Group>,
    pub(super) group_done: Condvar,
    pub(super) journal: Mutex<Journal>,
    pub(super) map: Mutex<MapFile>,
    /// Held while `disk.raw` is synced, and until a failure of that is noted.
    raw_syncs: Mutex<()>,
    /// Every write reaches `disk.raw` before it is acknowledged.
    pub(super) through: AtomicBool,
    /// `disk.raw` alone is the disk; see `plain`.
    pub(super) plain: AtomicBool,
    /// Trimmed blocks of an earlier life may still have bytes in `disk.raw`.
    pub(super) unswept: AtomicBool,
    failed: AtomicBool,
    failure: Mutex<Option<Failure>>,
    pub(super) wake: Mutex<Wake>,
    pub(super) woken: Condvar,
}

/// Who leads the present group of flushes, and which groups are through.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// Number the next group will have.
    pub(super) open: u64,
    /// Highest group that ended well; it covers all before it.
    pub(super) ok: u64,
    pub(super) running: bool,
}

/// What the settling thread is asked for.
#[derive(Debug, Default)]
pub(super) struct Wake {
    pub(super) wanted: bool,
    pub(super) stop: bool,
}

/// How the next bytes of a range are to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// In memory.
    Pages,
    /// In `disk.raw`.
    Local,
    /// Zeros.
    Trimmed,
    /// Below.
    Absent,
}

impl Core {
    pub(super) fn new(
        files: OverlayFiles,
        of: OverlayOf,
        options: OverlayOptions,
        map: MapFile,
        journal: Journal,
    ) -> Self {
        let regions = u32::try_from(of.size.div_ceil(REGION_BYTES)).unwrap_or(u32::MAX);
        let bytes: [AtomicU64; 4] = Default::default();
        bytes[BlockState::Absent.index()].store(of.size, Ordering::Relaxed);
        Self {
            files,
            of,
            options,
            stripes: (0..STRIPES.min(regions.saturating_add(1))).map(|_| RwLock::new(Stripe::new(regions))).collect(),
            bytes,
            page_bytes: AtomicU64::new(0),
            unflushed: AtomicU64::new(0),
            ahead: Ahead::new(options.ahead_bytes),
            paying: Mutex::new(0),
            pending: Mutex::new(Vec::new()),
            intents: Mutex::new(Vec::new()),
            unsealed: Mutex::new(BTreeSet::new()),
            owed: [Mutex::new(BTreeSet::new()), Mutex::new(BTreeSet::new())],
            map_dirty: Mutex::new(BTreeSet::new()),
            group: Mutex::new(Group { open: 1, ok: 0, running: false }),
            group_done: Condvar::default(),
            journal: Mutex::new(journal),
            map: Mutex::new(map),
            raw_syncs: Mutex::new(()),
            through: AtomicBool::new(false),
            plain: AtomicBool::new(false),
            unswept: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            wake: Mutex::new(Wake::default()),
            woken: Condvar::default(),
        }
    }

    pub(super) fn regions(&self) -> u32 {
        u32::try_from(self.of.size.div_ceil(REGION_BYTES)).unwrap_or(u32::MAX)
    }

    /// The lock of a region.
    #[expect(clippy::indexing_slicing, reason = "a remainder by the length is always inside")]
    pub(super) fn stripe(&self, region: u32) -> &RwLock<Stripe> {
        &self.stripes[(region % STRIPES) as usize]
    }

    /// All locks, to wait until nobody is inside that began earlier.
    pub(super) fn stripes(&self) -> &[RwLock<Stripe>] {
        &self.stripes
    }

    pub(super) fn raw(&self) -> &dyn Storage {
        &*self.files.raw
    }

    /// Bytes of a block: 4096, fewer at the end of the disk.
    pub(super) fn block_len(&self, block: u64) -> usize {
        let start = block * OVERLAY_BLOCK_BYTES;
        usize::try_from(OVERLAY_BLOCK_BYTES.min(self.of.size.saturating_sub(start))).unwrap_or(0)
    }

    /// Blocks of a region: 256, fewer at the end of the disk.
    pub(super) fn region_blocks(&self, region: u32) -> usize {
        let left = self.of.size.saturating_sub(u64::from(region) * REGION_BYTES);
        usize::try_from(left.div_ceil(OVERLAY_BLOCK_BYTES).min(REGION_BLOCKS)).unwrap_or(0)
    }

    /// Changes what readers are told of a block.
    pub(super) fn set_ram(&self, region: &mut Region, block: u64, state: BlockState) {
        let at = in_region(block);
        let before = region.ram.get(at);
        if before != state {
            region.ram.set(at, state);
            self.count(before, state, self.block_len(block) as u64);
        }
    }

    /// Moves `bytes` from one state's count to another's.
    pub(super) fn count(&self, before: BlockState, after: BlockState, bytes: u64) {
        if let (Some(from), Some(to)) = (self.bytes.get(before.index()), self.bytes.get(after.index())) {
            from.fetch_sub(bytes, Ordering::Relaxed);
            to.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Notes that no journal record carries a block's newest change.
    pub(super) fn set_pending(&self, region: u32, target: &mut Region, at: usize) {
        if target.pending.is_empty() {
            self.pending.lock().push(region);
        }
        target.pending.insert(at);
        // Whoever knows better says so afterwards.
        target.synced.remove(at);
    }

    /// Changes what recovery may find of a block.
    pub(super) fn set_durable(&self, region: u32, target: &mut Region, at: usize, state: BlockState) {
        if target.durable.get(at) != state {
            target.durable.set(at, state);
            if !planted(Bug::DirtyBitLost) {
                self.map_dirty.lock().insert(super::mapfile::page_of(region));
            }
        }
    }

    pub(super) fn local(&self) -> LocalProgress {
        let bytes = |state: BlockState| self.bytes.get(state.index()).map_or(0, |b| b.load(Ordering::Relaxed));
        LocalProgress {
            absent: bytes(BlockState::Absent),
            hydrated: bytes(BlockState::Hydrated),
            written: bytes(BlockState::Written),
            trimmed: bytes(BlockState::Trimmed),
        }
    }

    /// How the bytes at `offset` are to be had, and for how many of `1..=len_max` that holds.
    pub(super) fn run(&self, offset: u64, len_max: u64) -> (Run, u64) {
        if self.is_plain() {
            return (Run::Local, len_max);
        }
        let region = region_of(offset);
        let stripe = self.stripe(region).read();
        self.run_in(&stripe.view(region), offset, len_max)
    }

    fn run_in(&self, view: &View<'_>, offset: u64, len_max: u64) -> (Run, u64) {
        let end = (offset - offset % REGION_BYTES + REGION_BYTES).min(offset.saturating_add(len_max));
        let kind_at = |block: u64| {
            let at = in_region(block);
            match (view, view.ram(at)) {
                (View::Mixed(region), _) if region.page(at).is_some() => Run::Pages,
                (_, BlockState::Absent) => Run::Absent,
                (_, BlockState::Hydrated | BlockState::Written) => Run::Local,
                (_, BlockState::Trimmed) => Run::Trimmed,
            }
        };
        let mut block = offset / OVERLAY_BLOCK_BYTES;
        let kind = kind_at(block);
        let mut until = end;
        if matches!(view, View::Mixed(_)) {
            loop {
                block += 1;
                until = (block * OVERLAY_BLOCK_BYTES).min(end);
                if until == end || kind_at(block) != kind {
                    break;
                }
            }
        }
        (kind, until - offset)
    }

    /// As [`Core::run`] for the front of `buf`; what is in memory or zeros is filled in.
    pub(super) fn part(&self, offset: u64, buf: &mut [u8]) -> (Run, usize) {
        if self.is_plain() {
            return (Run::Local, buf.len());
        }
        let region = region_of(offset);
        let stripe = self.stripe(region).read();
        let view = stripe.view(region);
        let (kind, len) = self.run_in(&view, offset, buf.len() as u64);
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
        let front = buf.get_mut(..len).unwrap_or_default();
        match (kind, &view) {
            (Run::Trimmed, _) => front.fill(0),
            (Run::Pages, View::Mixed(region)) => copy_pages(region, offset, front),
            _ => {}
        }
        (kind, len)
    }

    /// Every region's blocks in the state `wanted` tells of, as runs of bytes in order.
    pub(super) fn collect(&self, wanted: impl Fn(BlockState) -> bool) -> Delta {
        let mut out = Delta::new();
        for region in 0..self.regions() {
            let start = u64::from(region) * REGION_BYTES;
            let stripe = self.stripe(region).read();
            match stripe.view(region) {
                View::Uniform(ram, _) if wanted(ram) => out.insert(start..(start + REGION_BYTES).min(self.of.size)),
                View::Uniform(..) => {}
                View::Mixed(mixed) => {
                    for at in (0..self.region_blocks(region)).filter(|at| wanted(mixed.ram.get(*at))) {
                        let from = start + at as u64 * OVERLAY_BLOCK_BYTES;
                        out.insert(from..(from + OVERLAY_BLOCK_BYTES).min(self.of.size));
                    }
                }
            }
        }
        out
    }

    /// The first byte from `from` on that is absent.
    pub(super) fn next_absent(&self, from: u64) -> Option<u64> {
        let mut at = from;
        while at < self.of.size {
            let (run, len) = self.run(at, REGION_BYTES);
            if run == Run::Absent {
                return Some(at);
            }
            at += len;
        }
        None
    }

    /// What recovery may find of a region.
    pub(super) fn durable_line(&self, region: u32) -> Line {
        self.stripe(region).read().view(region).durable_line()
    }

    /// Refuses once a sync has failed.
    pub(super) fn check(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.failure.lock().as_ref().map_or(Ok(()), |f| Err(f.error()))
    }

    /// Ranges in doubt since a sync failed: those that hung on it, and all that is pending. Bytes that a
    /// record carries are not: its own sync went well.
    pub(super) fn doubt(&self) -> Delta {
        let Some(failure) = self.failure.lock().clone() else { return Delta::new() };
        if planted(Bug::DoubtNotTold) {
            return Delta::new();
        }
        let regions: BTreeSet<u32> = self.pending.lock().iter().copied().collect();
        let mut pending = Delta::new();
        for region in regions {
            if let View::Mixed(mixed) = self.stripe(region).read().view(region) {
                pending.extend(mixed.pending.runs().map(|(first, count)| self.range(region, first, count)));
            }
        }
        failure.doubt.union(&pending)
    }

    /// Remembers the first failed sync for good; `doubt` are the ranges that hung on it. Returns what to
    /// tell whoever asked.
    pub(super) fn fail(&self, path: &str, cause: &crate::Error, doubt: Delta) -> crate::Error {
        let mut failure = self.failure.lock();
        let failure = failure.get_or_insert_with(|| Failure { path: path.to_owned(), cause: cause.to_string(), doubt });
        self.failed.store(!planted(Bug::FailureForgotten), Ordering::Release);
        failure.error()
    }

    /// The bytes of a run of blocks of a region.
    pub(super) fn range(&self, region: u32, first: usize, count: usize) -> std::ops::Range<u64> {
        let start = u64::from(region) * REGION_BYTES + first as u64 * OVERLAY_BLOCK_BYTES;
        start..(start + count as u64 * OVERLAY_BLOCK_BYTES).min(self.of.size)
    }

    /// Syncs `disk.raw`; a failure is final. `more` are the ranges that hang on it.
    pub(super) fn sync_raw(&self, more: impl FnOnce() -> Delta) -> Result<()> {
        // One after the other: a file tells of a lost write only once, and nobody else may take that for success.
        let _turn = self.raw_syncs.lock();
        self.check()?;
        self.raw().sync().map_err(|e| {
            let cause = io_failed(self.raw(), "sync", 0, e);
            self.fail(self.raw().label(), &cause, more())
        })
    }

    /// Asks the settling thread for a round.
    pub(super) fn wake(&self) {
        self.wake.lock().wanted = true;
        self.woken.notify_all();
    }
}

fn copy_pages(region: &Region, offset: u64, mut out: &mut [u8]) {
    let mut at = offset;
    while !out.is_empty() {
        let skip = usize::try_from(at % OVERLAY_BLOCK_BYTES).unwrap_or(0);
        let (part, rest) = out.split_at_mut((4096 - skip).min(out.len()));
        let zeros: &Page = &[0; 4096];
        let page = region.page(in_region(at / OVERLAY_BLOCK_BYTES)).map_or(zeros, |p| p);
        part.copy_from_slice(page.get(skip..skip + part.len()).unwrap_or_default());
        at += part.len() as u64;
        out = rest;
    }
}

/// Number of the region that holds a byte.
pub(super) fn region_of(offset: u64) -> u32 {
    u32::try_from(offset / REGION_BYTES).unwrap_or(u32::MAX)
}

/// Index of a block inside its region.
pub(super) fn in_region(block: u64) -> usize {
    usize::try_from(block % REGION_BLOCKS).unwrap_or(0)
}
