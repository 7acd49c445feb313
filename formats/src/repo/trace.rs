//! Boot traces beside a machine's points: which places its disks are read at first.
//!
//! Invariants
//! - A trace holds no truth about data: it may be replaced, lost or wrong, and costs only time then.
//! - It is written by the owner only, like everything else here.
//!
//! Not here: what is in one; to the repository it is a few bytes.

use super::{DiskName, Error, Machine, Repository, Result, name};

/// Largest trace that is kept, in bytes.
const TRACE_BYTES_MAX: usize = 1 << 20;

impl Repository {
    /// The trace of a machine's disk, if there is one. Anybody who can write here may have made it.
    ///
    /// # Errors
    /// I/O.
    pub fn trace(&self, machine: &Machine, disk: &DiskName) -> Result<Option<Vec<u8>>> {
        self.store().get(&name::trace(machine.id, disk))
    }

    /// Keeps a trace in the place of an older one.
    ///
    /// # Errors
    /// [`Error::ForeignOwner`]; more than 1 MiB; I/O, as on storage that can only be read.
    pub fn keep_trace(&self, machine: &Machine, disk: &DiskName, bytes: &[u8]) -> Result<()> {
        let file = name::trace(machine.id, disk);
        if bytes.len() > TRACE_BYTES_MAX {
            let what = format!("a trace of {} bytes; {TRACE_BYTES_MAX} are possible", bytes.len());
            return Err(crate::Error::Refused { path: self.store().path_of(&file), what }.into());
        }
        self.writable()?;
        match self.store().create(&file, bytes) {
            Err(Error::Exists { .. }) => self.store().replace(&file, bytes),
            done => done,
        }
    }
}
