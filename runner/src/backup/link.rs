//! Making a point that stands on the files of another product, and copies nothing.
//!
//! Invariants
//! - Only maps are read. What the other product's disk holds is left to it, what it says is zeros or nothing is zeros.
//! - The files are looked at before and after: one that is still growing makes no point.
//! - An interrupted link is begun anew.
//!
//! Not here: what such a point needs later (`crate::source::linked`), and telling that it has gone
//! (`aquifer_formats::repo`).

use std::{ops::Range, time::Instant};

use aquifer_formats::{
    aql::{LinkedDisk, Writer},
    repo::{
        DiskPlan, Machine, NewPoint, Repository, Transaction, keeper,
        record::{Found, Hash, LinkedSource, MachineDescription},
    },
};
use aquifer_vdisk::{ExtentKind, Linkable};
use jiff::Timestamp;
use uuid::Uuid;

use super::{Made, Order, Wanted, resume};
use crate::{
    fail::{Code, Fail, Result},
    source::linked,
    units,
};

/// The map is asked for this much of the disk at a time, bytes.
const WINDOW_BYTES: u64 = 1 << 30;

impl Order<'_> {
    /// Says what [`Order::link`] would do.
    pub(crate) fn plan_link(&self, wanted: &[Wanted]) -> Result<()> {
        for disk in wanted {
            let found = self.linkable(disk)?;
            let (size, files) = (units::bytes(disk.disk.size()), units::count(found.files.len(), "file"));
            let name = &disk.selected.name;
            self.context
                .out
                .line(format_args!("would link to {name} ({}, {size}, {files}), copying nothing", disk.format));
        }
        Ok(())
    }

    /// Refuses what cannot be stood on.
    pub(crate) fn check_link(&self, wanted: &[Wanted]) -> Result<()> {
        wanted.iter().try_for_each(|disk| self.linkable(disk).map(drop))
    }

    /// Stores a point that stands on the sources' own files.
    pub(crate) fn link(
        &self,
        repo: &Repository,
        machine: &Machine,
        wanted: &[Wanted],
        description: MachineDescription,
    ) -> Result<Made> {
        let clock = Instant::now();
        let found = wanted.iter().map(|disk| self.linkable(disk)).collect::<Result<Vec<_>>>()?;
        resume::reclaim(self, repo, machine)?;
        let mut transaction = repo.begin(machine, None, self.holder())?;
        let id = transaction.id();
        match self.link_all(repo, &mut transaction, wanted, &found) {
            Ok(bytes_stored) => {
                let new = NewPoint {
                    created: self.created.unwrap_or_else(Timestamp::now),
                    consistency: self.consistency,
                    machine: description,
                    origin: None,
                };
                let record = transaction.commit(new)?;
                let made = Made { record, bytes_stored, bytes_read: 0, seconds: clock.elapsed().as_secs() };
                self.report(machine, &made);
                Ok(made)
            }
            Err(fail) => {
                // What is left over is small, and the next backup of the machine clears it up.
                let _ = transaction.interrupt();
                let _ = self.discard(repo, machine, id);
                Err(fail)
            }
        }
    }

    fn discard(&self, repo: &Repository, machine: &Machine, id: Uuid) -> Result<()> {
        for what in repo.interrupted(machine)?.iter().filter(|what| what.record.id == id) {
            keeper::discard(repo, machine, what, self.holder())?;
        }
        Ok(())
    }

    fn linkable(&self, wanted: &Wanted) -> Result<Linkable> {
        let found = Linkable::of(&wanted.selected.spec, &wanted.chain)?;
        let ours = self.context.home()?;
        match found.files.iter().find(|file| std::path::Path::new(&file.path).starts_with(&ours)) {
            None => Ok(found),
            Some(file) => {
                let what = "a compressed archive cannot be stood on: what is read of it is a copy that may go";
                let cause = "decompressed, it can be linked to";
                Err(Fail::new(Code::Refused, what).at(&file.path).cause(cause))
            }
        }
    }

    fn link_all(
        &self,
        repo: &Repository,
        transaction: &mut Transaction<'_>,
        wanted: &[Wanted],
        found: &[Linkable],
    ) -> Result<u64> {
        let mut stored = 0;
        for (disk, found) in wanted.iter().zip(found) {
            let size = disk.disk.size();
            let plan = DiskPlan { size, sector_bytes: 512, full: true, options: repo.writer_options() };
            let to = LinkedSource {
                point: transaction.id(),
                format: disk.format.clone(),
                locator: linked::locator(&disk.selected.spec)?,
                identity: Hash(found.identity),
                files: found.files.clone(),
            };
            let on = LinkedDisk { format: found.format, identity: found.identity, size, live_blocks: 0 };
            let mut writer = transaction.link(&disk.name, plan, to, on)?;
            self.tell_blocks(disk, &mut writer)?;
            writer.finish()?;
            if *found != self.linkable(disk)? {
                let what =
                    format!("{}: it changed while it was looked at; is it still being written?", disk.selected.name);
                return Err(Fail::new(Code::Refused, what));
            }
            let noted = transaction.sealed(&disk.name, Found::Linked, &disk.format)?;
            stored += noted.file_bytes;
            let (used, format) = (units::bytes(noted.data_bytes), &disk.format);
            let files = units::count(found.files.len(), "file");
            self.context
                .out
                .line(format_args!("{}: {used} stay in {files} of {format}, which have to stay", disk.name));
        }
        Ok(stored)
    }

    /// Tells the writer which blocks hold data.
    fn tell_blocks(&self, wanted: &Wanted, writer: &mut Writer) -> Result<()> {
        let (size, block) = (wanted.disk.size(), writer.block_bytes() as u64);
        let (mut at, mut told) = (0, 0);
        let mut extents = Vec::new();
        while at < size {
            self.stop.check()?;
            extents.clear();
            let len = WINDOW_BYTES.min(size - at);
            wanted.disk.extents(at, len, &mut extents)?;
            for extent in extents.iter().filter(|extent| extent.kind == ExtentKind::Data) {
                let blocks: Range<u64> = extent.offset / block..(extent.offset + extent.len).div_ceil(block);
                let rest = blocks.start.max(told)..blocks.end;
                told = told.max(blocks.end);
                writer.linked(rest)?;
            }
            at += len;
        }
        Ok(())
    }
}
