//! A store that dies: after a set number of steps every call fails, and what was not synced is lost.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use crate::{Storage, storage::FileStorage};

/// Counts steps down; at zero the store is dead.
#[derive(Clone, Debug)]
pub(in crate::repo) struct Fuse {
    left: Arc<AtomicI64>,
    steps: Arc<Mutex<Vec<String>>>,
}

impl Default for Fuse {
    fn default() -> Self {
        Self { left: Arc::new(AtomicI64::new(i64::MAX)), steps: Arc::default() }
    }
}

impl Fuse {
    /// Lets `steps` more steps happen.
    pub(in crate::repo) fn set(&self, steps: i64) {
        self.left.store(steps, Ordering::SeqCst);
    }

    /// What has happened.
    pub(in crate::repo) fn steps(&self) -> Vec<String> {
        self.steps.lock().expect("lock").clone()
    }

    pub(in crate::repo) fn burn(&self, what: &str) -> io::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            return Err(io::Error::other("the fuse is burnt"));
        }
        self.steps.lock().expect("lock").push(what.to_owned());
        Ok(())
    }

    pub(in crate::repo) fn guard(&self, file: Arc<FileStorage>) -> Arc<dyn Storage> {
        let synced = file.len().expect("length");
        Arc::new(Guarded { file, fuse: self.clone(), synced: Mutex::new(synced) })
    }
}

/// A layer file of a store that may die: then it keeps only what was synced.
#[derive(Debug)]
struct Guarded {
    file: Arc<FileStorage>,
    fuse: Fuse,
    synced: Mutex<u64>,
}

impl Guarded {
    fn burn(&self, what: &str) -> io::Result<()> {
        self.fuse.burn(what).inspect_err(|_| {
            let synced = *self.synced.lock().expect("lock");
            if self.file.len().expect("length") > synced {
                self.file.set_len(synced).expect("cut");
            }
        })
    }
}

impl Storage for Guarded {
    fn label(&self) -> &str {
        self.file.label()
    }

    fn identity(&self) -> Option<u64> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, buf)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.file.read_now(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.burn("write")?;
        self.file.write_at(offset, buf)
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        self.file.allocated(offset, len_max)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.burn("punch")?;
        self.file.punch(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.burn("truncate")?;
        self.file.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.burn("reserve")?;
        self.file.reserve(offset, len)
    }

    fn start_writeback(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.start_writeback(offset, len)
    }

    fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.forget_cached(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.burn("sync")?;
        self.file.sync()?;
        *self.synced.lock().expect("lock") = self.file.len()?;
        Ok(())
    }
}
