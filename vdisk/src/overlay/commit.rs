//! Flushes: what is pending becomes one journal record, durable by one sync, for everybody who waits.
//!
//! Invariants
//! - One thread leads at a time; who arrives meanwhile waits for the next group, or for the running one
//!   if nothing new is pending.
//! - Blocks that went in place are synced in `disk.raw` *before* the record that marks them is written, unless each is known to be
//!   durable there already; what is put back is not known to be any more.
//!   (Both syncs at once, with checksums in the marks, cannot work: after the flush a later write may
//!   change the block in place, and recovery could not tell that from bytes that never arrived.)
//! - What is taken from `pending` and does not become durable goes back.
//!
//! Not here: moving bytes on to `disk.raw`.

use std::sync::Arc;

use aquifer_formats::planted::{Bug, planted};

use super::{
    core::{Core, in_region, region_of},
    failure::io_failed,
    journal::Draft,
    layout::{ENTRY_IN_PLACE, ENTRY_TRIMMED},
    region::{Bits, BlockState, OVERLAY_BLOCK_BYTES, Page, REGION_BLOCKS},
};
use crate::{Delta, Result, sync::Ordering};

/// What a flush took from one region.
#[derive(Debug)]
struct Taken {
    region: u32,
    pages: Vec<(usize, Arc<Page>)>,
    in_place: Bits,
    trimmed: Bits,
    /// Of what is in place something is not known to be durable there.
    to_sync: bool,
}

impl Taken {
    fn new(region: u32) -> Self {
        Self { region, pages: Vec::new(), in_place: Bits::default(), trimmed: Bits::default(), to_sync: false }
    }

    fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.in_place.is_empty() && self.trimmed.is_empty()
    }

    fn blocks(&self) -> impl Iterator<Item = usize> {
        self.pages.iter().map(|(at, _)| *at).chain(self.in_place.iter()).chain(self.trimmed.iter())
    }
}

impl Core {
    /// Makes everything that was acknowledged before the call durable.
    pub(super) fn flush(&self) -> Result<()> {
        if self.is_plain() {
            return self.flush_plain();
        }
        let mut group = self.group.lock();
        let idle = self.pending.lock().is_empty() && self.intents.lock().is_empty();
        let wanted = match (idle, group.running) {
            (true, false) => return self.check(),
            // What could have been pending was taken by the group that runs.
            (true, true) => group.open - 1,
            (false, _) => group.open,
        };
        loop {
            if group.ok >= wanted {
                return Ok(());
            }
            self.check()?;
            if group.running {
                group = self.group_done.wait(group);
                continue;
            }
            let mine = group.open;
            group.open += 1;
            group.running = true;
            drop(group);
            let result = self.commit();
            group = self.group.lock();
            group.running = false;
            if result.is_ok() {
                group.ok = mine;
            }
            self.group_done.notify_all();
            return result;
        }
    }

    /// Marks blocks `first..end` as written where recovery could find them hydrated, durably, so that
    /// bytes may go over them in place.
    pub(super) fn intend(&self, first: u64, end: u64) -> Result<()> {
        self.intents.lock().push((first, end));
        self.flush()
    }

    fn commit(&self) -> Result<()> {
        self.check()?;
        let mut taken = self.take_intents();
        let mut regions = std::mem::take(&mut *self.pending.lock());
        self.unflushed.store(0, Ordering::Relaxed);
        self.ahead.taken();
        regions.sort_unstable();
        for region in regions {
            let more = self.take(region);
            if !more.is_empty() {
                taken.push(more);
            }
        }
        if taken.is_empty() {
            return Ok(());
        }
        let mut run = Committing { core: self, rest: taken, unsynced: Vec::new() };
        let result = run.persist();
        let left = std::mem::take(&mut run.rest).into_iter().chain(std::mem::take(&mut run.unsynced));
        if !planted(Bug::FailedFlushForgets) {
            left.for_each(|taken| self.put_back(&taken));
        }
        result
    }

    /// Takes what is pending in a region.
    fn take(&self, region: u32) -> Taken {
        let mut taken = Taken::new(region);
        let mut stripe = self.stripe(region).write();
        let Some(target) = stripe.mixed(region) else { return taken };
        let synced = std::mem::take(&mut target.synced);
        for at in std::mem::take(&mut target.pending).iter() {
            match (target.page(at), target.ram.get(at)) {
                (Some(page), _) => taken.pages.push((at, Arc::clone(page))),
                (None, BlockState::Trimmed) if planted(Bug::TrimNotRecorded) => {}
                (None, BlockState::Trimmed) => taken.trimmed.insert(at),
                (None, _) => {
                    taken.in_place.insert(at);
                    taken.to_sync |= !synced.get(at) && !planted(Bug::InPlaceUncounted);
                }
            }
        }
        taken
    }

    /// Hydrated blocks inside the intended runs; they count as bytes in place, which they are.
    fn take_intents(&self) -> Vec<Taken> {
        let mut out: Vec<Taken> = Vec::new();
        for (first, end) in std::mem::take(&mut *self.intents.lock()) {
            for block in first..end {
                let (region, at) = (region_of(block * OVERLAY_BLOCK_BYTES), in_region(block));
                if out.last().is_none_or(|t| t.region != region) {
                    out.push(Taken::new(region));
                }
                let mut stripe = self.stripe(region).write();
                let target = stripe.region(region);
                let hydrated = target.durable.get(at) == BlockState::Hydrated;
                if hydrated && target.ram.get(at) == BlockState::Hydrated {
                    // From here on the guest's view agrees with what recovery may find.
                    self.set_ram(target, block, BlockState::Written);
                    if planted(Bug::IntentNotRecorded) {
                        self.set_durable(region, target, at, BlockState::Written);
                    } else if let Some(last) = out.last_mut() {
                        last.in_place.insert(at);
                        last.to_sync = true;
                    }
                }
                stripe.fold(region);
            }
        }
        out.retain(|t| !t.is_empty());
        out
    }

    /// Makes taken blocks pending again.
    fn put_back(&self, taken: &Taken) {
        let mut stripe = self.stripe(taken.region).write();
        let target = stripe.region(taken.region);
        for at in taken.blocks() {
            self.set_pending(taken.region, target, at);
        }
    }

    /// Notes that a durable record carries what was taken.
    fn note_durable(&self, taken: &Taken, half: usize) {
        let mut stripe = self.stripe(taken.region).write();
        let target = stripe.region(taken.region);
        for at in taken.pages.iter().map(|(at, _)| *at).chain(taken.in_place.iter()) {
            self.set_durable(taken.region, target, at, BlockState::Written);
        }
        for at in taken.trimmed.iter() {
            self.set_durable(taken.region, target, at, BlockState::Trimmed);
        }
        if (!taken.pages.is_empty() || !taken.trimmed.is_empty())
            && let Some(owed) = self.owed.get(half)
        {
            owed.lock().insert(taken.region);
        }
        stripe.fold(taken.region);
    }

    fn ranges(&self, taken: &[Taken]) -> Delta {
        let mut out = Delta::new();
        for t in taken {
            out = out.union(&t.blocks().map(|at| self.range(t.region, at, 1)).collect());
        }
        out
    }
}

/// A flush on its way.
struct Committing<'a> {
    core: &'a Core,
    /// Not in any record yet.
    rest: Vec<Taken>,
    /// In records that are not synced yet, all in the active half.
    unsynced: Vec<Taken>,
}

impl Committing<'_> {
    fn persist(&mut self) -> Result<()> {
        let in_place = self.rest.iter().any(|t| t.to_sync);
        if in_place && !planted(Bug::InPlaceNotSynced) && !planted(Bug::InPlaceSyncedLate) {
            self.core.sync_raw(|| self.core.ranges(&self.rest))?;
        }
        while !self.rest.is_empty() {
            let mut draft = self.core.journal.lock().draft();
            let covered = self.draft(&mut draft);
            let fits = self.core.journal.lock().fits(&draft);
            // What a half holds is durable before the other begins.
            let synced = if fits { Ok(()) } else { self.sync() };
            // Joined before anything is returned, so that an error puts them back.
            self.unsynced.extend(covered);
            synced?;
            if !fits {
                self.core.switch_half()?;
            }
            self.core.journal.lock().append(&draft)?;
        }
        self.sync()?;
        if in_place && planted(Bug::InPlaceSyncedLate) {
            self.core.sync_raw(Delta::new)?;
        }
        Ok(())
    }

    /// Moves as much of `rest` as fits into the draft; returns what that was.
    fn draft(&mut self, draft: &mut Draft) -> Vec<Taken> {
        let mut covered = Vec::new();
        let mut rest = std::mem::take(&mut self.rest).into_iter();
        for mut taken in rest.by_ref() {
            let mut done = Taken::new(taken.region);
            let base = u64::from(taken.region) * REGION_BLOCKS;
            for (kind, from, to) in [
                (ENTRY_IN_PLACE, &mut taken.in_place, &mut done.in_place),
                (ENTRY_TRIMMED, &mut taken.trimmed, &mut done.trimmed),
            ] {
                for (first, count) in from.runs() {
                    if !draft.fits_mark() {
                        break;
                    }
                    draft.mark(kind, base + first as u64, u32::try_from(count).unwrap_or(0));
                    (first..first + count).for_each(|at| to.insert(at));
                }
                to.iter().for_each(|at| from.remove(at));
            }
            let mut pages = taken.pages.into_iter();
            while draft.fits_page()
                && let Some((at, page)) = pages.next()
            {
                draft.page(base + at as u64, Arc::clone(&page));
                done.pages.push((at, page));
            }
            taken.pages = pages.collect();
            if !done.is_empty() {
                covered.push(done);
            }
            if !taken.is_empty() {
                self.rest.push(taken);
                break;
            }
        }
        self.rest.extend(rest);
        covered
    }

    /// Syncs the records written so far, and tells everybody what they carry.
    fn sync(&mut self) -> Result<()> {
        if self.unsynced.is_empty() && self.core.journal.lock().is_synced() {
            return Ok(());
        }
        let storage = self.core.journal.lock().storage();
        let synced = if planted(Bug::RecordNotSynced) { Ok(()) } else { storage.sync() };
        if let Err(e) = synced {
            let cause = io_failed(&*storage, "sync", 0, e);
            let doubt = self.core.ranges(&self.unsynced).union(&self.core.ranges(&self.rest));
            return Err(self.core.fail(storage.label(), &cause, doubt));
        }
        let half = self.core.journal.lock().active();
        for taken in std::mem::take(&mut self.unsynced) {
            self.core.note_durable(&taken, half);
        }
        self.core.journal.lock().mark_synced();
        if self.core.page_bytes.load(Ordering::Relaxed) >= self.core.options.memory_bytes / 4 {
            self.core.wake();
        }
        Ok(())
    }
}
