//! How things go wrong in an overlay, and what is remembered of it.
//!
//! Invariant: the first failed sync is kept for the life of the overlay; from then on nothing is
//! acknowledged as durable. A later sync that succeeds proves nothing about the pages of the earlier.

use std::io;

use aquifer_formats::{Error as FormatError, Storage};

use crate::{Delta, Error};

/// The first failed sync.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) path: String,
    pub(super) cause: String,
    /// Ranges whose newest bytes may be lost.
    pub(super) doubt: Delta,
}

impl Failure {
    pub(super) fn error(&self) -> Error {
        Error::SyncFailed { path: self.path.clone(), cause: self.cause.clone() }
    }
}

/// An I/O error with its place; a full disk or quota becomes [`Error::NoSpace`].
pub(super) fn io_failed(storage: &dyn Storage, action: &'static str, offset: u64, e: io::Error) -> Error {
    let full = matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    if full && action != "sync" {
        return Error::NoSpace { path: storage.label().to_owned(), what: format!("{action} at {offset}") };
    }
    FormatError::io(storage.label(), action, offset, e).into()
}

/// The file belongs to something else.
pub(super) fn wrong(storage: &dyn Storage, what: String) -> Error {
    Error::WrongOverlay { path: storage.label().to_owned(), what }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
        time::{Duration, Instant},
    };

    use aquifer_formats::storage::MemoryStorage;

    use super::*;
    use crate::overlay::{Overlay, OverlayFiles, OverlayOf, OverlayOptions, Settling};

    const SIZE: u64 = 4 << 20;

    /// As a file does it: a write that was lost is told of by one sync only. Syncs may overlap.
    #[derive(Debug)]
    struct ToldOnce {
        bytes: MemoryStorage,
        lost: AtomicBool,
        syncs: AtomicU64,
    }

    impl ToldOnce {
        fn wait_for_sync(&self, number: u64, limit: Duration) {
            let began = Instant::now();
            while self.syncs.load(Ordering::SeqCst) < number && began.elapsed() < limit {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    impl Storage for ToldOnce {
        fn label(&self) -> &str {
            self.bytes.label()
        }
        fn identity(&self) -> Option<u64> {
            None
        }
        fn len(&self) -> io::Result<u64> {
            self.bytes.len()
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.bytes.read_at(offset, buf)
        }
        fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
            self.bytes.read_now(offset, buf)
        }
        fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
            self.bytes.write_at(offset, buf)
        }
        fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
            self.bytes.allocated(offset, len_max)
        }
        fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
            self.bytes.punch(offset, len)
        }
        fn set_len(&self, len: u64) -> io::Result<()> {
            self.bytes.set_len(len)
        }
        fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
            self.bytes.reserve(offset, len)
        }
        fn start_writeback(&self, offset: u64, len: u64) -> io::Result<()> {
            self.bytes.start_writeback(offset, len)
        }
        fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()> {
            self.bytes.forget_cached(offset, len)
        }
        fn sync(&self) -> io::Result<()> {
            let number = self.syncs.fetch_add(1, Ordering::SeqCst) + 1;
            if !self.lost.swap(false, Ordering::SeqCst) {
                return Ok(());
            }
            // Long enough for another to begin meanwhile, and to come back before this one.
            self.wait_for_sync(number + 1, Duration::from_millis(200));
            std::thread::sleep(Duration::from_millis(50));
            Err(io::Error::other("lost"))
        }
    }

    #[test]
    fn what_one_sync_was_told_no_other_takes_for_success() {
        let memory = |name: &str| Arc::new(MemoryStorage::new(name, Vec::new()));
        let raw = Arc::new(ToldOnce {
            bytes: MemoryStorage::new("raw", Vec::new()),
            lost: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
        });
        let files = OverlayFiles { raw: Arc::clone(&raw) as _, map: memory("map"), journal: memory("journal") };
        // In place at once, so that the flush has to sync the very file that whoever settles syncs.
        let options = OverlayOptions { spill_bytes: 0, settling: Settling::Callers, ..OverlayOptions::default() };
        let overlay = Overlay::create_on(files, OverlayOf { size: SIZE, chain: [7; 32] }, options).expect("create");
        overlay.write(0, &[1; 65536], &|_, _| Ok(())).expect("write");
        raw.lost.store(true, Ordering::SeqCst);
        let before = raw.syncs.load(Ordering::SeqCst);
        std::thread::scope(|scope| {
            let settled = scope.spawn(|| overlay.seal());
            raw.wait_for_sync(before + 1, Duration::from_secs(10));
            assert!(overlay.flush().is_err(), "the bytes of this flush may be what was lost");
            assert!(settled.join().expect("it ends").is_err());
        });
        assert!(overlay.doubt().contains(0));
    }
}
