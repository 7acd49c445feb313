//! Codes for what sessions and hosts report.

use aquifer_mount::{fuse, loopdev, session, vhost};

use super::{At, Code, Fail, table::from_io};
use crate::host::{self, qmp};

impl From<session::Error> for Fail {
    fn from(error: session::Error) -> Self {
        use session::Error as E;
        match error {
            E::Io { path, action, source } => from_io(&path, action, None, &source),
            E::State { have, need, allowed } => {
                let list =
                    |states: &[session::State]| states.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let what = format!("the session is {have}; this needs {}", list(&need));
                let fail = Fail::new(Code::State, what);
                if allowed.is_empty() {
                    fail
                } else {
                    fail.at("session").cause(format!("possible now: {}", list(&allowed)))
                }
            }
            E::Busy { path, holder } => {
                Fail::new(Code::Busy, format!("the session is in use by process {holder}")).at(path)
            }
            E::BadFile { path, what } => Fail::new(Code::Corrupt, format!("{path} is not usable")).at(path).cause(what),
            E::SocketPath { path, len, max } => {
                let what = format!("a socket's path of {len} bytes is too long; {max} fit");
                Fail::new(Code::Usage, what)
                    .at(path)
                    .help_again("--into DIR    # a shorter one, or a shorter --home DIR")
            }
            E::OtherChain { disk, expected, found } => {
                Fail::new(Code::State, format!("the source of disk {disk} is not the one the session was started on"))
                    .at(disk)
                    .cause(format!("expected {expected}, found {found}"))
            }
            E::NoSession { name } => {
                Fail::new(Code::NotFound, format!("there is no session `{name}`")).help("aquifer status")
            }
            E::Ambiguous { name, fits } => {
                let what = format!("`{name}` fits several sessions: {}", fits.join(", "));
                Fail::new(Code::Ambiguous, what).help("aquifer status")
            }
            E::NotRunning { path } => {
                let help = format!("aquifer session resume {path}");
                Fail::new(Code::State, "the session's door is not running").at(path).help(help)
            }
            E::Door { code, what } => Fail::new(Code::find(&code).unwrap_or(Code::Failed), what),
            E::Protocol { path, what } => Fail::new(Code::Timeout, what).at(path),
            E::NoDisk { name } => Fail::new(Code::NotFound, format!("the session has no disk `{name}`")),
            E::Clients { connections, files } => {
                Fail::new(Code::Busy, format!("{connections} NBD clients are connected, {files}"))
            }
            E::Disk(error) => error.into(),
            E::Nbd(error) => error.into(),
            E::Fuse(error) => error.into(),
            E::KeepsDying { times, seconds, how, log } => {
                let what = format!("the session's door ended {times} times within {seconds} s");
                Fail::new(Code::Failed, what).at(&log).cause(how).help(format!("cat {log}"))
            }
        }
    }
}

impl From<fuse::Error> for Fail {
    fn from(error: fuse::Error) -> Self {
        use fuse::Error as E;
        match error {
            E::Io { path, action: "mount", source } => {
                from_io(&path, "mount", None, &source).help("aquifer doctor    # says who may use /dev/fuse here")
            }
            E::Io { path, action, source } => from_io(&path, action, None, &source),
            E::Busy { path } => Fail::new(Code::Busy, format!("another door serves at {path}")).at(path),
            E::Name { path, name } => Fail::new(Code::Usage, format!("`{name}` cannot name a file")).at(path),
        }
    }
}

impl From<vhost::Error> for Fail {
    fn from(error: vhost::Error) -> Self {
        match error {
            vhost::Error::Listen(error) => error.into(),
            ref error @ vhost::Error::Size { ref disk, .. } => Fail::new(Code::Unsupported, error.to_string()).at(disk),
            ref error @ vhost::Error::Name { ref name } => Fail::new(Code::Usage, error.to_string()).at(name),
        }
    }
}

impl From<loopdev::Error> for Fail {
    fn from(error: loopdev::Error) -> Self {
        match error {
            loopdev::Error::Io { path, action, source } => from_io(&path, action, None, &source),
            error @ loopdev::Error::NoneFree => Fail::new(Code::Busy, error.to_string()).help("losetup -a"),
        }
    }
}

impl From<host::Error> for Fail {
    fn from(error: host::Error) -> Self {
        use host::Error as E;
        match error {
            E::Missing { what, looked } => {
                Fail::new(Code::Tool, format!("{what} is not installed")).at(looked).help("aquifer doctor")
            }
            E::Shape { what } => Fail::new(Code::Unsupported, format!("the host cannot run this machine: {what}")),
            error @ E::Variables { .. } => Fail::new(Code::Unsupported, error.to_string()).help("aquifer doctor"),
            E::Io { path, action, source } => from_io(&path.display().to_string(), action, None, &source),
            E::Start { program, status, said } => {
                Fail::new(Code::Guest, format!("{program} ended at its start ({status})")).at(program).cause(said)
            }
            E::Monitor(error) => error.into(),
            E::Observed { what, expected, found } => {
                Fail::new(Code::Guest, format!("{what} is not what it was made to be"))
                    .at(what)
                    .cause(format!("expected {expected}, found {found}"))
            }
            E::Power { have } => Fail::new(Code::Guest, format!("the machine is {}", have.word())),
        }
    }
}

impl From<qmp::Error> for Fail {
    fn from(error: qmp::Error) -> Self {
        use qmp::Error as E;
        match error {
            E::Io { path, action, source } => from_io(&path.display().to_string(), action, None, &source),
            E::Closed { path } => Fail::new(Code::Guest, "QEMU closed its monitor").at(path.display()),
            E::Timeout { path, command, seconds } => {
                Fail::new(Code::Timeout, format!("QEMU did not answer {command} within {seconds} s")).at(path.display())
            }
            E::Refused { command, class, what } => Fail {
                at: Some(At { path: command.clone(), offset: None, cause: Some(format!("{class}: {what}")) }),
                ..Fail::new(Code::Guest, format!("QEMU refused {command}"))
            },
            E::Protocol { path, what } => {
                Fail::new(Code::Guest, "QEMU's monitor cannot be understood").at(path.display()).cause(what)
            }
        }
    }
}
