//! The session folder: record, events, locks.
//!
//! ```text
//! DIR/session.json   the record (Spec), replaced whole
//!     events         what happened, one JSON object per line, only appended
//!     lock           held by the process that serves the session
//!     edit.lock      held for the moment of a change to session.json or events
//!     door.log       what the door wrote to its standard output and error
//!     disks/NAME/    one overlay each (disk.raw, map, journal)
//!     traces/        what the guest reads first, now and in an earlier recovery
//!     run/           sockets, where DIR is short enough for them
//! ```
//!
//! Invariants
//! - `session.json` is created once and only ever replaced by rename, file and folder synced: after
//!   any crash it is the old record or the new one.
//! - A state changes only along the edges of [`State`], under `edit.lock`; its event follows at once.
//! - The folder is 0700, its files 0600.
//!
//! Not here: what the overlay keeps in `disks/`.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Error, Result, Spec, State};

/// Largest record that is read, in bytes. Chains of a thousand layers with long paths stay far below.
const RECORD_BYTES_MAX: u64 = 8 << 20;

/// How long a change waits for another one. Changes take milliseconds; longer means somebody stopped in the middle.
const EDIT_WAIT: Duration = Duration::from_secs(10);

/// One line of `events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, UTC.
    pub time: Timestamp,
    /// Whose.
    pub session: Uuid,
    /// What was done or happened: `recover`, `source_away`, `door_started` ...
    pub op: String,
    /// State before, for a transition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<State>,
    /// State after, for a transition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<State>,
    /// Why, or what failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Process that wrote the line.
    pub pid: u32,
}

/// A session folder.
#[derive(Clone, Debug)]
pub struct Folder {
    dir: PathBuf,
}

/// The right to serve a session; held until dropped or until the process ends.
#[derive(Debug)]
pub struct OwnerLock {
    file: File,
}

impl Drop for OwnerLock {
    fn drop(&mut self) {
        // Not left to closing alone: a child that another thread has just forked holds the open file a moment longer.
        let _ = self.file.unlock();
    }
}

impl Folder {
    /// Makes the folder and writes the record, unless there is one already.
    ///
    /// # Errors
    /// [`Error::Io`] with `AlreadyExists` where the folder holds a session; [`Error::BadFile`] for a
    /// record out of bounds.
    pub fn create(spec: &Spec) -> Result<Self> {
        let folder = Self { dir: spec.dir.clone() };
        let record = folder.record();
        spec.check(&record)?;
        make_private_dir(&folder.dir)?;
        let real = fs::canonicalize(&folder.dir).map_err(|e| Error::io(&folder.dir, "resolve", e))?;
        if real != folder.dir {
            return Err(Error::bad_file(&record, format!("the folder's real path is {}", real.display())));
        }
        make_private_dir(&folder.dir.join("disks"))?;
        let _lock = folder.lock_for_edit()?;
        let draft = folder.write_draft(spec)?;
        // A link is the create-only put of a file system: it fails where the name exists.
        let linked = fs::hard_link(&draft, &record).map_err(|e| Error::io(&record, "create", e));
        let removed = fs::remove_file(&draft).map_err(|e| Error::io(&draft, "remove", e));
        linked?;
        removed?;
        sync_dir(&folder.dir)?;
        Ok(folder)
    }

    /// An existing session folder.
    ///
    /// # Errors
    /// [`Error::NoSession`] where there is no record, [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Self> {
        let dir = fs::canonicalize(dir).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::NoSession { name: dir.display().to_string() },
            _ => Error::io(dir, "open", e),
        })?;
        let folder = Self { dir };
        match fs::symlink_metadata(folder.record()) {
            Ok(meta) if meta.is_file() => Ok(folder),
            Ok(_) => Err(Error::bad_file(&folder.record(), "not a plain file")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(Error::NoSession { name: folder.dir.display().to_string() })
            }
            Err(e) => Err(Error::io(&folder.record(), "open", e)),
        }
    }

    /// The folder's path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the door's words go.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("door.log")
    }

    /// Where the events are.
    pub fn events_path(&self) -> PathBuf {
        self.dir.join("events")
    }

    fn record(&self) -> PathBuf {
        self.dir.join("session.json")
    }

    /// The record as it is now.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadFile`] also where the folder was moved.
    pub fn load(&self) -> Result<Spec> {
        let path = self.record();
        let file = File::open(&path).map_err(|e| Error::io(&path, "open", e))?;
        let mut text = String::new();
        let read = file.take(RECORD_BYTES_MAX + 1).read_to_string(&mut text);
        let read = read.map_err(|e| Error::io(&path, "read", e))?;
        if read as u64 > RECORD_BYTES_MAX {
            return Err(Error::bad_file(&path, format!("larger than {RECORD_BYTES_MAX} bytes")));
        }
        let spec: Spec = serde_json::from_str(&text).map_err(|e| Error::bad_file(&path, e.to_string()))?;
        spec.check(&path)?;
        if spec.dir != self.dir {
            return Err(Error::bad_file(&path, format!("was made for {}; the folder was moved", spec.dir.display())));
        }
        Ok(spec)
    }

    /// Moves the session to `next` and records why. Returns the new record.
    ///
    /// # Errors
    /// [`Error::State`] where `next` may not follow; nothing is changed then. [`Error::Io`], [`Error::Busy`].
    pub fn transition(&self, next: State, op: &str, reason: Option<&str>) -> Result<Spec> {
        let _lock = self.lock_for_edit()?;
        let mut spec = self.load()?;
        let from = spec.state;
        spec.state = from.to(next)?;
        spec.reason = reason.map(str::to_owned);
        self.replace(&spec)?;
        self.append(&Event {
            time: Timestamp::now(),
            session: spec.id,
            op: op.to_owned(),
            from: Some(from),
            to: Some(next),
            reason: spec.reason.clone(),
            pid: std::process::id(),
        })?;
        Ok(spec)
    }

    /// Changes the record by `change`, except its identity and its state, which stay as they are.
    ///
    /// # Errors
    /// [`Error::BadFile`] where the result is out of bounds, [`Error::Io`], [`Error::Busy`].
    pub fn edit(&self, change: impl FnOnce(&mut Spec)) -> Result<Spec> {
        let _lock = self.lock_for_edit()?;
        let old = self.load()?;
        let mut spec = old.clone();
        change(&mut spec);
        (spec.version, spec.id, spec.dir, spec.state) = (old.version, old.id, old.dir, old.state);
        spec.check(&self.record())?;
        self.replace(&spec)?;
        Ok(spec)
    }

    /// Appends an event that is no transition.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Busy`].
    pub fn event(&self, session: Uuid, op: &str, reason: Option<&str>) -> Result<()> {
        let _lock = self.lock_for_edit()?;
        self.append(&Event {
            time: Timestamp::now(),
            session,
            op: op.to_owned(),
            from: None,
            to: None,
            reason: reason.map(str::to_owned),
            pid: std::process::id(),
        })
    }

    /// All events, oldest first. A line cut by a crash is left out.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn events(&self) -> Result<Vec<Event>> {
        let path = self.events_path();
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(Error::io(&path, "read", e)),
        }
    }

    /// Takes the session for this process.
    ///
    /// # Errors
    /// [`Error::Busy`] where another process has it.
    pub fn own(&self) -> Result<OwnerLock> {
        let path = self.dir.join("lock");
        let mut file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Busy { path: path.display().to_string(), holder: read_holder(&mut file) });
            }
            Err(TryLockError::Error(e)) => return Err(Error::io(&path, "lock", e)),
        }
        let text = format!("{}\n", std::process::id());
        let written = file.set_len(0).and_then(|()| file.write_all(text.as_bytes()));
        written.map_err(|e| Error::io(&path, "write", e))?;
        Ok(OwnerLock { file })
    }

    /// Process that holds the session, if one does.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn owner(&self) -> Result<Option<u32>> {
        let path = self.dir.join("lock");
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path, "open", e)),
        };
        // A shared try does not get in the way of another asker, and an owner that starts right now tries again.
        match file.try_lock_shared() {
            Ok(()) => Ok(None),
            Err(TryLockError::WouldBlock) => Ok(Some(read_holder(&mut file).parse().unwrap_or(0))),
            Err(TryLockError::Error(e)) => Err(Error::io(&path, "lock", e)),
        }
    }

    fn lock_for_edit(&self) -> Result<OwnerLock> {
        let path = self.dir.join("edit.lock");
        let file = open_lock(&path)?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(OwnerLock { file }),
                Err(TryLockError::WouldBlock) if start.elapsed() < EDIT_WAIT => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Busy { path: path.display().to_string(), holder: "unknown".into() });
                }
                Err(TryLockError::Error(e)) => return Err(Error::io(&path, "lock", e)),
            }
        }
    }

    fn replace(&self, spec: &Spec) -> Result<()> {
        let draft = self.write_draft(spec)?;
        let record = self.record();
        fs::rename(&draft, &record).map_err(|e| Error::io(&record, "replace", e))?;
        sync_dir(&self.dir)
    }

    /// Writes the record beside the real one, synced. A leftover of a crash is overwritten.
    fn write_draft(&self, spec: &Spec) -> Result<PathBuf> {
        let path = self.dir.join(format!(".session.json.{}", std::process::id()));
        let text = serde_json::to_string_pretty(spec).map_err(|e| Error::bad_file(&path, e.to_string()))?;
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            file.write_all(text.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()
        };
        write().map_err(|e| Error::io(&path, "write", e))?;
        Ok(path)
    }

    fn append(&self, event: &Event) -> Result<()> {
        let path = self.events_path();
        let text = serde_json::to_string(event).map_err(|e| Error::bad_file(&path, e.to_string()))?;
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path)?;
            // A line cut by a crash must not swallow this one.
            let len = file.seek(SeekFrom::End(0))?;
            let mut last = [b'\n'];
            if len > 0 {
                file.seek(SeekFrom::Start(len - 1))?;
                file.read_exact(&mut last)?;
            }
            let start = if last == [b'\n'] { "" } else { "\n" };
            file.write_all(format!("{start}{text}\n").as_bytes())?;
            file.sync_data()
        };
        write().map_err(|e| Error::io(&path, "append", e))
    }
}

fn open_lock(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    file.map_err(|e| Error::io(path, "open", e))
}

fn read_holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(32).read_to_string(&mut text));
    let pid = text.trim();
    if read.is_ok() && !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit()) {
        pid.into()
    } else {
        "unknown".into()
    }
}

/// Makes a folder only its owner can enter, with what leads to it; the names of what was made are durable.
///
/// # Errors
/// [`Error::Io`].
pub fn make_private_dir(dir: &Path) -> Result<()> {
    let full = std::path::absolute(dir).map_err(|e| Error::io(dir, "resolve", e))?;
    let missing: Vec<&Path> = full.ancestors().take_while(|above| !above.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(&full).map_err(|e| Error::io(dir, "create", e))?;
    missing.iter().filter_map(|made| made.parent()).try_for_each(sync_dir)
}

/// Makes names in a folder durable.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(dir, "sync", e))
}

#[cfg(test)]
mod tests;
