//! Space of the file system that a session's disks grow on.
//!
//! A copy in the background must not take the last of it: a machine that cannot write is worse than one that needs its
//! source for longer. So the copy stops while [`KEPT_BYTES`] are still free, and goes on when there is more.
//!
//! Not here: what the copy does about it (`Hydrator::set_room`).

use std::path::Path;

use super::{Error, Result};

/// What is left for what the machine writes, in bytes.
pub const KEPT_BYTES: u64 = 256 << 20;

/// Free bytes of the file system that holds `dir`.
///
/// # Errors
/// [`Error::Io`].
pub fn free(dir: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| Error::io(dir, "look at", e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// How much a copy may take of it.
pub(super) fn room(dir: &Path) -> Option<u64> {
    // Where nobody can tell, a full disk is met when it is full.
    Some(free(dir).ok()?.saturating_sub(KEPT_BYTES))
}
