//! Large writes that are durable in their place before they are acknowledged.
//!
//! A flush covers what was acknowledged before it. While somebody asks for flushes, a large write is therefore held back until it
//! has synced what it stored: no flush of anybody else ever finds it. One such write is on its way at a time, so that what
//! the device is given at once stays small.
//!
//! Invariants
//! - Blocks are in place, and readers see them, before they are pending: what a flush takes meanwhile has no part in them. Until then
//!   recovery finds what it found before, or the new bytes where it says `Written` already.
//! - Once they are pending their bytes are durable, unless something has changed the region since: a page that was stored
//!   over them, recorded and written back would be lost behind their mark. Then the next flush syncs `disk.raw` first.
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
    pub(super) fn pays(&self, len: usize) -> bool {
        self.ahead.pays(len as u64) && !self.through.load(Ordering::Acquire)
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

    /// From here on the next flush marks the blocks.
    fn mark_paid(&self, region: u32, paid: &Paid, durable: bool) {
        let mut stripe = self.stripe(region).write();
        let target = stripe.region(region);
        let alone = target.paid_by == paid.by;
        if !(durable && alone) {
            self.unsynced.store(true, Ordering::Release);
        }
        target.paid_by = 0;
        paid.blocks.iter().for_each(|at| self.set_pending(region, target, at));
        stripe.fold(region);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use aquifer_formats::storage::MemoryStorage;

    use super::*;
    use crate::{Overlay, OverlayFiles, OverlayOf, OverlayOptions, Settling};

    static BLOCKS: [u8; 65536] = [1; 65536];

    fn overlay() -> Overlay {
        let memory = |name: &str| Arc::new(MemoryStorage::new(name, Vec::new()));
        let files = OverlayFiles { raw: memory("raw"), map: memory("map"), journal: memory("journal") };
        let options = OverlayOptions { settling: Settling::Callers, ..OverlayOptions::default() };
        let overlay = Overlay::create_on(files, OverlayOf { size: 1 << 20, chain: [7; 32] }, options).expect("create");
        // Somebody asks for flushes, and nothing is unsynced from here on.
        overlay.write(1 << 19, &[2; 4096], &|_, _| Ok(())).expect("write");
        overlay.flush().expect("flush");
        overlay
    }

    /// Puts blocks in place, has something else done, and marks them; whether the next flush has to sync `disk.raw`.
    fn is_unsynced_after(between: impl Fn(&Overlay)) -> bool {
        let overlay = overlay();
        let core = &overlay.core;
        let mut paid = Paid { by: 1, blocks: Bits::default() };
        {
            let mut stripe = core.stripe(0).write();
            core.store_piece(&mut stripe, 0, 0, &BLOCKS, &Edges::new(), Some(&mut paid)).expect("stores");
            stripe.fold(0);
        }
        assert_eq!(paid.blocks.iter().count(), BLOCKS.len() / 4096);
        core.sync_raw(Delta::new).expect("sync");
        between(&overlay);
        core.mark_paid(0, &paid, true);
        core.unsynced.load(Ordering::Acquire)
    }

    #[test]
    fn what_was_synced_is_not_synced_again() {
        assert!(!is_unsynced_after(|_| {}));
        assert!(!is_unsynced_after(|overlay| overlay.flush().expect("flush")));
    }

    #[test]
    fn what_went_over_it_meanwhile_is() {
        let none = |_: u64, _: &mut [u8]| Ok(());
        assert!(is_unsynced_after(|overlay| {
            overlay.write(4096, &[3; 4096], &none).expect("write");
            overlay.flush().expect("flush");
            // Its bytes are in place now, unsynced, and the record that has them is about to lie behind a mark.
            overlay.core.relieve().expect("relief");
        }));
        assert!(is_unsynced_after(|overlay| overlay.zero(0, 4096, crate::Zeroing::MayTrim, &none).expect("zero")));
    }

    #[test]
    fn a_large_write_is_durable_when_it_is_acknowledged() {
        let overlay = overlay();
        let write = |bytes: &[u8]| overlay.write(0, bytes, &|_, _| Ok(())).expect("write");
        write(&vec![5; 512 << 10]);
        assert!(!overlay.core.unsynced.load(Ordering::Acquire), "no flush has to look at it");
        assert_eq!(overlay.core.ahead.step(), crate::overlay::ahead::Step::Go, "and nobody waits for it");
        overlay.flush().expect("flush");
        assert!(overlay.dirty().contains((512 << 10) - 1));
    }
}
