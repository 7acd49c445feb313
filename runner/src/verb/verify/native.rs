//! Checks all that a native point stores, several leaves at a time.

use std::{
    num::NonZero,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use aquifer_formats::{
    Layer as _,
    aql::{ContentKey, Depth, Finding, Reader, verify},
};
use parking_lot::Mutex;

use super::{Checked, Keeper, memory::Front, scan::Found};
use crate::fail::{Fail, Result};

/// Checks the disk of a point, from where an earlier run has ended.
pub(super) fn check(reader: &Reader, key: ContentKey, keeper: &mut Keeper<'_>) -> Result<Checked> {
    let steps = verify(reader, Depth::Deep(Some(key)));
    let before = std::mem::take(&mut keeper.before);
    let progress = keeper.context.out.progress("verify", Some(reader.size()));
    progress.set(before.below);
    let found = Mutex::new(Found::of(before.damage()));
    let next = AtomicU64::new(before.steps);
    let front = Front::from(before);
    let note = |finding: Finding| {
        progress.add(finding.disk.end - finding.disk.start);
        let mut found = found.lock();
        finding.damage.into_iter().for_each(|d| found.note(Fail::from(d.error), d.disk));
    };
    // What belongs to the whole file is little, and is looked at each time.
    note(steps.whole());
    let threads = thread::available_parallelism().map_or(2, NonZero::get).clamp(1, 16);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let leaf = next.fetch_add(1, Ordering::Relaxed);
                    if leaf >= steps.leaves() || keeper.stop.is_asked() {
                        return;
                    }
                    let finding = steps.leaf(leaf);
                    let (end, bytes) = (finding.disk.end, finding.blocks_read.saturating_mul(reader.grain()));
                    note(finding);
                    front.done(leaf, end, bytes);
                    if front.is_due() {
                        keeper.keep(&front.now(), &found.lock().list());
                    }
                }
            });
        }
    });
    drop(progress);
    let (done, damage) = (front.now(), found.into_inner().list());
    keeper.keep(&done, &damage);
    keeper.stop.check()?;
    Ok(Checked { size: reader.size(), bytes: done.bytes, damage })
}
