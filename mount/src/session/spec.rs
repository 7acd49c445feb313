//! What a recovery session is, as `session.json` records it.
//!
//! Invariants
//! - The record alone is enough to start the door again: chains, sizes, fingerprints, options.
//! - Formats come from here and are never guessed again: what a guest can write is not probed.
//! - `machine` and `host` belong to the runner; nothing in this crate looks inside.
//!
//! Not here: where the record lies and how it is replaced (`Folder`).

use std::path::{Path, PathBuf};

use aquifer_vdisk::ChainSpec;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Error, Result, State};

/// Format of `session.json` this build writes, and the newest it reads.
pub const SPEC_VERSION: u32 = 1;

/// Longest path a Unix socket address holds, in bytes (`sun_path` less the final zero).
pub const SOCKET_PATH_MAX: usize = 107;

/// Longest name of a machine or disk, in bytes.
pub const NAME_MAX: usize = 64;

/// Most disks of one session.
pub const DISKS_MAX: usize = 64;

/// A recovery session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Format of this record: [`SPEC_VERSION`].
    pub version: u32,
    /// Identity; time-ordered (UUIDv7).
    pub id: Uuid,
    /// Machine name, the short name of the session.
    pub name: String,
    /// Session folder, absolute. A moved folder is refused: the overlay's own record names it too.
    pub dir: PathBuf,
    /// Folder of the sockets, absolute and short ([`SOCKET_PATH_MAX`]).
    pub runtime_dir: PathBuf,
    /// Disks, in the machine's order.
    pub disks: Vec<DiskSpec>,
    /// How the session behaves.
    pub options: Options,
    /// When it was made, UTC.
    pub created: Timestamp,
    /// The runner's: machine description.
    #[serde(default)]
    pub machine: serde_json::Value,
    /// The runner's: host, process ids, firmware decision.
    #[serde(default)]
    pub host: serde_json::Value,
    /// Where the session stands. Changed only by `Folder::transition`.
    pub state: State,
    /// Why it got there, where that is not plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// One disk of a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Name: the export's name, the FUSE file's name and the folder's name.
    pub name: String,
    /// The restore point's chain.
    pub chain: ChainSpec,
    /// Size in bytes.
    pub size: u64,
    /// Fingerprint of the chain, 64 hexadecimal digits. Another chain is refused.
    pub fingerprint: String,
}

/// How a session behaves. All may be absent in the record; the defaults are those of [`Options::default`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Budget of the decoded-block cache, bytes, for all disks together.
    pub cache_bytes: u64,
    /// Whether disks take writes (a recovery does; a plain mount does not).
    pub access: Access,
    /// Whether the overlay is filled in the background.
    pub hydrate: Hydrate,
    /// Limit of background reading, bytes per second.
    pub rate: Option<u64>,
    /// When everything is to be local; the rate follows from it.
    pub ready_by: Option<Timestamp>,
    /// Whether the overlay's space is reserved before the machine starts.
    pub preallocate: Preallocate,
    /// How long a read waits for a source that is away before it fails with EIO, seconds.
    pub source_wait_s: u64,
    /// Where the FUSE files appear, if they are wanted.
    pub fuse_dir: Option<PathBuf>,
    /// Which blocks are copied in the background.
    pub blocks: Blocks,
    /// Passed to the overlay: size of its journal in bytes.
    pub journal_bytes: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_bytes: 256 << 20,
            access: Access::Writable,
            hydrate: Hydrate::On,
            rate: None,
            ready_by: None,
            preallocate: Preallocate::No,
            source_wait_s: 300,
            fuse_dir: None,
            blocks: Blocks::All,
            journal_bytes: None,
        }
    }
}

/// Whether disks take writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// The restore point as it is; no overlay.
    ReadOnly,
    /// Writes go to a durable overlay in the session folder.
    Writable,
}

/// Whether the overlay is filled in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hydrate {
    /// From the start.
    On,
    /// Hydration begins only when it is asked for.
    Paused,
    /// Never: only what the guest touches comes over.
    Off,
}

/// Which blocks are copied in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blocks {
    /// Those a file system uses, and those somebody has read; the rest is zeros in the end.
    Used,
    /// All that the restore point holds.
    All,
}

/// Whether space is reserved before the machine starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preallocate {
    /// The overlay grows.
    No,
    /// All of it; fails at the start where it does not fit.
    Full,
}

impl Spec {
    /// A new session in [`State::Queued`]. `runtime_base` holds the sockets where `dir` itself is too
    /// long for them (say `/run/aquifer` or `$XDG_RUNTIME_DIR/aquifer`).
    ///
    /// # Errors
    /// [`Error::BadFile`] for names, sizes or fingerprints out of bounds, [`Error::SocketPath`].
    pub fn new(
        name: &str,
        dir: &Path,
        runtime_base: &Path,
        disks: Vec<DiskSpec>,
        options: Options,
        created: Timestamp,
    ) -> Result<Self> {
        let id = Uuid::now_v7();
        let runtime_dir = short_runtime_dir(dir, runtime_base, id)?;
        let spec = Self {
            version: SPEC_VERSION,
            id,
            name: name.to_owned(),
            dir: dir.to_path_buf(),
            runtime_dir,
            disks,
            options,
            created,
            machine: serde_json::Value::Null,
            host: serde_json::Value::Null,
            state: State::Queued,
            reason: None,
        };
        spec.check(dir)?;
        Ok(spec)
    }

    /// Whether the record holds what this build can serve. `at` names the file in messages.
    ///
    /// # Errors
    /// [`Error::BadFile`], [`Error::SocketPath`].
    pub fn check(&self, at: &Path) -> Result<()> {
        let bad = |what: String| Err(Error::bad_file(at, what));
        if self.version != SPEC_VERSION {
            return bad(format!("version {} of the session record; this build reads {SPEC_VERSION}", self.version));
        }
        if !self.dir.is_absolute() || !self.runtime_dir.is_absolute() {
            return bad(format!("{} and {} must be absolute", self.dir.display(), self.runtime_dir.display()));
        }
        if !is_name(&self.name) {
            return bad(format!("machine name {:?}: 1 to {NAME_MAX} of letters, digits, . _ -", self.name));
        }
        if self.disks.is_empty() || self.disks.len() > DISKS_MAX {
            return bad(format!("{} disks; 1 to {DISKS_MAX} are possible", self.disks.len()));
        }
        for (index, disk) in self.disks.iter().enumerate() {
            if !is_name(&disk.name) {
                return bad(format!("disk name {:?}: 1 to {NAME_MAX} of letters, digits, . _ -", disk.name));
            }
            if self.disks.iter().take(index).any(|other| other.name == disk.name) {
                return bad(format!("two disks named {}", disk.name));
            }
            if disk.size == 0 || i64::try_from(disk.size).is_err() {
                return bad(format!("disk {}: size {} bytes", disk.name, disk.size));
            }
            if disk.fingerprint.len() != 64 || !disk.fingerprint.bytes().all(|b| b.is_ascii_hexdigit()) {
                return bad(format!("disk {}: the fingerprint is not 64 hexadecimal digits", disk.name));
            }
        }
        for socket in [self.nbd_socket(), self.control_socket()] {
            check_socket_path(&socket)?;
        }
        Ok(())
    }

    /// Where the NBD door listens.
    pub fn nbd_socket(&self) -> PathBuf {
        self.runtime_dir.join("nbd.sock")
    }

    /// Where the door takes orders.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime_dir.join("control.sock")
    }

    /// Folder of a disk's overlay (`disk.raw`, `map`, `journal`).
    pub fn disk_dir(&self, disk: &str) -> PathBuf {
        self.dir.join("disks").join(disk)
    }

    /// NBD URI of a disk.
    pub fn uri(&self, disk: &str) -> String {
        let socket = self.nbd_socket();
        format!("nbd+unix:///{}?socket={}", escape(disk), escape(&socket.to_string_lossy()))
    }
}

/// Whether `name` may name a machine or a disk: it is part of paths, URIs and messages.
pub fn is_name(name: &str) -> bool {
    let first = name.bytes().next();
    name.len() <= NAME_MAX
        && first.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// `dir` where its sockets fit, else a folder of `base` named after the session.
fn short_runtime_dir(dir: &Path, base: &Path, id: Uuid) -> Result<PathBuf> {
    let own = dir.join("run");
    if check_socket_path(&own.join("control.sock")).is_ok() {
        return Ok(own);
    }
    // The last twelve digits of a UUIDv7 are random; the first ones are the time.
    let text = id.simple().to_string();
    let short = base.join(text.get(20..).unwrap_or(&text));
    check_socket_path(&short.join("control.sock"))?;
    Ok(short)
}

/// Whether a socket can be bound at `path`.
///
/// # Errors
/// [`Error::SocketPath`].
pub fn check_socket_path(path: &Path) -> Result<()> {
    let len = path.as_os_str().len();
    if len > SOCKET_PATH_MAX {
        return Err(Error::SocketPath { path: path.display().to_string(), len, max: SOCKET_PATH_MAX });
    }
    Ok(())
}

/// Percent-encodes all but what a URI's path and query carry plainly.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'~' | b'/') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests;
