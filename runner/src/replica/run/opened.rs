//! What a run reads: a restore point of a repository, images, or what a hypervisor serves; open, and held while it is read.
//!
//! Invariants
//! - A point that is read cannot be deleted meanwhile: it is under a lease.
//! - Images that were written to since the run began with them are refused; a moment that is over is as well.
//!
//! Not here: which of them is chosen ([`super`]), what is made of it ([`super::work`]).

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::repo::{Point, PointState, Repository};
use aquifer_vdisk::{Chain, Delta, delta_between};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    fail::{Code, Fail, Result},
    host::in_use::Against,
    replica::{
        desk::Desk,
        images,
        layers::{self, said_above},
        model::{HomeDisk, PointRecord, ReplicaRecord, SourcePoint},
        production::Moment,
    },
    repository::{self, Hold},
};

/// What content a run reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunSource {
    /// A restore point of a repository.
    Backup {
        /// Its folder.
        repository: PathBuf,
        /// Which.
        point: SourcePoint,
    },
    /// Images of a machine that is off.
    Images {
        /// Its disks.
        disks: Vec<HomeDisk>,
        /// When they were last written to, nanoseconds since 1970: what is written to meanwhile is no restore point.
        #[serde(default)]
        as_of: Vec<i64>,
    },
    /// The disks of a running machine as they were at one moment, served by its hypervisor.
    Doors {
        /// Which moment: once it is over, what is served there is another.
        moment: Uuid,
        /// Its disks.
        disks: Vec<SourceDoor>,
    },
}

/// A disk that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceDoor {
    /// Its name.
    pub disk: String,
    /// NBD URI.
    pub uri: String,
}

impl RunSource {
    /// Whether production is read.
    pub fn is_production(&self) -> bool {
        !matches!(self, Self::Backup { .. })
    }
}

/// The source, open and held.
pub(in crate::replica) struct Opened {
    repo: Option<(Repository, Point, Option<Hold>)>,
    disks: Vec<(String, Arc<Chain>)>,
}

impl Opened {
    pub(in crate::replica) fn of(desk: &Desk<'_>, source: &RunSource) -> Result<Self> {
        match source {
            RunSource::Images { disks, as_of } => {
                untouched(disks, as_of)?;
                let open =
                    |disk: &HomeDisk| Ok((disk.disk.clone(), layers::open(&disk.path, disk.format, desk.cache)?));
                Ok(Self { repo: None, disks: disks.iter().map(open).collect::<Result<_>>()? })
            }
            RunSource::Doors { moment, disks } => {
                if !Moment::is_held(*moment) {
                    return Err(Fail::new(Code::NotFound, "the moment of the running machine that was read is over"));
                }
                let open = |door: &SourceDoor| Ok((door.disk.clone(), layers::served(&door.uri, desk.cache)?));
                Ok(Self { repo: None, disks: disks.iter().map(open).collect::<Result<_>>()? })
            }
            RunSource::Backup { repository, point: wanted } => {
                let repo = Repository::open(repository, desk.me.clone())?;
                let repo = repo.with_linked(crate::source::linked::opener(desk.cache.clone()));
                let machine = repo.machines()?.into_iter().find(|machine| machine.id == wanted.machine);
                let gone = || Fail::new(Code::NotFound, format!("the point {} is gone", wanted.point)).at(repo.label());
                let machine = machine.filter(|_| repo.id() == wanted.repository).ok_or_else(gone)?;
                let listed = repo.points(&machine)?;
                let point = wanted.among(&repo, &listed).filter(|point| point.state == PointState::Complete);
                let point = point.cloned().ok_or_else(gone)?;
                let hold = Hold::read(&repo, &machine, &point, repository::holder("replicate"))?;
                Ok(Self { repo: Some((repo, point, Some(hold))), disks: Vec::new() })
            }
        }
    }

    pub(super) fn chain(&self, desk: &Desk<'_>, disk: &str) -> Result<Arc<Chain>> {
        if let Some((repo, point, _)) = &self.repo {
            let name = aquifer_formats::repo::DiskName::new(disk)?;
            return Ok(Arc::new(Chain::of_point(repo.open_disk(point, &name)?, desk.cache.clone())));
        }
        let found = self.disks.iter().find(|(name, _)| name == disk);
        Ok(found.ok_or_else(|| Fail::new(Code::NotFound, format!("there is no disk {disk}")))?.1.clone())
    }

    /// Where the new content can differ from the replica's newest state, if the tables prove where it cannot: the
    /// tables of the replica's own layers, down to one that was made of the same chain, and those of that chain.
    pub(super) fn candidates(
        &self,
        desk: &Desk<'_>,
        record: &ReplicaRecord,
        points: &[PointRecord],
        disk: &str,
        (base, source): (&Chain, &Chain),
    ) -> Result<Option<Delta>> {
        let Some((repo, new, _)) = &self.repo else { return Ok(None) };
        let Some(machine) = repo.machines()?.into_iter().find(|machine| machine.id == new.machine) else {
            return Ok(None);
        };
        let known = repo.points(&machine)?;
        for point in points.iter().rev() {
            let Some(top) = point.disks.iter().find(|top| top.disk == disk) else { continue };
            let old = point.source.and_then(|of| of.among(repo, &known).cloned());
            // Whatever it is called by now: it has to be the same moment.
            let Some(old) = old.filter(|old| old.created() == Some(point.taken)) else { continue };
            let Some(above) = said_above(base, &record.folder.join(&top.file))? else { continue };
            let name = aquifer_formats::repo::DiskName::new(disk)?;
            // An older point that cannot be read any more costs reading, nothing else.
            let Ok(reader) = repo.open_disk(&old, &name) else { continue };
            let old = Chain::of_point(reader, desk.cache.clone());
            if old.size() != top.size {
                continue;
            }
            return Ok(Some(delta_between(&old, source)?.union(&above)));
        }
        Ok(None)
    }
}

/// Refuses images that were written to since a run began with them, or that somebody has open to write.
pub(super) fn untouched(disks: &[HomeDisk], as_of: &[i64]) -> Result<()> {
    for (disk, as_of) in disks.iter().zip(as_of) {
        images::free(disk, Against::Writers)?;
        if written(&disk.path)? != *as_of {
            let what = "the image was written to while it was copied: its machine has to be off";
            return Err(Fail::new(Code::State, what).at(disk.path.display()));
        }
    }
    Ok(())
}

/// When a file was last written to, nanoseconds since 1970.
///
/// # Errors
/// I/O.
pub(crate) fn written(path: &Path) -> Result<i64> {
    let meta = std::fs::metadata(path).map_err(|e| Fail::io(path.display(), "look at", &e))?;
    Ok(meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()))
}
