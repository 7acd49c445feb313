//! Listening sockets: where, with which rights, and the thread that accepts.
//!
//! Invariants
//! - A Unix socket is born 0600 (its mode is set before it is bound); a missing folder is made 0700.
//! - Only a socket nobody answers on is replaced; on stop only our own is removed.
//! - A TCP address off loopback needs TLS.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fs::Mode,
    io::Errno,
    net::{
        AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
        socket_with,
    },
};

use crate::nbd::{Address, Error, Result, address::Place};

/// Connections the kernel keeps before they are accepted.
const BACKLOG: i32 = 128;
/// Rest after an accept that failed for want of descriptors or memory.
const REST: Duration = Duration::from_millis(50);

/// A socket that listens.
#[derive(Debug)]
pub(crate) struct Bound {
    fd: OwnedFd,
    pub(crate) address: Address,
    file: Option<SocketFile>,
}

/// Our socket in the file system, told from another's by its inode.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

/// The thread that accepts.
#[derive(Debug)]
pub(crate) struct Listener {
    wake: Arc<OwnedFd>,
    thread: JoinHandle<()>,
    file: Option<SocketFile>,
}

pub(crate) fn unix(path: &Path, tls: bool) -> Result<Bound> {
    let shown = path.display().to_string();
    let failed = |action| move |e: Errno| Error::io(path.display().to_string(), action, e.into());
    let place = SocketAddrUnix::new(path).map_err(failed("name a socket"))?;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|e| Error::io(folder.display().to_string(), "make the folder", e))?;
    }
    clear_stale(path, &place)?;
    let fd =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed("open"))?;
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(failed("set the mode"))?;
    bind(&fd, &place).map_err(failed("bind"))?;
    let inode = fs::symlink_metadata(path).map(|m| (m.dev(), m.ino())).map_err(|e| Error::io(shown, "stat", e))?;
    listen(&fd, BACKLOG).map_err(failed("listen"))?;
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let address = Address { place: Place::Unix(path.clone()), export: String::new(), tls };
    Ok(Bound { fd, address, file: Some(SocketFile { path, inode }) })
}

/// Whether a socket could be made at `path` now.
pub(crate) fn check_unix(path: &Path) -> Result<()> {
    let failed = |e: Errno| Error::io(path.display().to_string(), "name a socket", e.into());
    is_stale(path, &SocketAddrUnix::new(path).map_err(failed)?).map(drop)
}

/// Removes a socket nobody listens on.
fn clear_stale(path: &Path, place: &SocketAddrUnix) -> Result<()> {
    match is_stale(path, place)? {
        true => fs::remove_file(path).map_err(|e| Error::io(path.display().to_string(), "remove the stale socket", e)),
        false => Ok(()),
    }
}

/// Whether a socket is there that nobody listens on; an error where something else is.
fn is_stale(path: &Path, place: &SocketAddrUnix) -> Result<bool> {
    let taken = |why| Error::SocketTaken { path: path.display().to_string(), why };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io(path.display().to_string(), "stat", e)),
    };
    if !meta.file_type().is_socket() {
        return Err(taken("something other than a socket is there"));
    }
    let probe =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None);
    let probe = probe.map_err(|e| Error::io(path.display().to_string(), "open", e.into()))?;
    match connect(&probe, place) {
        Err(Errno::CONNREFUSED) => Ok(true),
        _ => Err(taken("a server listens there")),
    }
}

/// The addresses of `HOST:PORT`, where listening on them is allowed.
pub(crate) fn check_tcp(place: &str, tls: bool) -> Result<Vec<SocketAddr>> {
    let failed = |e: io::Error| Error::io(format!("tcp:{place}"), "resolve", e);
    let places: Vec<SocketAddr> = place.to_socket_addrs().map_err(failed)?.collect();
    if !tls && places.iter().any(|place| !place.ip().is_loopback()) {
        return Err(Error::TlsNeeded { place: format!("tcp:{place}") });
    }
    Ok(places)
}

pub(crate) fn tcp(place: &str, tls: bool) -> Result<Bound> {
    let failed = |action| move |e: io::Error| Error::io(format!("tcp:{place}"), action, e);
    let places = check_tcp(place, tls)?;
    let listener = TcpListener::bind(places.as_slice()).map_err(failed("bind"))?;
    let address = tcp_address(listener.local_addr().map_err(failed("stat"))?, tls);
    Ok(Bound { fd: listener.into(), address, file: None })
}

fn tcp_address(place: SocketAddr, tls: bool) -> Address {
    let place = Place::Tcp { host: place.ip().to_string(), port: place.port() };
    Address { place, export: String::new(), tls }
}

pub(crate) fn inherited(fd: OwnedFd, tls: bool) -> Result<Bound> {
    let failed = |e: io::Error| Error::io("inherited socket", "use", e);
    let name = rustix::net::getsockname(&fd).map_err(|e| failed(e.into()))?;
    let is_stream = rustix::net::sockopt::socket_type(&fd).map_err(|e| failed(e.into()))? == SocketType::STREAM;
    if !is_stream || !rustix::net::sockopt::socket_acceptconn(&fd).map_err(|e| failed(e.into()))? {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a listening stream socket")));
    }
    let address = inherited_address(name, tls).map_err(failed)?;
    if let Place::Tcp { host, .. } = &address.place
        && !tls
        && !host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
    {
        return Err(Error::TlsNeeded { place: address.to_string() });
    }
    Ok(Bound { fd, address, file: None })
}

fn inherited_address(name: SocketAddrAny, tls: bool) -> io::Result<Address> {
    match name.address_family() {
        AddressFamily::UNIX => {
            let name = SocketAddrUnix::try_from(name)?;
            let path = name.path_bytes().unwrap_or_default().to_vec();
            let path = <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(path);
            Ok(Address { place: Place::Unix(path.into()), export: String::new(), tls })
        }
        _ => Ok(tcp_address(SocketAddr::try_from(name)?, tls)),
    }
}

impl Listener {
    /// Calls `admit` with each connection, in a thread of this name.
    pub(crate) fn start(bound: Bound, name: &str, admit: impl Fn(OwnedFd) + Send + 'static) -> Result<Self> {
        let place = bound.address.to_string();
        let failed = |e: io::Error| Error::io(&place, "start listening", e);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?);
        rustix::io::ioctl_fionbio(&bound.fd, true).map_err(|e| failed(e.into()))?;
        let (fd, woken) = (bound.fd, Arc::clone(&wake));
        let run = move || accept_all(&fd, &woken, &admit);
        let thread = thread::Builder::new().name(name.into()).spawn(run).map_err(failed)?;
        Ok(Self { wake, thread, file: bound.file })
    }

    /// Stops accepting, and removes the socket file if it is still ours.
    pub(crate) fn stop(self) {
        let _ = rustix::io::write(&*self.wake, &[1; 8]);
        drop(self.thread.join());
        if let Some(file) = self.file
            && fs::symlink_metadata(&file.path).is_ok_and(|m| (m.dev(), m.ino()) == file.inode)
        {
            drop(fs::remove_file(&file.path));
        }
    }
}

fn accept_all(fd: &OwnedFd, wake: &OwnedFd, admit: &impl Fn(OwnedFd)) {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN),
        ];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let [_, woken] = &fds;
        if !woken.revents().is_empty() {
            return;
        }
        match accept_with(fd, SocketFlags::CLOEXEC) {
            Ok(connection) => admit(connection),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            // Out of descriptors or memory: those that leave will free some.
            Err(_) => thread::sleep(REST),
        }
    }
}
