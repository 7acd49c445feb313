//! Mounts that are being served on this machine, for `status`: each keeps a record in the runtime folder.
//!
//! Invariants
//! - A record is locked by the process that serves; one that can be locked is of a process that is dead,
//!   and is taken away. No process number is ever believed.
//! - A record is seen whole or not at all: it is locked and written before it gets its name.
//!
//! Not here: recovery sessions, which have folders of their own.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{
    context::Context,
    fail::{Fail, Result},
};

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What is served, as it was named.
    pub source: String,
    /// Since when.
    pub since: Timestamp,
    /// The process that serves; a signal ends it.
    pub pid: u32,
    /// Its disks.
    pub disks: Vec<MountedDisk>,
}

/// A disk of a mount and where it is found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountedDisk {
    /// Name of the disk.
    pub disk: String,
    /// Size in bytes.
    pub size: u64,
    /// Whether it takes writes.
    pub writable: bool,
    /// Its NBD URI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// Its file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Its vhost-user-blk socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<PathBuf>,
    /// Its loop device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<PathBuf>,
}

/// The record of a mount of this process; dropped with the mount.
#[derive(Debug)]
pub struct Listed {
    path: PathBuf,
    _locked: File,
}

impl Listed {
    /// Lists a mount of this process.
    pub fn new(context: &Context, mount: &Mount) -> Result<Self> {
        let folder = context.runtime_dir()?;
        let failed = |action| move |e: io::Error| Fail::io("the record of the mount", action, &e);
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(failed("create"))?;
        let temporary = folder.join(format!(".mount-{}", mount.pid));
        let path = folder.join(format!("mount-{}.json", mount.pid));
        let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
        let mut file = opened.map_err(failed("create"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| failed("lock")(e.into()))?;
        let text = serde_json::to_vec(mount).map_err(|e| failed("write")(e.into()))?;
        file.write_all(&text).and_then(|()| fs::rename(&temporary, &path)).map_err(failed("write"))?;
        Ok(Self { path, _locked: file })
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        // A record that stays is taken away by whoever looks next.
        let _ = fs::remove_file(&self.path);
    }
}

fn is_record(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("mount-") && name.ends_with(".json")
}

/// Every living mount, oldest first.
pub fn list(context: &Context) -> Result<Vec<Mount>> {
    let folder = context.runtime_dir()?;
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Fail::io(folder.display(), "look at", &error)),
    };
    let mut mounts = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_record(path)) {
        // One that goes while it is looked at has ended.
        let Ok(file) = File::open(&path) else { continue };
        if flock(&file, FlockOperation::NonBlockingLockShared).is_err() {
            mounts.extend(fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Mount>(&text).ok()));
        } else {
            // Whoever served it was killed.
            let _ = fs::remove_file(&path);
        }
    }
    mounts.sort_by_key(|mount: &Mount| mount.since);
    Ok(mounts)
}
