//! What a point says of itself: `20261101T000000Z.json`.

use std::{
    collections::BTreeMap,
    path::{Component, Path},
    sync::Arc,
};

use jiff::Timestamp;
use serde::Deserialize;

use crate::{Error, Result, Storage, document};

/// Longest description, in bytes.
const BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, Default, Deserialize)]
struct Machine {
    #[serde(default)]
    name_label: String,
    #[serde(default)]
    uuid: String,
}

#[derive(Debug, Deserialize)]
struct Described {
    #[serde(default)]
    uuid: String,
    #[serde(default)]
    virtual_size: u64,
}

/// How a disk is attached.
#[derive(Debug, Deserialize)]
struct Attached {
    #[serde(default, rename = "VDI")]
    disk: Option<String>,
    #[serde(default)]
    device: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    #[serde(default)]
    mode: String,
    /// Milliseconds since 1970 UTC.
    #[serde(default)]
    timestamp: Option<i64>,
    #[serde(default)]
    vm: Machine,
    #[serde(default)]
    vdis: BTreeMap<String, Described>,
    #[serde(default)]
    vbds: BTreeMap<String, Attached>,
    #[serde(default)]
    vhds: BTreeMap<String, String>,
    #[serde(default)]
    is_vhd_differencing: BTreeMap<String, bool>,
    #[serde(default)]
    xva: Option<String>,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What the machine calls it (`xvda`), or its id where that is not known, or not known for sure.
    pub name: String,
    /// Where its VHD or alias lies, counted from the point's own folder.
    pub path: String,
    /// Size in bytes, as the machine had it.
    pub size: u64,
}

/// How many folders and files `name` goes down from where it counts; `None` for one that may lead out of there.
fn depth(name: &str) -> Option<usize> {
    Path::new(name).components().try_fold(0, |depth, part| match part {
        Component::Normal(_) => Some(depth + 1),
        Component::CurDir => Some(depth),
        Component::ParentDir | Component::RootDir | Component::Prefix(_) => None,
    })
}

/// One point of a machine.
#[derive(Debug)]
pub struct Point {
    label: String,
    metadata: Metadata,
}

impl Point {
    /// Reads the description that `storage` is.
    ///
    /// # Errors
    /// [`Error::Corrupt`], also for one that names files outside its own folder; [`Error::Unsupported`] for one that is too
    /// long, [`Error::Io`].
    pub fn read(storage: &Arc<dyn Storage>) -> Result<Self> {
        let point = Self { label: storage.label().into(), metadata: document::read(&**storage, BYTES_MAX)? };
        let bad = |what: String| Err(Error::corrupt(&point.label, 0, what));
        if let Some(export) = point.export().filter(|export| !matches!(depth(export), Some(1))) {
            return bad(format!("its export {export:?} is no name of a file beside it"));
        }
        if let Some(path) = point.metadata.vhds.values().find(|path| depth(path).is_none()) {
            return bad(format!("its disk {path:?} is no name of a file beneath its folder"));
        }
        Ok(point)
    }

    /// Name and id of the machine.
    pub fn machine(&self) -> (&str, &str) {
        (&self.metadata.vm.name_label, &self.metadata.vm.uuid)
    }

    /// When it was made.
    pub fn created(&self) -> Option<Timestamp> {
        Timestamp::from_millisecond(self.metadata.timestamp?).ok()
    }

    /// Whether any of its disks stands on one of an older point; `None` where it does not say.
    pub fn is_increment(&self) -> Option<bool> {
        let told = &self.metadata.is_vhd_differencing;
        (!told.is_empty()).then(|| told.values().any(|is_one| *is_one))
    }

    /// The export beside it that a full backup is.
    pub fn export(&self) -> Option<&str> {
        let is_full = self.metadata.vhds.is_empty() && self.metadata.mode == "full";
        self.metadata.xva.as_deref().filter(|_| is_full)
    }

    /// Its disks, by name.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a full backup, whose disks are in the export beside it; [`Error::Corrupt`] for a point
    /// without disks.
    pub fn disks(&self) -> Result<Vec<Disk>> {
        if let Some(export) = self.export() {
            let what = format!("disks of a full backup by way of its description: they are in {export}");
            return Err(Error::unsupported(&self.label, what));
        }
        if self.metadata.vhds.is_empty() {
            return Err(Error::corrupt(&self.label, 0, "a point without disks"));
        }
        let device = |disk: &str| {
            let attached = self.metadata.vbds.values().find(|attached| attached.disk.as_deref() == Some(disk));
            attached.and_then(|attached| attached.device.as_deref()).filter(|device| !device.is_empty())
        };
        let alone = |name: &str| self.metadata.vhds.keys().filter(|disk| device(disk) == Some(name)).count() == 1;
        let of = |(reference, path): (&String, &String)| {
            let described = self.metadata.vdis.get(reference);
            let id = described.map(|described| described.uuid.as_str()).filter(|id| !id.is_empty());
            let name = device(reference).filter(|name| alone(name)).or(id).unwrap_or(reference);
            let size = described.map_or(0, |described| described.virtual_size);
            Disk { name: name.to_owned(), path: path.clone(), size }
        };
        let mut disks: Vec<Disk> = self.metadata.vhds.iter().map(of).collect();
        disks.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(disks)
    }
}
