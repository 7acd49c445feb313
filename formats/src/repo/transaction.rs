//! Adding a point: begin, write layers, commit.
//!
//! Invariants
//! - Until the commit nothing is listed. The order is: layers sealed and synced, the generation that
//!   receives the point, `point.json`; then `begin.json` goes. Cut anywhere, the point is there whole or not at
//!   all, and what is left can be gone on with.
//! - A listed point with `begin.json` and no `point.json` was cut short; one with neither was complete and has lost its
//!   record: nobody goes on with that, and nobody discards it.
//! - The commit looks once more whether the append lease is still held and the repository still owned:
//!   whoever lost them meanwhile adds nothing. It looks again once the point is received: a keeper that took
//!   the lease before that may have deleted what the point needs; one that takes it later sees the point.
//! - Of several attempts at one piece of work one makes its point, whoever else wakes up at whatever moment.

use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    DiskName, Error, Lease, Machine, Point, PointState, Repository, Result, keeper, manifest, name,
    record::{
        BeginRecord, Consistency, Found, Hash, Holder, LinkedSource, MachineDescription, ManifestPoint, Origin,
        PointDisk, PointKind, PointRecord, encode, read,
    },
};
use crate::{
    Error as FormatError, Layer, Storage,
    aql::{LinkedDisk, NewLayer, Reader, Writer, WriterOptions},
};

/// Files a disk of a point draws from before the least used are taken over into the new one. Each costs an
/// open file and a kilobyte of memory per reader.
const FILES_PER_DISK: usize = 192;

/// What a new point is, apart from its disks.
#[derive(Clone, Debug)]
pub struct NewPoint {
    /// When the disks looked like this.
    pub created: Timestamp,
    /// What state the guest was in.
    pub consistency: Consistency,
    /// The machine.
    pub machine: MachineDescription,
    /// The point it is a copy of.
    pub origin: Option<Origin>,
}

/// A backup that was begun and never committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interrupted {
    /// What it set out to do.
    pub record: BeginRecord,
}

/// How a disk's layer is written.
#[derive(Clone, Copy, Debug)]
pub struct DiskPlan {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Its sector size in bytes, 512 or 4096.
    pub sector_bytes: u32,
    /// Store everything, even where the parent has this disk.
    pub full: bool,
    /// Block size, compression, threads.
    pub options: WriterOptions,
}

/// A disk of a point being added.
#[derive(Debug)]
pub enum DiskWork {
    /// To be written, from the start or from where it was interrupted.
    Write(Box<Writer>),
    /// Finished before the interruption.
    Sealed,
}

/// A point being added.
#[derive(Debug)]
pub struct Transaction<'a> {
    repo: &'a Repository,
    machine: Machine,
    begin: BeginRecord,
    parent: Option<Point>,
    lease: Lease,
    disks: Vec<PointDisk>,
    /// Disks of this point that are linked, not stored.
    links: Vec<(DiskName, LinkedSource)>,
}

impl Repository {
    /// Begins a point of `machine`, standing on `parent`.
    ///
    /// # Errors
    /// [`Error::Locked`] if another backup of this machine runs; [`Error::ForeignOwner`]; I/O.
    pub fn begin(&self, machine: &Machine, parent: Option<&Point>, holder: Holder) -> Result<Transaction<'_>> {
        self.writable()?;
        let lease = self.lease_append(machine, parent.map(|p| p.id), holder.clone())?;
        // What stays is tried again by the next one: it keeps no backup from being made.
        let _ = self.tidy_begun(machine);
        let begin = BeginRecord { id: Uuid::now_v7(), begun: Timestamp::now(), parent: parent.map(|p| p.id), holder };
        self.store().create(&name::begin(machine.id, begin.id), &encode(&begin)?)?;
        Ok(Transaction::new(self, machine, begin, parent.cloned(), lease))
    }

    /// Backups of `machine` that were begun and never committed, oldest first. One of them may be running.
    ///
    /// # Errors
    /// I/O; a damaged record.
    pub fn interrupted(&self, machine: &Machine) -> Result<Vec<Interrupted>> {
        let mut found = Vec::new();
        for folder in self.store().list(&name::points(machine.id))? {
            let Ok(id) = folder.parse::<Uuid>() else { continue };
            if self.store().len(&name::point(machine.id, id))?.is_none()
                && let Some(record) = read::<BeginRecord>(self.store(), &name::begin(machine.id, id))?
                && record.id == id
            {
                found.push(Interrupted { record });
            }
        }
        // One that others stand on was complete once, and has lost its record: nobody goes on with it.
        let listed = self.listed(machine)?;
        if found.iter().any(|what| listed.iter().any(|point| point.id == what.record.id)) {
            let points = self.points(machine)?;
            found.retain(|what| !points.iter().any(|point| stands_on(point, what.record.id)));
        }
        Ok(found)
    }

    /// Takes away what says that a point was begun where it is complete: its commit was cut just before that, or was
    /// made by a version that left it.
    fn tidy_begun(&self, machine: &Machine) -> Result<()> {
        for listed in self.listed(machine)? {
            let begun = self.store().len(&name::begin(machine.id, listed.id))?.is_some();
            if begun && self.store().len(&name::point(machine.id, listed.id))?.is_some() {
                // The record's own name may not be durable yet.
                self.store().settle(&name::point_folder(machine.id, listed.id))?;
                keeper::drop_begun(self.store(), machine.id, listed.id)?;
            }
        }
        Ok(())
    }

    fn still_interrupted(&self, machine: &Machine, point: Uuid) -> Result<()> {
        let (done, begun) = (name::point(machine.id, point), name::begin(machine.id, point));
        match (self.store().len(&done)?, self.store().len(&begun)?) {
            (Some(_), _) => Err(Error::Exists { path: self.store().path_of(&done) }),
            (None, None) => Err(Error::not_found(&self.store().path_of(&begun), "interrupted backup")),
            (None, Some(_)) => Ok(()),
        }
    }

    /// Goes on with an interrupted backup.
    ///
    /// # Errors
    /// As [`Repository::begin`]; [`Error::Exists`] if it was not interrupted at all and has been committed since it
    /// was looked for; [`Error::NotFound`] if its parent, or itself, has been given up.
    pub fn resume(&self, machine: &Machine, what: &Interrupted, holder: Holder) -> Result<Transaction<'_>> {
        self.writable()?;
        let begin = what.record.clone();
        let lease = self.lease_append(machine, begin.parent, holder)?;
        // Whoever had the lease until now may have finished it, or given it up.
        if let Err(over) = self.still_interrupted(machine, begin.id) {
            lease.release()?;
            return Err(over);
        }
        let parent = match begin.parent {
            None => None,
            Some(id) => {
                let listed = self.listed(machine)?;
                let gone = || Error::not_found(self.label(), format!("point {id} of {}", machine.name));
                Some(self.point_state(machine, listed.iter().find(|p| p.id == id).ok_or_else(gone)?)?)
            }
        };
        Ok(Transaction::new(self, machine, begin, parent, lease))
    }
}

fn stands_on(point: &Point, older: Uuid) -> bool {
    let disks = point.record.iter().flat_map(|record| &record.disks);
    let (mut needs, mut linked) = (disks.clone().flat_map(|disk| &disk.needs), disks.flat_map(|disk| &disk.linked));
    point.id != older && (needs.any(|need| need.point == older) || linked.any(|linked| linked.point == older))
}

impl<'a> Transaction<'a> {
    /// Nothing of it is written yet, or looked at of what is.
    fn new(repo: &'a Repository, machine: &Machine, begin: BeginRecord, parent: Option<Point>, lease: Lease) -> Self {
        Self { repo, machine: machine.clone(), begin, parent, lease, disks: Vec::new(), links: Vec::new() }
    }
}

impl Transaction<'_> {
    /// The point's id.
    pub fn id(&self) -> Uuid {
        self.begin.id
    }

    /// The point it stands on.
    pub fn parent(&self) -> Option<&Point> {
        self.parent.as_ref()
    }

    /// A sign of life; to be given every [`super::LEASE_TTL`] / 4.
    ///
    /// # Errors
    /// As [`Lease::beat`].
    pub fn beat(&mut self) -> Result<()> {
        self.lease.beat()
    }

    /// The parent's disk of this name, where there is one.
    ///
    /// # Errors
    /// As [`Repository::open_disk`], except that a parent without this disk is `None`.
    pub fn parent_disk(&self, disk: &DiskName) -> Result<Option<Arc<Reader>>> {
        match &self.parent {
            Some(parent) if parent.record.as_ref().is_none_or(|r| r.disks.iter().any(|d| d.name == *disk)) => {
                self.repo.open_disk(parent, disk).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Begins, or goes on with, the layer of a disk.
    ///
    /// # Errors
    /// [`Error::Exists`] if this transaction has it already; what [`Writer::create`] and
    /// [`Writer::resume`] report.
    pub fn disk(&mut self, disk: &DiskName, plan: DiskPlan) -> Result<DiskWork> {
        let file = name::layer(self.machine.id, self.begin.id, disk);
        if self.disks.iter().any(|d| d.name == *disk) {
            return Err(Error::Exists { path: self.repo.store().path_of(&file) });
        }
        let parent = if plan.full { None } else { self.parent_disk(disk)? };
        let hint = self.begin.parent.map(|parent| name::hint(parent, disk)).unwrap_or_default();
        let parent = parent.map(|reader| (reader, hint));
        let key = self.repo.content_key().clone();
        if self.repo.store().len(&file)?.is_none() {
            let storage = self.repo.store().create_layer(&file)?;
            return self.write(storage, parent, plan).map(DiskWork::Write);
        }
        let storage = self.repo.store().reopen_layer(&file)?;
        if crate::aql::is_link(storage.as_ref())? {
            // What was begun was to refer to another product's files. Nothing in it is content.
            storage.set_len(0).map_err(|e| FormatError::io(storage.label(), "truncate", 0, e))?;
            return self.write(storage, parent, plan).map(DiskWork::Write);
        }
        if crate::aql::is_sealed(storage.as_ref())? {
            // Its writer may have died before it knew that the seal is durable.
            if crate::aql::confirm_sealed(storage.as_ref())? {
                return Ok(DiskWork::Sealed);
            }
            let what = "sealed, but what was written before the seal is not all there; discard this backup";
            return Err(FormatError::corrupt(storage.label(), 0, what).into());
        }
        // Interrupted before its first page was there: nothing is in it yet.
        if storage.len().is_ok_and(|len| len < crate::aql::layout::FRAMES_START) {
            storage.set_len(0).map_err(|e| FormatError::io(storage.label(), "truncate", 0, e))?;
            return self.write(storage, parent, plan).map(DiskWork::Write);
        }
        let mut writer = Writer::resume(storage, parent, key, plan.options)?;
        writer.absorb(FILES_PER_DISK)?;
        Ok(DiskWork::Write(Box::new(writer)))
    }

    /// Begins the layer of a disk that stays in files of another product.
    ///
    /// # Errors
    /// [`Error::Exists`] if this transaction has it already; what [`Writer::link`] reports.
    pub fn link(&mut self, disk: &DiskName, plan: DiskPlan, to: LinkedSource, on: LinkedDisk) -> Result<Writer> {
        let file = name::layer(self.machine.id, self.begin.id, disk);
        let storage = self.repo.store().create_layer(&file)?;
        let writer = Writer::link(storage, self.new_layer(None, plan), on, plan.options)?;
        self.links.push((disk.clone(), LinkedSource { point: self.begin.id, ..to }));
        Ok(writer)
    }

    fn new_layer(&self, parent: Option<(Arc<Reader>, String)>, plan: DiskPlan) -> NewLayer {
        NewLayer {
            virtual_size: plan.size,
            parent,
            key: self.repo.content_key().clone(),
            layer: Uuid::now_v7(),
            created: u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0),
            sector_bytes: plan.sector_bytes,
        }
    }

    /// The other product's disk that a finished layer of this point stands on.
    fn linked(&self, disk: &DiskName, reader: &Reader) -> Result<Option<LinkedSource>> {
        if reader.linked().is_none() {
            return Ok(None);
        }
        let here = self.links.iter().find(|(name, _)| name == disk).map(|(_, to)| to);
        let before = self.parent.iter().filter_map(|parent| parent.record.as_ref()).flat_map(|record| &record.disks);
        let before = before.filter(|known| known.name == *disk).find_map(|known| known.linked.as_ref());
        let what = "it stands on a disk of another product of which nothing is known";
        let unknown = || FormatError::ChainBroken { path: reader.label().into(), what: what.into() };
        Ok(Some(here.or(before).cloned().ok_or_else(unknown)?))
    }

    fn write(
        &self,
        storage: Arc<dyn Storage>,
        parent: Option<(Arc<Reader>, String)>,
        plan: DiskPlan,
    ) -> Result<Box<Writer>> {
        let mut writer = Writer::create(storage, self.new_layer(parent, plan), plan.options)?;
        writer.absorb(FILES_PER_DISK)?;
        Ok(Box::new(writer))
    }

    /// Notes a disk whose layer is sealed; `found` and `source_format` are for its record.
    ///
    /// # Errors
    /// The layer cannot be opened, or draws from a file that is not there; I/O.
    pub fn sealed(&mut self, disk: &DiskName, found: Found, source_format: &str) -> Result<&PointDisk> {
        let reader = self.repo.open_layer(self.machine.id, self.begin.id, disk)?;
        reader.check_layers()?;
        let stats = reader.stats();
        let size = reader.size();
        self.disks.retain(|d| d.name != *disk);
        self.disks.push(PointDisk {
            name: disk.clone(),
            size,
            layer: reader.layer_id(),
            seal: Hash(reader.seal_hash()),
            file_bytes: reader.file_bytes(),
            stored_bytes: stats.bytes_stored,
            data_bytes: stats.data_blocks.saturating_mul(reader.block_bytes().into()).min(size),
            found,
            source_format: source_format.to_owned(),
            needs: self.repo.needs_of(self.machine.id, &reader)?,
            mark: None,
            counting: Vec::new(),
            linked: self.linked(disk, &reader)?,
        });
        self.disks.last().ok_or_else(|| Error::not_found(self.repo.label(), "disk"))
    }

    /// Notes the bitmap of a disk's source that counts what changes from this point on.
    pub fn mark(&mut self, disk: &DiskName, bitmap: &str) {
        if let Some(noted) = self.disks.iter_mut().find(|noted| noted.name == *disk) {
            noted.mark = Some(bitmap.to_owned());
        }
    }

    /// Notes the bitmaps that counted changes of a disk's source when it was read.
    pub fn counting(&mut self, disk: &DiskName, bitmaps: Vec<String>) {
        if let Some(noted) = self.disks.iter_mut().find(|noted| noted.name == *disk) {
            noted.counting = bitmaps;
        }
    }

    /// Makes the point exist in the place of `old`, which has the same content and is given up in the same generation.
    /// The record is durable before that: there is no moment at which neither is whole.
    ///
    /// # Errors
    /// As [`Transaction::commit`]; [`Error::NotFound`] if `old` was given up meanwhile.
    pub fn commit_instead(self, old: &Point) -> Result<PointRecord> {
        self.repo.writable()?;
        let gone = || Error::not_found(self.repo.label(), format!("point {} of {}", old.id, self.machine.name));
        let before = old.record.as_ref().ok_or_else(gone)?;
        let record = PointRecord {
            id: self.begin.id,
            receipt: old.receipt,
            kind: if self.draws_from_older() { PointKind::Increment } else { PointKind::Full },
            disks: self.disks.clone(),
            origin: Some(old.identity(self.repo)),
            ..before.clone()
        };
        self.check_files(&record)?;
        let bytes = encode(&record)?;
        self.repo.store().create(&name::point(self.machine.id, record.id), &bytes)?;
        manifest::change(self.repo, &self.machine, |manifest| {
            if self.repo.store().len(&name::lease(self.lease.record().id))?.is_none() {
                return Err(Error::not_found(self.repo.label(), "append lease: it was reclaimed"));
            }
            let place = manifest.points.iter_mut().find(|p| p.id == old.id && p.retained).ok_or_else(gone)?;
            place.retained = false;
            let pinned = std::mem::replace(&mut place.pinned, false);
            manifest.points.push(ManifestPoint {
                id: record.id,
                receipt: old.receipt,
                record: Hash::of(&bytes),
                retained: true,
                damaged: None,
                pinned,
                work: record.work.clone(),
            });
            Ok(())
        })?;
        self.over(record)
    }

    /// Makes the point exist.
    ///
    /// # Errors
    /// No disk was noted; the lease or the ownership was lost; a file it needs is gone; [`Error::Exists`] if another
    /// attempt at the same work has made its point; I/O. The backup can then be gone on with.
    pub fn commit(self, new: NewPoint) -> Result<PointRecord> {
        let store = self.repo.store();
        let folder = store.path_of(&name::point_folder(self.machine.id, self.begin.id));
        if self.disks.is_empty() {
            return Err(FormatError::Refused { path: folder, what: "a point without disks".into() }.into());
        }
        self.repo.writable()?;
        let held = || match store.len(&name::lease(self.lease.record().id))? {
            Some(_) => Ok(()),
            None => Err(Error::not_found(&folder, "append lease: it was reclaimed")),
        };
        held()?;
        self.repo.still_interrupted(&self.machine, self.begin.id)?;
        let draws_from_older = self.draws_from_older();
        let kind = if draws_from_older { PointKind::Increment } else { PointKind::Full };
        let mut record = PointRecord {
            id: self.begin.id,
            receipt: 0,
            created: new.created,
            kind,
            parent: self.begin.parent.filter(|_| draws_from_older),
            consistency: new.consistency,
            machine: new.machine,
            disks: self.disks.clone(),
            origin: new.origin,
            work: self.lease.record().holder.work.clone(),
        };
        let mut bytes = Vec::new();
        manifest::change(self.repo, &self.machine, |manifest| {
            held()?;
            self.check_files(&record)?;
            self.only_of_its_work(&record, &mut manifest.points)?;
            record.receipt = manifest.generation;
            bytes = encode(&record)?;
            manifest.points.retain(|p| p.id != record.id);
            manifest.points.push(ManifestPoint {
                id: record.id,
                receipt: record.receipt,
                record: Hash::of(&bytes),
                retained: true,
                damaged: None,
                pinned: false,
                work: record.work.clone(),
            });
            Ok(())
        })?;
        held()?;
        store.create(&name::point(self.machine.id, record.id), &bytes)?;
        self.over(record)
    }

    /// The point is there: what says that it was begun goes, and then the lease.
    fn over(self, record: PointRecord) -> Result<PointRecord> {
        // What stays of it is taken away when the next point is begun: the point is whole either way.
        let _ = keeper::drop_begun(self.repo.store(), self.machine.id, record.id);
        self.lease.release()?;
        Ok(record)
    }

    /// Refuses where another attempt at the same work has made its point, and takes what such an attempt has received
    /// and not completed off the list: whoever wakes up and completes it now completes nothing that is listed.
    fn only_of_its_work(&self, new: &PointRecord, points: &mut Vec<ManifestPoint>) -> Result<()> {
        if new.work.is_none() {
            return Ok(());
        }
        let mut overtaken = Vec::new();
        // Named in the manifest itself: of a thousand points no record is read to find one.
        for other in points.iter().filter(|point| point.retained && point.id != new.id && point.work == new.work) {
            let record = name::point(self.machine.id, other.id);
            let has_record = self.repo.store().len(&record)?.is_some();
            let has_begun = self.repo.store().len(&name::begin(self.machine.id, other.id))?.is_some();
            match self.repo.point_state(&self.machine, other)?.state {
                PointState::Complete => return Err(Error::Exists { path: self.repo.store().path_of(&record) }),
                PointState::Incomplete => overtaken.push(other.id),
                PointState::Missing { .. } if !has_record && has_begun => overtaken.push(other.id),
                // It is somebody's to repair, and no point of this work that can be read.
                PointState::Missing { .. } | PointState::Corrupted { .. } => {}
            }
        }
        points.retain(|point| !overtaken.contains(&point.id));
        Ok(())
    }

    /// Whether it stands on something that an older point brought in: that one's files, or the disk it was linked to.
    fn draws_from_older(&self) -> bool {
        let linked = |disk: &PointDisk| disk.linked.as_ref().is_some_and(|linked| linked.point != self.begin.id);
        self.disks.iter().any(|disk| !disk.needs.is_empty() || linked(disk))
    }

    fn check_files(&self, record: &PointRecord) -> Result<()> {
        for file in record.disks.iter().filter_map(|d| d.linked.as_ref()).flat_map(|linked| &linked.files) {
            if let Some(what) = file.changed() {
                return Err(FormatError::ChainBroken { path: file.path.clone(), what }.into());
            }
        }
        for needed in record.disks.iter().flat_map(|d| &d.needs) {
            let file = name::layer(self.machine.id, needed.point, &needed.disk);
            if self.repo.store().len(&file)? != Some(needed.file_bytes) {
                let what = format!("layer {}, which the new point needs, is gone", needed.layer);
                return Err(FormatError::ChainBroken { path: self.repo.store().path_of(&file), what }.into());
            }
        }
        Ok(())
    }

    /// Leaves the backup as it is, to be gone on with later.
    ///
    /// # Errors
    /// I/O while withdrawing the lease.
    pub fn interrupt(self) -> Result<()> {
        self.lease.release()
    }
}
