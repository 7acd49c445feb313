//! How a layer's older files are found.
//!
//! Invariants
//! - A hint is a relative path from the file that holds it. It never leaves the folder the resolver was
//!   made for, passes no symbolic link, and opens regular files only, read-only.
//! - A path is only a hint: whoever opens the file checks its layer id and seal hash.

use std::{
    fmt,
    fs::File,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use uuid::Uuid;

use crate::{Error, Result, Storage, storage::FileStorage};

/// Which file is wanted.
#[derive(Clone, Copy, Debug)]
pub struct LayerName<'a> {
    /// Relative path from the file that needs it.
    pub hint: &'a str,
    /// The layer it must hold.
    pub layer: Uuid,
    /// The seal hash it must have.
    pub seal: [u8; 32],
}

type Open = dyn Fn(&LayerName<'_>) -> Result<Arc<dyn Storage>> + Send + Sync;

/// Opens the older files a layer draws from.
#[derive(Clone)]
pub struct Resolver {
    domain: String,
    open: Arc<Open>,
}

impl Resolver {
    /// Files below `root`; hints are read from `base`, the folder of the asking file, relative to `root`.
    pub fn folder(root: impl Into<PathBuf>, base: impl Into<PathBuf>) -> Self {
        let (root, base) = (root.into(), base.into());
        let domain = root.display().to_string();
        Self { domain, open: Arc::new(move |name| open_beneath(&root, &base, name)) }
    }

    /// Anything else. `domain` names the world of files it opens: equal seals in one domain are taken to
    /// be the same bytes, and share cached blocks.
    pub fn custom(
        domain: impl Into<String>,
        open: impl Fn(&LayerName<'_>) -> Result<Arc<dyn Storage>> + Send + Sync + 'static,
    ) -> Self {
        Self { domain: domain.into(), open: Arc::new(open) }
    }

    /// No other files: for fulls.
    pub fn none() -> Self {
        Self::custom("", |name| {
            Err(Error::ChainBroken { path: name.hint.into(), what: "no folder was given to look for it in".into() })
        })
    }

    pub(crate) fn domain(&self) -> &str {
        &self.domain
    }

    pub(crate) fn open(&self, name: &LayerName<'_>) -> Result<Arc<dyn Storage>> {
        (self.open)(name)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("domain", &self.domain).finish_non_exhaustive()
    }
}

/// `base/hint` without `.` and `..`; `None` where it would leave the root.
pub(crate) fn join_hint(base: &Path, hint: &str) -> Option<PathBuf> {
    let mut out: Vec<&std::ffi::OsStr> = Vec::new();
    for part in base.components().chain(Path::new(hint).components()) {
        match part {
            Component::CurDir => {}
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop()?;
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    if out.is_empty() || hint.contains('\0') { None } else { Some(out.iter().collect()) }
}

/// As [`join_hint`], but keeps leading `..`: the hint of a hint, for a file one folder further on.
pub(crate) fn chain_hint(parent_hint: &str, hint: &str) -> String {
    let mut out: Vec<String> = Vec::new();
    let folder = Path::new(parent_hint).parent().unwrap_or(Path::new(""));
    for part in folder.components().chain(Path::new(hint).components()) {
        match part {
            Component::Normal(name) => out.push(name.to_string_lossy().into_owned()),
            Component::ParentDir if out.last().is_some_and(|last| last != "..") => {
                out.pop();
            }
            Component::ParentDir => out.push("..".into()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    out.join("/")
}

fn open_beneath(root: &Path, base: &Path, name: &LayerName<'_>) -> Result<Arc<dyn Storage>> {
    let shown = root.join(base).join(name.hint).display().to_string();
    let Some(relative) = join_hint(base, name.hint) else {
        let what = format!("a layer file may not lie outside {}", root.display());
        return Err(Error::Refused { path: shown, what });
    };
    let label = root.join(&relative).display().to_string();
    let missing = |e: rustix::io::Errno| {
        if e == rustix::io::Errno::NOENT || e == rustix::io::Errno::NOTDIR {
            let what = format!("layer {} is missing", name.layer);
            return Error::ChainBroken { path: label.clone(), what };
        }
        Error::io(&label, "open", 0, e.into())
    };
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat2(CWD, root, folder, Mode::empty(), ResolveFlags::empty()).map_err(missing)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(openat2(&root, &relative, flags, Mode::empty(), beneath).map_err(missing)?);
    let meta = file.metadata().map_err(|e| Error::io(&label, "stat", 0, e))?;
    if !meta.is_file() {
        return Err(Error::Refused { path: label, what: "a layer is a regular file".into() });
    }
    Ok(Arc::new(FileStorage::from_file(file, label)))
}
