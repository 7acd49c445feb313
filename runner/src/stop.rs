//! Orderly stop: SIGINT and SIGTERM ask, a second SIGINT within 5 s insists, SIGUSR1 asks for a line
//! of progress.
//!
//! Invariants
//! - Work polls [`Stop::check`] between blocks and ends with what it has stored.
//! - Signals are taken from the first call of [`Stop::listen`] on; before it the defaults hold.
//! - A task of a service has a [`Halt`] of its own beside the signals: it ends that task and no other.
//!
//! Not here: what stopping means for a verb.

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering},
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    iterator::Signals,
};

use crate::fail::{Code, Fail, Result};

static SIGNAL: AtomicI32 = AtomicI32::new(0);
static STATUS: AtomicBool = AtomicBool::new(false);
static CHANGED: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
const INSIST_WITHIN: Duration = Duration::from_secs(5);

/// The wish to stop: the process's, and a task's own where it has one.
#[derive(Clone, Copy, Debug)]
pub struct Stop(Option<&'static Halt>);

/// Why one task of a process is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It goes on later.
    Pause,
    /// It ends.
    Cancel,
    /// Its work is in other hands: nothing it does counts any more.
    Lost,
}

/// One task's wish to stop. Lives as long as the process: a thread that does tasks keeps one for all of them.
#[derive(Debug, Default)]
pub struct Halt(AtomicU8);

impl Halt {
    /// Nothing is asked: a task begins.
    pub fn clear(&self) {
        self.0.store(0, Ordering::SeqCst);
    }

    /// Asks. What is lost stays lost.
    pub fn ask(&self, why: Why) {
        let word = match why {
            Why::Pause => 1,
            Why::Cancel => 2,
            Why::Lost => 3,
        };
        self.0.fetch_max(word, Ordering::SeqCst);
        let _guard = CHANGED.0.lock();
        CHANGED.1.notify_all();
    }

    /// What was asked.
    pub fn asked(&self) -> Option<Why> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            1 => Some(Why::Pause),
            2 => Some(Why::Cancel),
            _ => Some(Why::Lost),
        }
    }
}

impl Stop {
    /// Takes over SIGINT, SIGTERM and SIGUSR1 of the process; once is enough.
    pub fn listen() -> io::Result<Self> {
        static LISTENING: Mutex<bool> = Mutex::new(false);
        let mut listening = LISTENING.lock();
        if !*listening {
            let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
            thread::Builder::new().name("signals".into()).spawn(move || serve(&mut signals))?;
            *listening = true;
        }
        Ok(Self(None))
    }

    /// The wish of whoever signals this process, as far as it listens.
    pub fn of_process() -> Self {
        Self(None)
    }

    /// The same for one task, which has a wish of its own.
    #[must_use]
    pub fn of_task(self, halt: &'static Halt) -> Self {
        Self(Some(halt))
    }

    /// Whether somebody asked to stop.
    pub fn is_asked(self) -> bool {
        SIGNAL.load(Ordering::SeqCst) != 0 || self.0.is_some_and(|halt| halt.asked().is_some())
    }

    /// Whether the process is to stop, whatever was asked of a task.
    pub fn is_signalled(self) -> bool {
        SIGNAL.load(Ordering::SeqCst) != 0
    }

    /// Fails with the interruption, if somebody asked to stop.
    pub fn check(self) -> Result<()> {
        match SIGNAL.load(Ordering::SeqCst) {
            0 => match self.0.and_then(Halt::asked) {
                None => Ok(()),
                Some(Why::Pause) => Err(Fail::new(Code::Interrupted, "stopped: the session is paused")),
                Some(Why::Cancel) => Err(Fail::new(Code::Interrupted, "stopped: the session was cancelled")),
                Some(Why::Lost) => Err(Fail::new(Code::Fenced, "stopped: the work is in other hands")),
            },
            SIGTERM => Err(Fail::new(Code::Terminated, "stopped by SIGTERM")),
            _ => Err(Fail::new(Code::Interrupted, "stopped by SIGINT")),
        }
    }

    /// Waits until somebody asks to stop, at most `limit`; true if so.
    pub fn wait(self, limit: Duration) -> bool {
        self.wait_or(limit, || false)
    }

    /// The same, and until something else is so, which whoever brings it about tells by [`look_again`].
    pub(crate) fn wait_or(self, limit: Duration, is_so: impl Fn() -> bool) -> bool {
        let until = Instant::now() + limit;
        let mut guard = CHANGED.0.lock();
        while !self.is_asked() && !is_so() {
            if CHANGED.1.wait_until(&mut guard, until).timed_out() {
                break;
            }
        }
        self.is_asked()
    }
}

/// Has everybody who waits look again at what they wait for.
pub(crate) fn look_again() {
    let _guard = CHANGED.0.lock();
    CHANGED.1.notify_all();
}

/// Whether SIGUSR1 came since the last call.
pub(crate) fn take_status_request() -> bool {
    STATUS.swap(false, Ordering::SeqCst)
}

fn serve(signals: &mut Signals) {
    let mut asked_at: Option<Instant> = None;
    for signal in signals.forever() {
        if signal == SIGUSR1 {
            STATUS.store(true, Ordering::SeqCst);
            continue;
        }
        let insists = signal == SIGINT && asked_at.is_some_and(|at| at.elapsed() < INSIST_WITHIN);
        if insists {
            std::process::exit(i32::from(Code::Interrupted.exit()));
        }
        asked_at = Some(Instant::now());
        SIGNAL.store(signal, Ordering::SeqCst);
        let _guard = CHANGED.0.lock();
        CHANGED.1.notify_all();
    }
}
