//! At most one machine runs in a folder.
//!
//! Two machines on one disk destroy it, and nothing on the way stops them: both speak to the same door. So a start looks
//! for the machine that is there already, as a start that was killed before it could record its machine leaves one.
//!
//! Invariants
//! - Starts in one folder follow each other.
//! - A process counts only if its own command line names the folder's number file: numbers are used again. Whoever looks
//!   for a folder's machine without the number asks the same question ([`is_machine_in`]).
//! - QEMU holds a lock on that file, so that even a start that got past this one fails.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::host::{Error, Process, Result};

/// Where the process writes its number.
pub(super) fn number_file(dir: &Path) -> PathBuf {
    dir.join("qemu.pid")
}

/// Keeps others from starting in `dir`, until dropped.
pub(super) fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("qemu.lock");
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let locked = open.and_then(|file| file.lock().map(|()| file));
    locked.map_err(|e| Error::io(&path, "lock", e))
}

/// The process that runs in `dir`, if one does.
pub(super) fn running_in(dir: &Path) -> Option<Process> {
    let path = number_file(dir);
    let process = Process::of(fs::read_to_string(&path).ok()?.trim().parse().ok()?)?;
    let command = fs::read(format!("/proc/{}/cmdline", process.pid)).ok()?;
    (is_machine_in(&command, dir) && process.is_alive()).then_some(process)
}

/// The process behind a monitor's socket: a machine that somebody started by hand has no number file.
pub(super) fn listening_at(monitor: &Path) -> Option<Process> {
    let stream = std::os::unix::net::UnixStream::connect(monitor).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(stream).ok()?;
    Process::of(u32::try_from(peer.pid.as_raw_nonzero().get()).ok()?)
}

/// Whether a command line, its words ended by zero bytes, is that of the machine in `dir`.
pub(crate) fn is_machine_in(command_line: &[u8], dir: &Path) -> bool {
    let path = number_file(dir);
    let words: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| matches!(pair, [b"-pidfile", file] if *file == path.as_os_str().as_bytes()))
}
