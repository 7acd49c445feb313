//! Where writes of a mount go: nowhere, a folder that is removed at the end, or a folder that is kept.
//!
//! Invariant: an overlay appears under its disk's name whole and with all its names durable, or not at all.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use aquifer_mount::{
    session::{make_private_dir, sync_dir, this_boot},
    vhost::Identity,
};
use aquifer_vdisk::{
    Chain, Disk,
    overlay::{Overlay, OverlayOf, OverlayOptions},
    unflushed,
};

use super::Args;
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
};

/// The overlays of one mount.
pub(super) enum Scratch {
    /// Read-only.
    None,
    /// Removed at the end; made when the first disk needs it.
    Thrown(Option<PathBuf>),
    /// Kept.
    Kept(PathBuf),
}

/// What goes on with a disk's writes in mind when this process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outlives {
    /// Nobody: what was not flushed may be gone.
    Nothing,
    /// A machine that waits for the next door.
    Door,
}

/// The file that says that a folder is a mount's overlay.
const RAW_NAME: &str = aquifer_vdisk::overlay::RAW_NAME;

impl Scratch {
    pub(super) fn of(args: &Args) -> Result<Self> {
        Ok(match (&args.overlay, args.writable) {
            (Some(dir), _) => Self::Kept(std::path::absolute(dir).map_err(|e| Fail::io(dir.display(), "look at", &e))?),
            (None, true) => Self::Thrown(None),
            (None, false) => Self::None,
        })
    }

    /// Whether the folder of a kept overlay can be used; changes nothing.
    pub(super) fn check(&self) -> Result<()> {
        let Self::Kept(dir) = self else { return Ok(()) };
        match fs::metadata(dir) {
            Ok(meta) if meta.is_dir() => Ok(()),
            Ok(_) => Err(Fail::new(Code::Exists, format!("{} is no folder", dir.display())).at(dir.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let above = dir.parent().unwrap_or(dir);
                fs::metadata(above).map(drop).map_err(|e| Fail::io(above.display(), "write into", &e))
            }
            Err(error) => Err(Fail::io(dir.display(), "look at", &error)),
        }
    }

    /// The overlay of one disk, where writes are wanted.
    pub(super) fn overlay(&mut self, context: &Context, name: &str, chain: &Chain) -> Result<Option<Overlay>> {
        let base = match self {
            Self::None => return Ok(None),
            Self::Kept(dir) => dir.clone(),
            Self::Thrown(Some(dir)) => dir.clone(),
            Self::Thrown(none) => none.insert(private_folder(context)?).clone(),
        };
        let dir = base.join(name);
        let of = OverlayOf { size: chain.size(), chain: chain.fingerprint()? };
        if !dir.join(RAW_NAME).exists() {
            create(&base, name, of)?;
        }
        Ok(Some(Overlay::open(&dir, of, OverlayOptions::default())?))
    }

    /// The disk, with unflushed writes kept for the next process where somebody outlives this one; so also where an
    /// earlier process has kept some, which must not come back later over what is written now.
    pub(super) fn lasting(&self, disk: Disk, outlives: Outlives) -> Result<Disk> {
        let Self::Kept(base) = self else { return Ok(disk) };
        let dir = base.join(disk.name());
        let kept_before = unflushed::NAMES.iter().any(|name| dir.join(name).exists());
        match outlives {
            Outlives::Nothing if !kept_before => Ok(disk),
            _ => Ok(disk.surviving(&dir, this_boot()?)?),
        }
    }

    /// Tells the disk from every other that a machine could have run from: the same for a later mount of a kept overlay
    /// or of a source that is only read.
    pub(super) fn identity(&self, disk: &Disk) -> Result<Identity> {
        let mut hash = blake3::Hasher::new();
        match self {
            Self::Thrown(_) => return Ok(uuid::Uuid::new_v4().into_bytes()),
            Self::None => hash.update(b"source"),
            Self::Kept(base) => {
                let path = base.join(disk.name()).join(RAW_NAME);
                let meta = fs::metadata(&path).map_err(|e| Fail::io(path.display(), "look at", &e))?;
                let born = meta.created().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
                hash.update(b"overlay").update(&meta.dev().to_le_bytes()).update(&meta.ino().to_le_bytes());
                hash.update(&born.map_or(0, |at| at.as_nanos()).to_le_bytes())
            }
        };
        if let Some(chain) = disk.chain() {
            hash.update(&chain.fingerprint()?);
        }
        let mut identity = Identity::default();
        hash.update(&disk.size().to_le_bytes()).finalize_xof().fill(&mut identity);
        Ok(identity)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Self::Thrown(Some(dir)) = self {
            // Nothing of value is in it, and its folder is private: a leftover is the most that can happen.
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// Makes the overlay of the disk `name` in `base`. What a kill leaves unfinished has another name, and is made anew.
fn create(base: &Path, name: &str, of: OverlayOf) -> Result<()> {
    let (draft, dir) = (base.join(format!(".{name}.new")), base.join(name));
    if draft.exists() {
        fs::remove_dir_all(&draft).map_err(|e| Fail::io(draft.display(), "remove", &e))?;
    }
    make_private_dir(&draft)?;
    drop(Overlay::create(&draft, of, OverlayOptions::default())?);
    sync_dir(&draft)?;
    fs::rename(&draft, &dir).map_err(|e| Fail::io(dir.display(), "create", &e))?;
    Ok(sync_dir(base)?)
}

/// A new folder of our own below the state folder: scratch can be as large as the disk, so not in memory.
fn private_folder(context: &Context) -> Result<PathBuf> {
    let dir = context.home()?.join("scratch").join(uuid::Uuid::now_v7().to_string());
    make_private_dir(&dir)?;
    Ok(dir)
}
