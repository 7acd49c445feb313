//! Where a repository's objects lie: a folder now, an object prefix later, behind the same calls.
//!
//! Invariants
//! - [`Store::create`] either creates the whole object durably (file and folder synced) or nothing; of two
//!   who create one name, one gets [`Error::Exists`]. [`Store::self_test`] proves that on the spot.
//! - Paths are resolved beneath the repository's folder, without symbolic links.
//! - Nothing is deleted without a [`Permit`], which only the keeper makes.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use rustix::{
    fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use uuid::Uuid;

use super::{Error, Result, keeper::Permit};
use crate::{
    Storage,
    planted::{Bug, planted},
    storage::FileStorage,
};

/// Largest record that is read, in bytes.
const RECORD_BYTES_MAX: u64 = 16 << 20;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// A repository's objects.
#[derive(Clone, Debug)]
pub enum Store {
    /// A folder of a file system.
    Directory(Arc<DirectoryStore>),
}

impl Store {
    /// The folder at `path`, which must exist.
    ///
    /// # Errors
    /// [`Error::Format`] with the I/O error.
    pub fn directory(path: &Path) -> Result<Self> {
        Ok(Self::Directory(Arc::new(DirectoryStore::open(path)?)))
    }

    /// Name for messages: the folder.
    pub fn label(&self) -> &str {
        let Self::Directory(store) = self;
        &store.label
    }

    /// The object's name for messages.
    pub(super) fn path_of(&self, name: &str) -> String {
        format!("{}/{name}", self.label())
    }

    /// Creates an object, whole and durable, if its name is free.
    ///
    /// # Errors
    /// [`Error::Exists`]; I/O.
    pub fn create(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let Self::Directory(store) = self;
        store.create(name, bytes)
    }

    /// Makes the names in a folder durable, whoever made them.
    pub(super) fn settle(&self, folder: &str) -> Result<()> {
        let Self::Directory(store) = self;
        store.settle(folder)
    }

    /// Replaces an object. Only for leases and traces, which hold no truth about data.
    pub(super) fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let Self::Directory(store) = self;
        store.replace(name, bytes)
    }

    /// A record; `None` if there is none.
    ///
    /// # Errors
    /// Over 16 MiB, not a regular file, I/O.
    pub fn get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Self::Directory(store) = self;
        store.get(name)
    }

    /// Names directly below `folder`, sorted; none if there is no such folder.
    ///
    /// # Errors
    /// I/O.
    pub fn list(&self, folder: &str) -> Result<Vec<String>> {
        let Self::Directory(store) = self;
        store.list(folder)
    }

    /// Length of an object in bytes; `None` if there is none.
    ///
    /// # Errors
    /// I/O.
    pub fn len(&self, name: &str) -> Result<Option<u64>> {
        let Self::Directory(store) = self;
        store.len(name)
    }

    /// Whether an object has this one name in its file system; it has more if it was copied by hard links.
    pub(super) fn is_alone(&self, name: &str) -> Result<bool> {
        let Self::Directory(store) = self;
        Ok(store.stat(name)?.is_some_and(|stat| stat.st_nlink == 1))
    }

    /// A layer file, read-only.
    ///
    /// # Errors
    /// [`Error::NotFound`]; I/O.
    pub fn open_layer(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let Self::Directory(store) = self;
        store.open_layer(name)
    }

    /// A new layer file, to be written by this process alone.
    pub(super) fn create_layer(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let Self::Directory(store) = self;
        store.create_layer(name)
    }

    /// An unfinished layer file, to be written by this process alone; read from the disk, not from memory.
    pub(super) fn reopen_layer(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let Self::Directory(store) = self;
        store.reopen_layer(name)
    }

    /// Deletes an object or an empty folder. `false` if there was none.
    pub(super) fn delete(&self, name: &str, permit: &Permit) -> Result<bool> {
        let Self::Directory(store) = self;
        store.delete(name, permit)
    }

    /// Proves that creating is exclusive here, and that what was created can be read back.
    ///
    /// # Errors
    /// [`Error::Unsafe`] with the broken promise; I/O.
    pub(super) fn self_test(&self, permit: &Permit) -> Result<()> {
        let name = format!("{}/.self-test-{}", super::name::LEASES, Uuid::new_v4());
        let broken = |what: &str| Err(Error::Unsafe { path: self.label().into(), what: what.into() });
        self.create(&name, b"first")?;
        let second = self.create(&name, b"second");
        let found = self.get(&name)?;
        self.delete(&name, permit)?;
        match second {
            Err(Error::Exists { .. }) if found.as_deref() == Some(b"first") => Ok(()),
            Err(Error::Exists { .. }) => broken("an object reads back differently"),
            Err(e) => Err(e),
            Ok(()) => broken("creating an object twice succeeds"),
        }
    }
}

/// A folder of a file system.
#[derive(Debug)]
pub struct DirectoryStore {
    root: OwnedFd,
    label: String,
    /// Folders whose names this process has seen durable.
    durable: Mutex<BTreeSet<String>>,
    #[cfg(test)]
    pub(super) fuse: super::tests::Fuse,
}

fn failed(label: &str, action: &'static str, e: impl Into<std::io::Error>) -> Error {
    crate::Error::io(label, action, 0, e.into()).into()
}

fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or((".", name))
}

impl DirectoryStore {
    fn open(path: &Path) -> Result<Self> {
        let label = path.display().to_string();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(&label, "open", e))?;
        Ok(Self {
            root,
            label,
            durable: Mutex::default(),
            #[cfg(test)]
            fuse: super::tests::Fuse::default(),
        })
    }

    fn shown(&self, name: &str) -> String {
        format!("{}/{name}", self.label)
    }

    fn at(&self, name: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        rustix::fs::openat2(&self.root, name, flags | OFlags::CLOEXEC, mode, BENEATH)
    }

    fn folder(&self, name: &str) -> rustix::io::Result<OwnedFd> {
        self.at(name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }

    /// The folder, made where it is missing, its name durable. One that is there already may have been made by
    /// somebody who was killed, or whose sync failed, before it was: each process makes sure once.
    fn make_folder(&self, name: &str) -> rustix::io::Result<OwnedFd> {
        let known = name == "." || self.durable.lock().contains(name) || planted(Bug::FolderTrusted);
        match self.folder(name) {
            Ok(folder) if known => return Ok(folder),
            Ok(_) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
        let (above, last) = split(name);
        let above = self.make_folder(above)?;
        match rustix::fs::mkdirat(&above, last, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        if !planted(Bug::FolderNameUnsynced) {
            rustix::fs::fsync(&above)?;
        }
        let folder = self.folder(name)?;
        self.durable.lock().insert(name.to_owned());
        Ok(folder)
    }

    fn step(&self, _what: &'static str) -> Result<()> {
        #[cfg(test)]
        self.fuse.burn(_what).map_err(|e| failed(&self.label, _what, e))?;
        Ok(())
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let shown = self.shown(name);
        let (folder, last) = split(name);
        self.step("create")?;
        let folder = self.make_folder(folder).map_err(|e| failed(&shown, "create the folder of", e))?;
        let done = match create_unnamed(&folder, last, bytes) {
            Err(e)
                if [Errno::OPNOTSUPP, Errno::ISDIR, Errno::NOENT, Errno::INVAL]
                    .map(std::io::Error::from)
                    .iter()
                    .any(|n| n.raw_os_error() == e.raw_os_error()) =>
            {
                create_named(&folder, last, bytes)
            }
            done => done,
        };
        match done {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => return Err(Error::Exists { path: shown }),
            Err(e) => return Err(failed(&shown, "create", e)),
        }
        if !planted(Bug::RecordNameUnsynced) {
            rustix::fs::fsync(&folder).map_err(|e| failed(&shown, "sync the folder of", e))?;
        }
        self.step("created")
    }

    fn settle(&self, folder: &str) -> Result<()> {
        let settled = self.folder(folder).and_then(rustix::fs::fsync);
        settled.map_err(|e| failed(&self.shown(folder), "sync", e))
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let shown = self.shown(name);
        let (folder, last) = split(name);
        self.step("replace")?;
        let replaced = || -> std::io::Result<()> {
            let folder = self.folder(folder)?;
            let (temporary, mut file) = temporary(&folder)?;
            file.write_all(bytes)?;
            // Else a loss of power may leave the new name without its bytes, and nobody could read it any more.
            if !planted(Bug::LeaseUnsynced) {
                file.sync_all()?;
            }
            Ok(rustix::fs::renameat(&folder, temporary.as_str(), &folder, last)?)
        };
        replaced().map_err(|e| failed(&shown, "replace", e))
    }

    fn get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let shown = self.shown(name);
        let fd = match self.at(name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            done => done.map_err(|e| failed(&shown, "open", e))?,
        };
        let file = File::from(fd);
        let meta = file.metadata().map_err(|e| failed(&shown, "stat", e))?;
        if !meta.is_file() || meta.len() > RECORD_BYTES_MAX {
            let what = format!("a record is a regular file of at most {RECORD_BYTES_MAX} bytes");
            return Err(crate::Error::Refused { path: shown, what }.into());
        }
        let mut bytes = Vec::new();
        file.take(RECORD_BYTES_MAX).read_to_end(&mut bytes).map_err(|e| failed(&shown, "read", e))?;
        Ok(Some(bytes))
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let shown = self.shown(folder);
        let fd = match self.folder(folder) {
            Err(Errno::NOENT) => return Ok(Vec::new()),
            done => done.map_err(|e| failed(&shown, "open", e))?,
        };
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&fd).map_err(|e| failed(&shown, "list", e))? {
            let entry = entry.map_err(|e| failed(&shown, "list", e))?;
            match entry.file_name().to_str() {
                Ok(name) if !name.starts_with('.') => names.push(name.to_owned()),
                _ => {}
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn len(&self, name: &str) -> Result<Option<u64>> {
        Ok(self.stat(name)?.map(|stat| u64::try_from(stat.st_size).unwrap_or(0)))
    }

    fn stat(&self, name: &str) -> Result<Option<rustix::fs::Stat>> {
        let shown = self.shown(name);
        match self.at(name, OFlags::PATH, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(e) => Err(failed(&shown, "open", e)),
            Ok(fd) => rustix::fs::fstat(&fd).map(Some).map_err(|e| failed(&shown, "stat", e)),
        }
    }

    fn open_layer(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let shown = self.shown(name);
        let fd = match self.at(name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(Error::not_found(&shown, "layer file")),
            done => done.map_err(|e| failed(&shown, "open", e))?,
        };
        let file = File::from(fd);
        if !file.metadata().map_err(|e| failed(&shown, "stat", e))?.is_file() {
            return Err(crate::Error::Refused { path: shown, what: "a layer is a regular file".into() }.into());
        }
        Ok(Arc::new(FileStorage::from_file(file, shown)))
    }

    fn create_layer(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let shown = self.shown(name);
        let (folder, last) = split(name);
        self.step("create layer")?;
        let made = || -> rustix::io::Result<OwnedFd> {
            let folder = self.make_folder(folder)?;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(&folder, last, flags, Mode::RUSR | Mode::WUSR)?;
            if !planted(Bug::LayerNameUnsynced) {
                rustix::fs::fsync(&folder)?;
            }
            Ok(fd)
        };
        match made() {
            Ok(fd) => self.own(fd, shown),
            Err(Errno::EXIST) => Err(Error::Exists { path: shown }),
            Err(e) => Err(failed(&shown, "create", e)),
        }
    }

    fn reopen_layer(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let shown = self.shown(name);
        match self.at(name, OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty()) {
            Err(Errno::NOENT) => Err(Error::not_found(&shown, "layer file")),
            Err(e) => Err(failed(&shown, "open", e)),
            Ok(fd) => {
                // A sync that failed may have left pages in memory that never reached the disk: what is read
                // from now on comes from there.
                rustix::fs::fdatasync(&fd).map_err(|e| failed(&shown, "sync", e))?;
                let dropped = rustix::fs::fadvise(&fd, 0, None, rustix::fs::Advice::DontNeed);
                dropped.map_err(|e| failed(&shown, "drop the cache of", e))?;
                self.own(fd, shown)
            }
        }
    }

    /// One writer at a time, whatever leases say.
    fn own(&self, fd: OwnedFd, shown: String) -> Result<Arc<dyn Storage>> {
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let (holder, since) = ("another process".to_owned(), "an unknown time".to_owned());
                return Err(Error::Locked { path: shown, holder, kind: "append", since });
            }
            Err(e) => return Err(failed(&shown, "lock", e)),
        }
        let file = Arc::new(FileStorage::from_file(File::from(fd), shown));
        #[cfg(test)]
        return Ok(self.fuse.guard(file));
        #[cfg(not(test))]
        Ok(file)
    }

    fn delete(&self, name: &str, _permit: &Permit) -> Result<bool> {
        let shown = self.shown(name);
        let (folder, last) = split(name);
        self.step("delete")?;
        self.durable.lock().remove(name);
        let deleted = || -> rustix::io::Result<()> {
            let folder = self.folder(folder)?;
            match rustix::fs::unlinkat(&folder, last, AtFlags::empty()) {
                Err(Errno::ISDIR | Errno::PERM) => rustix::fs::unlinkat(&folder, last, AtFlags::REMOVEDIR)?,
                done => done?,
            }
            rustix::fs::fsync(&folder)
        };
        match deleted() {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(failed(&shown, "delete", e)),
        }
    }
}

/// The object is written without a name and then linked to it: nothing half-made is ever visible.
fn create_unnamed(folder: impl AsFd, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(&folder, ".", flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(bytes)?;
    if !planted(Bug::RecordUnsynced) {
        file.sync_all()?;
    }
    let itself = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok(rustix::fs::linkat(CWD, itself, &folder, name, AtFlags::SYMLINK_FOLLOW)?)
}

/// The same for file systems without unnamed files.
fn create_named(folder: impl AsFd, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let (temporary, mut file) = temporary(&folder)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    let linked = written.and_then(|()| {
        rustix::fs::linkat(&folder, temporary.as_str(), &folder, name, AtFlags::empty()).map_err(Into::into)
    });
    // The temporary name goes either way; the object, once linked, has its own.
    let removed = rustix::fs::unlinkat(&folder, temporary.as_str(), AtFlags::empty());
    linked.and(removed.map_err(Into::into))
}

fn temporary(folder: impl AsFd) -> std::io::Result<(String, File)> {
    let name = format!(".new-{}", Uuid::new_v4());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(&folder, name.as_str(), flags, Mode::RUSR | Mode::WUSR)?;
    Ok((name, File::from(fd)))
}
