//! The one table from errors of the libraries and of the operating system to codes.

use std::io;

use aquifer_formats::{self as formats, repo};
use aquifer_mount::nbd;
use aquifer_vdisk as vdisk;

use super::{At, Code, Fail, errno_name};

/// The code an error of the operating system stands for.
fn code_of(error: &io::Error) -> Code {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::NotFound | Kind::NotADirectory => Code::NotFound,
        Kind::PermissionDenied => Code::Access,
        Kind::AlreadyExists | Kind::DirectoryNotEmpty => Code::Exists,
        Kind::StorageFull | Kind::QuotaExceeded => Code::Capacity,
        Kind::ResourceBusy | Kind::ExecutableFileBusy | Kind::AddrInUse => Code::Busy,
        Kind::TimedOut => Code::Timeout,
        Kind::ConnectionRefused
        | Kind::ConnectionReset
        | Kind::ConnectionAborted
        | Kind::NotConnected
        | Kind::HostUnreachable
        | Kind::NetworkUnreachable
        | Kind::NetworkDown => Code::Net,
        Kind::UnexpectedEof => Code::Truncated,
        // The word was too long for what it names: a file, or a socket, which holds 107 bytes.
        Kind::InvalidFilename => Code::Usage,
        Kind::Unsupported => Code::Unsupported,
        Kind::StaleNetworkFileHandle => Code::RepoOffline,
        _ => Code::Io,
    }
}

pub(super) fn from_io(path: &str, action: &str, offset: Option<u64>, error: &io::Error) -> Fail {
    let code = code_of(error);
    let what = match code {
        Code::NotFound => format!("{path} does not exist"),
        Code::Access => format!("cannot {action} {path}: access denied"),
        Code::Exists => format!("{path} exists already"),
        Code::Capacity => format!("no space left to {action} {path}"),
        Code::Busy => format!("cannot {action} {path}: it is in use"),
        Code::Truncated => format!("{path} ends too early"),
        Code::Usage => format!("cannot {action} {path}: the name is too long"),
        _ => format!("cannot {action} {path}"),
    };
    let fail = Fail::new(code, what).at(path).cause(errno_name(error));
    match offset {
        Some(offset) if offset > 0 || action == "read" || action == "write" => fail.offset(offset),
        _ => fail,
    }
}

impl From<formats::Error> for Fail {
    fn from(error: formats::Error) -> Self {
        use formats::Error as E;
        match error {
            E::Io { path, action, offset, source } => from_io(&path, action, Some(offset), &source),
            E::Corrupt { path, offset, what } => {
                Fail::new(Code::Corrupt, format!("{path} is damaged")).at(path).offset(offset).cause(what)
            }
            E::BadBlock { path, offset, len, what } => {
                Fail::new(Code::BlockCorrupt, format!("a stored block of {len} bytes in {path} is damaged"))
                    .at(path)
                    .offset(offset)
                    .cause(what)
            }
            E::Truncated { path, len, need, what } => {
                Fail::new(Code::Truncated, format!("{path} ends at {len} bytes, but {what} needs {need}"))
                    .at(path)
                    .offset(len)
            }
            E::ChainBroken { path, what } => {
                Fail::new(Code::ChainBroken, format!("the chain is broken: {what}")).at(path)
            }
            E::Unsupported { path, what } => Fail::new(Code::Unsupported, format!("not supported: {what}")).at(path),
            E::Refused { path, what } => Fail::new(Code::Refused, what).at(path),
            E::Key { path, what } if what.starts_with("the snapshot") => {
                Fail::new(Code::Key, format!("a key is needed: {what}")).at(path).help_again("--key-file FILE")
            }
            E::Key { path, what } => Fail::new(Code::Key, format!("a key is needed: {what}")).at(path),
            E::OutOfRange { path, offset, len, size } => {
                Fail::new(Code::OutOfRange, format!("range {offset}+{len} lies outside {size} bytes"))
                    .at(path)
                    .offset(offset)
            }
        }
    }
}

impl From<vdisk::Error> for Fail {
    fn from(error: vdisk::Error) -> Self {
        use vdisk::Error as E;
        match error {
            E::Format(error) => error.into(),
            E::ReadOnly { disk } => Fail::new(Code::ReadOnly, format!("{disk} is read-only")).at(disk),
            E::OutOfRange { disk, offset, len, size } => {
                Fail::new(Code::OutOfRange, format!("range {offset}+{len} lies outside {size} bytes"))
                    .at(disk)
                    .offset(offset)
            }
            E::NoSpace { path, what } => Fail::new(Code::Capacity, format!("no space left for {what}")).at(path),
            E::SyncFailed { path, cause } => {
                Fail::new(Code::Io, "an earlier sync failed; flushes are refused until the session is restarted")
                    .at(path)
                    .cause(cause)
            }
            E::WrongOverlay { path, what } => Fail::new(Code::State, what).at(path),
            E::Busy { path, holder } => Fail::new(Code::Busy, format!("in use by process {holder}")).at(path),
            E::NotLocal { disk, absent } => {
                Fail::new(Code::State, format!("{absent} bytes of {disk} are not local yet")).at(disk)
            }
            E::SourceAway { offset, seconds, cause, .. } => Fail {
                at: Some(At { path: "source".into(), offset: Some(offset), cause: Some(cause) }),
                ..Fail::new(Code::Timeout, format!("the source did not answer for {seconds} s"))
            },
        }
    }
}

impl From<nbd::Error> for Fail {
    fn from(error: nbd::Error) -> Self {
        use nbd::Error as E;
        let text = error.to_string();
        match error {
            E::Io { place, action, source } => from_io(&place, action, None, &source),
            E::Address { text, why } => Fail::new(Code::Usage, format!("`{text}` is not an NBD address: {why}")),
            E::TlsNeeded { place } => {
                Fail::new(Code::Refused, format!("{place} is not a loopback address, and no TLS is set up"))
                    .at(place)
                    .help_again("--tls DIR")
            }
            E::Tls { place, why } => Fail::new(Code::Access, format!("TLS failed: {why}")).at(place),
            E::SocketTaken { path, why } => Fail::new(Code::Busy, why).at(path),
            E::Name { name, why } => Fail::new(Code::Usage, format!("export {name:?}: {why}")),
            E::Protocol { place, .. } => Fail::new(Code::Net, text).at(place),
            E::Refused { place, what } => Fail::new(Code::NotFound, format!("refused by the server: {what}")).at(place),
            E::Remote { place, offset, .. } => Fail::new(Code::Io, text).at(place).offset(offset),
            E::Lost { place, why } => Fail::new(Code::Net, "the connection was lost").at(place).cause(why),
            E::FlushLost { place } => Fail::new(Code::Net, text).at(place),
            E::Impossible { place, what } => Fail::new(Code::Unsupported, what).at(place),
        }
    }
}

impl From<repo::Error> for Fail {
    fn from(error: repo::Error) -> Self {
        use repo::Error as E;
        match error {
            E::Format(error) => error.into(),
            E::NoRepository { path, what } => Fail::new(Code::NoRepository, format!("{path} is no repository: {what}"))
                .at(&path)
                .help(format!("aquifer -r {path} init")),
            E::NotFound { path, what } => {
                Fail::new(Code::NotFound, format!("there is no {what}")).at(path).help("aquifer points")
            }
            E::Ambiguous { path, what, candidates } => {
                Fail::new(Code::Ambiguous, format!("{what} could be {}", candidates.join(", "))).at(path)
            }
            E::Exists { path } => Fail::new(Code::Exists, format!("{path} exists already")).at(path),
            E::Locked { path, holder, kind, since } => {
                Fail::new(Code::FileLocked, format!("held by {holder} ({kind}) since {since}"))
                    .at(path)
                    .help("aquifer leases")
            }
            E::ForeignOwner { path, owner } => {
                Fail::new(Code::ForeignOwner, format!("the repository belongs to {owner}; it can only be read"))
                    .at(&path)
                    .help(format!("aquifer -r {path} init --take-over    # if {owner} is given up"))
            }
            E::PointState { path, state, why } => match state {
                "incomplete" => Fail::new(Code::PointIncomplete, why).at(path),
                "missing" => Fail::new(Code::ChainBroken, why).at(path),
                _ => Fail::new(Code::BlockCorrupt, why).at(path),
            },
            E::RolledBack { path, what } => {
                Fail::new(Code::Refused, format!("the repository is older than what was seen before: {what}")).at(path)
            }
            E::Unsafe { path, what } => {
                Fail::new(Code::Unsupported, format!("this file system cannot hold a repository: {what}")).at(path)
            }
        }
    }
}
