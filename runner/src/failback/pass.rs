//! One pass home: what differs between a replica's disk and production's goes into a working layer above the latter.
//!
//! Invariants
//! - Production's own image is read and never written: dropping the working layer is as if nothing had happened.
//! - The working layer, read through production's image, is the replica's disk, byte for byte.
//! - What is sent is counted in grains of [`GRAIN`] bytes that differ; zeros are told and not sent.
//!
//! Not here: who is on or off meanwhile; writing the layer down (`images::merge_down`).

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use aquifer_formats::{
    Storage,
    qcow2::{BackingName, CLUSTER_BYTES, NewQcow2},
    storage::{Access, FileStorage},
};
use aquifer_vdisk::{Chain, Delta, Disk};

use crate::{
    copy::{Piece, is_zero_bytes, sweep},
    fail::{Fail, Result},
    replica::{
        build::{Moved, Pace, discard},
        digests::{Digests, each_block, sum_of},
        layers::{name_it, part_of},
        model::Carried,
    },
};

/// Unit in which differences are sent, bytes.
pub const GRAIN: usize = 4096;

/// A pass of one disk.
pub struct Pass<'a> {
    /// The replica's disk.
    pub from: Arc<Chain>,
    /// What production is known to hold: its own image, or what the last pass made of it.
    pub have: Option<Arc<Chain>>,
    /// The image the working layer stands on.
    pub backing: Option<BackingName>,
    /// Digests of the replica's disk; with them, and without ranges, only production is read to find what differs.
    pub digests: Option<&'a Digests>,
    /// Where the two can differ; everywhere, where that is not known.
    pub ranges: Option<Delta>,
    /// The working layer.
    pub working: PathBuf,
    /// Told what is looked at.
    pub pace: Pace<'a>,
}

struct Sent<'a> {
    pass: &'a Pass<'a>,
    image: NewQcow2,
    written: AtomicU64,
    equal: AtomicU64,
    read: AtomicU64,
}

impl Pass<'_> {
    /// Makes the working layer. One that an earlier try left is made anew.
    ///
    /// # Errors
    /// Of either side; I/O.
    pub fn run(&self) -> Result<Carried> {
        discard(&self.working)?;
        let part = part_of(&self.working);
        if let Some(folder) = part.parent() {
            std::fs::create_dir_all(folder).map_err(|e| Fail::io(folder.display(), "create", &e))?;
        }
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&part, Access::CreateNew)?);
        let image = NewQcow2::create(storage, self.from.size(), self.backing.clone())?;
        let zero = || AtomicU64::new(0);
        let sent = Sent { pass: self, image, written: zero(), equal: zero(), read: zero() };
        let production = match (&self.ranges, self.digests, &self.have) {
            (None, Some(digests), Some(have)) => sent.by_digests(digests, have)?,
            _ => sent.by_ranges()?,
        };
        let Sent { image, written, equal, read, .. } = sent;
        image.finish()?;
        name_it(&part, &self.working)?;
        Ok(Carried {
            bytes_read: read.into_inner() + production,
            bytes_read_production: production,
            bytes_written: written.into_inner(),
            blocks_equal: equal.into_inner(),
        })
    }
}

impl Sent<'_> {
    /// Reads all of production, and of the replica only blocks whose digest says that they differ.
    fn by_digests(&self, digests: &Digests, have: &Arc<Chain>) -> Result<u64> {
        let size = self.pass.from.size();
        let common = have.size().min(size) / digests.block() * digests.block();
        let disk = Disk::read_only("production", have.clone());
        let read = sweep(&disk, &std::iter::once(0..common).collect(), digests.block(), &|offset, piece| {
            each_block(offset, piece, digests.block(), &mut |index, bytes| {
                let sum = bytes.map_or_else(|| digests.zero_at(index), sum_of);
                if digests.sum(index) == Some(&sum) {
                    (self.pass.pace)(Moved::Read(digests.block()))?;
                    self.equal.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                let at = index * digests.block();
                let mut new = vec![0; usize::try_from(digests.block()).unwrap_or_default()];
                self.pass.from.read(at, &mut new)?;
                self.read.fetch_add(new.len() as u64, Ordering::Relaxed);
                self.clusters(at, &new)
            })
        })?;
        // What is past the end of either, or in no whole block, is compared as it is.
        self.over(&std::iter::once(common..size).collect())?;
        Ok(read.read)
    }

    /// Reads the ranges of both.
    fn by_ranges(&self) -> Result<u64> {
        let size = self.pass.from.size();
        let mut ranges = self.pass.ranges.clone().unwrap_or_else(|| Delta::full(size));
        if let Some(have) = self.pass.have.as_ref().filter(|have| have.size() != size) {
            ranges.insert(have.size().min(size).saturating_sub(1)..size);
        }
        self.over(&ranges)?;
        Ok(0)
    }

    fn over(&self, ranges: &Delta) -> Result<()> {
        let size = self.pass.from.size();
        let ranges = ranges.round_out(CLUSTER_BYTES).clip(0..size);
        let disk = Disk::read_only("replica", self.pass.from.clone());
        let read = sweep(&disk, &ranges, CLUSTER_BYTES, &|offset, piece| match piece {
            Piece::Bytes(bytes) => self.clusters(offset, bytes),
            Piece::Zeros(len) => {
                let step = usize::try_from(CLUSTER_BYTES).unwrap_or(usize::MAX);
                (offset..offset + len).step_by(step).try_for_each(|at| {
                    let len = CLUSTER_BYTES.min(offset + len - at);
                    self.clusters(at, &vec![0; usize::try_from(len).unwrap_or_default()])
                })
            }
        })?;
        self.read.fetch_add(read.read, Ordering::Relaxed);
        Ok(())
    }

    fn clusters(&self, at: u64, bytes: &[u8]) -> Result<()> {
        (self.pass.pace)(Moved::Read(bytes.len() as u64))?;
        let step = usize::try_from(CLUSTER_BYTES).unwrap_or(usize::MAX);
        let mut old = Vec::new();
        for (index, new) in bytes.chunks(step).enumerate() {
            let at = at + index as u64 * CLUSTER_BYTES;
            old.clear();
            old.resize(new.len(), 0);
            if let Some(have) = &self.pass.have {
                let there = usize::try_from(have.size().saturating_sub(at)).unwrap_or(usize::MAX).min(new.len());
                if let Some(part) = old.get_mut(..there).filter(|part| !part.is_empty()) {
                    have.read(at, part)?;
                }
            }
            if old == new {
                self.equal.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if is_zero_bytes(new) {
                self.image.write_zeros(at, new.len() as u64)?;
                continue;
            }
            let grains = new.chunks(GRAIN).zip(old.chunks(GRAIN));
            let moved: usize =
                grains.filter(|(new, old)| new != old && !is_zero_bytes(new)).map(|(new, _)| new.len()).sum();
            self.image.write(at, new)?;
            self.written.fetch_add(moved as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The working layer above an image of production.
pub fn working_of(image: &Path, pass: u32) -> PathBuf {
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(format!(".pass{pass}.qcow2"));
    image.with_file_name(name)
}
