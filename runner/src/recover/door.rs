//! The processes that serve a session: a small supervisor, unconfined, and under it the door.
//!
//! The supervisor holds the restore point, follows the machine and starts the door again when it dies. What a
//! stranger wrote (sources, clients) is met only by the door, which confines itself.
//!
//! Invariants
//! - The restore point is held before the door opens it, and until both processes have ended.
//! - A repository that is away keeps no door from serving what is local.

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use aquifer_formats::repo::{PointQuery, Repository, record::Holder};
use aquifer_mount::session::{
    self, Client, Confine, Error, Folder, NoHooks, Policy, Serving, inherited_listener, leave_terminal, serve,
    spawn_detached, supervise,
};

use super::{
    follow::follow,
    record::{HeldPoint, Machine},
    traces,
};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    host::Process,
    repository::{self, Hold},
    source,
    stop::Stop,
};

/// How long a supervisor may take to end once its door has.
const END_WAIT: Duration = Duration::from_secs(20);

/// How often a door on its way up is looked at.
const TICK: Duration = Duration::from_millis(20);

/// Starts the supervisor of a session away from the terminal. It outlives this process.
///
/// # Errors
/// It cannot be started at all.
pub fn launch(context: &Context, folder: &Folder) -> Result<Process> {
    let (program, _) = context.own_command()?;
    let mut command = Command::new(program);
    command.arg("--home").arg(context.home()?).arg("door").arg(folder.dir());
    let mut child = spawn_detached(&mut command, &folder.log_path())?;
    let gone = || Fail::new(Code::Failed, "the session's process ended at once").at(folder.log_path().display());
    let process = Process::of(child.id()).ok_or_else(gone);
    // Whoever lives on beside it must not keep it as a zombie.
    std::thread::spawn(move || child.wait());
    process
}

/// Waits until the door answers, at most `limit`.
///
/// # Errors
/// What the door said, if it died instead; an interruption.
pub fn await_door(folder: &Folder, supervisor: Option<&Process>, limit: Duration, stop: Stop) -> Result<()> {
    let began = Instant::now();
    let deaths = deaths(folder);
    loop {
        match Client::of(folder.clone()).status() {
            Ok(status) if matches!(status.door, session::status::Door::Running { .. }) => return Ok(()),
            Ok(_) | Err(Error::NotRunning { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let died = self::deaths(folder) > deaths || supervisor.is_some_and(|process| !process.is_alive());
        if died || began.elapsed() > limit {
            return Err(last_words(folder));
        }
        stop.check()?;
        stop.wait(TICK);
    }
}

/// How often the session's door has died.
fn deaths(folder: &Folder) -> usize {
    folder.events().map_or(0, |events| events.iter().filter(|event| event.op == "door_died").count())
}

/// Why a door did not come up, in its own words: the last error in its log.
fn last_words(folder: &Folder) -> Fail {
    const TAIL: u64 = 8 << 10;
    let mut text = Vec::new();
    if let Ok(mut log) = fs::File::open(folder.log_path()) {
        let end = log.seek(SeekFrom::End(0)).unwrap_or(0);
        let _ = log.seek(SeekFrom::Start(end.saturating_sub(TAIL)));
        let _ = log.take(TAIL).read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    let silent = || {
        let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned();
        Fail::new(Code::Failed, "the session's door did not come up").at(folder.log_path().display()).cause(last)
    };
    last_error(&text).unwrap_or_else(silent)
}

/// The last error in a log, whole: its code, what, where and what to do.
fn last_error(text: &str) -> Option<Fail> {
    let lines: Vec<&str> = text.lines().collect();
    let (at, mut fail) = lines.iter().enumerate().rev().find_map(|(at, line)| {
        let (code, what) = line.split_once(": ")?;
        Some((at, Fail::new(Code::find(code).filter(|code| !code.is_warning())?, what)))
    })?;
    for line in lines.iter().skip(at + 1).map_while(|line| line.strip_prefix("  ")) {
        fail = match line.split_once(": ") {
            Some(("at", place)) => fail.at(place),
            Some(("do", command)) => fail.help(command),
            _ => break,
        };
    }
    Some(fail)
}

/// Asks a supervisor to end, with its door, and waits until it has.
///
/// # Errors
/// It is still there.
pub fn end(supervisor: &Process) -> Result<()> {
    let failed = |e: &std::io::Error| Fail::io(format!("process {}", supervisor.pid), "end", e);
    supervisor.signal(rustix::process::Signal::TERM).map_err(|e| failed(&e))?;
    await_end(supervisor)
}

/// Waits until a supervisor whose door was stopped has ended too.
///
/// # Errors
/// It is still there.
pub fn await_end(supervisor: &Process) -> Result<()> {
    if supervisor.wait_gone(END_WAIT) {
        return Ok(());
    }
    Err(Fail::new(Code::Timeout, format!("process {} does not end", supervisor.pid)))
}

/// The supervisor of a session whose door answers.
pub fn supervisor(folder: &Folder) -> Option<Process> {
    match Client::of(folder.clone()).status().ok()?.door {
        session::status::Door::Running { supervisor, .. } => Process::of(supervisor?),
        session::status::Door::NotRunning => None,
    }
}

/// Is the supervisor of `folder` until its door has ended in order.
///
/// # Errors
/// The door keeps dying, or cannot be started at all.
pub fn run_supervisor(context: &Context, folder: &Folder) -> Result<()> {
    leave_terminal().map_err(|e| Fail::io("the terminal", "leave", &e))?;
    let stop = context.stop()?;
    let spec = folder.load()?;
    let point = Machine::of(&spec)?.and_then(|machine| machine.point);
    let hold = point.and_then(|point| hold(context, &point, spec.id));
    let (program, _) = context.own_command()?;
    let mut start = |listener: Stdio| -> std::io::Result<Child> {
        let own = std::process::id().to_string();
        Command::new(&program)
            .arg("door")
            .arg(folder.dir())
            .args(["--serve", "--supervisor", &own])
            .stdin(listener)
            .spawn()
    };
    let done = Arc::new(AtomicBool::new(false));
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| follow(folder, &|| done.load(Ordering::Relaxed)));
        scope.spawn(|| traces::keep(context, folder, &done));
        let outcome = supervise(folder, Policy::default(), &mut start, &|| stop.is_asked());
        done.store(true, Ordering::Release);
        outcome
    });
    drop(hold);
    Ok(outcome?)
}

/// Holds the session's point. A repository that is away cannot be written to, nor can it be swept meanwhile.
fn hold(context: &Context, point: &HeldPoint, session: uuid::Uuid) -> Option<Hold> {
    let held = || -> Result<Hold> {
        let repo = Repository::open(&point.repository, repository::me(context)?)?;
        let machine = repo.machine(&point.machine.to_string())?;
        let found = repo.resolve(&machine, &PointQuery::Id(point.point.to_string()))?;
        let holder = Holder { session: Some(session.to_string()), ..repository::holder("recover") };
        Hold::read(&repo, &machine, &found, holder)
    };
    match held() {
        Ok(hold) => Some(hold),
        Err(fail) => {
            context.out.say(format_args!("the restore point is not held: {fail}"));
            None
        }
    }
}

/// Is the door of `folder` until it is told to end.
///
/// # Errors
/// Whatever keeps it from serving.
pub fn run_door(context: &Context, folder: &Folder, supervisor: Option<u32>) -> Result<()> {
    let stop = context.stop()?;
    let serving = Serving {
        connect: |uri| source::layer_of_nbd(uri),
        hooks: Arc::new(NoHooks),
        confine: Confine::Reading(Vec::new()),
        listener: inherited_listener().map_err(|e| Fail::io("the NBD socket", "take over", &e))?,
        supervisor,
        stop: &|| stop.is_asked(),
    };
    Ok(serve(folder, &serving)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_a_log_is_taken_whole() {
        let log = "W_IN_THE_CLEAR: plain\nE_IO: first\n  at: /a\nsome talk\nE_CHAIN_BROKEN: a file is gone\n  at: /b, offset 3, ENOENT: no\n  do: aquifer verify x\nbye\n";
        let fail = last_error(log).expect("one");
        assert_eq!(
            fail.to_string(),
            "E_CHAIN_BROKEN: a file is gone\n  at: /b, offset 3, ENOENT: no\n  do: aquifer verify x"
        );
        assert_eq!(last_error("nothing: at all\nW_FULL: no error\n"), None);
    }
}
