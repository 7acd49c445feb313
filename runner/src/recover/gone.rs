//! Recoveries whose folder somebody took away by hand: what is left of them is a line in the list and processes that
//! hold deleted files.
//!
//! Invariants
//! - A folder that cannot be looked at is not gone: only one whose path leads nowhere while its parent is there.
//! - A process is ended only if its own command line names that very folder as its session's.
//!
//! Not here: folders that are there, however damaged.

use std::{fs, os::unix::ffi::OsStrExt, path::Path, time::Duration};

use aquifer_mount::session::{Pointer, Registry};
use rustix::process::Signal;

use crate::{
    fail::{Code, Fail, Result},
    host::{Process, qemu},
};

/// How long a killed process may take to be gone.
const END_WAIT: Duration = Duration::from_secs(10);

/// The listed session that `word` names, if its folder is gone.
///
/// # Errors
/// The list cannot be read.
pub fn find(registry: &Registry, word: &str) -> Result<Option<Pointer>> {
    let means = |p: &Pointer| p.name == word || p.id.to_string() == word || p.dir == Path::new(word);
    let mut fits = registry.list()?.into_iter().filter(means);
    Ok(fits.next().filter(|pointer| fits.next().is_none() && is_gone(&pointer.dir)))
}

/// Whether the folder was taken away. Where the one above is missing too, a file system may only not be mounted.
pub fn is_gone(dir: &Path) -> bool {
    let missing = fs::symlink_metadata(dir).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
    missing && dir.parent().is_some_and(Path::is_dir)
}

/// Ends what is left of it and takes it off the list.
///
/// # Errors
/// A process does not end.
pub fn clear(registry: &Registry, pointer: &Pointer) -> Result<()> {
    // The one that would start others again ends first.
    kill(&processes(&pointer.dir, Kind::Door))?;
    kill(&processes(&pointer.dir, Kind::Hypervisor))?;
    Ok(registry.remove(pointer.id)?)
}

/// Ends processes at once and sees that they are gone.
///
/// # Errors
/// One is still there.
pub fn kill(processes: &[Process]) -> Result<()> {
    for process in processes {
        let failed = |e: &std::io::Error| Fail::io(format!("process {}", process.pid), "end", e);
        process.signal(Signal::KILL).map_err(|e| failed(&e))?;
        if !process.wait_gone(END_WAIT) {
            return Err(Fail::new(Code::Timeout, format!("process {} does not end", process.pid)));
        }
    }
    Ok(())
}

/// What a process is to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its supervisor or its door.
    Door,
    /// Its machine.
    Hypervisor,
}

/// The processes of the session whose folder this is or was, oldest first: known by their command lines alone.
pub fn processes(dir: &Path, kind: Kind) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let ours = |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| kind_of(&line, dir) == Some(kind));
    let mut found: Vec<Process> = pids.filter(ours).filter_map(Process::of).collect();
    found.sort_by_key(|process| process.started);
    found
}

/// Whether a command line is that of one of a session's processes.
fn kind_of(command_line: &[u8], dir: &Path) -> Option<Kind> {
    let words: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    let folder = dir.as_os_str().as_bytes();
    if words.windows(2).any(|pair| matches!(pair, [b"door", of] if *of == folder)) {
        return Some(Kind::Door);
    }
    qemu::is_machine_in(command_line, dir).then_some(Kind::Hypervisor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_processes_are_known_as_such() {
        let dir = Path::new("/vm/db01");
        let line = |words: &[&str]| words.join("\0").into_bytes();
        let door = line(&["/usr/bin/aquifer", "--home", "/h", "door", "/vm/db01"]);
        assert_eq!(kind_of(&door, dir), Some(Kind::Door));
        let machine = line(&["qemu", "-pidfile", "/vm/db01/qemu.pid", "-m", "64M"]);
        assert_eq!(kind_of(&machine, dir), Some(Kind::Hypervisor));
        for other in [
            &["aquifer", "door", "/vm/db01x"][..],
            &["aquifer", "status", "/vm/db01"],
            &["vi", "/vm/db01/qemu.pid"],
            &["qemu", "-pidfile", "/other/vm/db01/qemu.pid"],
        ] {
            assert_eq!(kind_of(&line(other), dir), None, "{other:?}");
        }
    }

    #[test]
    fn a_folder_on_a_file_system_that_is_away_is_not_gone() {
        let root = tempfile::tempdir().expect("folder");
        assert!(is_gone(&root.path().join("db01")));
        assert!(!is_gone(&root.path().join("mnt/db01")));
        assert!(!is_gone(root.path()));
    }
}
