//! A lease that is kept alive from a thread of its own, and withdrawn when it is dropped.

use std::{
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{self, JoinHandle},
};

use aquifer_formats::repo::{LEASE_TTL, Lease, Machine, Point, Repository, record::Holder};

use crate::fail::{Fail, Result};

/// A point that is being read.
#[derive(Debug)]
pub struct Hold {
    /// Dropped to end the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Hold {
    /// Holds a point for reading, as this process or for a whole session. On storage that nobody can write nobody deletes either: then there is
    /// nothing to hold.
    ///
    /// # Errors
    /// The point has been given up meanwhile.
    pub fn read(repo: &Repository, machine: &Machine, point: &Point, holder: Holder) -> Result<Self> {
        use aquifer_formats::{Error as FormatError, repo::Error};
        match repo.lease_read(machine, point, holder) {
            Ok(lease) => Ok(Self::beating(lease)),
            Err(Error::Format(FormatError::Io { .. })) => Ok(Self { end: None, thread: None }),
            Err(error) => Err(Fail::from(error)),
        }
    }

    fn beating(mut lease: Lease) -> Self {
        let (end, ended) = channel::<()>();
        let thread = thread::Builder::new().name("lease".into()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(LEASE_TTL / 4) {
                // Taken away, or the storage is gone: what is open stays readable, and a later read of a
                // file that was deleted says so itself.
                let _ = lease.beat();
            }
            // A lease that cannot be withdrawn ends by standing still.
            let _ = lease.release();
        });
        Self { end: Some(end), thread: thread.ok() }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread costs the lease its withdrawal, no more.
            let _ = thread.join();
        }
    }
}
