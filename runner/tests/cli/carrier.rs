//! Who carries work out, and is killed while at it: a command that waits for its end, a worker, the service itself.

use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aquifer_runner::catalogue::{Catalogue, Fence, NewWork, Outcome as Ended, SessionId, SessionResult, WorkState};
use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{Outcome, Room};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until it is so.
pub(crate) fn wait(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Does something with the catalogue as a worker does: under the lease of a piece of work, which is done afterwards.
pub(crate) fn as_worker<T>(room: &Room, what: impl FnOnce(&Catalogue, &Fence) -> T) -> T {
    let catalogue = room.catalogue();
    let new = NewWork::new("test", "", 300, Value::Null);
    catalogue.enqueue(&new).expect("enqueue");
    let (_, fence) = catalogue.claim("test", &["test"], Timestamp::now()).expect("claim").expect("work");
    let done = what(&catalogue, &fence);
    catalogue.finish(&fence, &Ended::Success(Value::Null), None).expect("the work is done");
    done
}

/// A process that carries work out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// The command that was typed.
    Command,
    /// `aquifer worker`, for a command that left the work to others.
    Worker,
    /// `aquifer serve`.
    Serve,
}

/// A process, killed with the test.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    /// Starts a command that nobody listens to.
    pub(crate) fn start(mut command: Command) -> Self {
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a process"))
    }

    /// Whether it has not ended by itself.
    pub(crate) fn runs(&mut self) -> bool {
        self.0.try_wait().expect("a status").is_none()
    }

    /// Waits for so long, or for its end; how long that took, if it has ended.
    pub(crate) fn ends_within(&mut self, most: Duration) -> Option<Duration> {
        let began = Instant::now();
        while began.elapsed() < most {
            if !self.runs() {
                return Some(began.elapsed());
            }
            thread::sleep((most.saturating_sub(began.elapsed())).min(Duration::from_millis(2)));
        }
        None
    }

    /// `kill -9`; whether it was still at it.
    pub(crate) fn kill(mut self) -> bool {
        let runs = self.runs();
        let _ = self.0.kill();
        self.0.wait().expect("it is gone");
        runs
    }

    /// Waits for its end; its exit code.
    pub(crate) fn ends(&mut self) -> Option<i32> {
        let until = Instant::now() + PATIENCE;
        while self.runs() {
            assert!(Instant::now() < until, "it does not end");
            thread::sleep(Duration::from_millis(10));
        }
        self.0.wait().expect("a status").code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Carrier {
    pub(crate) const ALL: [Self; 3] = [Self::Command, Self::Worker, Self::Serve];

    /// The one of a round.
    pub(crate) fn of(round: u32) -> Self {
        Self::ALL[round as usize % Self::ALL.len()]
    }

    /// A process of its kind, which takes whatever is left to do.
    pub(crate) fn hand(self, room: &Room) -> Process {
        let args: &[&str] = match self {
            Self::Serve => &["-c", "site.toml", "serve", "--lease", "2s"],
            Self::Command | Self::Worker => &["-c", "site.toml", "worker", "--until-idle", "--lease", "2s"],
        };
        Process::start(room.command(args))
    }

    /// Begins a run of a job.
    pub(crate) fn begins(self, room: &Room, job: &str) -> Process {
        match self {
            Self::Command => Process::start(room.command(["-c", "site.toml", "run", job])),
            Self::Worker | Self::Serve => {
                let begun = room.json(["-c", "site.toml", "run", job, "--no-wait"]);
                assert!(begun.code <= 1, "{self:?} {job}: {}{}", begun.stdout, begun.stderr);
                self.hand(room)
            }
        }
    }

    /// Begins a run of a job, and kills whoever carries it out after that time; whether it was still at it.
    pub(crate) fn is_killed(self, room: &Room, job: &str, after: Duration) -> bool {
        let process = self.begins(room, job);
        thread::sleep(after);
        // The service goes on for ever: it was at it if there is work left.
        process.kill() && (self != Self::Serve || is_at_work(room))
    }

    /// Sees to it that a run which was begun since then has ended well: brings the one that was cut short to its end, or
    /// makes one where none was begun. Answers what was said.
    pub(crate) fn carries_through(self, room: &Room, job: &str, since: Option<SessionId>) -> String {
        let mut said = String::new();
        if newest_run(room, job) == since || room.catalogue().job(job).expect("the job").open_session.is_some() {
            if self == Self::Command {
                let Outcome { stdout, stderr, .. } = room.json(["-c", "site.toml", "run", job]);
                said = stdout + &stderr;
            } else {
                if newest_run(room, job) == since {
                    room.json(["-c", "site.toml", "run", job, "--no-wait"]);
                }
                self.finishes(room);
            }
        }
        let newest = newest_run(room, job).filter(|newest| Some(*newest) != since).expect("a run");
        let session = room.catalogue().session(newest).expect("the session");
        let reason = session.reason.as_deref().unwrap_or_default();
        let good = match session.result {
            SessionResult::Success => true,
            // That it went on from what was there, by what it found the changes, that the one before had it all: nothing else.
            SessionResult::Warning => {
                let known = ["W_RESUMED", "W_COMPARED", "compared instead", "W_NO_NEW_POINT"];
                known.iter().any(|word| reason.contains(word))
            }
            _ => false,
        };
        assert!(good && session.ended.is_some(), "{self:?} {job}: {session:?}\n{said}");
        said
    }

    /// Another one of its kind does what is left to do.
    pub(crate) fn finishes(self, room: &Room) {
        let mut process = self.hand(room);
        if self == Self::Serve {
            let until = Instant::now() + PATIENCE;
            while is_at_work(room) {
                assert!(Instant::now() < until && process.runs(), "{:?}", room.catalogue().open_work());
                thread::sleep(Duration::from_millis(20));
            }
            kill_process(Pid::from_child(&process.0), Signal::TERM).expect("a signal");
        }
        // What jobs have warned of is no end of a service that was asked to stop.
        let most = i32::from(self != Self::Serve);
        assert!(process.ends().is_some_and(|code| code <= most), "{self:?}");
    }
}

/// Goes on for a few rounds more where everybody was faster than the kills: a storm in which nobody dies proves nothing.
pub(crate) fn goes_on(round: u32, rounds: u32, kills: u64) -> bool {
    round < rounds || (kills == 0 && round < rounds + 12)
}

/// The newest run of a job.
pub(crate) fn newest_run(room: &Room, job: &str) -> Option<SessionId> {
    let state = room.catalogue().job(job).expect("the job");
    state.open_session.or(state.last_session)
}

/// Whether something is left to do now.
pub(crate) fn is_at_work(room: &Room) -> bool {
    let now = jiff::Timestamp::now();
    let open = room.catalogue().open_work().expect("work");
    open.iter().any(|work| work.state == WorkState::Running || work.run_at <= now)
}

/// Every process whose command line names the room and the word.
pub(crate) fn processes(room: &Room, word: &str) -> Vec<Pid> {
    let (ours, mut found) = (room.dir.path().to_string_lossy().into_owned(), Vec::new());
    for entry in fs::read_dir("/proc").expect("processes").flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        found.extend(pid.filter(|_| line.contains(&ours) && line.contains(word)));
    }
    found
}

/// Kills them; how many there were.
pub(crate) fn kill_all(room: &Room, word: &str) -> u32 {
    let there = processes(room, word).into_iter();
    there.map(|pid| u32::from(kill_process(pid, Signal::KILL).is_ok())).sum()
}
