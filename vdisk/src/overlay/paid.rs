//! Large writes that are durable in their place before they are acknowledged.
//!
//! A flush covers what was acknowledged before it. While somebody asks for flushes, a large write is therefore held back until it
//! has synced what it stored: no flush of anybody else ever finds it. One such write is on its way at a time, so that what
//! the device is given at once stays small.
//!
//! Invariants
//! - Blocks are in place, and readers see them, before they are pending by this write: what a flush takes meanwhile has no part in
//!   them. One that is pending already, by a trim before, is taken as one in place that is not known to be durable.
//! - A block is known to be durable only if it was synced after it was stored and nothing has changed its region since: a page that
//!   was stored over it, recorded and written back would be lost behind its mark. Whatever makes it pending again ends that.
//! - Nobody drains in between.
//!
//! Not here: who pays (`ahead`), what the next flush does (`commit`).

use aquifer_formats::planted::{Bug, planted};

use super::{
    core::{Core, in_region},
    region::{Bits, BlockState, Region},
    store::{Edges, Outcome},
};
use crate::{Delta, Result, sync::Ordering};

/// What a write that pays has put in place.
#[derive(Debug)]
pub(super) struct Paid {
    /// Its number; none is 0.
    by: u64,
    blocks: Bits,
}

impl Core {
    /// Whether a piece of so many bytes is to be durable before it is acknowledged.
    pub(super) fn pays(&self, len: u64) -> bool {
        self.ahead.pays(len) && !self.through.load(Ordering::Acquire)
    }

    /// One attempt to store a piece that lies in one region, and to make it durable.
    pub(super) fn store_paid(&self, region: u32, offset: u64, bytes: &[u8], edges: &Edges) -> Result<Outcome> {
        let mut turn = self.paying.lock();
        *turn += 1;
        let mut paid = Paid { by: *turn, blocks: Bits::default() };
        let stored = {
            let mut stripe = self.stripe(region).write();
            let stored = self.store_piece(&mut stripe, region, offset, bytes, edges, Some(&mut paid));
            stripe.fold(region);
            stored
        };
        if paid.blocks.is_empty() {
            return stored;
        }
        self.ahead.paid();
        let ranges = || paid.blocks.runs().map(|(first, count)| self.range(region, first, count)).collect::<Delta>();
        let synced = if planted(Bug::PaidNotSynced) { Ok(()) } else { self.sync_raw(ranges) };
        self.mark_paid(region, &paid, stored.is_ok() && synced.is_ok());
        synced.and(stored)
    }

    /// Notes a block that a write which pays has put in place.
    pub(super) fn note_paid(&self, target: &mut Region, block: u64, paid: &mut Paid) {
        let at = in_region(block);
        self.set_ram(target, block, BlockState::Written);
        target.unpunched.remove(at);
        target.keep.remove(at);
        target.paid_by = paid.by;
        paid.blocks.insert(at);
    }

    /// From here on the next flush marks the blocks, without a sync where they are known to be durable.
    fn mark_paid(&self, region: u32, paid: &Paid, durable: bool) {
        let mut stripe = self.stripe(region).write();
        let target = stripe.region(region);
        let synced = durable && target.paid_by == paid.by;
        target.paid_by = 0;
        for at in paid.blocks.iter() {
            self.set_pending(region, target, at);
            if synced {
                target.synced.insert(at);
            }
        }
        stripe.fold(region);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use aquifer_formats::storage::MemoryStorage;

    use super::*;
    use crate::{Overlay, OverlayFiles, OverlayOf, OverlayOptions, Settling, overlay::region::View};

    static BLOCKS: [u8; 65536] = [1; 65536];

    fn overlay() -> Overlay {
        let memory = |name: &str| Arc::new(MemoryStorage::new(name, Vec::new()));
        let files = OverlayFiles { raw: memory("raw"), map: memory("map"), journal: memory("journal") };
        let options = OverlayOptions { settling: Settling::Callers, ..OverlayOptions::default() };
        let overlay = Overlay::create_on(files, OverlayOf { size: 1 << 20, chain: [7; 32] }, options).expect("create");
        // Somebody asks for flushes.
        overlay.write(1 << 19, &[2; 4096], &none).expect("write");
        overlay.flush().expect("flush");
        overlay
    }

    /// Whether a flush would have to sync `disk.raw` now.
    fn is_unsynced(overlay: &Overlay) -> bool {
        let core = &overlay.core;
        let stripe = core.stripe(0).read();
        match stripe.view(0) {
            View::Mixed(region) => region.pending.iter().any(|at| {
                region.page(at).is_none() && region.ram.get(at) == BlockState::Written && !region.synced.get(at)
            }),
            View::Uniform(..) => false,
        }
    }

    fn store(overlay: &Overlay) -> Paid {
        let core = &overlay.core;
        let mut paid = Paid { by: 1, blocks: Bits::default() };
        let mut stripe = core.stripe(0).write();
        core.store_piece(&mut stripe, 0, 0, &BLOCKS, &Edges::new(), Some(&mut paid)).expect("stores");
        stripe.fold(0);
        drop(stripe);
        assert_eq!(paid.blocks.iter().count(), BLOCKS.len() / 4096);
        paid
    }

    /// Puts blocks in place, syncs them, has something else done, and marks them.
    fn is_unsynced_after(between: impl Fn(&Overlay)) -> bool {
        let overlay = overlay();
        let paid = store(&overlay);
        overlay.core.sync_raw(Delta::new).expect("sync");
        between(&overlay);
        overlay.core.mark_paid(0, &paid, true);
        is_unsynced(&overlay)
    }

    fn none(_: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    #[test]
    fn what_was_synced_is_not_synced_again() {
        assert!(!is_unsynced_after(|_| {}));
        assert!(!is_unsynced_after(|overlay| overlay.flush().expect("flush")));
    }

    #[test]
    fn what_went_over_it_meanwhile_is() {
        assert!(is_unsynced_after(|overlay| {
            overlay.write(4096, &[3; 4096], &none).expect("write");
            overlay.flush().expect("flush");
            // Its bytes are in place now, unsynced, and the record that has them is about to lie behind a mark.
            overlay.core.relieve().expect("relief");
        }));
        // After a trim of one block nothing else of the region is taken for durable.
        assert!(is_unsynced_after(|overlay| overlay.zero(0, 4096, crate::Zeroing::MayTrim, &none).expect("zero")));
    }

    /// A flush between the write's store and its sync: what it takes was pending before, and is not durable.
    #[test]
    fn what_was_pending_before_it_is_synced_by_whoever_flushes_meanwhile() {
        let overlay = overlay();
        overlay.zero(0, 65536, crate::Zeroing::MayTrim, &none).expect("zero");
        let paid = store(&overlay);
        assert!(is_unsynced(&overlay), "the trim has made it pending");
        overlay.core.mark_paid(0, &paid, false);
        assert!(is_unsynced(&overlay));
    }

    #[test]
    fn what_is_pending_again_is_not_known_to_be_durable() {
        let overlay = overlay();
        let paid = store(&overlay);
        overlay.core.sync_raw(Delta::new).expect("sync");
        overlay.core.mark_paid(0, &paid, true);
        assert!(!is_unsynced(&overlay));
        let mut stripe = overlay.core.stripe(0).write();
        overlay.core.set_pending(0, stripe.region(0), 3);
        drop(stripe);
        assert!(is_unsynced(&overlay));
    }

    #[test]
    fn a_large_write_is_durable_when_it_is_acknowledged() {
        let overlay = overlay();
        overlay.write(0, &vec![5; 512 << 10], &none).expect("write");
        assert!(!is_unsynced(&overlay), "no flush has to look at it");
        assert_eq!(overlay.core.ahead.step(), crate::overlay::ahead::Step::Go, "and nobody waits for it");
        overlay.flush().expect("flush");
        assert!(overlay.dirty().contains((512 << 10) - 1));
    }
}
