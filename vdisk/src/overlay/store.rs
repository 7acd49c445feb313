//! How bytes and zeros enter an overlay: from the guest, and from hydration.
//!
//! Invariants
//! - A block goes in place only where recovery cannot find `Hydrated` for it; else it waits in memory
//!   for its record, or for an intent.
//! - Looking at a block and changing it happen under one hold of its lock. Only the chain is read
//!   without it, and a block never becomes absent again, so what was read for one that is still absent
//!   is still right.
//!
//! Not here: when and how any of it becomes durable.

use std::sync::Arc;

use aquifer_formats::planted::{Bug, planted};

use super::{
    core::{Core, in_region, region_of},
    failure::io_failed,
    look::Look,
    paid::Paid,
    region::{BlockState, OVERLAY_BLOCK_BYTES, Page, REGION_BYTES, Region, Stripe},
};
use crate::{Result, Zeroing, sync::Ordering};

/// Reads what lies below the overlay.
pub(crate) type Below<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<()>;

/// A run of hydrated blocks in one write from which on an intent is cheaper than a record with bytes.
const INTENT_BLOCKS_MIN: usize = 16;

/// Blocks at the ends of a write that are covered only in part, as the chain has them.
pub(super) type Edges = Vec<(u64, Box<Page>)>;

/// What became of an attempt.
pub(super) enum Outcome {
    Done,
    /// Nothing was changed: these blocks, `first..end`, need their mark before their bytes.
    IntentFirst(u64, u64),
}

impl Core {
    /// Takes the guest's bytes.
    pub(super) fn write(&self, offset: u64, bytes: &[u8], below: Below<'_>) -> Result<()> {
        if self.is_plain() {
            return self.write_plain(offset, bytes);
        }
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let room = usize::try_from(REGION_BYTES - at % REGION_BYTES).unwrap_or(usize::MAX);
            let (piece, tail) = rest.split_at(room.min(rest.len()));
            self.write_piece(at, piece, below)?;
            at += piece.len() as u64;
            rest = tail;
        }
        Ok(())
    }

    fn write_piece(&self, offset: u64, bytes: &[u8], below: Below<'_>) -> Result<()> {
        let edges = self.read_edges(offset, bytes.len(), below)?;
        let region = region_of(offset);
        loop {
            if self.is_plain() {
                return self.write_plain(offset, bytes);
            }
            self.check()?;
            self.make_room()?;
            let outcome = if self.pays(bytes.len() as u64) {
                self.store_paid(region, offset, bytes, &edges)
            } else {
                let mut stripe = self.stripe(region).write();
                let outcome = self.store_piece(&mut stripe, region, offset, bytes, &edges, None);
                stripe.fold(region);
                outcome
            };
            match outcome? {
                Outcome::Done => return Ok(()),
                Outcome::IntentFirst(first, end) => self.intend(first, end)?,
            }
        }
    }

    /// Reads from below the blocks that a write covers in part and that are absent.
    fn read_edges(&self, offset: u64, len: usize, below: Below<'_>) -> Result<Edges> {
        let end = offset + len as u64;
        let (first, last) = (offset / OVERLAY_BLOCK_BYTES, (end - 1) / OVERLAY_BLOCK_BYTES);
        let mut out = Edges::new();
        for block in if first == last { vec![first] } else { vec![first, last] } {
            let start = block * OVERLAY_BLOCK_BYTES;
            let whole = offset <= start && end >= start + self.block_len(block) as u64;
            let region = region_of(start);
            let absent = !whole && self.stripe(region).read().view(region).ram(in_region(block)) == BlockState::Absent;
            if absent {
                let mut page: Box<Page> = Box::new([0; 4096]);
                below(start, page.get_mut(..self.block_len(block)).unwrap_or_default())?;
                out.push((block, page));
            }
        }
        Ok(out)
    }

    /// One attempt to store a piece that lies in one region, which is locked.
    pub(super) fn store_piece(
        &self,
        stripe: &mut Stripe,
        region: u32,
        offset: u64,
        bytes: &[u8],
        edges: &Edges,
        paid: Option<&mut Paid>,
    ) -> Result<Outcome> {
        let through = self.through.load(Ordering::Acquire);
        let mut paid = paid.filter(|_| !through);
        let full = self.unflushed.load(Ordering::Relaxed) >= self.options.spill_bytes;
        let spill = through || paid.is_some() || (full && !self.ahead.is_asked());
        let target = stripe.region(region);
        if spill && let Some((first, end)) = self.needs_intent(target, offset, bytes.len(), through) {
            return Ok(Outcome::IntentFirst(first, end));
        }
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let block = at / OVERLAY_BLOCK_BYTES;
            let has_page = target.page(in_region(block)).is_some();
            let hydrated = target.durable.get(in_region(block)) == BlockState::Hydrated;
            let held_back = hydrated && !planted(Bug::WrittenBeforeMark);
            let n = if spill && !held_back && (through || !has_page) {
                self.store_in_place(target, region, at, rest, edges, &mut paid)?
            } else {
                self.store_page(target, region, at, rest, edges)?
            };
            at += n as u64;
            rest = rest.get(n..).unwrap_or_default();
        }
        Ok(Outcome::Done)
    }

    /// Whether a piece should be marked before it is stored: all of it if every write must go in place,
    /// else only a long run over hydrated blocks.
    fn needs_intent(&self, target: &Region, offset: u64, len: usize, through: bool) -> Option<(u64, u64)> {
        let first = offset / OVERLAY_BLOCK_BYTES;
        let end = (offset + len as u64).div_ceil(OVERLAY_BLOCK_BYTES);
        let hydrated = |block: &u64| {
            target.durable.get(in_region(*block)) == BlockState::Hydrated && !planted(Bug::WrittenBeforeMark)
        };
        if through {
            return (first..end).any(|b| hydrated(&b)).then_some((first, end));
        }
        let unpaged = |block: &u64| target.page(in_region(*block)).is_none();
        let long = (first..end).filter(|b| hydrated(b) && unpaged(b)).count() >= INTENT_BLOCKS_MIN;
        long.then_some((first, end))
    }

    /// Stores the front of `bytes` in `disk.raw`; returns how much.
    fn store_in_place(
        &self,
        target: &mut Region,
        region: u32,
        offset: u64,
        bytes: &[u8],
        edges: &Edges,
        paid: &mut Option<&mut Paid>,
    ) -> Result<usize> {
        let first = offset / OVERLAY_BLOCK_BYTES;
        // Who pays has been let in before; a drain waits for him.
        let through = paid.is_none() && self.through.load(Ordering::Acquire);
        let mut len = 0;
        let mut end = first;
        while len < bytes.len() {
            let (skip, n) = self.cut(offset + len as u64, bytes.len() - len);
            let at = in_region(end);
            let fresh = matches!(target.ram.get(at), BlockState::Absent | BlockState::Trimmed);
            let merge = n < self.block_len(end) && (fresh || target.page(at).is_some());
            let held_back = target.durable.get(at) == BlockState::Hydrated && !planted(Bug::WrittenBeforeMark);
            let paged = target.page(at).is_some() && !through;
            if merge && len == 0 {
                let part = bytes.get(..n).unwrap_or_default();
                return self.merge_in_place(target, region, end, (skip, part), edges, paid);
            }
            if merge || held_back || paged {
                break;
            }
            len += n;
            end += 1;
        }
        let front = bytes.get(..len).unwrap_or_default();
        let written = self.raw().write_at(offset, front);
        for block in first..end {
            if written.is_ok() {
                self.drop_page(target, block);
                self.note_in_place(target, region, block, paid);
            } else {
                self.note_half_written(target, region, block);
            }
        }
        written.map(|()| len).map_err(|e| io_failed(self.raw(), "write", offset, e))
    }

    /// A write in place failed and may have changed part of a block: it is no copy of the chain's any
    /// more, and not zeros either.
    fn note_half_written(&self, target: &mut Region, region: u32, block: u64) {
        match target.ram.get(in_region(block)) {
            BlockState::Absent => {}
            BlockState::Hydrated | BlockState::Written => self.note_written(target, region, block),
            BlockState::Trimmed => target.unpunched.insert(in_region(block)),
        }
    }

    /// Stores one block in `disk.raw` of which only a part is new.
    fn merge_in_place(
        &self,
        target: &mut Region,
        region: u32,
        block: u64,
        (skip, part): (usize, &[u8]),
        edges: &Edges,
        paid: &mut Option<&mut Paid>,
    ) -> Result<usize> {
        let mut page = self.base(target, block, edges)?;
        if let Some(slot) = page.get_mut(skip..skip + part.len()) {
            slot.copy_from_slice(part);
        }
        let start = block * OVERLAY_BLOCK_BYTES;
        let whole = page.get(..self.block_len(block)).unwrap_or_default();
        if let Err(e) = self.raw().write_at(start, whole) {
            self.note_half_written(target, region, block);
            return Err(io_failed(self.raw(), "write", start, e));
        }
        self.drop_page(target, block);
        self.note_in_place(target, region, block, paid);
        Ok(part.len())
    }

    /// Keeps the block at the front of `bytes` in memory; returns how much of `bytes` that was.
    fn store_page(&self, target: &mut Region, region: u32, offset: u64, bytes: &[u8], edges: &Edges) -> Result<usize> {
        let block = offset / OVERLAY_BLOCK_BYTES;
        let at = in_region(block);
        let (skip, n) = self.cut(offset, bytes.len());
        let part = bytes.get(..n).unwrap_or_default();
        let counted = target.pending.get(at) && target.page(at).is_some();
        if let Some(page) = target.page_mut(at) {
            // Copied first if a record is being written from it.
            if let Some(slot) = Arc::make_mut(page).get_mut(skip..skip + n) {
                slot.copy_from_slice(part);
            }
        } else {
            let mut page = if n == self.block_len(block) { [0; 4096] } else { self.base(target, block, edges)? };
            if let Some(slot) = page.get_mut(skip..skip + n) {
                slot.copy_from_slice(part);
            }
            target.insert_page(at, Arc::new(page));
            self.page_bytes.fetch_add(OVERLAY_BLOCK_BYTES, Ordering::Relaxed);
        }
        if !counted {
            self.unflushed.fetch_add(OVERLAY_BLOCK_BYTES, Ordering::Relaxed);
            self.ahead.keep(OVERLAY_BLOCK_BYTES);
        }
        self.note_written(target, region, block);
        Ok(n)
    }

    /// Where in its block `offset` lies, and how many of `len` bytes that block takes.
    fn cut(&self, offset: u64, len: usize) -> (usize, usize) {
        let skip = usize::try_from(offset % OVERLAY_BLOCK_BYTES).unwrap_or(0);
        (skip, (self.block_len(offset / OVERLAY_BLOCK_BYTES) - skip).min(len))
    }

    /// The present bytes of a block.
    fn base(&self, target: &Region, block: u64, edges: &Edges) -> Result<Page> {
        let at = in_region(block);
        if let Some(page) = target.page(at) {
            return Ok(**page);
        }
        let mut page = [0; 4096];
        match target.ram.get(at) {
            BlockState::Trimmed => {}
            BlockState::Absent => {
                let edge = edges.iter().find(|(b, _)| *b == block && !planted(Bug::EdgeOfZeros));
                debug_assert!(edge.is_some() || planted(Bug::EdgeOfZeros), "a block does not become absent again");
                if let Some((_, below)) = edge {
                    page = **below;
                }
            }
            BlockState::Hydrated | BlockState::Written => {
                let start = block * OVERLAY_BLOCK_BYTES;
                let whole = page.get_mut(..self.block_len(block)).unwrap_or_default();
                self.raw().read_at(start, whole).map_err(|e| io_failed(self.raw(), "read", start, e))?;
            }
        }
        Ok(page)
    }

    fn note_written(&self, target: &mut Region, region: u32, block: u64) {
        let at = in_region(block);
        self.set_ram(target, block, BlockState::Written);
        self.set_pending(region, target, at);
        target.unpunched.remove(at);
        target.keep.remove(at);
        target.paid_by = 0;
    }

    /// Notes a block whose bytes were put in place by the guest.
    fn note_in_place(&self, target: &mut Region, region: u32, block: u64, paid: &mut Option<&mut Paid>) {
        match paid {
            Some(paid) => self.note_paid(target, block, paid),
            None => {
                self.ahead.add(OVERLAY_BLOCK_BYTES);
                self.note_written(target, region, block);
            }
        }
    }

    fn drop_page(&self, target: &mut Region, block: u64) {
        if target.remove_page(in_region(block)) {
            self.page_bytes.fetch_sub(OVERLAY_BLOCK_BYTES, Ordering::Relaxed);
        }
    }

    /// Makes a range read as zeros.
    pub(super) fn zero(&self, offset: u64, len: u64, zeroing: Zeroing, below: Below<'_>) -> Result<()> {
        if self.is_plain() {
            return self.zero_plain(offset, len, zeroing);
        }
        let end = offset + len;
        let first = offset.div_ceil(OVERLAY_BLOCK_BYTES);
        // The short block at the end of the disk counts as whole.
        let last = if end == self.of.size { end.div_ceil(OVERLAY_BLOCK_BYTES) } else { end / OVERLAY_BLOCK_BYTES };
        if first >= last {
            return self.zero_part(offset, end, below);
        }
        self.zero_part(offset, first * OVERLAY_BLOCK_BYTES, below)?;
        let (start, stop) = (first * OVERLAY_BLOCK_BYTES, (last * OVERLAY_BLOCK_BYTES).min(end));
        if zeroing == Zeroing::KeepSpace {
            self.raw().reserve(start, stop - start).map_err(|e| io_failed(self.raw(), "reserve", start, e))?;
        }
        let mut at = start;
        while at < stop {
            let next = (at - at % REGION_BYTES + REGION_BYTES).min(stop);
            self.zero_blocks(at, next, zeroing)?;
            at = next;
        }
        self.zero_part(stop, end, below)
    }

    /// Zeros less than a block, or nothing.
    fn zero_part(&self, from: u64, to: u64, below: Below<'_>) -> Result<()> {
        let mut at = from;
        while at < to {
            let n = usize::try_from(to - at).unwrap_or(usize::MAX).min(4096);
            self.write(at, [0; 4096].get(..n).unwrap_or_default(), below)?;
            at += n as u64;
        }
        Ok(())
    }

    fn zero_blocks(&self, from: u64, to: u64, zeroing: Zeroing) -> Result<()> {
        let region = region_of(from);
        let (first, end) = (from / OVERLAY_BLOCK_BYTES, to.div_ceil(OVERLAY_BLOCK_BYTES));
        loop {
            if self.is_plain() {
                return self.zero_plain(from, to - from, zeroing);
            }
            self.check()?;
            let mut stripe = self.stripe(region).write();
            let target = stripe.region(region);
            let through = self.through.load(Ordering::Acquire);
            let intent = if through { self.needs_intent(target, from, len_of(from, to), true) } else { None };
            match (intent, through) {
                (Some(_), _) => {}
                (None, true) => {
                    self.clear_raw(from, to - from, zeroing == Zeroing::KeepSpace)?;
                    (first..end).for_each(|block| self.zeroed_in_place(region, target, block));
                }
                (None, false) => (first..end).for_each(|block| self.trim(region, target, block, zeroing)),
            }
            stripe.fold(region);
            drop(stripe);
            match intent {
                Some((first, end)) => self.intend(first, end)?,
                None => return Ok(()),
            }
        }
    }

    /// Notes a block whose bytes in `disk.raw` are zeros now: the file says it all.
    fn zeroed_in_place(&self, region: u32, target: &mut Region, block: u64) {
        if !planted(Bug::TrimLeavesPage) {
            self.drop_page(target, block);
        }
        self.note_written(target, region, block);
    }

    /// Marks a block as zeros; what `disk.raw` holds of it goes later.
    fn trim(&self, region: u32, target: &mut Region, block: u64, zeroing: Zeroing) {
        let at = in_region(block);
        if !planted(Bug::TrimLeavesPage) {
            self.drop_page(target, block);
        }
        self.set_ram(target, block, BlockState::Trimmed);
        self.set_pending(region, target, at);
        if !planted(Bug::TrimLeavesBytes) {
            target.unpunched.insert(at);
        }
        target.keep.remove(at);
        target.paid_by = 0;
        if zeroing == Zeroing::KeepSpace {
            target.keep.insert(at);
        }
    }

    /// Zeros a range of `disk.raw`, whose space may have to stay reserved.
    pub(super) fn clear_raw(&self, offset: u64, len: u64, keep: bool) -> Result<()> {
        self.raw().punch(offset, len).map_err(|e| io_failed(self.raw(), "punch", offset, e))?;
        if keep {
            self.raw().reserve(offset, len).map_err(|e| io_failed(self.raw(), "reserve", offset, e))?;
        }
        Ok(())
    }

    /// Stores the chain's bytes where nobody has been yet. `offset` and the end are multiples of 4096,
    /// or the end of the disk. Returns how many bytes were stored.
    pub(super) fn fill(&self, offset: u64, bytes: &[u8]) -> Result<u64> {
        self.fill_runs(offset, bytes.len() as u64, &|at, from, len| {
            let part = bytes.get(from..from + len).unwrap_or_default();
            self.raw().write_at(at, part).map_err(|e| io_failed(self.raw(), "write", at, e))
        })
    }

    /// As [`Core::fill`] for a range the chain has no data for: nothing is written, what an earlier life
    /// may have left in `disk.raw` is removed.
    pub(super) fn fill_zero(&self, offset: u64, len: u64) -> Result<u64> {
        self.fill_runs(offset, len, &|at, _, len| self.clear_leftovers(at, at + len as u64))
    }

    /// Makes blocks that nobody has filled, written or read read as zeros from now on. They count as the guest's own
    /// zeros: they are not what the chain has. Durable after the next flush. Returns how many bytes that were.
    pub(super) fn forget(&self, offset: u64, len: u64) -> Result<u64> {
        let end = (offset + len).min(self.of.size);
        let (mut at, mut forgotten) = (offset, 0);
        while at < end {
            self.check()?;
            let next = (at - at % REGION_BYTES + REGION_BYTES).min(end);
            let region = region_of(at);
            let mut stripe = self.stripe(region).write();
            let target = stripe.region(region);
            let through = self.through.load(Ordering::Acquire);
            let mut result = Ok(());
            for block in at / OVERLAY_BLOCK_BYTES..next.div_ceil(OVERLAY_BLOCK_BYTES) {
                let within = in_region(block);
                if target.ram.get(within) != BlockState::Absent {
                    continue;
                }
                let start = block * OVERLAY_BLOCK_BYTES;
                let bytes = self.block_len(block) as u64;
                if through {
                    result = self.clear_leftovers(start, start + bytes);
                    if result.is_err() {
                        break;
                    }
                } else {
                    target.unpunched.insert(within);
                }
                self.set_ram(target, block, BlockState::Trimmed);
                self.set_pending(region, target, within);
                forgotten += bytes;
            }
            stripe.fold(region);
            drop(stripe);
            result?;
            at = next;
        }
        Ok(forgotten)
    }

    /// Zeros what is stored in a range of `disk.raw`.
    pub(super) fn clear_leftovers(&self, from: u64, to: u64) -> Result<()> {
        let mut at = if planted(Bug::LeftoversKept) { to } else { from };
        while at < to {
            let map = |e| io_failed(self.raw(), "map", at, e);
            let (stored, len) = self.raw().allocated(at, to - at).map_err(map)?;
            if stored {
                self.clear_raw(at, len, false)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Calls `store` for each run of absent blocks in a range, with its offset, how far into the range
    /// it begins, and its length; what was stored is hydrated. The region's lock is held from the look
    /// to the mark.
    fn fill_runs(&self, offset: u64, len: u64, store: &dyn Fn(u64, usize, usize) -> Result<()>) -> Result<u64> {
        let end = if self.is_plain() { offset } else { (offset + len).min(self.of.size) };
        let (mut at, mut stored) = (offset, 0);
        while at < end {
            let next = (at - at % REGION_BYTES + REGION_BYTES).min(end);
            let region = region_of(at);
            let look = Look::begin(self, region);
            let mut stripe = self.stripe(region).write();
            let target = stripe.region(region);
            let mut result = Ok(());
            let mut block = at / OVERLAY_BLOCK_BYTES;
            let last = next.div_ceil(OVERLAY_BLOCK_BYTES);
            while block < last && result.is_ok() {
                let run = (block..last).take_while(|b| look.is_absent(target, in_region(*b))).count() as u64;
                if run == 0 {
                    block += 1;
                    continue;
                }
                let (from, to) = (block * OVERLAY_BLOCK_BYTES, ((block + run) * OVERLAY_BLOCK_BYTES).min(end));
                result = store(from, len_of(offset, from), len_of(from, to));
                if result.is_ok() {
                    (block..block + run).for_each(|b| self.set_ram(target, b, BlockState::Hydrated));
                    self.unsealed.lock().insert(region);
                    stored += to - from;
                    block += run;
                }
            }
            stripe.fold(region);
            drop(stripe);
            result?;
            at = next;
        }
        Ok(stored)
    }
}

fn len_of(from: u64, to: u64) -> usize {
    usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX)
}
