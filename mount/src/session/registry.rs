//! The list of a user's sessions: one pointer file per session under `HOME/sessions`.
//!
//! Invariants
//! - The truth is in the session folder; a pointer only says where that is. A pointer to a folder that
//!   is gone is listed as gone, never an error for the others.
//! - Names are not unique, ids are; a name or a prefix that fits several sessions is refused with all of them.
//!
//! Not here: where HOME is (the caller says), and deleting session folders.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Error, Folder, Result, Spec,
    folder::{make_private_dir, sync_dir},
};

/// Largest pointer file, in bytes.
const POINTER_BYTES_MAX: u64 = 64 << 10;

/// Where a session is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pointer {
    /// Identity.
    pub id: Uuid,
    /// Machine name.
    pub name: String,
    /// Session folder.
    pub dir: PathBuf,
}

/// The sessions of one user.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// The registry under `home` (`AQUIFER_HOME`), which need not exist yet.
    pub fn new(home: &Path) -> Self {
        Self { dir: home.join("sessions") }
    }

    /// Lists a session. Listing it again changes nothing.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&self, spec: &Spec) -> Result<()> {
        make_private_dir(&self.dir)?;
        let pointer = Pointer { id: spec.id, name: spec.name.clone(), dir: spec.dir.clone() };
        let path = self.path(spec.id);
        let draft = self.dir.join(format!(".{}.{}", spec.id, std::process::id()));
        let text = serde_json::to_string(&pointer).map_err(|e| Error::bad_file(&path, e.to_string()))?;
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &path)
        };
        write().map_err(|e| Error::io(&path, "write", e))?;
        sync_dir(&self.dir)
    }

    /// Takes a session off the list. One that is not on it is no error.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, id: Uuid) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Ok(()) => sync_dir(&self.dir),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(&path, "remove", e)),
        }
    }

    /// All sessions, oldest first. Files that are no pointers are passed over.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Pointer>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(&self.dir, "list", e)),
        };
        let mut out = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| Error::io(&self.dir, "list", e))?.path();
            let id = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".json"));
            let Some(id) = id.and_then(|id| Uuid::try_parse(id).ok()) else { continue };
            if let Some(pointer) = read_pointer(&path).filter(|p| p.id == id) {
                out.push(pointer);
            }
        }
        out.sort_by_key(|p: &Pointer| p.id);
        Ok(out)
    }

    /// The session that `word` means: a session folder, an id or a prefix of one, or a machine name. Of
    /// several sessions of one name the only one still live is meant.
    ///
    /// # Errors
    /// [`Error::NoSession`], [`Error::Ambiguous`], [`Error::Io`].
    pub fn resolve(&self, word: &str) -> Result<Folder> {
        if word.contains('/') {
            return Folder::open(Path::new(word));
        }
        let all = self.list()?;
        let named: Vec<&Pointer> = all.iter().filter(|p| p.name == word).collect();
        let fits = if named.is_empty() { by_prefix(&all, word) } else { named };
        match fits.as_slice() {
            [] => Err(Error::NoSession { name: word.to_owned() }),
            [one] => Folder::open(&one.dir),
            several => {
                let live = |p: &&&Pointer| {
                    Folder::open(&p.dir).and_then(|f| f.load()).is_ok_and(|s| s.id == p.id && s.state.is_live())
                };
                match several.iter().filter(live).collect::<Vec<_>>().as_slice() {
                    [one] => Folder::open(&one.dir),
                    _ => {
                        let fits = several.iter().map(|p| p.id.to_string()).collect();
                        Err(Error::Ambiguous { name: word.to_owned(), fits })
                    }
                }
            }
        }
    }

    fn path(&self, id: Uuid) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

/// Sessions whose id begins or ends with `word`. Ids made in one minute share their beginning, so people use the end.
fn by_prefix<'a>(all: &'a [Pointer], word: &str) -> Vec<&'a Pointer> {
    let word = word.to_ascii_lowercase();
    if word.len() < 4 {
        return Vec::new();
    }
    let fits = |p: &&Pointer| {
        let (plain, dashed) = (p.id.simple().to_string(), p.id.to_string());
        plain.starts_with(&word) || dashed.starts_with(&word) || plain.ends_with(&word)
    };
    all.iter().filter(fits).collect()
}

fn read_pointer(path: &Path) -> Option<Pointer> {
    if fs::metadata(path).ok()?.len() > POINTER_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests;
