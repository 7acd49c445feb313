//! The host's mounts, as far as a FUSE door needs them: is there a dead one, take it away, cut it off.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::{io::Errno, mount::UnmountFlags};

use super::{Error, Result};

/// What the mounts name as their source.
pub(super) const SOURCE: &str = "aquifer";

/// How long a living door may take to answer.
const PROBE_WAIT: Duration = Duration::from_secs(5);

/// Makes sure no dead mount of ours lies on `dir`. Returns the real path of the mountpoint, which need
/// not exist yet. Nothing below a dead mount can be looked at, so only its parent is resolved.
pub(super) fn clear_stale(dir: &Path) -> Result<PathBuf> {
    let real = real_path(dir)?;
    while is_ours(&real)? {
        if !is_dead(&real) {
            return Err(Error::Busy { path: real.display().to_string() });
        }
        unmount(&real)?;
    }
    Ok(real)
}

fn real_path(dir: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(dir).map_err(|e| Error::io(dir, "resolve", e))?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) if !matches!(name.to_str(), Some(".." | ".")) => {
            fs::create_dir_all(parent).map_err(|e| Error::io(parent, "create", e))?;
            let parent = fs::canonicalize(parent).map_err(|e| Error::io(parent, "resolve", e))?;
            let path = parent.join(name);
            match fs::read_link(&path) {
                Ok(_) => fs::canonicalize(&path).map_err(|e| Error::io(&path, "resolve", e)),
                Err(_) => Ok(path),
            }
        }
        _ => fs::canonicalize(&absolute).map_err(|e| Error::io(dir, "resolve", e)),
    }
}

/// Whether the uppermost mount on `dir` is a FUSE door of ours.
fn is_ours(dir: &Path) -> Result<bool> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(|e| Error::io(path, "read", e))?;
    let mut ours = false;
    for line in text.split(|b| *b == b'\n') {
        if let Some((place, kind, source)) = parse(line)
            && place == dir
        {
            ours = (kind == b"fuse" || kind.starts_with(b"fuse.")) && source == SOURCE.as_bytes();
        }
    }
    Ok(ours)
}

/// Whether nobody serves the mount any more. `statfs` always asks the server, where attributes may
/// come from a cache that outlives it; one that does not answer may be stopped, but is not dead.
fn is_dead(dir: &Path) -> bool {
    let (answer, outcome) = crossbeam_channel::bounded(1);
    let dir = dir.to_path_buf();
    let ask = move || {
        let _ = answer.send(rustix::fs::statfs(&dir).err());
    };
    if std::thread::Builder::new().name("fuse-probe".into()).spawn(ask).is_err() {
        return false;
    }
    matches!(outcome.recv_timeout(PROBE_WAIT), Ok(Some(Errno::NOTCONN | Errno::CONNABORTED)))
}

/// Mountpoint, type and source of one line of `mountinfo`.
fn parse(line: &[u8]) -> Option<(PathBuf, &[u8], &[u8])> {
    let mut words = line.split(|b| *b == b' ');
    let place = unescape(words.nth(4)?);
    // Optional fields end with a dash; the type follows.
    words.find(|w| *w == b"-")?;
    Some((place, words.next()?, words.next()?))
}

/// Blank, tab, newline and backslash are written as three octal digits.
fn unescape(word: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..b'8').contains(b)));
        match digits {
            Some(digits) => {
                let value = digits.iter().fold(0u32, |v, d| v * 8 + u32::from(d - b'0'));
                out.push(u8::try_from(value).unwrap_or(b'?'));
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// Number of a mount's connection in the control folder.
pub(super) fn connection(dir: &Path) -> io::Result<u32> {
    // statx answers the device from the kernel's own memory; a plain stat of a mount that is not
    // served yet would wait for us.
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    Ok(statx(CWD, dir, flags, StatxFlags::empty())?.stx_dev_minor)
}

/// Takes the mount on `dir` away; `false` if files are open and it is only detached.
pub(super) fn unmount(dir: &Path) -> Result<bool> {
    match rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW) {
        // Not a mountpoint: somebody was faster.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(true),
        Err(Errno::BUSY) => detach(dir).map(|()| false),
        Err(Errno::PERM) => unmount_by_helper(dir),
        Err(e) => Err(Error::io(dir, "unmount", e.into())),
    }
}

fn detach(dir: &Path) -> Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    rustix::mount::unmount(dir, flags).map_err(|e| Error::io(dir, "detach", e.into()))
}

/// Users without the privilege go through the setuid program of libfuse.
fn unmount_by_helper(dir: &Path) -> Result<bool> {
    let quiet = |lazy: &[&str]| -> io::Result<bool> {
        let mut command = Command::new("fusermount3");
        command.arg("-u").args(lazy).arg("--").arg(dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(command.status()?.success())
    };
    let failed = |e| Error::io(dir, "unmount by fusermount3", e);
    if quiet(&[]).map_err(failed)? {
        return Ok(true);
    }
    if quiet(&["-z"]).map_err(failed)? {
        return Ok(false);
    }
    Err(failed(io::Error::from(io::ErrorKind::PermissionDenied)))
}

/// Cuts a connection off: every request of it, waiting or to come, fails. `false` where the control
/// folder is not mounted or not ours to write.
pub(super) fn abort(connection: u32) -> bool {
    fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1").is_ok()
}

#[cfg(test)]
mod tests {
    //! Lines of `mountinfo` as the kernel writes them.

    use super::*;

    #[test]
    fn mountpoints_and_types_are_found() {
        let line = br"36 35 0:51 / /mnt/a\040b\134c rw,noatime shared:1 master:2 - fuse aquifer rw,user_id=0";
        assert_eq!(parse(line), Some((PathBuf::from(r"/mnt/a b\c"), &b"fuse"[..], &b"aquifer"[..])));
        let line = br"36 35 98:0 /mnt1 /mnt2 rw - ext3 /dev/root rw";
        assert_eq!(parse(line), Some((PathBuf::from("/mnt2"), &b"ext3"[..], &b"/dev/root"[..])));
        for line in [&b""[..], b"a b c", b"1 2 3 4 5 6 7", b"1 2 3 4 /x rw -"] {
            assert_eq!(parse(line), None);
        }
        assert_eq!(unescape(br"\04\999\"), PathBuf::from(r"\04\999\"));
    }

    #[test]
    fn a_folder_that_is_no_mount_is_clear() {
        let tmp = tempfile::tempdir().expect("tempdir");
        let dir = clear_stale(&tmp.path().join("not/there")).expect("clear");
        assert!(dir.ends_with("not/there"));
        assert!(unmount(&dir).expect("nothing to do"));
    }
}
