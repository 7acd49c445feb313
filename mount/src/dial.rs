//! Connecting to a socket of this computer, and never waiting longer than was said.
//!
//! Invariants
//! - Who listens may be stopped, or wait for us: the kernel lets a caller wait without end for a place in a full queue,
//!   so a bound on the wait is set before the call (unix(7), `SO_SNDTIMEO` in socket(7)).
//!
//! Not here: what is said once connected, and the bounds on that.

use std::{io, os::unix::net::UnixStream, path::Path, time::Duration};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

/// Connects to the socket at `path` within `wait`. The stream has no bounds of its own yet.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] and [`io::ErrorKind::ConnectionRefused`] where nobody listens, [`io::ErrorKind::TimedOut`] where
/// somebody does and takes no caller.
pub fn unix(path: &Path, wait: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Zero would mean no bound.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(wait.max(Duration::from_millis(1))))?;
    loop {
        match connect(&socket, &SocketAddrUnix::new(path)?) {
            Ok(()) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e.into()),
        }
    }
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, time::Instant};

    use super::*;

    #[test]
    fn a_listener_that_takes_nobody_is_not_waited_for_without_end() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("bind");
        rustix::net::listen(&listener, 0).expect("a queue of one");
        let short = Duration::from_millis(50);
        let mut queued = Vec::new();
        let refused = loop {
            assert!(queued.len() < 100, "the queue has no end");
            let begun = Instant::now();
            match unix(&path, short) {
                Ok(stream) => queued.push(stream),
                Err(e) => break (e.kind(), begun.elapsed() >= short),
            }
        };
        assert_eq!(refused, (io::ErrorKind::TimedOut, true));
        drop(listener);
        assert_eq!(unix(&path, short).expect_err("nobody").kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(unix(&dir.path().join("none"), short).expect_err("nobody").kind(), io::ErrorKind::NotFound);
    }
}
