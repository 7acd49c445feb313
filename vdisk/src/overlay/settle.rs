//! Moves what the journal carries to where it belongs: bytes to `disk.raw`, marks to `map`.
//!
//! Invariants
//! - A page is written back only where a durable record says `Written`, so recovery never finds guest
//!   bytes under a hydrated mark.
//! - A half of the journal is freed in this order: its blocks to `disk.raw`, sync, marks to `map`, sync.
//! - Which half is active changes under the lock of `map` only.
//! - Hydrated marks enter `map` by the same order; from the moment they are chosen guest writes over
//!   those blocks are held back in memory.
//!
//! Not here: when a flush is acknowledged.

use std::collections::BTreeSet;

use aquifer_formats::planted::{Bug, planted};

use super::{
    ahead::Step,
    core::Core,
    failure::io_failed,
    mapfile::MapFile,
    region::{BlockState, OVERLAY_BLOCK_BYTES},
};
use crate::{
    Delta, Result,
    sync::{Mutex, Ordering},
};

/// Regions that are written back at once where somebody may wait for that.
const STEP_REGIONS: usize = 4;

/// How much to settle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// The half that takes no records now, if it needs it.
    Inactive,
    /// As `Inactive`, and the marks of all that has been hydrated.
    Hydrated,
    /// Everything.
    All,
}

impl Core {
    /// Brings the inactive half's contents home, and writes it again from here on. Nobody settles in
    /// between: whoever does must find the same half inactive when he begins and when he ends.
    pub(super) fn switch_half(&self) -> Result<()> {
        let mut map = self.map.lock();
        if !planted(Bug::HalfNotSettled) {
            self.settle_with(&mut map, Scope::Inactive)?;
        }
        self.journal.lock().switch();
        drop(map);
        self.wake();
        Ok(())
    }

    /// Settles, one thread at a time.
    pub(super) fn settle(&self, scope: Scope) -> Result<()> {
        self.settle_with(&mut self.map.lock(), scope)
    }

    fn settle_with(&self, map: &mut MapFile, scope: Scope) -> Result<()> {
        self.check()?;
        // Whoever was given the file may have written it since.
        if self.is_plain() {
            return Ok(());
        }
        let (active, floor) = {
            let journal = self.journal.lock();
            let inactive = 1 - journal.active();
            if scope == Scope::Inactive && journal.is_settled(inactive) {
                return Ok(());
            }
            let all = scope == Scope::All || planted(Bug::FloorTooHigh);
            let floor = if all { journal.floor_of_all() } else { journal.floor_of_active() };
            (journal.active(), floor)
        };
        self.write_back_half(1 - active)?;
        if scope == Scope::All {
            self.write_back_half(active)?;
        }
        if scope != Scope::Inactive {
            self.seal();
        }
        let pages: Vec<u32> = std::mem::take(&mut *self.map_dirty.lock()).into_iter().collect();
        if !planted(Bug::MarksBeforeBytes) {
            self.sync_raw(Delta::new)?;
        }
        if let Err(cause) = map.store(floor, &pages, &mut |region| self.durable_line(region)) {
            let path = self.files.map.label();
            return Err(self.fail(path, &cause, Delta::new()));
        }
        if planted(Bug::MarksBeforeBytes) {
            self.sync_raw(Delta::new)?;
        }
        self.journal.lock().settle_inactive();
        Ok(())
    }

    /// Writes back what both halves owe, without syncing, to have memory again. The lock is given away between steps: whoever
    /// has to switch halves is not to wait for all of this. What is not written yet is still owed then.
    pub(super) fn relieve(&self) -> Result<()> {
        for owed in &self.owed {
            let mut left = owed.lock().len();
            while left > 0 {
                let _one_at_a_time = self.map.lock();
                self.check()?;
                if self.is_plain() {
                    return Ok(());
                }
                let step = first_of(&mut owed.lock(), left);
                left = if step.is_empty() { 0 } else { left - step.len() };
                self.write_back(owed, step)?;
            }
        }
        Ok(())
    }

    /// Waits until there is memory for another write, and not more in place than a flush should have to sync.
    pub(super) fn make_room(&self) -> Result<()> {
        match self.ahead.step() {
            Step::Go => {}
            // A hint; the sync that matters reports its own errors.
            Step::Send => _ = self.raw().start_writeback(0, self.of.size),
            Step::Sync => self.pay()?,
        }
        while self.page_bytes.load(Ordering::Relaxed) >= self.options.memory_bytes {
            self.relieve()?;
            if self.page_bytes.load(Ordering::Relaxed) >= self.options.memory_bytes {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Makes what is pending durable, and leaves room for those who write little: in the journal, whose other half has to be free
    /// before this one is full, and in memory.
    fn pay(&self) -> Result<()> {
        self.flush()?;
        if self.journal.lock().is_half_full() {
            self.settle(Scope::Inactive)?;
        }
        if self.page_bytes.load(Ordering::Relaxed) >= self.options.memory_bytes / 2 {
            self.relieve()?;
        }
        Ok(())
    }

    /// Writes back every region a half of the journal owes, to be synced by the caller.
    fn write_back_half(&self, half: usize) -> Result<()> {
        let Some(owed) = self.owed.get(half) else { return Ok(()) };
        let mut regions = std::mem::take(&mut *owed.lock());
        // In small steps, so that a flush that comes between has one of them before it on the device, and not all.
        while self.ahead.is_asked() && regions.len() > STEP_REGIONS {
            let step = first_of(&mut regions, STEP_REGIONS);
            if let Err(e) = self.write_back(owed, step).and_then(|()| self.sync_raw(Delta::new)) {
                owed.lock().append(&mut regions);
                return Err(e);
            }
        }
        self.write_back(owed, regions)
    }

    /// Writes back regions that were owed; they are owed again if that fails.
    fn write_back(&self, owed: &Mutex<BTreeSet<u32>>, mut regions: BTreeSet<u32>) -> Result<()> {
        while let Some(region) = regions.pop_first() {
            if let Err(e) = self.write_back_region(region) {
                regions.insert(region);
                owed.lock().append(&mut regions);
                return Err(e);
            }
        }
        Ok(())
    }

    fn write_back_region(&self, region: u32) -> Result<()> {
        let mut stripe = self.stripe(region).write();
        let Some(target) = stripe.mixed(region) else { return Ok(()) };
        let may = |at: &usize| target.durable.get(*at) == BlockState::Written || planted(Bug::WriteBackEarly);
        let ready: Vec<usize> = target.pages().map(|(at, _)| at).filter(may).collect();
        for run in ready.chunk_by(|a, b| a + 1 == *b) {
            let first = run.first().copied().unwrap_or(0);
            let range = self.range(region, first, run.len());
            let mut bytes = Vec::with_capacity(run.len() * 4096);
            for page in run.iter().filter_map(|at| target.page(*at)) {
                bytes.extend_from_slice(&**page);
            }
            if !planted(Bug::LastBlockWhole) {
                bytes.truncate(usize::try_from(range.end - range.start).unwrap_or(usize::MAX));
            }
            let written = self.raw().write_at(range.start, &bytes);
            written.map_err(|e| io_failed(self.raw(), "write", range.start, e))?;
            // A page that is newer than its record stays: a later flush needs its bytes.
            for at in run.iter().filter(|at| !target.pending.get(**at)).copied().collect::<Vec<_>>() {
                target.remove_page(at);
                self.page_bytes.fetch_sub(OVERLAY_BLOCK_BYTES, Ordering::Relaxed);
            }
        }
        // Where recovery may find `Written`, zeros must take the place of bytes that only the journal has.
        let clear: Vec<usize> =
            target.unpunched.iter().filter(|at| target.durable.get(*at) != BlockState::Hydrated).collect();
        for run in clear.chunk_by(|a, b| a + 1 == *b && target.keep.get(*a) == target.keep.get(*b)) {
            let first = run.first().copied().unwrap_or(0);
            let range = self.range(region, first, run.len());
            self.clear_raw(range.start, range.end - range.start, target.keep.get(first))?;
        }
        for at in clear {
            target.unpunched.remove(at);
            target.keep.remove(at);
        }
        stripe.fold(region);
        Ok(())
    }

    /// From here on guest writes over these blocks are held back: their marks are about to be stored.
    fn seal(&self) {
        let regions = std::mem::take(&mut *self.unsealed.lock());
        for region in regions {
            let mut stripe = self.stripe(region).write();
            let target = stripe.region(region);
            for at in 0..self.region_blocks(region) {
                if target.ram.get(at) == BlockState::Hydrated && target.durable.get(at) == BlockState::Absent {
                    self.set_durable(region, target, at, BlockState::Hydrated);
                }
            }
            stripe.fold(region);
        }
    }

    /// Leaves nothing in memory or journal that `disk.raw` does not have, and keeps it so.
    pub(super) fn drain(&self) -> Result<()> {
        if self.is_plain() {
            return self.flush();
        }
        self.through.store(!planted(Bug::DrainNotThrough), Ordering::Release);
        // The write that pays brings its marks with it.
        drop(self.paying.lock());
        // Whoever stores a page now began before that; nobody does once each lock was free once.
        for stripe in self.stripes() {
            drop(stripe.write());
        }
        if !planted(Bug::DrainWithoutFlush) {
            self.flush()?;
        }
        self.settle(Scope::All)?;
        self.give_up_trims()?;
        // Once more: the marks that have just changed.
        self.settle(Scope::All)
    }

    /// Makes trimmed blocks written ones, which are zeros in `disk.raw`: a write over them in place is then found
    /// again, flushed or not, and so is one by whoever else is given the file.
    fn give_up_trims(&self) -> Result<()> {
        let unswept = self.unswept.load(Ordering::Acquire) && !planted(Bug::SweepSkipped);
        for region in 0..self.regions() {
            let mut stripe = self.stripe(region).write();
            let trimmed: Vec<usize> = {
                let view = stripe.view(region);
                (0..self.region_blocks(region)).filter(|at| view.ram(*at) == BlockState::Trimmed).collect()
            };
            if trimmed.is_empty() {
                continue;
            }
            let target = stripe.region(region);
            for at in trimmed {
                let range = self.range(region, at, 1);
                if unswept {
                    self.clear_leftovers(range.start, range.end)?;
                }
                self.set_ram(target, range.start / OVERLAY_BLOCK_BYTES, BlockState::Written);
                self.set_durable(region, target, at, BlockState::Written);
            }
            stripe.fold(region);
        }
        self.unswept.store(false, Ordering::Release);
        Ok(())
    }
}

/// Takes the first regions out of a set: as many as are written back at once, and no more than `most`.
fn first_of(regions: &mut BTreeSet<u32>, most: usize) -> BTreeSet<u32> {
    std::iter::from_fn(|| regions.pop_first()).take(STEP_REGIONS.min(most)).collect()
}
