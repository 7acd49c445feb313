//! Keeps a session's door open: a small process that starts the one that serves, and starts it again
//! when it dies. The machine stays meanwhile: its hypervisor reconnects, or its I/O waits.
//!
//! The NBD socket listens in the supervisor, which never answers on it: a client that reconnects while
//! no door is there waits in the socket's queue instead of being refused, and is served by the next door
//! within milliseconds. (QEMU sleeps for a whole second after a refusal, then two, then four.)
//!
//! Invariants
//! - The supervisor opens no source, no overlay and no door; nothing a stranger wrote reaches it.
//! - It ends when the door ends in order, when the session is no longer to be served, or when the door
//!   dies faster than [`Policy`] allows; then the session is `Interrupted` or `Failed`, and says why.
//! - The supervisor's own death does not touch the door. The next one takes over by waiting for it.
//! - Of two supervisors the one without the door has no queue: a caller in it would never be answered.
//!
//! Not here: what the door's process does (`serve`), which command starts it.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
            net::UnixListener,
            process::ExitStatusExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Error, Folder, Result, Spec, State, folder::make_private_dir};

/// A log longer than this is set aside when a door starts, in bytes.
const LOG_BYTES_MAX: u64 = 8 << 20;

/// How long a door may take to end in order before it is killed. Its own limits are shorter.
const END_WAIT: Duration = Duration::from_secs(15);

const LOOK_EVERY: Duration = Duration::from_millis(50);

/// When to try again, and when to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Deaths within `window` after which it is given up.
    pub deaths_max: usize,
    /// How far back deaths count.
    pub window: Duration,
    /// Pause before the first restart; doubled for each further death within the window.
    pub pause: Duration,
    /// Longest pause.
    pub pause_max: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            deaths_max: 8,
            window: Duration::from_secs(120),
            pause: Duration::from_millis(50),
            pause_max: Duration::from_secs(5),
        }
    }
}

/// Starts the door by `start` and keeps it running until it ends in order or `stop` says so. `start` is
/// given the door's standard input: the socket it answers on, which it finds by [`inherited_listener`].
///
/// # Errors
/// [`Error::KeepsDying`]; [`Error::Io`] where it cannot be started at all.
pub fn supervise(
    folder: &Folder,
    policy: Policy,
    start: &mut dyn FnMut(Stdio) -> io::Result<Child>,
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    let mut deaths: VecDeque<Instant> = VecDeque::new();
    let mut queue: Option<Queue> = None;
    loop {
        // A door that outlived its supervisor, or that of another one which was started while ours was dead.
        while folder.owner()?.is_some() && !stop() {
            // Whoever waits in our queue would wait for ever: that door answers on another.
            queue = None;
            std::thread::sleep(LOOK_EVERY);
        }
        if stop() || !folder.load()?.state.serves() {
            return Ok(());
        }
        if !queue.as_ref().is_some_and(Queue::is_there) {
            drop(queue.take());
            queue = Some(Queue::bind(&folder.load()?)?);
        }
        let input = queue.as_ref().map_or_else(|| Ok(Stdio::null()), Queue::input)?;
        let mut door = start(input).map_err(|e| Error::io(folder.dir(), "start the door", e))?;
        let status = wait_for(folder, &mut door, stop)?;
        if status.success() || stop() {
            return Ok(());
        }
        let how = words(status);
        while deaths.front().is_some_and(|d| d.elapsed() > policy.window) {
            deaths.pop_front();
        }
        deaths.push_back(Instant::now());
        record_death(folder, &how)?;
        if deaths.len() >= policy.deaths_max {
            return give_up(folder, policy, deaths.len(), how);
        }
        let doublings = u32::try_from(deaths.len() - 1).unwrap_or(u32::MAX).min(16);
        pause(policy.pause.saturating_mul(1 << doublings).min(policy.pause_max), stop);
    }
}

/// The NBD socket, listening.
#[derive(Debug)]
struct Queue {
    listener: UnixListener,
    path: PathBuf,
    /// Of the name: another supervisor may have put its own socket there.
    inode: u64,
}

impl Queue {
    /// Binds. No door runs, so a socket that is there is one that nobody answers on.
    fn bind(spec: &Spec) -> Result<Self> {
        let path = spec.nbd_socket();
        make_private_dir(&spec.runtime_dir)?;
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io(&path, "remove", e)),
            _ => {}
        }
        let failed = |e| Error::io(&path, "listen", e);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let inode = fs::symlink_metadata(&path).map_err(failed)?.ino();
        Ok(Self { listener, path, inode })
    }

    /// Whether callers of the name still come to this socket.
    fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode)
    }

    fn input(&self) -> Result<Stdio> {
        let again = self.listener.try_clone().map_err(|e| Error::io(&self.path, "share", e))?;
        Ok(Stdio::from(OwnedFd::from(again)))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The socket that [`supervise`] gave this process as its standard input, if it did.
///
/// # Errors
/// [`io::Error`] where it cannot be taken over.
pub fn inherited_listener() -> io::Result<Option<OwnedFd>> {
    let input = io::stdin();
    if rustix::net::sockopt::socket_acceptconn(&input) != Ok(true) {
        return Ok(None);
    }
    // What is left as standard input does no harm: it is the same socket and ends with the process.
    Ok(Some(rustix::io::fcntl_dupfd_cloexec(&input, 3)?))
}

fn wait_for(folder: &Folder, door: &mut Child, stop: &dyn Fn() -> bool) -> Result<ExitStatus> {
    let failed = |e| Error::io(folder.dir(), "wait for the door", e);
    let mut asked: Option<Instant> = None;
    loop {
        if let Some(status) = door.try_wait().map_err(failed)? {
            return Ok(status);
        }
        match asked {
            None if stop() => {
                if let Some(pid) = i32::try_from(door.id()).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::TERM);
                }
                asked = Some(Instant::now());
            }
            Some(since) if since.elapsed() > END_WAIT => door.kill().map_err(failed)?,
            _ => {}
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A session whose door died is interrupted until the next one answers.
fn record_death(folder: &Folder, how: &str) -> Result<()> {
    match folder.transition(State::Interrupted, "door_died", Some(how)) {
        Ok(_) => Ok(()),
        Err(Error::State { .. }) => folder.event(folder.load()?.id, "door_died", Some(how)),
        Err(e) => Err(e),
    }
}

fn give_up(folder: &Folder, policy: Policy, times: usize, how: String) -> Result<()> {
    let error = Error::KeepsDying {
        times,
        seconds: policy.window.as_secs(),
        how,
        log: folder.log_path().display().to_string(),
    };
    let reason = error.to_string();
    // A session that never got as far as being mounted has failed; one that was stays interrupted.
    if folder.transition(State::Failed, "door_given_up", Some(&reason)).is_err() {
        folder.event(folder.load()?.id, "door_given_up", Some(&reason))?;
    }
    Err(error)
}

fn pause(time: Duration, stop: &dyn Fn() -> bool) {
    let start = Instant::now();
    while start.elapsed() < time && !stop() {
        std::thread::sleep(LOOK_EVERY.min(time));
    }
}

fn words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".to_owned(),
    }
}

/// Starts `command` away from the terminal: no input, output and errors to `log`, which is set aside
/// first where it has grown long. The started process is to call [`leave_terminal`].
///
/// # Errors
/// [`Error::Io`].
pub fn spawn_detached(command: &mut Command, log: &Path) -> Result<Child> {
    let failed = |e| Error::io(log, "open", e);
    let file = open_log(log).map_err(failed)?;
    let again = file.try_clone().map_err(failed)?;
    command.stdin(Stdio::null()).stdout(file).stderr(again);
    command.spawn().map_err(|e| Error::io(Path::new(command.get_program()), "start", e))
}

fn open_log(log: &Path) -> io::Result<File> {
    if fs::metadata(log).is_ok_and(|m| m.len() > LOG_BYTES_MAX) {
        fs::rename(log, log.with_extension("log.1"))?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(log)
}

/// Makes this process the head of a session of its own, so that the terminal's end is not its end, and
/// lets go of the folder it was started in.
///
/// # Errors
/// [`io::Error`] of the system.
pub fn leave_terminal() -> io::Result<()> {
    // Refused to a process that is the head of its group already, as a shell's background job is: it
    // has no terminal to lose then but the one its session keeps, and hangups are ignored by the caller.
    match rustix::process::setsid() {
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    rustix::process::chdir("/").map_err(io::Error::from)
}

#[cfg(test)]
mod tests;
