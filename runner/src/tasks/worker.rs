//! The loop of a worker: takes work, keeps its lease alive, tells what came of it.
//!
//! Invariants
//! - A lease is renewed from a thread of its own, whatever the body does. A worker that could not renew it for its
//!   whole length stops by itself: by then somebody else may have the work.
//! - A body that panics fails its work, not the worker.
//! - Work of a process that is known to have ended is taken over at once; of others when their lease ends.
//! - An orderly stop gives unfinished work back; who takes it next goes on from what is stored.
//!
//! Not here: what work means (`job`), when it is due (`super::planner`).

use std::{
    panic,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use parking_lot::Mutex;

use super::{
    hands::Hands,
    owner::is_gone,
    rate::Rates,
    task::{Counts, Done, Task},
};
use crate::{
    catalogue::{Asked, Catalogue, Error, Fence, Outcome, SessionId, Work},
    context::Context,
    fail::{At, Code, Fail, Remedy, Result},
    stop::{Halt, Stop, Why, look_again},
};

/// How long an idle worker waits before it looks again.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What does the work of one kind or of all.
pub type Body = fn(&Task<'_>) -> Result<Done>;

/// A worker: so many threads, each with one piece of work at a time.
#[derive(Debug)]
pub struct Worker<'a> {
    /// The process's site, repository cache, output.
    pub context: &'a Context,
    /// Where work comes from.
    pub catalogue: &'a Catalogue,
    /// Who we are, in leases and events.
    pub owner: String,
    /// Pieces of work at a time.
    pub tasks: u32,
    /// Only work of this session, and only until it has ended.
    pub only: Option<SessionId>,
    /// Ends once there is nothing to do.
    pub until_idle: bool,
    /// What does it.
    pub body: Body,
    /// How far it is.
    pub hands: Hands,
}

impl Worker<'_> {
    /// Works until somebody asks to stop, or until there is nothing left that this worker waits for. Says how many
    /// pieces of work it had in hand.
    ///
    /// # Errors
    /// The catalogue, where it cannot be used at all; one that does not answer for a while is waited for.
    pub fn run(&self, stop: Stop) -> Result<u32> {
        let shared = Shared {
            worker: self,
            stop,
            rates: Rates::default(),
            failure: Mutex::new(None),
            over: AtomicBool::new(false),
            in_hand: AtomicU32::new(0),
            had: AtomicU32::new(0),
            ended: AtomicU32::new(0),
        };
        thread::scope(|scope| {
            for _ in 0..self.tasks.max(1) {
                scope.spawn(|| shared.serve());
            }
        });
        let had = shared.had.into_inner();
        shared.failure.into_inner().map_or(Ok(had), Err)
    }
}

struct Shared<'a> {
    worker: &'a Worker<'a>,
    stop: Stop,
    rates: Rates,
    failure: Mutex<Option<Fail>>,
    over: AtomicBool,
    in_hand: AtomicU32,
    had: AtomicU32,
    /// Pieces of work that have ended: what was waited for may be possible now, or all be done.
    ended: AtomicU32,
}

thread_local! {
    /// One for each thread that ever does a task, kept for all of its tasks.
    static HALT: OnceLock<&'static Halt> = const { OnceLock::new() };
}

fn halt_of_this_thread() -> &'static Halt {
    HALT.with(|halt| *halt.get_or_init(|| Box::leak(Box::default())))
}

impl Shared<'_> {
    fn serve(&self) {
        while !self.stop.is_signalled() && !self.over.load(Ordering::SeqCst) {
            let ended = self.ended.load(Ordering::SeqCst);
            match self.next() {
                Ok(Some((work, fence))) => {
                    self.had.fetch_add(1, Ordering::SeqCst);
                    self.do_it(&work, &fence);
                    self.in_hand.fetch_sub(1, Ordering::SeqCst);
                    self.ended.fetch_add(1, Ordering::SeqCst);
                    look_again();
                }
                Ok(None) => {
                    if self.is_over() {
                        self.over.store(true, Ordering::SeqCst);
                        look_again();
                    } else {
                        let news = || self.over.load(Ordering::SeqCst) || self.ended.load(Ordering::SeqCst) != ended;
                        self.stop.wait_or(LOOK_EVERY, news);
                    }
                }
                Err(error) if is_passing(&error) => {
                    tracing::warn!(target: "aquifer", %error, "the catalogue does not answer; trying again");
                    self.stop.wait(LOOK_EVERY * 4);
                }
                Err(error) => {
                    self.failure.lock().get_or_insert(error.into());
                    self.over.store(true, Ordering::SeqCst);
                }
            }
        }
    }

    fn next(&self) -> Result<Option<(Work, Fence)>, Error> {
        let worker = self.worker;
        worker.catalogue.settle_gone(is_gone)?;
        // Counted before it is taken: another thread must not think that all is done.
        self.in_hand.fetch_add(1, Ordering::SeqCst);
        let taken = worker.catalogue.claim_of(&worker.owner, &[], worker.only, Timestamp::now());
        if !matches!(taken, Ok(Some(_))) {
            self.in_hand.fetch_sub(1, Ordering::SeqCst);
        }
        taken
    }

    /// Whether there is nothing left that this worker waits for.
    fn is_over(&self) -> bool {
        if self.in_hand.load(Ordering::SeqCst) > 0 {
            return false;
        }
        match self.worker.only {
            // Others may have taken part of it; a catalogue that does not answer is asked again.
            Some(id) => self.worker.catalogue.session(id).is_ok_and(|session| session.ended.is_some()),
            None => self.worker.until_idle && self.worker.catalogue.open_work().is_ok_and(|work| work.is_empty()),
        }
    }

    fn do_it(&self, work: &Work, fence: &Fence) {
        let halt = halt_of_this_thread();
        halt.clear();
        let counts = self.worker.hands.take(work.id, self.worker.only);
        let task = Task {
            context: self.worker.context,
            catalogue: self.worker.catalogue,
            work,
            fence,
            stop: self.stop.of_task(halt),
            rates: &self.rates,
            counts: &counts,
        };
        tracing::info!(target: "aquifer", work = work.id.0, kind = %work.kind, object = %work.object, "work begins");
        let ended = AtomicBool::new(false);
        let outcome = thread::scope(|scope| {
            let keeper = scope.spawn(|| self.keep(fence, halt, &counts, &ended));
            let body = self.worker.body;
            let outcome = panic::catch_unwind(panic::AssertUnwindSafe(|| body(&task)));
            ended.store(true, Ordering::SeqCst);
            keeper.thread().unpark();
            outcome.unwrap_or_else(|payload| Err(Fail::from_panic(payload.as_ref())))
        });
        if halt.asked() == Some(Why::Lost) {
            tracing::warn!(target: "aquifer", work = work.id.0, "the work is in other hands; nothing of it was told");
            return;
        }
        let outcome = self.outcome(outcome, halt);
        tracing::info!(target: "aquifer", work = work.id.0, outcome = ?outcome, "work ends");
        self.tell(fence, &outcome, &counts);
    }

    fn outcome(&self, outcome: Result<Done>, halt: &Halt) -> Outcome {
        match outcome {
            Ok(Done::Success(report)) => Outcome::Success(report),
            Ok(Done::Warning { why, report }) => Outcome::Warning { why, report },
            Ok(Done::Skipped { why, known }) => Outcome::Skipped { why, known },
            Err(_) if halt.asked() == Some(Why::Cancel) => Outcome::Cancelled,
            Err(_) if halt.asked() == Some(Why::Pause) => Outcome::GivenBack("the session is paused".into()),
            Err(fail) if matches!(fail.code, Code::Interrupted | Code::Terminated) && self.stop.is_signalled() => {
                Outcome::GivenBack(format!("{} was stopped", self.worker.owner))
            }
            Err(fail) => {
                let why = match &fail.at {
                    Some(at) if !fail.what.contains(&at.path) => format!("{} ({at})", fail.what),
                    Some(At { cause: Some(cause), .. }) => format!("{} ({cause})", fail.what),
                    _ => fail.what.clone(),
                };
                let help = match &fail.do_ {
                    Some(Remedy::Command(command)) => Some(command.to_string()),
                    // An option for whoever typed what is carried out here.
                    Some(Remedy::Again(options)) => options.starts_with("--").then(|| options.to_string()),
                    None => None,
                };
                Outcome::Failed { why, code: fail.code.name().into(), passing: may_pass(fail.code), help }
            }
        }
    }

    /// Ends the work in the catalogue, for as long as the lease may still be ours.
    fn tell(&self, fence: &Fence, outcome: &Outcome, counts: &Counts) {
        let began = Instant::now();
        let progress = counts.progress();
        loop {
            match self.worker.catalogue.finish(fence, outcome, Some(&progress)) {
                Err(error) if is_passing(&error) && began.elapsed() < self.worker.catalogue.lease() => {
                    thread::sleep(LOOK_EVERY);
                }
                Err(error) => {
                    tracing::warn!(target: "aquifer", %error, work = fence.work.0, "the end of work was not stored");
                    return;
                }
                Ok(()) => return,
            }
        }
    }

    /// Keeps the lease alive until the work has ended, and passes on what is asked.
    fn keep(&self, fence: &Fence, halt: &Halt, counts: &Counts, ended: &AtomicBool) {
        let lease = self.worker.catalogue.lease();
        let mut heard = Instant::now();
        loop {
            thread::park_timeout(lease / 4);
            if ended.load(Ordering::SeqCst) {
                return;
            }
            match self.worker.catalogue.beat(fence, Some(&counts.progress())) {
                Ok(asked) => {
                    heard = Instant::now();
                    match asked {
                        Asked::Nothing => {}
                        Asked::Pause => halt.ask(Why::Pause),
                        Asked::Cancel => halt.ask(Why::Cancel),
                    }
                    self.share();
                }
                Err(Error::Fenced { .. }) => return halt.ask(Why::Lost),
                Err(error) => {
                    tracing::warn!(target: "aquifer", %error, work = fence.work.0, "a lease could not be renewed");
                    if heard.elapsed() >= lease {
                        return halt.ask(Why::Lost);
                    }
                }
            }
        }
    }

    /// Divides the rates with the other workers, by the slots that each has.
    fn share(&self) {
        if let Ok((ours, all)) = self.worker.catalogue.slots_of(&self.worker.owner) {
            self.rates.share(&ours, &all);
        }
    }
}

/// Whether a catalogue that failed so may answer later.
fn is_passing(error: &Error) -> bool {
    matches!(error, Error::Unreachable { .. } | Error::Busy { .. } | Error::Full { .. } | Error::Database { .. })
}

/// Whether what failed so is worth another attempt: not what was asked wrongly, is refused by state or is damaged.
fn may_pass(code: Code) -> bool {
    code.retryable() || (matches!(code.exit(), 2 | 13) && code != Code::Bug && code != Code::Unsupported)
}
