//! Whole stores of other products: a folder of Veeam's backup files, a datastore of Proxmox Backup Server, a remote of
//! Xen Orchestra, a backup store of Longhorn, a storage of Benji. Their machines and points are listed like a repository's; each point's path is a SOURCE of its own.
//!
//! Invariants
//! - A file that cannot be read is a point that says so, never one that is left out.
//! - Nothing is opened but what lies in the folder; links to elsewhere are not followed into folders.
//!
//! Not here: opening of disks (`select`).

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    benji, longhorn, pbs,
    storage::{Access, FileStorage},
    vbk::{Backup, Vbk},
    xo,
};
use jiff::Timestamp;

use crate::fail::{Code, Fail, Result};

/// One point of a machine in a store.
#[derive(Clone, Debug)]
pub(crate) struct StorePoint {
    pub(crate) machine: String,
    /// What the store calls the point.
    pub(crate) id: String,
    pub(crate) created: Option<Timestamp>,
    pub(crate) kind: StoreKind,
    /// The point below.
    pub(crate) parent: Option<String>,
    pub(crate) state: StoreState,
    /// What to name as SOURCE.
    pub(crate) source: PathBuf,
    /// Names and sizes in bytes.
    pub(crate) disks: Vec<(String, u64)>,
}

/// Whether a point holds everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreKind {
    Full,
    Increment,
    Unknown,
}

/// Whether a point can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StoreState {
    Complete,
    /// Its backup never ended, or still runs.
    Incomplete,
    /// What it stands on is not in the store.
    Missing(String),
    /// It cannot be read, or the product that wrote it says that it is damaged.
    Corrupted(String),
}

/// Products whose stores are folders of a known shape.
const STORES: &str = "Proxmox Backup Server, Xen Orchestra, Longhorn or Benji";

/// The points in the folder at `path`, by machine and age; an error where it is no store.
pub(crate) fn list(path: &Path) -> Result<Vec<StorePoint>> {
    let label = path.display().to_string();
    let folder = fs::canonicalize(path).map_err(|e| Fail::io(&label, "open", &e))?;
    let mut points = if let Some(datastore) = pbs::datastore_holding(&folder) {
        of_datastore(&datastore, &folder)?
    } else if let Some(machines) = xo::machines_in(&folder) {
        of_remote(&machines)?
    } else if let Some(volumes) = longhorn::volumes_in(&folder) {
        of_longhorn(&volumes)?
    } else if let Some(versions) = benji::versions(&folder)? {
        versions.into_iter().flat_map(of_benji).collect()
    } else {
        of_backup_files(&folder)?
    };
    if points.is_empty() {
        let what = format!("{label} holds no backups that are listed here: files of Veeam, or a store of {STORES}");
        return Err(Fail::new(Code::NotFound, what).at(label));
    }
    points.sort_by(|a, b| (&a.machine, a.created, &a.source).cmp(&(&b.machine, b.created, &b.source)));
    Ok(points)
}

fn of_datastore(datastore: &Path, folder: &Path) -> Result<Vec<StorePoint>> {
    let mut points = Vec::new();
    for found in pbs::snapshots(folder)? {
        let group = found.folder.parent().and_then(|group| group.strip_prefix(datastore).ok());
        let mut point = StorePoint {
            machine: group.unwrap_or(&found.folder).display().to_string(),
            id: found.folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            created: found.created(),
            kind: StoreKind::Full,
            parent: None,
            state: StoreState::Complete,
            source: found.folder.clone(),
            disks: Vec::new(),
        };
        match found.manifest {
            Ok(Some(manifest)) => {
                point.disks = manifest.disks().map(|(name, file)| (name.to_owned(), file.size)).collect();
            }
            Ok(None) => point.state = StoreState::Incomplete,
            Err(error) => point.state = StoreState::Corrupted(error.to_string()),
        }
        points.push(point);
    }
    Ok(points)
}

fn of_remote(machines: &[PathBuf]) -> Result<Vec<StorePoint>> {
    let mut points = Vec::new();
    for stored in xo::points(machines)? {
        let point = match stored.point {
            Ok(point) => point,
            Err(error) => {
                points.push(unreadable(&stored.path, error.to_string()));
                continue;
            }
        };
        let (name, id) = point.machine();
        // Names are not unique there.
        let machine = if name.is_empty() { id.to_owned() } else { format!("{name} ({id})") };
        let is_whole = stored.refusal.is_none();
        let export = point.export().and_then(|export| Some(stored.path.parent()?.join(export)));
        points.push(StorePoint {
            machine,
            id: stored.path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            created: point.created(),
            kind: match (&export, point.is_increment()) {
                (Some(_), _) | (None, Some(false)) => StoreKind::Full,
                (None, Some(true)) => StoreKind::Increment,
                (None, None) => StoreKind::Unknown,
            },
            parent: None,
            state: stored.refusal.map_or(StoreState::Complete, StoreState::Missing),
            disks: point.disks().unwrap_or_default().into_iter().map(|disk| (disk.name, disk.size)).collect(),
            // What is refused is not named: its description says why when it is opened.
            source: export.filter(|_| is_whole).unwrap_or(stored.path),
        });
    }
    Ok(points)
}

fn of_benji(stored: benji::Stored) -> Vec<StorePoint> {
    let point = |version: &benji::Version| StorePoint {
        machine: version.volume().to_owned(),
        id: version.uid().to_owned(),
        created: version.created(),
        kind: StoreKind::Full,
        parent: None,
        state: match version.refusal() {
            None => StoreState::Complete,
            Some(why) => StoreState::Corrupted(why.to_owned()),
        },
        source: stored.path.clone(),
        disks: vec![(version.volume().to_owned(), version.size())],
    };
    match &stored.versions {
        Ok(versions) => versions.iter().map(point).collect(),
        Err(error) => vec![unreadable(&stored.path, error.to_string())],
    }
}

fn of_longhorn(volumes: &Path) -> Result<Vec<StorePoint>> {
    let point = |stored: longhorn::Stored| StorePoint {
        machine: stored.volume.clone(),
        id: stored.name,
        created: stored.created,
        // Whichever way it was made, it stands alone.
        kind: StoreKind::Full,
        parent: None,
        state: match stored.refusal {
            _ if !stored.is_complete => StoreState::Incomplete,
            None => StoreState::Complete,
            Some(why) => StoreState::Corrupted(why),
        },
        source: stored.path,
        disks: vec![(stored.volume, stored.size)],
    };
    Ok(longhorn::backups(volumes)?.into_iter().map(point).collect())
}

fn of_backup_files(folder: &Path) -> Result<Vec<StorePoint>> {
    let label = folder.display().to_string();
    let failed = |e| Fail::io(&label, "list", &e);
    let mut points = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let ends = |end: &str| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(end));
        if !ends("vbk") && !ends("vib") && !ends("vrb") {
            continue;
        }
        let opened = FileStorage::open(&path, Access::ReadOnly);
        match opened.and_then(|storage| Vbk::open(Arc::new(storage))).and_then(|file| file.backups()) {
            Ok(backups) => points.extend(backups.iter().map(|backup| of_backup(&path, backup))),
            Err(error) => points.push(unreadable(&path, error.to_string())),
        }
    }
    let known: HashSet<String> = points.iter().map(|point| point.id.clone()).collect();
    for point in &mut points {
        if let (StoreState::Complete, StoreKind::Increment) = (&point.state, point.kind)
            && let Some(wanted) = point.parent.as_ref().filter(|parent| !known.contains(*parent))
        {
            point.state = StoreState::Missing(format!("the point {wanted} that it stands on is in no file here"));
        }
    }
    Ok(points)
}

fn of_backup(path: &Path, backup: &Backup) -> StorePoint {
    let is_increment = backup.disks.iter().any(|disk| disk.is_increment);
    let state = match &backup.summary {
        Some(summary) if summary.is_corrupted => {
            StoreState::Corrupted("the product that wrote it marks it as damaged".into())
        }
        Some(summary) if summary.is_inconsistent => StoreState::Incomplete,
        None if is_increment => StoreState::Corrupted("it does not say on which point it stands".into()),
        Some(_) | None => StoreState::Complete,
    };
    StorePoint {
        machine: backup.machine().to_owned(),
        id: backup.id().unwrap_or(&backup.folder).to_owned(),
        created: backup.summary.as_ref().and_then(|summary| summary.created),
        kind: if is_increment { StoreKind::Increment } else { StoreKind::Full },
        parent: backup.below().map(str::to_owned),
        state,
        source: path.to_path_buf(),
        disks: backup.disks.iter().map(|disk| (disk.name.clone(), disk.bytes)).collect(),
    }
}

fn unreadable(path: &Path, why: String) -> StorePoint {
    StorePoint {
        machine: "unknown".into(),
        id: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        created: None,
        kind: StoreKind::Unknown,
        parent: None,
        state: StoreState::Corrupted(why),
        source: path.to_path_buf(),
        disks: Vec::new(),
    }
}

impl StoreState {
    /// As a repository's points call it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Incomplete => "incomplete",
            Self::Missing(_) => "missing",
            Self::Corrupted(_) => "corrupted",
        }
    }

    pub(crate) fn why(&self) -> Option<&str> {
        match self {
            Self::Complete | Self::Incomplete => None,
            Self::Missing(why) | Self::Corrupted(why) => Some(why),
        }
    }
}

impl StoreKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Increment => "increment",
            Self::Unknown => "-",
        }
    }
}
