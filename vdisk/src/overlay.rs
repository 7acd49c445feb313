//! The durable, writable top of a recovery: what the guest wrote, and what has been copied from the
//! chain already.
//!
//! Three files for each disk (`docs/formats/overlay.md` draws them): `disk.raw` has the disk's bytes at
//! the disk's own offsets, `map` two bits for each block of 4 KiB, `journal` what is durable but not in
//! the other two yet. A block is *absent* (the chain answers), *hydrated* (a copy of the chain's block),
//! *written* (the guest's bytes) or *trimmed* (zeros, by the guest's wish).
//!
//! Invariants
//! - What a flush has acknowledged survives `kill -9`, loss of the source and power loss. What it has
//!   not reads old or new, for each 512 bytes, and never anything else.
//! - A block the guest changed is never found hydrated or absent: dirty may say too much, never too little.
//! - A block leaves `absent` once and never returns; exactly one source is read for each block.
//! - A write of whole blocks reads nothing from the chain.
//! - Once handed over, `disk.raw` alone is the disk, in this life and in every later one (`plain`).
//! - After a failed sync nothing is acknowledged as durable any more, and the ranges in doubt are named.
//! - No error path deletes or shortens anything.
//!
//! # Order, and the crash each rule prevents
//!
//! | Rule | Without it |
//! |---|---|
//! | Into an absent block: bytes durable before, or together with, their mark. A record carries both. | The mark survives, the bytes do not: garbage is read. |
//! | Over a hydrated block: the `written` mark durable *before* the bytes reach `disk.raw`. They wait in memory for their record, or an intent (a mark alone) is made durable first. | Reads look perfect, and failback forgets a guest's write. |
//! | Hydrated bytes are synced before their mark enters `map`; from the choice of those blocks on, guest writes over them wait in memory. | A hydrated mark over a hole, or over guest bytes. |
//! | Bytes stored in place are synced before the record that marks them is written. | After the flush the block may be changed in place again; no checksum in the mark could tell that from bytes that never arrived. |
//! | Every flush of a block stored in place writes a mark, even if the block is written already; in replay the last entry for a block counts. | An older record's bytes are replayed over newer ones. |
//! | A half of the journal is reused only after: its blocks in `disk.raw`, sync, marks in `map`, sync, and the first record that is not settled is named there. | Acknowledged bytes are in no file. |
//! | When a half is freed, a block that was trimmed since is cleared in `disk.raw`, flushed or not. | It is found written, with whatever `disk.raw` held before the record. |
//! | Map pages go to a copy first, sync, then to their place. | A torn page loses the marks of 63 MiB, or damage passes for a torn page. |
//! | A range the chain has no data for is cleared, if anything is stored there, before it is marked. | Bytes of a write that was never flushed come back from an earlier life. |
//! | `fill` looks and stores under one hold of the block's lock. | Hydration overwrites a guest's write. |
//!
//! Large writes (more than [`OverlayOptions::spill_bytes`] since the last flush) go in place, so that they
//! are not written twice; small flushed writes cost one write and one sync of the journal. All flushes
//! that arrive during a sync share the next one. While somebody flushes, a flood of small writes goes to the journal as well,
//! and a large one is durable in its place before it is acknowledged: no flush pays for another's flood (`ahead`, `paid`).
//!
//! Not here: reading the chain (`Disk`), the order of hydration (`Hydrator`).

mod ahead;
mod commit;
mod core;
mod failure;
mod journal;
mod layout;
mod look;
mod mapfile;
mod owner;
mod paid;
mod plain;
mod recover;
mod region;
mod settle;
mod store;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    Storage,
    storage::{Access, FileStorage},
};

use self::{core::Core, failure::io_failed, journal::Journal, mapfile::MapFile, owner::Owner, settle::Scope};
pub(crate) use self::{core::Run, store::Below};
pub use region::OVERLAY_BLOCK_BYTES;

use crate::{
    Delta, Result, Zeroing,
    sync::{JoinHandle, Ordering, spawn},
};

/// Name of the file that holds the disk's bytes, at the disk's own offsets.
pub const RAW_NAME: &str = "disk.raw";
const MAP_NAME: &str = "map";
const JOURNAL_NAME: &str = "journal";
const MEMORY_BYTES_MIN: u64 = 64 << 10;

/// The files of one overlay.
#[derive(Clone, Debug)]
pub struct OverlayFiles {
    /// The disk's bytes, sparse.
    pub raw: Arc<dyn Storage>,
    /// The state of each block.
    pub map: Arc<dyn Storage>,
    /// Bytes and marks that are durable but not yet in place.
    pub journal: Arc<dyn Storage>,
}

/// What an overlay belongs to; a mismatch refuses to open it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayOf {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Digest of the chain below.
    pub chain: [u8; 32],
}

/// Who brings the journal's contents home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settling {
    /// A thread of the overlay's own, early; callers only where it falls behind.
    Thread,
    /// Callers, where there is no room left: every run with the same calls does the same I/O.
    Callers,
}

/// How much an overlay may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayOptions {
    /// Length of the journal in bytes, reserved when the overlay is created.
    pub journal_bytes: u64,
    /// Most bytes of guest writes held in memory; writers wait beyond that.
    pub memory_bytes: u64,
    /// Bytes written since the last flush beyond which further ones go straight to their place.
    pub spill_bytes: u64,
    /// Most bytes that may wait for a flush while somebody asks for flushes; whoever writes more flushes first, and a write
    /// of a quarter of it is durable in its place before it is acknowledged. `u64::MAX`: nobody is held back.
    pub ahead_bytes: u64,
    /// Who settles.
    pub settling: Settling,
}

impl Default for OverlayOptions {
    fn default() -> Self {
        Self {
            journal_bytes: 64 << 20,
            memory_bytes: 24 << 20,
            spill_bytes: 1 << 20,
            ahead_bytes: 1 << 20,
            settling: Settling::Thread,
        }
    }
}

/// How much of a disk is in which state, in bytes. The four add up to the size of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalProgress {
    /// Not local yet.
    pub absent: u64,
    /// Copied from the chain, unchanged.
    pub hydrated: u64,
    /// Written by the guest.
    pub written: u64,
    /// Zeroed or given back by the guest.
    pub trimmed: u64,
}

impl LocalProgress {
    /// Bytes that no longer need the source.
    pub fn local(&self) -> u64 {
        self.hydrated + self.written + self.trimmed
    }

    /// Size of the disk in bytes.
    pub fn total(&self) -> u64 {
        self.absent + self.local()
    }
}

/// The overlay of one disk.
#[derive(Debug)]
pub struct Overlay {
    core: Arc<Core>,
    settler: Option<JoinHandle<()>>,
    _owner: Option<Owner>,
}

impl Overlay {
    /// Makes a new overlay in `dir`, an existing folder of its own for each disk, and makes it durable.
    /// The folder's own entries are the caller's to sync.
    ///
    /// # Errors
    /// [`crate::Error::Busy`]; the folder holds an overlay already; no space for map and journal.
    pub fn create(dir: &Path, of: OverlayOf, options: OverlayOptions) -> Result<Self> {
        let owner = Owner::take(dir)?;
        let mut overlay = Self::create_on(files(dir, Access::CreateNew)?, of, options)?;
        overlay._owner = Some(owner);
        Ok(overlay)
    }

    /// Opens the overlay in `dir`, replays its journal and takes ownership.
    ///
    /// # Errors
    /// [`crate::Error::WrongOverlay`] for another chain, size or version; [`crate::Error::Busy`] if
    /// another process owns it; [`crate::Error::NoSpace`]; damage of its files, which are left as they are.
    pub fn open(dir: &Path, of: OverlayOf, options: OverlayOptions) -> Result<Self> {
        let owner = Owner::take(dir)?;
        let mut overlay = Self::open_on(files(dir, Access::ReadWrite)?, of, options)?;
        overlay._owner = Some(owner);
        Ok(overlay)
    }

    /// How much of the overlay in `dir` is local, by its files alone: nothing is written and nobody is
    /// kept out, so this is for an overlay that nobody has open.
    ///
    /// # Errors
    /// As [`Overlay::open`]. Damage may also mean that somebody has it open after all.
    pub fn look(dir: &Path, of: OverlayOf) -> Result<LocalProgress> {
        recover::look(&files(dir, Access::ReadOnly)?, &of)
    }

    /// As [`Overlay::create`], on empty files somebody else opened and keeps to this overlay.
    pub fn create_on(files: OverlayFiles, of: OverlayOf, options: OverlayOptions) -> Result<Self> {
        let raw = &*files.raw;
        raw.set_len(of.size).and_then(|()| raw.sync()).map_err(|e| io_failed(raw, "extend", of.size, e))?;
        let id = *uuid::Uuid::new_v4().as_bytes();
        let journal = Journal::create(files.journal.clone(), id, options.journal_bytes)?;
        // Last: without a map's header there is no overlay.
        let map = MapFile::create(files.map.clone(), &of, id)?;
        Ok(Self::start(Core::new(files, of, bounded(options), map, journal)))
    }

    /// As [`Overlay::open`], on files somebody else opened and keeps to this overlay.
    pub fn open_on(files: OverlayFiles, of: OverlayOf, options: OverlayOptions) -> Result<Self> {
        Ok(Self::start(recover::open(files, of, bounded(options))?))
    }

    fn start(core: Core) -> Self {
        let core = Arc::new(core);
        let settler = (core.options.settling == Settling::Thread).then(|| {
            let core = Arc::clone(&core);
            spawn(move || run_settler(&core))
        });
        Self { core, settler, _owner: None }
    }

    /// Path of the file in `dir` that becomes the machine's disk.
    pub fn raw_path(dir: &Path) -> PathBuf {
        dir.join(RAW_NAME)
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.core.of.size
    }

    /// How much is local.
    pub fn local(&self) -> LocalProgress {
        self.core.local()
    }

    /// Whether [`crate::Disk::hand_over`] was called in this or an earlier life.
    pub fn is_handed_over(&self) -> bool {
        self.core.is_plain()
    }

    /// What the guest has changed since the overlay was created: written or trimmed, in whole blocks.
    /// All of the disk once it has been handed over.
    pub fn dirty(&self) -> Delta {
        if self.is_handed_over() {
            return Delta::full(self.size());
        }
        self.core.collect(|state| matches!(state, region::BlockState::Written | region::BlockState::Trimmed))
    }

    /// What is not local yet, in whole blocks.
    pub fn absent(&self) -> Delta {
        if self.is_handed_over() {
            return Delta::new();
        }
        self.core.collect(|state| state == region::BlockState::Absent)
    }

    /// The first byte from `from` on that is not local.
    pub(crate) fn next_absent(&self, from: u64) -> Option<u64> {
        self.core.next_absent(from)
    }

    /// Ranges in doubt since a sync failed.
    pub(crate) fn doubt(&self) -> Delta {
        self.core.doubt()
    }

    /// The file the local bytes are in.
    pub(crate) fn raw(&self) -> &dyn Storage {
        self.core.raw()
    }

    /// How the bytes at `offset` are to be had, and for how many of `1..=len_max` that holds.
    pub(crate) fn run(&self, offset: u64, len_max: u64) -> (Run, u64) {
        self.core.run(offset, len_max)
    }

    /// As [`Overlay::run`] for the front of `buf`; what is in memory or zeros is filled in.
    pub(crate) fn part(&self, offset: u64, buf: &mut [u8]) -> (Run, usize) {
        self.core.part(offset, buf)
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8], below: Below<'_>) -> Result<()> {
        self.core.write(offset, bytes, below)
    }

    pub(crate) fn zero(&self, offset: u64, len: u64, zeroing: Zeroing, below: Below<'_>) -> Result<()> {
        self.core.zero(offset, len, zeroing, below)
    }

    pub(crate) fn pays(&self, len: u64) -> bool {
        self.core.pays(len)
    }

    pub(crate) fn flush(&self) -> Result<()> {
        self.core.ahead.asked();
        self.core.flush()
    }

    /// As [`Overlay::flush`], where nobody has asked for it.
    pub(crate) fn flush_for_room(&self) -> Result<()> {
        self.core.flush()
    }

    pub(crate) fn fill(&self, offset: u64, bytes: &[u8]) -> Result<u64> {
        self.core.fill(offset, bytes)
    }

    pub(crate) fn fill_zero(&self, offset: u64, len: u64) -> Result<u64> {
        self.core.fill_zero(offset, len)
    }

    /// Makes blocks that are absent read as zeros, as if the guest had given them back; durable after the next flush.
    pub(crate) fn forget(&self, offset: u64, len: u64) -> Result<u64> {
        self.core.forget(offset, len)
    }

    /// Makes what was filled so far durable, with its marks.
    pub(crate) fn seal(&self) -> Result<()> {
        self.core.settle(Scope::Hydrated)
    }

    pub(crate) fn drain(&self) -> Result<()> {
        self.core.drain()
    }

    pub(crate) fn hand_over(&self) -> Result<()> {
        if self.core.is_plain() {
            return self.core.drain();
        }
        self.core.drain()?;
        self.core.hand_over()
    }

    /// Bytes of guest writes that are only in memory and journal.
    pub fn memory_bytes(&self) -> u64 {
        self.core.page_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Some(settler) = self.settler.take() {
            self.core.wake.lock().stop = true;
            self.core.woken.notify_all();
            // It has no result; a panic of it has been reported where it happened.
            let _ended = settler.join();
        }
    }
}

fn bounded(options: OverlayOptions) -> OverlayOptions {
    OverlayOptions { memory_bytes: options.memory_bytes.max(MEMORY_BYTES_MIN), ..options }
}

fn files(dir: &Path, access: Access) -> Result<OverlayFiles> {
    let file = |name: &str| -> Result<Arc<dyn Storage>> { Ok(Arc::new(FileStorage::open(&dir.join(name), access)?)) };
    Ok(OverlayFiles { raw: file(RAW_NAME)?, map: file(MAP_NAME)?, journal: file(JOURNAL_NAME)? })
}

/// Settles early, so that callers need not. Errors are left to the caller who meets them next.
fn run_settler(core: &Core) {
    // For profiles. The schedule test's threads are none of the system's.
    #[cfg(not(feature = "schedule"))]
    let _unnamed = rustix::thread::set_name(c"settle");
    loop {
        let mut wake = core.wake.lock();
        while !wake.wanted && !wake.stop {
            wake = core.woken.wait(wake);
        }
        if wake.stop {
            return;
        }
        wake.wanted = false;
        drop(wake);
        let _met_by_callers = core.settle(Scope::Inactive).and_then(|()| core.relieve());
    }
}
