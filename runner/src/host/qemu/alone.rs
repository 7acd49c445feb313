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
    io,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use aquifer_mount::dial;

use crate::host::{Error, Process, Result};

/// How long a listener may take to let us in before its command line is asked instead.
const PEER_TIMEOUT: Duration = Duration::from_secs(2);

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
    match dial::unix(monitor, PEER_TIMEOUT) {
        Ok(stream) => {
            let peer = rustix::net::sockopt::socket_peercred(stream).ok()?;
            Process::of(u32::try_from(peer.pid.as_raw_nonzero().get()).ok()?)
        }
        // It lives and takes nobody, and must not pass for one that is off.
        Err(e) if e.kind() == io::ErrorKind::TimedOut => processes().find(|process| names(*process, monitor)),
        Err(_) => None,
    }
}

fn processes() -> impl Iterator<Item = Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Process::of(entry.file_name().to_str()?.parse().ok()?))
}

/// Whether the command line of a QEMU names this socket.
fn names(process: Process, monitor: &Path) -> bool {
    let Ok(command) = fs::read(format!("/proc/{}/cmdline", process.pid)) else { return false };
    let program = command.split(|byte| *byte == 0).next().unwrap_or_default();
    let wanted = monitor.as_os_str().as_bytes();
    program.windows(4).any(|part| part == b"qemu") && command.windows(wanted.len().max(1)).any(|part| part == wanted)
}

/// Whether a command line, its words ended by zero bytes, is that of the machine in `dir`.
pub(crate) fn is_machine_in(command_line: &[u8], dir: &Path) -> bool {
    let path = number_file(dir);
    let words: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| matches!(pair, [b"-pidfile", file] if *file == path.as_os_str().as_bytes()))
}
