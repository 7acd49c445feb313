//! Whether some program has an image open, by the locks that QEMU and its tools put on the images they use.
//!
//! ```text
//! byte 100 + n   held: somebody has right n        byte 200 + n   held: somebody lets nobody else have right n
//! n: 0 reads what is there, 1 writes, 2 writes what is there already, 3 changes the length
//! ```
//!
//! Invariants
//! - Looking puts no lock and changes nothing.
//! - Whoever has an image open without locks (a loop device, a program with `locking=off`, a file system that knows none) is not seen.
//!
//! Not here: which use of an image stands in whose way.

use std::{
    fs, io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

use crate::fail::{Code, Fail, Result};

/// What others must not do with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// Write to it: it is going to be read.
    Writers,
    /// Have it open: it is going to be written to.
    Anybody,
}

/// Bytes that stand for a right, each with its length.
const HAS: i64 = 100;
const LETS_NOBODY: i64 = 200;
const RIGHTS: i64 = 4;
const WRITES: i64 = 1;

/// Programs of this computer that have the image at `path` open, where their locks stand in the way; none where nothing
/// does. The list is empty where they are on another computer, or cannot be seen.
///
/// # Errors
/// The image cannot be opened.
pub fn by(path: &Path, against: Against) -> io::Result<Option<Vec<String>>> {
    let file = fs::File::open(path)?;
    let held = match against {
        Against::Writers => is_locked(&file, HAS + WRITES, RIGHTS - WRITES)?,
        Against::Anybody => is_locked(&file, HAS, RIGHTS)? || is_locked(&file, LETS_NOBODY, RIGHTS)?,
    };
    Ok(held.then(|| holders(&file).unwrap_or_default()))
}

/// Refuses an image that a program has open in a way that stands against what is going to be done with it; `disk` is its
/// name.
///
/// # Errors
/// [`Code::Busy`] names the programs; I/O.
pub fn free(disk: &str, path: &Path, against: Against) -> Result<()> {
    let held = by(path, against).map_err(|e| Fail::io(path.display(), "look at", &e))?;
    let Some(holders) = held else { return Ok(()) };
    let what = format!("the disk {disk} is in use by {}, which is no machine of ours", named(&holders));
    Err(Fail::new(Code::Busy, what).at(path.display()))
}

/// Programs in a sentence.
pub fn named(holders: &[String]) -> String {
    if holders.is_empty() { "a program elsewhere".to_owned() } else { holders.join(", ") }
}

#[expect(unsafe_code, reason = "a query for the locks of open file descriptions, which no safe wrapper offers")]
fn is_locked(file: &fs::File, start: i64, len: i64) -> io::Result<bool> {
    // SAFETY: all zeros are a valid `flock`, whose fields are plain numbers.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(libc::F_WRLCK).unwrap_or_default();
    lock.l_whence = i16::try_from(libc::SEEK_SET).unwrap_or_default();
    (lock.l_start, lock.l_len) = (start, len);
    // SAFETY: the descriptor is open, and the kernel writes only into the `flock` that it is given.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    match answer {
        0 => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        _ => match io::Error::last_os_error() {
            // Where nobody can put a lock, nobody has: a share without a lock daemon, for one.
            error if matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::EINVAL)) => Ok(false),
            error => Err(error),
        },
    }
}

/// Programs with a descriptor of the same file.
fn holders(file: &fs::File) -> io::Result<Vec<String>> {
    let wanted = file.metadata()?;
    let mut found = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid == std::process::id() {
            continue;
        }
        let Ok(open) = fs::read_dir(process.path().join("fd")) else { continue };
        let same = |entry: fs::DirEntry| {
            let meta = fs::metadata(entry.path()).ok();
            meta.filter(|meta| meta.is_file() || meta.file_type().is_block_device())
                .is_some_and(|meta| (meta.dev(), meta.ino()) == (wanted.dev(), wanted.ino()))
        };
        if open.flatten().any(same) {
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("{} ({pid})", program.trim()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn tool(program: &str, args: &[&str]) {
        let done = Command::new(program).args(args).stdout(Stdio::null()).status().expect("the tool is installed");
        assert!(done.success(), "{program} {args:?}");
    }

    #[test]
    fn who_writes_and_who_reads_is_told_apart() {
        let dir = tempfile::tempdir().expect("folder");
        let image = dir.path().join("a.qcow2");
        let text = image.display().to_string();
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &text, "4M"]);
        assert_eq!(by(&image, Against::Anybody).expect("look"), None);
        for (mode, writes) in [(&["-r"][..], false), (&[][..], true)] {
            let socket = dir.path().join("s");
            let mut door = Command::new("qemu-nbd");
            door.args(mode).args(["-t", "-f", "qcow2", "-k"]).arg(&socket).arg(&image);
            let mut door = door.spawn().expect("qemu-nbd");
            let pid = door.id();
            // It listens before it has the image open.
            let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
            let holders = loop {
                if let Some(holders) = by(&image, Against::Anybody).expect("look") {
                    break holders;
                }
                assert!(std::time::Instant::now() < until, "it is not open");
                std::thread::sleep(std::time::Duration::from_millis(5));
            };
            assert!(holders.iter().any(|holder| holder.contains(&pid.to_string())), "{holders:?}");
            assert_eq!(by(&image, Against::Writers).expect("look").is_some(), writes, "{mode:?}");
            door.kill().expect("kill");
            door.wait().expect("reap");
            let _ = fs::remove_file(&socket);
        }
        assert_eq!(by(&image, Against::Anybody).expect("look"), None, "its locks went with it");
    }
}
