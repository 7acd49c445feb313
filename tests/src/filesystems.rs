//! Real file systems: made, mounted, checked by their own tools.
//!
//! Everything needs root, loop devices and the tools of the file system.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

const MIB: u64 = 1 << 20;

/// A file system under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
}

/// All of them.
pub const ALL: [FileSystem; 3] = [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs];

/// A folder for images, in memory where there is one: what the disk below does is not under test.
pub fn quick_folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder")
}

/// Copies an image, holes included.
///
/// # Errors
/// What `cp` says.
pub fn copy(from: &Path, to: &Path) -> Result<(), String> {
    run("cp", &["--sparse=always", text(from), text(to)])
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(format!("{program} {args:?}: {}", String::from_utf8_lossy(&said)))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("utf-8")
}

impl FileSystem {
    /// Makes an empty one in a new file, about as small as it can be, for a device of 4 KiB sectors.
    pub fn make(self, path: &Path) {
        let (bytes, program, args): (_, _, &[&str]) = match self {
            Self::Ext4 => (96 * MIB, "mkfs.ext4", &["-q", "-F", "-b", "4096"]),
            Self::Xfs => (320 * MIB, "mkfs.xfs", &["-q", "-s", "size=4096"]),
            Self::Btrfs => (128 * MIB, "mkfs.btrfs", &["-q", "-s", "4096"]),
        };
        fs::File::create(path).and_then(|f| f.set_len(bytes)).expect("an image");
        run(program, &[args, &[text(path)]].concat()).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Asks its own tool whether it is whole; its log must have been replayed.
    ///
    /// # Errors
    /// What the tool says.
    pub fn check(self, path: &Path) -> Result<(), String> {
        match self {
            Self::Ext4 => run("e2fsck", &["-f", "-n", text(path)]),
            Self::Xfs => run("xfs_repair", &["-n", "-f", text(path)]),
            Self::Btrfs => run("btrfs", &["check", "--readonly", text(path)]),
        }
    }
}

/// A mounted file system; unmounted when it goes, so that a failing test leaves nothing in the way of the next.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts a device.
    ///
    /// # Errors
    /// What `mount` says.
    pub fn device(device: &Path, at: &Path) -> Result<Self, String> {
        run("mount", &[text(device), text(at)]).map(|()| Self(at.to_path_buf()))
    }

    /// Mounts an image through a loop device that goes with it. No other image may have had this path before: `mount`
    /// takes a loop device that still stands on a file of that name, with what it remembers of it.
    ///
    /// # Errors
    /// What `mount` says.
    pub fn image(image: &Path, at: &Path) -> Result<Self, String> {
        run("mount", &["-o", "loop", text(image), text(at)]).map(|()| Self(at.to_path_buf()))
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for _ in 0..50 {
            if Command::new("umount").arg(&self.0).stderr(Stdio::null()).status().is_ok_and(|s| s.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
