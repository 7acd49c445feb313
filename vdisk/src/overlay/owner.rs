//! One owner at a time for the folder of an overlay.
//!
//! Invariants
//! - The lock lives no longer than the process, however that ends; the process id inside is for messages only.
//! - It is given back by a call, not by closing: a child that another thread has just forked still holds the open file until it
//!   becomes another program.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use aquifer_formats::Error as FormatError;
use rustix::fs::{FlockOperation, flock};

use crate::{Error, Result};

/// The lock, held.
#[derive(Debug)]
pub(super) struct Owner {
    file: File,
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Closing, which follows, gives it back a moment later.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

impl Owner {
    /// Takes the lock of `dir`.
    ///
    /// # Errors
    /// [`Error::Busy`] with the holder's process id.
    pub(super) fn take(dir: &Path) -> Result<Self> {
        let path = dir.join("owner");
        let label = path.display().to_string();
        let failed = |action| {
            let label = label.clone();
            move |e: std::io::Error| -> Error { FormatError::io(label, action, 0, e).into() }
        };
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).clone();
        let mut file = options.open(&path).map_err(failed("open"))?;
        if let Err(e) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if e != rustix::io::Errno::WOULDBLOCK {
                return Err(failed("lock")(e.into()));
            }
            let mut holder = String::new();
            let known = (&mut file).take(32).read_to_string(&mut holder).is_ok() && !holder.trim().is_empty();
            let holder = if known { holder.trim().to_owned() } else { "unknown".to_owned() };
            return Err(Error::Busy { path: label, holder });
        }
        // Shorter than before only in text; the file holds nothing but this line.
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed("write"))?;
        writeln!(file, "{}", std::process::id()).map_err(failed("write"))?;
        Ok(Self { file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in a child between `fork` and `exec`.
    #[test]
    fn who_gives_it_back_has_given_it_back_whoever_still_has_the_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let owner = Owner::take(dir.path()).expect("free");
        assert!(matches!(Owner::take(dir.path()), Err(Error::Busy { .. })));
        let of_a_child = owner.file.try_clone().expect("a second descriptor");
        drop(owner);
        Owner::take(dir.path()).expect("free again");
        drop(of_a_child);
    }
}
