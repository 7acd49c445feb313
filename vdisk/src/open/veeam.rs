//! Disks of Veeam's backups: which files a point stands on, and disks that are images of their own inside them.
//!
//! A file tells its point's id and the id of the point below. Names of files tell nothing (merges rename them),
//! so the backup files of the folder are looked through until one holds the point that is wanted.
//!
//! Invariants
//! - A layer is put below another only by the id that the upper one's summary gives.
//! - An increment whose point below is not there is refused; what it does not hold is never zeros.
//! - Every file passes the gate, as in any other chain.

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::{OsStr, OsString},
    path::PathBuf,
    sync::Arc,
};

use aquifer_formats::{
    Error as FormatError, Layer, Storage,
    gate::{Gate, Passage},
    vbk::{Backup, Vbk},
    vhd::Vhd,
    vhdx::Vhdx,
};

use super::{beside, label};
use crate::{BlockCache, Chain, ChainStorage, Result};

/// Deepest chain of differencing images inside one backup.
const IMAGES_MAX: usize = 64;

/// Names of the disks of a file: a disk's own where one machine is in it, else behind the machine's.
pub(super) fn names(vbk: &Vbk) -> Result<Vec<String>> {
    Ok(disks(&vbk.backups()?).into_iter().map(|(name, _, _)| name).collect())
}

fn disks(backups: &[Backup]) -> Vec<(String, &Backup, &str)> {
    let shared = |machine: &str| backups.iter().filter(|other| other.machine() == machine).count() > 1;
    let mut found = Vec::new();
    for backup in backups {
        let machine = if shared(backup.machine()) { &backup.folder } else { backup.machine() };
        for disk in &backup.disks {
            let name = if backups.len() == 1 { disk.name.clone() } else { format!("{machine}/{}", disk.name) };
            found.push((name, backup, disk.name.as_str()));
        }
    }
    found
}

/// The disk `member` of `file`, with all that it stands on.
pub(super) fn chain(gate: &Gate, file: &Passage, member: &str, cache: Arc<BlockCache>) -> Result<Chain> {
    let vbk = Vbk::open(file.storage())?;
    let backups = vbk.backups()?;
    let found = disks(&backups).into_iter().find(|(name, _, _)| name == member);
    let missing = || FormatError::ChainBroken { path: label(file), what: format!("has no disk {member:?}") };
    let (_, backup, disk) = found.ok_or_else(missing)?;
    let point = Point { gate, file, vbk: &vbk, backup, cache, seen: RefCell::default() };
    let chain = match point.image(disk)? {
        Some(image) => point.images(image),
        None => point.files(disk),
    }?;
    Ok(chain.of_files(point.seen.into_inner()))
}

/// One machine at one point in time.
struct Point<'a> {
    gate: &'a Gate,
    file: &'a Passage,
    vbk: &'a Vbk,
    backup: &'a Backup,
    cache: Arc<BlockCache>,
    /// The files that were needed.
    seen: RefCell<Vec<PathBuf>>,
}

impl Point<'_> {
    /// The file `name` of the backup, as it was at this point.
    fn files(&self, name: &str) -> Result<Chain> {
        let mut layers: Vec<Arc<dyn Layer>> = vec![Arc::new(self.vbk.disk(self.backup, name)?)];
        let mut folder = None;
        let (mut at, mut backup) = (self.file.clone(), self.backup.clone());
        self.note(&at);
        while backup.disks.iter().any(|disk| disk.name == name && disk.is_increment) {
            let broken = |what: String| FormatError::ChainBroken { path: label(&at), what };
            let wanted = backup.below().ok_or_else(|| {
                broken(format!("{name:?} is an increment, and no summary says on which point it stands"))
            })?;
            let folder = match &folder {
                Some(folder) => folder,
                None => folder.insert(points_beside(self.gate, self.file)?),
            };
            let found = folder.get(wanted);
            let found = found.ok_or_else(|| {
                broken(format!("it stands on the point {wanted}, which no backup file in its folder holds"))
            })?;
            let next = self.gate.follow(&at, found)?;
            let vbk = Vbk::open(next.storage())?;
            let below = vbk.backups()?.into_iter().find(|other| other.id() == Some(wanted));
            let gone = || broken(format!("{} held the point {wanted} a moment ago", label(&next)));
            let below = below.ok_or_else(gone)?;
            layers.push(Arc::new(vbk.disk(&below, name)?));
            (at, backup) = (next, below);
            self.note(&at);
        }
        Chain::new(layers, self.cache.clone())
    }

    fn note(&self, file: &Passage) {
        let mut seen = self.seen.borrow_mut();
        if !seen.iter().any(|known| known == file.path()) {
            seen.push(file.path().to_path_buf());
        }
    }

    /// The image that the file `name` is, if its name says that it is one.
    fn image(&self, name: &str) -> Result<Option<Image>> {
        let lower = name.to_ascii_lowercase();
        let ends = |ends: [&str; 2]| ends.iter().any(|end| lower.ends_with(end));
        let open = || -> Result<Arc<dyn Storage>> {
            let label = format!("{} ({name})", label(self.file));
            Ok(Arc::new(ChainStorage::new(self.files(name)?, label)?))
        };
        Ok(if ends([".vhdx", ".avhdx"]) {
            Some(Image::Vhdx(Box::new(Vhdx::open(open()?)?)))
        } else if ends([".vhd", ".avhd"]) {
            Some(Image::Vhd(Box::new(Vhd::open(open()?)?)))
        } else {
            None
        })
    }

    /// The disk that `image` and its parents in the same backup are.
    fn images(&self, mut image: Image) -> Result<Chain> {
        let mut layers = Vec::new();
        while layers.len() < IMAGES_MAX {
            layers.push(image.layer()?);
            let Some(names) = image.parent_names() else { return Chain::new(layers, self.cache.clone()) };
            let called = |disk: &str| names.iter().any(|name| last_part(name).eq_ignore_ascii_case(disk));
            let parent = self.backup.disks.iter().find(|disk| called(&disk.name));
            let broken = |what: &str| FormatError::ChainBroken { path: label(self.file), what: what.into() };
            let parent = parent.ok_or_else(|| broken("an image in it has a parent that is not in the same backup"))?;
            let parent = self.image(&parent.name)?.ok_or_else(|| broken("an image's parent is none"))?;
            image.check_parent(&parent)?;
            image = parent;
        }
        let what = format!("more than {IMAGES_MAX} images on each other, or a cycle");
        Err(FormatError::ChainBroken { path: label(self.file), what }.into())
    }
}

/// Behind both kinds of slash.
fn last_part(name: &OsStr) -> String {
    name.to_string_lossy().rsplit(['/', '\\']).next().unwrap_or_default().to_owned()
}

/// A disk image that is a file of the backup.
enum Image {
    Vhdx(Box<Vhdx>),
    Vhd(Box<Vhd>),
}

impl Image {
    fn layer(&self) -> Result<Arc<dyn Layer>> {
        Ok(match self {
            Self::Vhdx(image) => Arc::new(image.layer()?),
            Self::Vhd(image) => Arc::new(image.layer()?),
        })
    }

    fn parent_names(&self) -> Option<&[OsString]> {
        match self {
            Self::Vhdx(image) => image.parent().map(|parent| parent.names()),
            Self::Vhd(image) => image.parent().map(|parent| parent.names()),
        }
    }

    fn check_parent(&self, parent: &Self) -> Result<()> {
        match (self, parent) {
            (Self::Vhdx(child), Self::Vhdx(parent)) => Ok(child.check_parent(parent)?),
            (Self::Vhd(child), Self::Vhd(parent)) => Ok(child.check_parent(parent)?),
            (Self::Vhdx(_), Self::Vhd(_)) | (Self::Vhd(_), Self::Vhdx(_)) => {
                let what = "an image of one generation stands on one of the other".into();
                Err(FormatError::ChainBroken { path: "backup".into(), what }.into())
            }
        }
    }
}

/// Which file beside `file` holds which point. Files that do not open hold none; where two hold the same
/// point, the first by name is taken: the id says that they hold the same.
fn points_beside(gate: &Gate, file: &Passage) -> Result<HashMap<String, OsString>> {
    let mut found = HashMap::new();
    for name in beside(file, &["vbk", "vib"])? {
        let Ok(vbk) = gate.follow(file, &name).and_then(|other| Vbk::open(other.storage())) else { continue };
        let Ok(backups) = vbk.backups() else { continue };
        for id in backups.iter().filter_map(Backup::id) {
            found.entry(id.to_owned()).or_insert_with(|| name.clone());
        }
    }
    Ok(found)
}
