//! Where absent blocks have been read, for good: what somebody has seen must stay what it was.
//!
//! One bit for each MiB, in memory and in the file `touched` beside the overlay. A range without its bit has been read by
//! nobody since the overlay was made, so it may become zeros when hydration leaves out what no file system uses.
//!
//! Invariants
//! - The bit is in the page cache of `touched` before any byte of an absent block is given out, so it survives the death
//!   of this process.
//! - A flush makes the bits durable first: what a reader made of the bytes it saw never outlives the bit. Whoever loses
//!   the bit in a loss of power has lost with it all that came of the read.
//! - While ranges are made zeros nobody reads an absent or trimmed range: either the bit came first, and they stay, or the
//!   zeros are durable before they are seen.
//!
//! Not here: which ranges those are.

use std::{
    fs::File,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use aquifer_formats::{
    Error as FormatError, Storage,
    storage::{Access, FileStorage},
};
use parking_lot::Mutex;

use crate::Result;

/// Bytes of the disk for each bit.
pub(crate) const UNIT_BYTES: u64 = 1 << 20;

/// Name of the file, in the overlay's folder.
pub const TOUCHED_NAME: &str = "touched";

/// See the module.
#[derive(Debug)]
pub(super) struct Touched {
    bits: Vec<AtomicU8>,
    file: Arc<dyn Storage>,
    /// Held to set a bit, and while ranges are made zeros.
    lock: Mutex<()>,
    settling: AtomicBool,
    /// Bits were set since the file was synced.
    unsynced: AtomicBool,
    /// Held while it is synced: whoever flushes meanwhile waits.
    syncing: Mutex<()>,
    /// A bit could not be stored: nothing may be left out any more.
    broken: AtomicBool,
}

/// What touching came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    /// It was touched before.
    Known,
    /// It is now; what was known of the range may have changed meanwhile.
    New,
    /// That would have to wait.
    Later,
}

impl Touched {
    /// The bits beside an overlay; new ones only for an overlay that has nothing in it. `None` where reads before now may
    /// have gone unnoticed.
    pub(super) fn open(dir: &Path, size: u64, is_empty: bool) -> Result<Option<Self>> {
        let path = dir.join(TOUCHED_NAME);
        let exists = path.exists();
        if !exists && !is_empty {
            return Ok(None);
        }
        let file = FileStorage::open(&path, if exists { Access::ReadWrite } else { Access::CreateNew })?;
        let touched = Self::on(Arc::new(file), size, !exists)?;
        if !exists {
            // A flush makes bits durable, which is worth nothing in a file that is not.
            File::open(dir)
                .and_then(|d| d.sync_all())
                .map_err(|e| FormatError::io(dir.display().to_string(), "sync", 0, e))?;
        }
        Ok(touched)
    }

    /// As [`Touched::open`], on a file that somebody else opened.
    pub(super) fn on(file: Arc<dyn Storage>, size: u64, is_new: bool) -> Result<Option<Self>> {
        let len = usize::try_from(size.div_ceil(UNIT_BYTES).div_ceil(8)).unwrap_or(usize::MAX);
        let failed = |e| FormatError::io(file.label(), "prepare", 0, e);
        if is_new {
            // Reserved, so that a full disk does not get in the way of a bit later.
            let made = file.reserve(0, len as u64).and_then(|()| file.set_len(len as u64)).and_then(|()| file.sync());
            made.map_err(failed)?;
        }
        let mut bytes = vec![0; len];
        if file.len().map_err(failed)? != len as u64 || file.read_at(0, &mut bytes).is_err() {
            return Ok(None);
        }
        let bits = bytes.into_iter().map(AtomicU8::new).collect();
        let (settling, broken) = (AtomicBool::new(false), AtomicBool::new(false));
        // What an earlier life stored may not be durable yet.
        let unsynced = AtomicBool::new(!is_new);
        Ok(Some(Self { bits, file, lock: Mutex::new(()), settling, unsynced, syncing: Mutex::new(()), broken }))
    }

    /// Makes durable what has been touched so far. For a flush, before anything else of it.
    pub(super) fn sync(&self) {
        let _one_at_a_time = self.syncing.lock();
        if self.unsynced.swap(false, Ordering::AcqRel) && self.file.sync().is_err() {
            self.broken.store(true, Ordering::Release);
            // Nor is it to be believed by a later life. Where that fails too, the file system is about to fail flushes.
            let _ = self.file.set_len(0);
        }
    }

    fn bit(offset: u64) -> (usize, u8) {
        let unit = offset / UNIT_BYTES;
        (usize::try_from(unit / 8).unwrap_or(usize::MAX), 1 << (unit % 8))
    }

    /// Whether the unit at `offset` was touched.
    pub(super) fn contains(&self, offset: u64) -> bool {
        let (at, bit) = Self::bit(offset);
        self.bits.get(at).is_none_or(|byte| byte.load(Ordering::Acquire) & bit != 0)
    }

    fn covers(&self, offset: u64, len: u64) -> bool {
        units(offset, len).all(|at| self.contains(at))
    }

    /// Notes that a range is about to be read; may wait.
    pub(super) fn touch(&self, offset: u64, len: u64) -> Touch {
        if self.covers(offset, len) {
            return Touch::Known;
        }
        let _lock = self.lock.lock();
        self.set(offset, len);
        Touch::New
    }

    /// The same without waiting.
    pub(super) fn touch_now(&self, offset: u64, len: u64) -> Touch {
        if self.covers(offset, len) {
            return Touch::Known;
        }
        let Some(_lock) = self.lock.try_lock() else { return Touch::Later };
        self.set(offset, len);
        Touch::New
    }

    fn set(&self, offset: u64, len: u64) {
        for unit in units(offset, len) {
            let (at, bit) = Self::bit(unit);
            let Some(byte) = self.bits.get(at) else { continue };
            let new = byte.load(Ordering::Relaxed) | bit;
            if self.file.write_at(at as u64, &[new]).is_err() {
                self.broken.store(true, Ordering::Release);
            }
            // The mark before the bit: whoever finds it set may flush at once.
            self.unsynced.store(true, Ordering::Release);
            byte.store(new, Ordering::Release);
        }
    }

    /// Whether ranges are being made zeros right now.
    pub(super) fn is_settling(&self) -> bool {
        self.settling.load(Ordering::Acquire)
    }

    /// Waits until no range is being made zeros.
    pub(super) fn wait_settled(&self) {
        if self.is_settling() {
            drop(self.lock.lock());
        }
    }

    /// Runs `settle`, which may make zeros, durably, of what was not touched. `None` if nothing may be left out.
    pub(super) fn settle<T>(&self, settle: impl FnOnce() -> T) -> Option<T> {
        if self.broken.load(Ordering::Acquire) {
            return None;
        }
        let _lock = self.lock.lock();
        self.settling.store(true, Ordering::Release);
        let out = settle();
        self.settling.store(false, Ordering::Release);
        Some(out)
    }
}

/// The starts of the units that a range touches.
fn units(offset: u64, len: u64) -> impl Iterator<Item = u64> {
    let first = offset / UNIT_BYTES;
    let end = offset.saturating_add(len).div_ceil(UNIT_BYTES);
    (first..end).map(|unit| unit * UNIT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_outlive_the_process_and_begin_only_with_an_empty_overlay() {
        let dir = tempfile::tempdir().expect("folder");
        assert!(Touched::open(dir.path(), 20 << 20, false).expect("open").is_none(), "reads may have gone unnoticed");
        let first = Touched::open(dir.path(), 20 << 20, true).expect("open").expect("bits");
        assert_eq!(first.touch((9 << 20) - 1, 2), Touch::New);
        assert_eq!(first.touch_now(8 << 20, 2 << 20), Touch::Known);
        drop(first);
        for is_empty in [false, true] {
            let again = Touched::open(dir.path(), 20 << 20, is_empty).expect("open").expect("bits");
            let touched: Vec<u64> = (0..20).filter(|unit| again.contains(unit << 20)).collect();
            assert_eq!(touched, [8, 9]);
        }
        std::fs::write(dir.path().join(TOUCHED_NAME), [0]).expect("cut");
        assert!(Touched::open(dir.path(), 20 << 20, false).expect("open").is_none(), "of another length");
    }

    #[test]
    fn while_zeros_are_made_a_touch_waits() {
        let dir = tempfile::tempdir().expect("folder");
        let touched = Touched::open(dir.path(), 20 << 20, true).expect("open").expect("bits");
        std::thread::scope(|scope| {
            let inside = touched.settle(|| {
                assert!(touched.is_settling());
                assert_eq!(touched.touch_now(0, 1), Touch::Later);
                let other = scope.spawn(|| touched.touch(0, 1));
                std::thread::sleep(std::time::Duration::from_millis(20));
                assert!(!other.is_finished() && !touched.contains(0));
                other
            });
            assert_eq!(inside.expect("nothing is broken").join().expect("a toucher"), Touch::New);
        });
        assert!(touched.contains(0) && !touched.is_settling());
    }
}
