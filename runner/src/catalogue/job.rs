//! What is remembered of a job between its runs.
//!
//! Invariants
//! - One run of a job at a time, whoever begins it: a second is refused, and names the first.
//! - A run and all its work are put in by one transaction.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use sqlx::{Row, any::AnyRow};

use super::{
    Catalogue, Error, Event, NewSession, NewWork, Result, Session, SessionId, SessionResult, SessionState,
    transaction::{Fault, Tx, maybe_time, record, text, word},
};

/// A job as it is remembered.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct JobState {
    /// Its name.
    pub name: String,
    /// Whether its schedule is held.
    pub paused: bool,
    /// The run that has not ended.
    pub open_session: Option<SessionId>,
    /// The run that ended last.
    pub last_session: Option<SessionId>,
    /// What came of it.
    pub last_result: Option<SessionResult>,
    /// When the last run began.
    pub last_begun: Option<Timestamp>,
    /// When the last run ended.
    pub last_ended: Option<Timestamp>,
    /// When its schedule comes next.
    pub next_run: Option<Timestamp>,
    /// What its triggers have seen: points, sessions.
    pub mark: Value,
}

/// What began a run, as far as others could begin it for the same reason: whoever is first does, the rest are told
/// [`Error::Stale`].
#[derive(Clone, Debug, PartialEq)]
pub enum Trigger {
    /// Somebody asked.
    Hand,
    /// Its time came.
    Due {
        /// The time.
        at: Timestamp,
        /// The time after that.
        next: Option<Timestamp>,
    },
    /// Something happened: what was seen before, and now.
    Mark {
        /// Before.
        before: Value,
        /// Now.
        after: Value,
    },
}

/// A run of a job to begin.
#[derive(Clone, Debug, PartialEq)]
pub struct NewRun {
    /// What began it.
    pub trigger: Trigger,
    /// The session.
    pub session: NewSession,
    /// Its work; job and session are filled in.
    pub work: Vec<NewWork>,
}

impl Catalogue {
    /// Begins a run of a job: a session with its work.
    ///
    /// # Errors
    /// [`Error::Busy`] names the run that has not ended; [`Error::Stale`] where another controller has answered the
    /// same trigger.
    pub fn begin_run(&self, job: &str, run: &NewRun) -> Result<SessionId> {
        self.write("begin a run", async |tx| {
            let state = tx.job(job).await?;
            tx.trigger(job, &state, &run.trigger).await?;
            if let Some(open) = state.open_session {
                return Err(Error::Busy { what: format!("job {job}"), holder: format!("session {open}") }.into());
            }
            let new = NewSession { job: Some(job.to_owned()), ..run.session.clone() };
            let id = tx.begin_session(&new, SessionState::Waiting).await?;
            let now = tx.now;
            sqlx::query("UPDATE job SET open_session = $1, last_begun = $2 WHERE name = $3")
                .bind(id.0)
                .bind(now)
                .bind(job.to_owned())
                .execute(tx.on())
                .await?;
            for work in &run.work {
                let work = NewWork { job: Some(job.to_owned()), session: Some(id), ..work.clone() };
                tx.enqueue(&work).await?;
            }
            if run.work.is_empty() {
                let session = tx.session(id).await?;
                tx.end_session(&session, SessionResult::Success, Some("there was nothing to do")).await?;
            }
            Ok(id)
        })
    }

    /// A job as it is remembered; one that never ran, too.
    pub fn job(&self, name: &str) -> Result<JobState> {
        self.read("read a job", async |pool| {
            let row =
                sqlx::query("SELECT * FROM job WHERE name = $1").bind(name.to_owned()).fetch_optional(pool).await?;
            let fresh = || Ok(JobState { name: name.to_owned(), ..JobState::default() });
            row.as_ref().map_or_else(fresh, read)
        })
    }

    /// Every job that is remembered.
    pub fn jobs(&self) -> Result<Vec<JobState>> {
        self.read("list jobs", async |pool| {
            let rows = sqlx::query("SELECT * FROM job ORDER BY name").fetch_all(pool).await?;
            rows.iter().map(read).collect()
        })
    }

    /// Holds the schedule of a job, or lets it go on.
    pub fn pause_job(&self, name: &str, paused: bool, user: &str) -> Result<()> {
        self.write("pause a job", async |tx| {
            let state = tx.job(name).await?;
            if state.paused == paused {
                return Ok(());
            }
            sqlx::query("UPDATE job SET paused = $1 WHERE name = $2")
                .bind(i64::from(paused))
                .bind(name.to_owned())
                .execute(tx.on())
                .await?;
            let words = ["enabled", "paused"];
            let word = |held: bool| Some(words[usize::from(held)].to_owned());
            tx.events.push(Event {
                object: format!("job/{name}"),
                from: word(state.paused),
                to: word(paused),
                op: if paused { "pause" } else { "resume" }.into(),
                user: user.to_owned(),
                ..Event::default()
            });
            Ok(())
        })
    }

    /// Stores when the schedule of a job comes next.
    pub fn set_next_run(&self, name: &str, next: Option<Timestamp>) -> Result<()> {
        self.write("store the next run of a job", async |tx| {
            tx.job(name).await?;
            sqlx::query("UPDATE job SET next_run = $1 WHERE name = $2")
                .bind(next.map(Timestamp::as_millisecond))
                .bind(name.to_owned())
                .execute(tx.on())
                .await?;
            Ok(())
        })
    }

    /// Stores what the triggers of a job have seen, if that is still what it was.
    ///
    /// # Errors
    /// [`Error::Stale`].
    pub fn set_mark(&self, name: &str, before: &Value, after: &Value) -> Result<()> {
        self.write("store what a trigger has seen", async |tx| {
            tx.job(name).await?;
            let changed = sqlx::query("UPDATE job SET mark = $1 WHERE name = $2 AND mark = $3")
                .bind(text(after)?)
                .bind(name.to_owned())
                .bind(text(before)?)
                .execute(tx.on())
                .await?;
            if changed.rows_affected() == 1 {
                return Ok(());
            }
            Err(Error::Stale { what: format!("the mark of job {name}"), have: 0, now: 1 }.into())
        })
    }
}

impl Tx {
    /// The job, locked; made where it is not remembered yet.
    async fn job(&mut self, name: &str) -> Result<JobState, Fault> {
        let row = sqlx::query(
            "INSERT INTO job (name, paused, mark) VALUES ($1, 0, 'null') \
             ON CONFLICT (name) DO UPDATE SET paused = job.paused RETURNING *",
        )
        .bind(name.to_owned())
        .fetch_one(self.on())
        .await?;
        read(&row)
    }

    /// Answers a trigger, if nobody has.
    async fn trigger(&mut self, job: &str, state: &JobState, trigger: &Trigger) -> Result<(), Fault> {
        let stale = || Error::Stale { what: format!("the trigger of job {job}"), have: 0, now: 1 };
        match trigger {
            Trigger::Hand => {}
            Trigger::Due { at, .. } if state.next_run != Some(*at) => return Err(stale().into()),
            Trigger::Due { next, .. } => {
                sqlx::query("UPDATE job SET next_run = $1 WHERE name = $2")
                    .bind(next.map(Timestamp::as_millisecond))
                    .bind(job.to_owned())
                    .execute(self.on())
                    .await?;
            }
            Trigger::Mark { before, .. } if state.mark != *before => return Err(stale().into()),
            Trigger::Mark { after, .. } => {
                sqlx::query("UPDATE job SET mark = $1 WHERE name = $2")
                    .bind(text(after)?)
                    .bind(job.to_owned())
                    .execute(self.on())
                    .await?;
            }
        }
        Ok(())
    }

    pub(super) async fn job_ended(&mut self, job: &str, session: &Session, result: SessionResult) -> Result<(), Fault> {
        let now = self.now;
        sqlx::query(
            "UPDATE job SET open_session = NULL, last_session = $1, last_result = $2, last_ended = $3 \
             WHERE name = $4 AND open_session = $5",
        )
        .bind(session.id.0)
        .bind(result.word())
        .bind(now)
        .bind(job.to_owned())
        .bind(session.id.0)
        .execute(self.on())
        .await?;
        Ok(())
    }
}

fn read(row: &AnyRow) -> Result<JobState, Fault> {
    let result: Option<String> = row.try_get("last_result")?;
    Ok(JobState {
        name: row.try_get("name")?,
        paused: row.try_get::<i64, _>("paused")? != 0,
        open_session: row.try_get::<Option<i64>, _>("open_session")?.map(SessionId),
        last_session: row.try_get::<Option<i64>, _>("last_session")?.map(SessionId),
        last_result: result.map(|_| word(row, "last_result")).transpose()?,
        last_begun: maybe_time(row, "last_begun")?,
        last_ended: maybe_time(row, "last_ended")?,
        next_run: maybe_time(row, "next_run")?,
        mark: record(row, "mark")?,
    })
}
