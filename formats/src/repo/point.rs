//! Points as they are found: listed, checked, opened.
//!
//! Invariants
//! - The state of a point is decided by what is there now: its record against the hash in its
//!   generation, its files and the older files it needs against the lengths they were sealed with.
//! - A point inherits the state of every file it needs; points that do not need it stay complete.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    DiskName, Error, Machine, Repository, Result, manifest,
    name::{self, parse_hint},
    record::{Hash, LeaseKind, LeaseRecord, ManifestPoint, NeededFile, Origin, PointDisk, PointRecord, decode},
};
use crate::{
    Layer,
    aql::{LayerName, Reader, Resolver},
};

/// Whether a point can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PointState {
    /// All of it is there.
    Complete,
    /// It was received and is not completed: somebody is at it, or was cut short just then.
    Incomplete,
    /// A file it needs, its own record among them, is gone or cannot be read.
    Missing {
        /// Which, and how.
        why: String,
    },
    /// A file it needs is not what was written, or a check found damage.
    Corrupted {
        /// What is wrong.
        why: String,
    },
}

impl PointState {
    /// `complete`, `incomplete`, `missing`, `corrupted`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Incomplete => "incomplete",
            Self::Missing { .. } => "missing",
            Self::Corrupted { .. } => "corrupted",
        }
    }

    /// What is wrong with it, in a sentence for whoever asks why it cannot be read.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Complete | Self::Incomplete => None,
            Self::Missing { why } | Self::Corrupted { why } => Some(why),
        }
    }

    fn gone(path: &str) -> Self {
        Self::Missing { why: format!("{path} is gone") }
    }
}

/// A listed point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// Its machine.
    pub machine: Uuid,
    /// Its id.
    pub id: Uuid,
    /// Generation that received it: the order of points.
    pub receipt: u64,
    /// Whether it can be used.
    pub state: PointState,
    /// Never given up by a rule.
    pub pinned: bool,
    /// What it says of itself, where that could be read.
    pub record: Option<PointRecord>,
}

impl Point {
    /// When the disks looked like this, by the clock of whoever took the backup.
    pub fn created(&self) -> Option<Timestamp> {
        self.record.as_ref().map(|record| record.created)
    }

    /// What stays the same of it wherever it is copied and however often it is written anew.
    pub fn identity(&self, repo: &Repository) -> Origin {
        let known = self.record.as_ref().and_then(|record| record.origin.clone());
        known.unwrap_or_else(|| Origin { repository: repo.id(), point: self.id })
    }
}

/// Lengths of layer files that were looked up, so that each is looked up once for many points.
#[derive(Debug, Default)]
struct FileLengths(HashMap<String, Option<u64>>);

impl Repository {
    /// The points of a machine in the order of their receipt, each with its state.
    ///
    /// # Errors
    /// A damaged manifest; I/O. Damage of a point is its state.
    pub fn points(&self, machine: &Machine) -> Result<Vec<Point>> {
        let mut files = FileLengths::default();
        self.listed(machine)?.iter().map(|listed| self.point_state_with(machine, listed, &mut files)).collect()
    }

    /// The retained points of the newest generation.
    pub(super) fn listed(&self, machine: &Machine) -> Result<Vec<ManifestPoint>> {
        let newest = manifest::latest(self.store(), machine.id)?;
        let mut points = newest.map(|m| m.record.points).unwrap_or_default();
        points.retain(|point| point.retained);
        points.sort_by_key(|point| point.receipt);
        Ok(points)
    }

    pub(super) fn point_state(&self, machine: &Machine, listed: &ManifestPoint) -> Result<Point> {
        self.point_state_with(machine, listed, &mut FileLengths::default())
    }

    fn point_state_with(&self, machine: &Machine, listed: &ManifestPoint, files: &mut FileLengths) -> Result<Point> {
        let (state, record) = self.look(machine.id, listed, files)?;
        let ManifestPoint { id, receipt, pinned, .. } = *listed;
        Ok(Point { machine: machine.id, id, receipt, state, pinned, record })
    }

    fn look(
        &self,
        machine: Uuid,
        listed: &ManifestPoint,
        files: &mut FileLengths,
    ) -> Result<(PointState, Option<PointRecord>)> {
        let file = name::point(machine, listed.id);
        let read = match self.store().get(&file) {
            Ok(None) if self.is_being_received(machine, listed) => return Ok((PointState::Incomplete, None)),
            // Whoever completed it between the two looks has let go of its lease since.
            Ok(None) => self.store().get(&file),
            read => read,
        };
        let bytes = match read {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                let begun = self.store().len(&name::begin(machine, listed.id)).ok().flatten().is_some();
                let how = if begun { "was never written: its backup was cut short" } else { "is gone" };
                let why = format!("{} {how}", self.store().path_of(&file));
                return Ok((PointState::Missing { why }, None));
            }
            // What cannot be read is as good as gone; other points stay usable.
            Err(e) => return Ok((PointState::Missing { why: e.to_string() }, None)),
        };
        let corrupted = |why: String| PointState::Corrupted { why: format!("{}: {why}", self.store().path_of(&file)) };
        if Hash::of(&bytes) != listed.record {
            return Ok((corrupted("not the record its generation names".into()), None));
        }
        let record: PointRecord = match decode(&file, &bytes) {
            Ok(record) => record,
            Err(e) => return Ok((corrupted(e.to_string()), None)),
        };
        if let Some(why) = &listed.damaged {
            return Ok((PointState::Corrupted { why: why.clone() }, Some(record)));
        }
        for disk in &record.disks {
            if let Some(state) = self.disk_state(machine, listed.id, disk, files) {
                return Ok((state, Some(record)));
            }
        }
        Ok((PointState::Complete, Some(record)))
    }

    /// Whether whoever received a point may still be at it, or was cut short. A commit lets go of its lease, which is
    /// older than the point, only once the point's record is durable.
    fn is_being_received(&self, machine: Uuid, listed: &ManifestPoint) -> bool {
        let by = |lease: &LeaseRecord| {
            lease.machine == machine && lease.kind == LeaseKind::Append && lease.generation < listed.receipt
        };
        self.leases().is_ok_and(|leases| leases.iter().any(by))
    }

    /// What is wrong with a disk's files, as far as names and lengths tell.
    fn disk_state(&self, machine: Uuid, point: Uuid, disk: &PointDisk, files: &mut FileLengths) -> Option<PointState> {
        let own = (point, &disk.name, disk.file_bytes);
        let older = disk.needs.iter().map(|needed| (needed.point, &needed.disk, needed.file_bytes));
        for (point, disk, expected) in std::iter::once(own).chain(older) {
            let file = name::layer(machine, point, disk);
            let found = match files.0.entry(file) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(unknown) => {
                    let found = self.store().len(unknown.key()).ok().flatten();
                    *unknown.insert(found)
                }
            };
            let path = || self.store().path_of(&name::layer(machine, point, disk));
            match found {
                None => return Some(PointState::gone(&path())),
                Some(len) if len != expected => {
                    let why = format!("{}: {len} bytes instead of {expected}", path());
                    return Some(PointState::Corrupted { why });
                }
                Some(_) => {}
            }
        }
        linked_state(disk)
    }

    /// Opens one disk of a complete point. Every older file it needs is opened and identified now.
    ///
    /// # Errors
    /// [`Error::PointState`] if the point is not complete; [`Error::NotFound`] for the disk;
    /// [`crate::Error::ChainBroken`] for a file that is missing or another than the one it was built on.
    pub fn open_disk(&self, point: &Point, disk: &DiskName) -> Result<Arc<Reader>> {
        let shown = self.store().path_of(&name::point_folder(point.machine, point.id));
        let record = match (&point.state, &point.record) {
            (PointState::Complete, Some(record)) => record,
            (state, _) => {
                let why = state.why().unwrap_or("its record is not there").to_owned();
                return Err(Error::PointState { path: shown, state: state.name(), why });
            }
        };
        let found = record.disks.iter().find(|d| d.name == *disk);
        let found = found.ok_or_else(|| Error::not_found(&shown, format!("disk {disk}")))?;
        let reader = self.open_layer(point.machine, point.id, disk)?;
        if reader.seal_hash() != found.seal.0 || reader.layer_id() != found.layer {
            let what = format!("holds layer {}, the point names {}", reader.layer_id(), found.layer);
            return Err(crate::Error::ChainBroken { path: reader.label().into(), what }.into());
        }
        reader.check_layers()?;
        Ok(Arc::new(self.over(reader, found)?))
    }

    /// Puts the disk of another product below a layer that stands on one, where this repository was told how.
    fn over(&self, reader: Reader, disk: &PointDisk) -> Result<Reader> {
        match (&disk.linked, self.open_linked(), reader.linked()) {
            (Some(linked), Some(open), Some(_)) => Ok(reader.over(open(linked)?)?),
            _ => Ok(reader),
        }
    }

    /// Opens a sealed layer file, whatever lists it.
    pub(super) fn open_layer(&self, machine: Uuid, point: Uuid, disk: &DiskName) -> Result<Reader> {
        let storage = self.store().open_layer(&name::layer(machine, point, disk))?;
        Ok(Reader::open(storage, self.resolver(machine))?)
    }

    /// Finds older files of one machine. Only hints of the shape `../<point>/<disk>.aql` name anything.
    pub(super) fn resolver(&self, machine: Uuid) -> Resolver {
        let store = self.store().clone();
        let domain = format!("{} {machine}", self.id());
        Resolver::custom(domain, move |wanted: &LayerName<'_>| {
            let shown = store.path_of(&name::points(machine));
            let Some((point, disk)) = parse_hint(wanted.hint) else {
                let what = format!("layer {} is looked for at {:?}, outside the repository", wanted.layer, wanted.hint);
                return Err(crate::Error::Refused { path: shown, what });
            };
            let file = name::layer(machine, point, &disk);
            store.open_layer(&file).map_err(|e| match e {
                Error::Format(e) => e,
                _ => {
                    let what = format!("layer {} is missing", wanted.layer);
                    crate::Error::ChainBroken { path: store.path_of(&file), what }
                }
            })
        })
    }

    /// The older files a finished layer draws from, as a point's record names them.
    pub(super) fn needs_of(&self, machine: Uuid, reader: &Reader) -> Result<Vec<NeededFile>> {
        let mut needs = Vec::new();
        for needed in reader.needed_layers() {
            let Some((point, disk)) = parse_hint(&needed.hint) else {
                let what = format!("layer {} lies at {:?}, outside the repository", needed.layer, needed.hint);
                return Err(crate::Error::Refused { path: reader.label().into(), what }.into());
            };
            let file = name::layer(machine, point, &disk);
            let missing = || {
                let what = format!("layer {} is missing", needed.layer);
                crate::Error::ChainBroken { path: self.store().path_of(&file), what }
            };
            let file_bytes = self.store().len(&file)?.ok_or_else(missing)?;
            needs.push(NeededFile { point, disk, layer: needed.layer, seal: Hash(needed.seal), file_bytes });
        }
        Ok(needs)
    }
}

/// What is wrong with the files of another product that a disk stands on.
fn linked_state(disk: &PointDisk) -> Option<PointState> {
    let linked = disk.linked.as_ref()?;
    linked.files.iter().find_map(|file| {
        let why = file.changed()?;
        let gone = !std::path::Path::new(&file.path).exists();
        Some(if gone { PointState::gone(&file.path) } else { PointState::Corrupted { why } })
    })
}
