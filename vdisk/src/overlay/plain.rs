//! An overlay that has been handed over: `disk.raw` alone is the disk, and others may write it as well.
//!
//! From the moment the flag is durable the hypervisor may move onto the file, and nobody here is told when it does. So
//! this process, and every one that opens the overlay later, does with the file just what the hypervisor would do. It
//! makes no difference then who serves the guest, who died, and whether the move went forward or back.
//!
//! Invariants
//! - Each write is in the file before it is acknowledged; each read asks the file.
//! - Nothing but what a guest asks for changes the file: no journal is replayed over it, no leftovers are cleared.
//! - Marks and journal are never looked at again; all of the disk counts as written.
//!
//! Not here: how the file became the whole truth (`settle`).

use super::{core::Core, failure::io_failed};
use crate::{Delta, Result, Zeroing, sync::Ordering};

impl Core {
    /// Whether `disk.raw` alone is the disk.
    pub(super) fn is_plain(&self) -> bool {
        self.plain.load(Ordering::Acquire)
    }

    /// Gives the file away, durably. It must be drained.
    pub(super) fn hand_over(&self) -> Result<()> {
        let mut map = self.map.lock();
        let label = self.files.map.label();
        map.hand_over().map_err(|e| self.fail(label, &e, Delta::new()))?;
        // Not earlier: until the flag is durable, what the guest changes has to be marked.
        self.plain.store(true, Ordering::Release);
        Ok(())
    }

    pub(super) fn write_plain(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check()?;
        self.raw().write_at(offset, bytes).map_err(|e| io_failed(self.raw(), "write", offset, e))
    }

    pub(super) fn zero_plain(&self, offset: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        self.check()?;
        self.clear_raw(offset, len, zeroing == Zeroing::KeepSpace)
    }

    pub(super) fn flush_plain(&self) -> Result<()> {
        self.check()?;
        self.sync_raw(|| Delta::full(self.of.size))
    }
}
