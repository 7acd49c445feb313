//! The control socket of a door.
//!
//! Invariants
//! - 0600 in a 0700 folder, and the peer's user is checked besides.
//! - At most [`CONNECTIONS_MAX`] connections; one more is closed at once. Each has a time limit for its
//!   order, so that none can hold a place by silence.

use std::{
    fs, io,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{
    Error, Result,
    control::{Answer, Request, Wire},
    live::Live,
    serve::Hooks,
};

const CONNECTIONS_MAX: usize = 16;
const ORDER_WAIT: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A bound control socket.
#[derive(Debug)]
pub(super) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Binds. The caller owns the session, so a socket that is there already is a dead door's.
    pub(super) fn bind(path: &Path) -> Result<Self> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io(path, "remove", e)),
            _ => {}
        }
        let failed = |e| Error::io(path, "listen", e);
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, path: path.to_path_buf() })
    }

    /// Answers until the session ends.
    pub(super) fn serve(&self, live: &Arc<Live>, hooks: &Arc<dyn Hooks>) {
        let places = Arc::new(AtomicUsize::new(0));
        while !*live.ending.0.lock() {
            match self.listener.accept() {
                Ok((stream, _)) => self.take(stream, live, hooks, &places),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(LOOK_EVERY),
                Err(error) => {
                    tracing::warn!(%error, "control socket");
                    std::thread::sleep(LOOK_EVERY);
                }
            }
        }
    }

    fn take(&self, stream: UnixStream, live: &Arc<Live>, hooks: &Arc<dyn Hooks>, places: &Arc<AtomicUsize>) {
        if places.load(Ordering::Acquire) >= CONNECTIONS_MAX || !is_ours(&stream) {
            return;
        }
        places.fetch_add(1, Ordering::AcqRel);
        let (live, hooks, path) = (live.clone(), hooks.clone(), self.path.clone());
        let place = Place(places.clone());
        let work = move || {
            let _place = place;
            if let Err(error) = answer(stream, &path, &live, &*hooks) {
                tracing::debug!(%error, "control connection");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("control".into()).spawn(work) {
            tracing::warn!(%error, "no thread for a control connection");
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// One of the places for connections, given back whatever happens.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn answer(stream: UnixStream, path: &Path, live: &Arc<Live>, hooks: &dyn Hooks) -> Result<()> {
    let failed = |e| Error::io(path, "accept", e);
    stream.set_nonblocking(false).map_err(failed)?;
    stream.set_read_timeout(Some(ORDER_WAIT)).map_err(failed)?;
    stream.set_write_timeout(Some(ORDER_WAIT)).map_err(failed)?;
    let mut wire = Wire::answering(stream, path);
    loop {
        match wire.receive::<Request>() {
            Ok(None) => return Ok(()),
            Ok(Some(request)) => wire.send(&live.obey(request, hooks))?,
            Err(e @ Error::Protocol { .. }) => {
                // What follows on this connection may be the rest of the nonsense.
                return wire.send(&Answer::Error { code: "E_USAGE".to_owned(), what: e.to_string() });
            }
            Err(e) => return Err(e),
        }
    }
}

/// Whether the peer is our own user or root.
fn is_ours(stream: &UnixStream) -> bool {
    let peer = rustix::net::sockopt::socket_peercred(stream);
    peer.is_ok_and(|p| p.uid.is_root() || p.uid == rustix::process::geteuid())
}
