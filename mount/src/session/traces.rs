//! Boot traces of a session's disks: the one that is fetched ahead, and the one that is recorded.
//!
//! ```text
//! DIR/traces/NAME.replay    from an earlier recovery, put there before the door starts
//!            NAME.trace     recorded by this one
//! ```
//!
//! Invariants
//! - A trace that is missing or bad costs only time: the session serves without it.
//! - Files are replaced whole; nobody ever sees half a trace.
//!
//! Not here: what a trace is (`aquifer_vdisk::trace`), and where it is kept beyond the session.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use aquifer_vdisk::{Disk, Trace, trace::FILE_BYTES_MAX};

use super::{Error, Result, Spec, folder::make_private_dir};

/// Where the trace of an earlier recovery lies.
pub fn replay_path(spec: &Spec, disk: &str) -> PathBuf {
    folder(spec).join(format!("{disk}.replay"))
}

/// Where the trace of this recovery lies.
pub fn recorded_path(spec: &Spec, disk: &str) -> PathBuf {
    folder(spec).join(format!("{disk}.trace"))
}

/// Folder of a session's traces.
pub fn folder(spec: &Spec) -> PathBuf {
    spec.dir.join("traces")
}

/// Reads a trace; `None` where there is none, or none that is whole.
pub fn load(path: &Path) -> Option<Trace> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|f| f.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes));
    match read {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a boot trace cannot be read");
            return None;
        }
    }
    match Trace::decode(&path.display().to_string(), &bytes) {
        Ok(trace) => Some(trace),
        Err(error) => {
            tracing::warn!(%error, "a boot trace is not used");
            None
        }
    }
}

/// Writes a trace in the place of an older one. It is a hint, and not synced.
///
/// # Errors
/// [`Error::Io`].
pub fn store(path: &Path, trace: &Trace) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    make_private_dir(parent)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = parent.join(format!(".{name}.new"));
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(&trace.encode())?;
        fs::rename(&draft, path)
    };
    write().map_err(|e| Error::io(path, "write", e))
}

/// What a door does about the trace of one disk.
#[derive(Debug, Default)]
pub(super) struct Traced {
    /// Of an earlier recovery, until it has been given to the hydrator.
    pub(super) replay: Option<Trace>,
    /// How much of what is recorded has been written, in bytes of the disk; `None` once it is all there.
    written: Option<u64>,
}

impl Traced {
    /// Begins to record, going on where an earlier door of the session was.
    pub(super) fn start(spec: &Spec, disk: &Disk) -> Self {
        let earlier = load(&recorded_path(spec, disk.name())).filter(|t| t.size == disk.size()).unwrap_or_default();
        let written = (!earlier.complete).then(|| earlier.bytes());
        if written.is_some() {
            disk.record_trace(earlier);
        }
        Self { replay: load(&replay_path(spec, disk.name())), written }
    }

    /// Writes what has been recorded since the last time.
    pub(super) fn save(&mut self, spec: &Spec, disk: &Disk) {
        let Some(written) = self.written else { return };
        let Some(trace) = disk.recorded_trace(written) else { return };
        self.written = (!trace.complete).then(|| trace.bytes());
        if let Err(error) = store(&recorded_path(spec, disk.name()), &trace) {
            tracing::warn!(%error, "a boot trace is not recorded");
            self.written = None;
        }
    }
}
