//! The FUSE door: every disk is one file, for whatever wants a file: loop devices, `cp`, `qemu-img`,
//! hypervisors without NBD.
//!
//! ```text
//! FuseMount::new   mounts and shakes hands        may need privileges, parses nothing
//! FuseMount::serve starts the loops               may run confined
//! FuseDoor::stop   unmounts, aborts if it must    done by a thread made in the first step
//! ```
//!
//! Invariants
//! - Every request is answered exactly once, whatever happens to the thread that works on it.
//! - Hits are answered on the loop that read the request; what may wait for the source goes to one
//!   pool, what waits for our own disk to another, so that local ranges go on while a source is away.
//! - A writable disk is opened with direct I/O only: no page cache above ours, no write-back of the
//!   kernel's. An immutable one may stay in the page cache.
//! - Once a disk is all local, readers may be passed through to its `disk.raw`; writers are not, so
//!   that what they change stays known. One file is never opened both cached and passed through: the
//!   kernel answers that with an error.
//! - Memory for requests is taken before the first one arrives or is bounded by the kernel's own limits.
//!
//! Not here: loop devices (`loopdev`), what a disk holds, who may see it beyond the mount's owner.

mod files;
mod mounts;
mod pool;

use std::{
    fs::{DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use aquifer_vdisk::Disk;
use crossbeam_channel::{Receiver, Sender, bounded};
use fuser::{Config, MountOption, Session, SessionACL};

use files::{Entry, Files, Shared};

/// Result of anything in this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Event loops. Two use both of two cores and keep one alive while the other copies a megabyte.
const LOOPS: usize = 2;

/// How long a stop waits for requests in flight before it cuts the connection.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// Why a mount could not be made or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call on the mountpoint.
    #[error("{path}: {action}: {source}")]
    Io {
        /// The mountpoint or a file below it.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Another door serves there.
    #[error("{path}: another door serves here")]
    Busy {
        /// The mountpoint.
        path: String,
    },
    /// A name that cannot be a file's.
    #[error("{path}: {name:?} cannot name a file")]
    Name {
        /// The mountpoint.
        path: String,
        /// The name.
        name: String,
    },
}

impl Error {
    fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.display().to_string(), action, source }
    }
}

/// Who may open the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// The user of this process (and nobody else, root included, unless it is root).
    Owner,
    /// Also root: loop devices and `mount` of a door that another user runs.
    OwnerAndRoot,
}

/// Whether files can be opened for writing at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountAccess {
    /// The mount is read-only, whatever the disks are.
    ReadOnly,
    /// Writable disks can be written.
    ReadWrite,
}

/// How to mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FuseOptions {
    /// Who may open the files.
    pub audience: Audience,
    /// Whether files can be opened for writing.
    pub access: MountAccess,
}

/// A disk to serve as a file.
#[derive(Debug)]
pub struct FuseFile {
    /// The disk; its name is the file's name.
    pub disk: Arc<Disk>,
    /// Its `disk.raw`, for passthrough once all is local. `None` never passes through.
    pub raw: Option<File>,
}

/// A mount whose requests wait for [`FuseMount::serve`].
#[derive(Debug)]
pub struct FuseMount {
    session: Session<Files>,
    shared: Arc<OnceLock<Shared>>,
    unmounter: Unmounter,
}

/// A served mount. Dropping it stops it.
#[derive(Debug)]
pub struct FuseDoor {
    shared: Arc<OnceLock<Shared>>,
    unmounter: Unmounter,
    session: Option<fuser::BackgroundSession>,
}

impl FuseMount {
    /// Mounts at `dir`, which is made if need be. A dead mount left there by a killed process is
    /// taken away first. Any program that touches the mount waits until it is served.
    ///
    /// # Errors
    /// [`Error::Busy`] where a living door serves; [`Error::Io`], among them `PermissionDenied` for
    /// users without `fusermount3`.
    pub fn new(dir: &Path, options: FuseOptions) -> Result<Self> {
        let dir = mounts::clear_stale(dir)?;
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|e| Error::io(&dir, "create", e))?;
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName(mounts::SOURCE.into()),
            MountOption::DefaultPermissions,
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::NoExec,
            MountOption::NoAtime,
        ];
        if options.access == MountAccess::ReadOnly {
            config.mount_options.push(MountOption::RO);
        }
        config.acl = match options.audience {
            Audience::Owner => SessionACL::Owner,
            Audience::OwnerAndRoot => SessionACL::RootAndOwner,
        };
        config.n_threads = Some(LOOPS);
        // Threads made from here on must not wait for their own writes when memory is short. Without the
        // privilege that is at risk only where the disks are used on this very host.
        if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
            tracing::debug!(%error, "PR_SET_IO_FLUSHER");
        }
        let shared = Arc::new(OnceLock::new());
        let files = Files::new(shared.clone());
        let session = Session::new(files, &dir, &config).map_err(|e| Error::io(&dir, "mount", e))?;
        let unmounter = Unmounter::start(dir)?;
        Ok(Self { session, shared, unmounter })
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.unmounter.dir
    }

    /// Starts to serve `files`.
    ///
    /// # Errors
    /// [`Error::Name`]; [`Error::Io`] where threads cannot be made.
    pub fn serve(self, files: Vec<FuseFile>) -> Result<FuseDoor> {
        let Self { session, shared, unmounter } = self;
        let mut entries = Vec::with_capacity(files.len());
        for file in files {
            let name = file.disk.name();
            let twice = entries.iter().any(|e: &Entry| e.disk().name() == name);
            if twice || name.is_empty() || name.len() > 255 || name == "." || name == ".." || name.contains(['/', '\0'])
            {
                let path = unmounter.dir.display().to_string();
                return Err(Error::Name { path, name: name.to_owned() });
            }
            entries.push(Entry::new(file));
        }
        let failed = |e| Error::io(&unmounter.dir, "serve", e);
        let _ = shared.set(Shared::new(entries).map_err(failed)?);
        let session = session.spawn().map_err(failed)?;
        Ok(FuseDoor { shared, unmounter, session: Some(session) })
    }
}

impl FuseDoor {
    /// Mounts at `dir` and serves `files`.
    ///
    /// # Errors
    /// As [`FuseMount::new`] and [`FuseMount::serve`].
    pub fn open(dir: &Path, options: FuseOptions, files: Vec<FuseFile>) -> Result<Self> {
        FuseMount::new(dir, options)?.serve(files)
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.unmounter.dir
    }

    /// The file of a disk.
    pub fn path(&self, disk: &str) -> PathBuf {
        self.unmounter.dir.join(disk)
    }

    /// Whether files are open now.
    pub fn is_busy(&self) -> bool {
        self.shared.get().is_some_and(|s| s.open_files() > 0)
    }

    /// Unmounts. With files still open the mount is detached, what is in flight is finished within a
    /// moment, and then the connection is cut: whoever goes on reading gets an error instead of
    /// waiting for ever.
    ///
    /// # Errors
    /// [`Error::Io`] where the mount cannot be taken away; it is dead then, and the next mount there clears it.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        match self.unmounter.run(How::Gently)? {
            Outcome::Gone => {}
            Outcome::Detached => {
                let start = Instant::now();
                while start.elapsed() < STOP_WAIT && self.shared.get().is_some_and(|s| s.in_flight() > 0) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                // Where the control folder is not mounted the connection ends with the process.
                if self.unmounter.run(How::Abort)? == Outcome::Detached {
                    return Ok(());
                }
            }
        }
        let joined = session.join();
        joined.or_else(|e| match e.raw_os_error() {
            Some(libc::ENODEV | libc::ECONNABORTED) => Ok(()),
            _ => Err(Error::io(&self.unmounter.dir, "end", e)),
        })
    }
}

impl Drop for FuseDoor {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            tracing::warn!(error = %e, "fuse door did not end in order");
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum How {
    /// Unmount, or detach where files are open.
    Gently,
    /// Cut the connection of a detached mount.
    Abort,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Gone,
    Detached,
}

/// What to do, and whom to tell how it went.
type Order = (How, Sender<Result<Outcome>>);

/// The thread that can still unmount after the process has confined itself: Landlock forbids every
/// change of mounts to those it confines, and threads made before are not confined.
#[derive(Debug)]
struct Unmounter {
    dir: PathBuf,
    orders: Sender<Order>,
}

impl Unmounter {
    fn start(dir: PathBuf) -> Result<Self> {
        let (orders, inbox): (_, Receiver<Order>) = bounded(1);
        let failed = |e| Error::io(&dir, "start a thread", e);
        let connection = mounts::connection(&dir).map_err(failed)?;
        let place = dir.clone();
        let work = move || {
            for (how, answer) in inbox {
                let outcome = match how {
                    How::Gently => mounts::unmount(&place),
                    How::Abort => Ok(mounts::abort(connection)),
                };
                let _ = answer.send(outcome.map(|gone| if gone { Outcome::Gone } else { Outcome::Detached }));
            }
        };
        std::thread::Builder::new().name("fuse-unmount".into()).spawn(work).map_err(failed)?;
        Ok(Self { dir, orders })
    }

    fn run(&self, how: How) -> Result<Outcome> {
        let (answer, outcome) = bounded(1);
        let gone = || Error::io(&self.dir, "unmount", io::Error::other("the unmounting thread has ended"));
        self.orders.send((how, answer)).map_err(|_| gone())?;
        outcome.recv().map_err(|_| gone())?
    }
}
