//! vhost-user-blk: a door through a guest's own memory. The hypervisor shares the memory and the guest's rings, and
//! requests pass without it: no socket, no copy of a protocol, no context of QEMU's in between.
//!
//! - [`request`], [`ring`], [`memory`]: a request, a split virtqueue, a guest's memory; all of it is a stranger's.
//! - [`VhostDoor`]: a socket for each disk, a connection at a time on each, a thread for each queue.
//!
//! Invariants
//! - Sockets are 0600 in a folder that is made 0700.
//! - A guest can harm its own requests only: what makes no sense is answered with an error, a ring that makes none is
//!   stopped, and nothing it says is believed without a bound.
//! - A hypervisor that lost its door finds the same disk at the same socket, and the requests that were in the air are
//!   done by the new door; another disk turns it away.
//!
//! Not here: recoveries. A vhost-user device has no block node in QEMU, so that nothing could move it to the local disk
//! (`docs/decisions`): those stay on NBD.

mod config;
mod device;
mod frontend;
mod inflight;
pub mod memory;
mod queue;
pub mod request;
pub mod ring;
mod work;

use std::{
    fmt,
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex as HandlerMutex, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use aquifer_vdisk::Disk;
use parking_lot::{Condvar, Mutex};
use vhost::vhost_user::BackendReqHandler;

pub use self::{config::QUEUES_MAX, inflight::Identity};
use self::{
    device::{Device, Pools},
    frontend::Frontend,
};
use crate::nbd::{
    self,
    server::{
        STOP_MAX,
        listen::{self, Listener},
        pool::Pool,
    },
};

/// How long a connection waits for the end of the one before it.
const TURN_WAIT: Duration = Duration::from_secs(10);

/// Why a door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its socket cannot be made.
    #[error(transparent)]
    Listen(#[from] nbd::Error),
    /// A disk that does not end with a sector: its last bytes would be hidden.
    #[error("{disk} has {size} bytes, which is no multiple of 512: a virtio disk cannot have that size")]
    Size {
        /// Its name.
        disk: String,
        /// Its size in bytes.
        size: u64,
    },
    /// A name that is none for a file, or is there twice.
    #[error("a disk cannot be served as {name:?}")]
    Name {
        /// The name.
        name: String,
    },
}

/// A disk to serve.
#[derive(Clone, Debug)]
pub struct VhostDisk {
    /// The disk.
    pub disk: Arc<Disk>,
    /// The same for a door that serves the same disk later, with all that was acknowledged; else another.
    pub identity: Identity,
}

/// What a door has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Hypervisors connected now.
    pub open: u64,
    /// Requests answered.
    pub requests: u64,
    /// Requests and rings that were refused as making no sense.
    pub refused: u64,
    /// Requests that failed in the disk.
    pub errors: u64,
    /// Bytes read by guests.
    pub bytes_read: u64,
    /// Bytes written by guests.
    pub bytes_written: u64,
}

/// An open door. Dropping it stops it.
pub struct VhostDoor {
    devices: Vec<(Arc<Line>, PathBuf)>,
    listeners: Mutex<Vec<Listener>>,
    pools: Arc<Pools>,
}

impl fmt::Debug for VhostDoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.devices.iter().map(|(_, path)| path)).finish()
    }
}

/// A device and who is connected to it.
struct Line {
    device: Arc<Device>,
    state: Mutex<LineState>,
    free: Condvar,
}

#[derive(Default)]
struct LineState {
    connection: Option<UnixStream>,
    busy: bool,
    stopping: bool,
    threads: Vec<JoinHandle<()>>,
}

impl VhostDoor {
    /// Makes a socket `DISK.sock` for each disk in `dir`, which is made if need be. A socket left by a door that is gone
    /// is replaced.
    ///
    /// # Errors
    /// [`Error`], with nothing left listening.
    pub fn open(dir: &Path, disks: Vec<VhostDisk>) -> Result<Self, Error> {
        let workers = std::thread::available_parallelism().map_or(2, usize::from).max(2);
        let pools = Arc::new(Pools {
            slow: Pool::new("vhost-work", workers, workers + 64),
            sync: Pool::new("vhost-sync", 8, 16),
        });
        let door = Self { devices: Vec::new(), listeners: Mutex::default(), pools };
        disks.into_iter().try_fold(door, |mut door, disk| {
            door.add(dir, disk)?;
            Ok(door)
        })
    }

    fn add(&mut self, dir: &Path, VhostDisk { disk, identity }: VhostDisk) -> Result<(), Error> {
        let (name, size) = (disk.name().to_owned(), disk.size());
        if name.is_empty() || name.contains(['/', '\0']) || self.path(&name).is_some() {
            return Err(Error::Name { name });
        }
        if !size.is_multiple_of(request::SECTOR) {
            return Err(Error::Size { disk: name, size });
        }
        let path = socket_path(dir, &name);
        let bound = listen::unix(&path, false)?;
        let dir = path.parent().unwrap_or(dir).to_owned();
        let device = Arc::new(Device::new(disk, identity, dir, Arc::clone(&self.pools)));
        let line = Arc::new(Line { device, state: Mutex::default(), free: Condvar::new() });
        let admitting = Arc::clone(&line);
        let listener = Listener::start(bound, "vhost-accept", move |fd| admitting.admit(fd))?;
        self.listeners.lock().push(listener);
        self.devices.push((line, path));
        Ok(())
    }

    /// Looks whether [`VhostDoor::open`] could make the sockets of these disks now; makes nothing.
    ///
    /// # Errors
    /// As [`VhostDoor::open`].
    pub fn check<'a>(dir: &Path, names: impl IntoIterator<Item = &'a str>) -> Result<(), Error> {
        names.into_iter().try_for_each(|name| Ok(listen::check_unix(&socket_path(dir, name))?))
    }

    /// The socket of a disk.
    pub fn path(&self, name: &str) -> Option<&Path> {
        let mut found = self.devices.iter().filter(|(line, _)| line.device.disk.name() == name);
        found.next().map(|(_, path)| path.as_path())
    }

    /// What happened so far, over all disks.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        self.devices.iter().for_each(|(line, _)| line.device.stats.add_to(&mut stats));
        stats
    }

    /// Stops: no more connections; what was taken is finished. Returns whether that ended within [`STOP_MAX`].
    pub fn stop(&self) -> bool {
        for listener in self.listeners.lock().drain(..) {
            listener.stop();
        }
        let deadline = Instant::now() + STOP_MAX;
        let mut ended = true;
        for (line, _) in &self.devices {
            ended &= line.stop(deadline);
        }
        if ended {
            // Only then: a queue at work must not find them closed.
            self.pools.slow.close();
            self.devices.iter().for_each(|(line, _)| line.device.large.close());
            self.pools.sync.close();
        }
        ended
    }
}

impl Drop for VhostDoor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The socket of the disk `name` in `dir`.
fn socket_path(dir: &Path, name: &str) -> PathBuf {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    dir.join(format!("{name}.sock"))
}

impl Line {
    /// Serves a connection in a thread of its own.
    fn admit(self: &Arc<Self>, fd: OwnedFd) {
        let line = Arc::clone(self);
        let started = std::thread::Builder::new().name("vhost".into()).spawn(move || line.serve(UnixStream::from(fd)));
        match started {
            Ok(thread) => {
                let mut state = self.state.lock();
                state.threads.retain(|thread| !thread.is_finished());
                state.threads.push(thread);
            }
            Err(error) => tracing::warn!(disk = self.device.disk.name(), %error, "no thread for a hypervisor"),
        }
    }

    /// Waits for its turn, and serves until the hypervisor goes. One that comes while another stays is turned away.
    fn serve(&self, stream: UnixStream) {
        let disk = self.device.disk.name();
        let Ok(handle) = stream.try_clone() else { return };
        let mut state = self.state.lock();
        let deadline = Instant::now() + TURN_WAIT;
        while state.busy && !state.stopping {
            if state.connection.as_ref().is_some_and(is_alive) || Instant::now() >= deadline {
                tracing::warn!(disk, "another hypervisor uses this disk");
                return;
            }
            self.free.wait_for(&mut state, Duration::from_millis(20));
        }
        if state.stopping {
            return;
        }
        state.busy = true;
        state.connection = Some(handle);
        drop(state);
        self.device.stats.connected.store(1, Ordering::Relaxed);
        self.talk(stream);
        self.device.stats.connected.store(0, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.busy = false;
        state.connection = None;
        drop(state);
        self.free.notify_all();
    }

    fn talk(&self, stream: UnixStream) {
        let disk = self.device.disk.name();
        let frontend = Arc::new(HandlerMutex::new(Frontend::new(Arc::clone(&self.device))));
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&frontend));
        loop {
            match handler.handle_request() {
                Ok(()) => {}
                Err(vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::PartialMessage) => break,
                Err(error) => {
                    tracing::warn!(disk, %error, "a hypervisor's connection ends");
                    break;
                }
            }
        }
        // Queues first: the hypervisor may take the end of the connection as leave to use its memory.
        frontend.lock().unwrap_or_else(std::sync::PoisonError::into_inner).stop();
        drop(handler);
    }

    fn stop(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        state.stopping = true;
        if let Some(connection) = &state.connection {
            let _ = connection.shutdown(Shutdown::Read);
        }
        while state.busy && Instant::now() < deadline {
            self.free.wait_for(&mut state, Duration::from_millis(50));
        }
        let (ended, threads) = (!state.busy, std::mem::take(&mut state.threads));
        drop(state);
        if ended {
            // Nobody holds the disk any more then.
            threads.into_iter().for_each(|thread| drop(thread.join()));
        }
        ended
    }
}

/// Whether the other end of a connection is still there.
fn is_alive(stream: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let _ = poll(&mut fds, Some(&now));
    let [fd] = &fds;
    fd.revents().is_empty()
}
