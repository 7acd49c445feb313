//! Begins the runs of jobs: when their time comes, when another job has ended, when a point has arrived.
//!
//! Invariants
//! - A due time, an ended job, a new point begin one run, however many controllers look: whoever writes first that it
//!   was answered, in the transaction that begins the run, has begun it.
//! - A run that is still open at the next due time is not doubled; that is an event (`W_OVERRUN`), and the next due
//!   time counts.
//! - Due times that passed while nothing looked are answered by one run at most, or by none where the schedule says
//!   so; either way that is an event (`W_MISSED`).
//! - When a window shuts, the run is asked to stop; the next one goes on from what is stored.
//! - What is wrong with one job holds up no other.
//!
//! Not here: when a schedule is due (`schedule`), what a run does (`super::expand`, `job`).

use std::{collections::BTreeMap, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::expand;
use crate::{
    catalogue::{Catalogue, Error, Event, JobState, NewRun, NewSession, SessionResult, Trigger, Wish},
    context::Context,
    fail::{Code, Result},
    job,
    schedule::{Due, When},
    site::{Job, Site},
};

/// A run that begins so late is on time.
const GRACE: Duration = Duration::from_secs(60);
/// A continuous job that failed waits so long.
const AFTER_FAILURE: Duration = Duration::from_secs(60);
/// Who began what no person did.
pub const SCHEDULE: &str = "schedule";

/// Begins runs.
#[derive(Debug)]
pub struct Planner<'a> {
    /// The process's site and repositories.
    pub context: &'a Context,
    /// The catalogue.
    pub catalogue: &'a Catalogue,
    /// The site.
    pub site: &'a Site,
}

impl Planner<'_> {
    /// Looks at every job once.
    ///
    /// # Errors
    /// The catalogue's, where it does not answer; what is wrong with one job is told and passed over.
    pub fn tick(&self, now: Timestamp) -> Result<()> {
        let states: BTreeMap<String, JobState> =
            self.catalogue.jobs()?.into_iter().map(|state| (state.name.clone(), state)).collect();
        for (name, job) in self.site.jobs.iter().filter(|(_, job)| job.enabled) {
            let state =
                states.get(name).cloned().unwrap_or_else(|| JobState { name: name.clone(), ..JobState::default() });
            match self.look(name, job, &state, &states, now) {
                Ok(()) => {}
                // Another controller was first.
                Err(fail) if fail.code == Code::Busy => {}
                Err(fail) if matches!(fail.code, Code::Net | Code::Timeout) => return Err(fail),
                Err(fail) => {
                    tracing::warn!(target: "aquifer", job = %name, error = %fail.what, "the job cannot be planned")
                }
            }
        }
        Ok(())
    }

    fn look(
        &self,
        name: &str,
        job: &Job,
        state: &JobState,
        all: &BTreeMap<String, JobState>,
        now: Timestamp,
    ) -> Result<()> {
        if state.open_session.is_some() {
            self.shut(job, state, now)?;
        }
        if state.paused {
            return Ok(());
        }
        match &job.schedule.when {
            When::Manual => Ok(()),
            When::After { job: before } => self.after(name, job, state, all.get(before), before),
            When::OnNewPoint { .. } => self.on_new_point(name, job, state, now),
            When::Continuous { .. } => self.continuous(name, job, state, now),
            When::Daily { .. } | When::Monthly { .. } | When::Periodic { .. } | When::Calendar(_) => {
                self.by_time(name, job, state, now)
            }
        }
    }

    /// Asks the open run to stop, if its window has shut.
    fn shut(&self, job: &Job, state: &JobState, now: Timestamp) -> Result<()> {
        let Some(open) = state.open_session else { return Ok(()) };
        let session = self.catalogue.session(open)?;
        // Whoever began it by hand has chosen the time.
        let ours = session.initiator == SCHEDULE && session.wish == Wish::Run && session.ended.is_none();
        if ours && job.schedule.must_stop(session.begun).is_some_and(|shuts| shuts <= now) {
            self.catalogue.wish(open, Wish::Cancel, SCHEDULE, Some("the window has shut; the next run goes on"))?;
        }
        Ok(())
    }

    fn by_time(&self, name: &str, job: &Job, state: &JobState, now: Timestamp) -> Result<()> {
        let next = match job.schedule.due(name, now) {
            Due::At(next) => Some(next),
            Due::OnEvent(_) | Due::Never => None,
        };
        let Some(due) = state.next_run else {
            return Ok(self.catalogue.set_next_run(name, next)?);
        };
        if due > now {
            // The schedule was changed, if it comes earlier now.
            return if next.is_some_and(|next| next < due) {
                Ok(self.catalogue.set_next_run(name, next)?)
            } else {
                Ok(())
            };
        }
        let late = now.duration_since(due);
        let on_time = late <= SignedDuration::try_from(GRACE).unwrap_or(SignedDuration::ZERO);
        let mut reason = format!("due at {due}");
        if !on_time {
            // What was due before its jitter counts.
            let jitter = SignedDuration::try_from(job.schedule.jitter).unwrap_or(SignedDuration::ZERO);
            let from =
                due.checked_sub(jitter).and_then(|at| at.checked_sub(SignedDuration::from_secs(1))).unwrap_or(due);
            let caught = job.schedule.catch_up(name, from, now);
            let missed = caught.missed.max(1);
            self.told(
                name,
                "missed",
                Code::WarnMissed,
                format!("{missed} due since {due}; nothing was there to run it"),
            )?;
            if caught.next.is_none_or(|next| next > now) {
                return Ok(self.catalogue.set_next_run(name, next)?);
            }
            reason = format!("made up for: {missed} due since {due}");
        }
        let begun = self.begin(name, job, Trigger::Due { at: due, next }, reason);
        match begun {
            Err(Error::Busy { holder, .. }) => {
                self.told(name, "overrun", Code::WarnOverrun, format!("due at {due}, but {holder} has not ended"))?;
                Ok(self.catalogue.set_next_run(name, next)?)
            }
            begun => Ok(begun?),
        }
    }

    fn after(&self, name: &str, job: &Job, state: &JobState, before: Option<&JobState>, of: &str) -> Result<()> {
        let Some(ended) = before.and_then(|before| before.last_session) else { return Ok(()) };
        let seen = state.mark.get("after").and_then(Value::as_i64);
        if seen == Some(ended.0) || (seen.is_some() && state.open_session.is_some()) {
            return Ok(());
        }
        let mark = json!({ "after": ended.0 });
        let cancelled = before.and_then(|before| before.last_result) == Some(SessionResult::Cancelled);
        // What ended before this job was first seen, or was stopped by somebody, begins nothing.
        if seen.is_none() && state.last_session.is_none() && !self.is_fresh(ended)? || cancelled {
            return Ok(self.catalogue.set_mark(name, &state.mark, &mark)?);
        }
        let trigger = Trigger::Mark { before: state.mark.clone(), after: mark };
        Ok(self.begin(name, job, trigger, format!("after session {ended} of job {of}"))?)
    }

    /// Whether a session ended just now: the first one that a new job sees may be the one it was made for.
    fn is_fresh(&self, id: crate::catalogue::SessionId) -> Result<bool> {
        let ended = self.catalogue.session(id)?.ended;
        Ok(ended.is_some_and(|ended| Timestamp::now().duration_since(ended) < SignedDuration::from_secs(60)))
    }

    fn on_new_point(&self, name: &str, job: &Job, state: &JobState, now: Timestamp) -> Result<()> {
        if state.open_session.is_some() || !job.schedule.may_start(now) {
            return Ok(());
        }
        let points = job::newest_points(self.context, self.site, job)?;
        let before = state.mark.get("points");
        let seen = |machine: &str| before?.get(machine)?.as_str()?.parse::<Timestamp>().ok();
        let is_new = |(machine, taken): &(&String, &Timestamp)| seen(machine).is_none_or(|seen| **taken > seen);
        let news: Vec<&str> = points.iter().filter(is_new).map(|(machine, _)| machine.as_str()).collect();
        if news.is_empty() {
            return Ok(());
        }
        let mark = json!({ "points": points });
        let trigger = Trigger::Mark { before: state.mark.clone(), after: mark };
        Ok(self.begin(name, job, trigger, format!("new point of {}", news.join(", ")))?)
    }

    fn continuous(&self, name: &str, job: &Job, state: &JobState, now: Timestamp) -> Result<()> {
        let failed = state.last_result == Some(SessionResult::Failed);
        let rest = if failed { AFTER_FAILURE } else { Duration::from_secs(1) };
        let rest = SignedDuration::try_from(rest).unwrap_or(SignedDuration::ZERO);
        let rested = state.last_ended.is_none_or(|ended| now.duration_since(ended) >= rest);
        if state.open_session.is_some() || !rested || !job.schedule.may_start(now) {
            return Ok(());
        }
        Ok(self.begin(name, job, Trigger::Hand, "again".to_owned())?)
    }

    fn begin(&self, name: &str, job: &Job, trigger: Trigger, reason: String) -> std::result::Result<(), Error> {
        let session = NewSession {
            kind: job.kind.name().to_owned(),
            job: Some(name.to_owned()),
            initiator: SCHEDULE.to_owned(),
            reason: Some(reason),
            retry_of: None,
        };
        let work = expand::works(self.site, name, job, true);
        self.catalogue.begin_run(name, &NewRun { trigger, session, work }).map(drop)
    }

    fn told(&self, name: &str, op: &str, code: Code, what: String) -> Result<()> {
        Ok(self.catalogue.event(&Event {
            object: format!("job/{name}"),
            op: op.to_owned(),
            user: SCHEDULE.to_owned(),
            reason: Some(format!("{}: {what}", code.name())),
            ..Event::default()
        })?)
    }
}
