//! The NBD server: exports, listeners, limits, and an orderly end.
//!
//! Invariants
//! - A connection is a thread; at most [`Limits::connections`] of them. Over the cap the oldest connection
//!   that is still shaking hands makes way; with none, the newcomer is closed.
//! - A handshake ends within [`Limits::handshake`], whatever the client does.
//! - [`Server::stop`] returns within [`STOP_MAX`], whatever clients and disks do.
//! - A panic in a connection or a job ends that connection, and is counted.
//!
//! Not here: which disks there are; signals.

mod connection;
mod flight;
mod hub;
pub(crate) mod listen;
mod outlet;
pub(crate) mod pool;
mod status;
mod work;

use std::{
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use self::{hub::Hub, listen::Listener};
use super::{Address, Error, Export, Result, ServerTls, wire};

/// Longest time [`Server::stop`] takes.
pub const STOP_MAX: Duration = Duration::from_secs(5);

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once, over all listeners.
    pub connections: usize,
    /// From the first byte to the end of negotiation, TLS included.
    pub handshake: Duration,
    /// Threads for decodes and slow reads that run at once; more start where these wait for a source.
    pub workers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(2, usize::from).max(2);
        Self { connections: 256, handshake: Duration::from_secs(10), workers }
    }
}

/// What a server has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections closed for the cap.
    pub turned_away: u64,
    /// Connections open now.
    pub open: u64,
    /// Requests answered.
    pub requests: u64,
    /// Requests that were refused as invalid.
    pub refused: u64,
    /// Requests that failed in the disk.
    pub errors: u64,
    /// Bytes read by clients.
    pub bytes_read: u64,
    /// Bytes written by clients.
    pub bytes_written: u64,
    /// Panics that were contained. Each is a bug.
    pub panics: u64,
}

/// Puts a server together.
#[derive(Debug, Default)]
pub struct ServerBuilder {
    exports: Vec<Export>,
    limits: Limits,
    tls: Option<ServerTls>,
}

impl ServerBuilder {
    /// Adds an export. The first is also the answer to the empty name.
    #[must_use]
    pub fn export(mut self, export: Export) -> Self {
        self.exports.push(export);
        self
    }

    /// Sets bounds.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Requires TLS on every listener.
    #[must_use]
    pub fn tls(mut self, tls: ServerTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// The server, listening nowhere yet.
    ///
    /// # Errors
    /// [`Error::Name`] where a name is too long, not possible, or there twice.
    pub fn build(self) -> Result<Server> {
        for (index, export) in self.exports.iter().enumerate() {
            let bad = |why| Err(Error::Name { name: wire::shown(&export.name), why });
            if wire::text(export.name.as_bytes()).is_none() || wire::text(export.description.as_bytes()).is_none() {
                return bad("longer than 4096 bytes, or with a zero byte");
            }
            if self.exports.iter().take(index).any(|other| other.name == export.name) {
                return bad("served already");
            }
        }
        let hub = Hub::new(self.exports.into_iter().map(Arc::new).collect(), self.limits, self.tls);
        Ok(Server { hub, listeners: parking_lot::Mutex::default() })
    }
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    hub: Arc<Hub>,
    listeners: parking_lot::Mutex<Vec<Listener>>,
}

impl Server {
    /// Starts putting a server together.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// Listens on a Unix socket, 0600, whose folder is made (0700) where it is missing. A socket left by a
    /// server that is gone is replaced.
    ///
    /// # Errors
    /// [`Error::SocketTaken`] where a live server or something else is at `path`; [`Error::Io`].
    pub fn listen_unix(&self, path: &Path) -> Result<Address> {
        self.keep(listen::unix(path, self.hub.has_tls())?)
    }

    /// Listens on `HOST:PORT`; port 0 picks a free one, which the answer tells.
    ///
    /// # Errors
    /// [`Error::TlsNeeded`] off loopback without TLS; [`Error::Io`].
    pub fn listen_tcp(&self, place: &str) -> Result<Address> {
        self.keep(listen::tcp(place, self.hub.has_tls())?)
    }

    /// Listens on a socket that is bound and listening already, as systemd hands it over. TLS rules are the same.
    ///
    /// # Errors
    /// [`Error::TlsNeeded`]; [`Error::Io`] where it is no listening stream socket.
    pub fn listen_fd(&self, fd: OwnedFd) -> Result<Address> {
        self.keep(listen::inherited(fd, self.hub.has_tls())?)
    }

    /// Listens on `address` (its export name has no meaning here).
    ///
    /// # Errors
    /// As [`Server::listen_unix`] and [`Server::listen_tcp`]; [`Error::Address`] where the address asks for TLS
    /// and none is set up.
    pub fn listen(&self, address: &Address) -> Result<Address> {
        self.check_tls(address)?;
        match &address.place {
            super::address::Place::Unix(path) => self.listen_unix(path),
            super::address::Place::Tcp { host, port } => self.listen_tcp(&host_and_port(host, *port)),
        }
    }

    /// Looks whether [`Server::listen`] has a reason to fail now; opens and makes nothing.
    ///
    /// # Errors
    /// As [`Server::listen`].
    pub fn check(&self, address: &Address) -> Result<()> {
        self.check_tls(address)?;
        match &address.place {
            super::address::Place::Unix(path) => listen::check_unix(path),
            super::address::Place::Tcp { host, port } => {
                listen::check_tcp(&host_and_port(host, *port), self.hub.has_tls()).map(drop)
            }
        }
    }

    fn check_tls(&self, address: &Address) -> Result<()> {
        if address.tls && !self.hub.has_tls() {
            let why = "asks for TLS, and no certificates are set up";
            return Err(Error::Address { text: address.to_string(), why });
        }
        Ok(())
    }

    fn keep(&self, bound: listen::Bound) -> Result<Address> {
        let address = bound.address.clone();
        let hub = Arc::clone(&self.hub);
        self.listeners.lock().push(Listener::start(bound, "nbd-accept", move |fd| hub.admit(fd))?);
        Ok(address)
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        self.hub.stats()
    }

    /// Stops: no more connections; requests in the air are answered, later ones get `ESHUTDOWN`; whoever is
    /// left after three seconds is cut off. Returns whether every connection ended by itself.
    pub fn stop(&self) -> bool {
        let began = Instant::now();
        for listener in self.listeners.lock().drain(..) {
            listener.stop();
        }
        self.hub.stop(began + STOP_MAX * 3 / 5, began + STOP_MAX * 9 / 10)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.hub.stopping.load(Ordering::Relaxed) {
            self.stop();
        }
    }
}

/// As name resolution takes it.
fn host_and_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}
