//! Sessions: one run of a job or of an operation, with what came of it.
//!
//! Invariants
//! - A session with work ends in the transaction that ends its last work; its result is the worst of them.
//! - A wish to stop or to pause is a word in the row: whoever works hears it with its next sign of life.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sqlx::{Row, any::AnyRow};

use super::{
    Catalogue, Error, Event, NewWork, Progress, Result,
    transaction::{Fault, Tx, maybe_time, record, text, time, word, words},
};

/// Number of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionId(pub i64);

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

words! {
    /// How far a session is.
    SessionState {
        /// Its work waits for its time, for slots or for a worker.
        Waiting "waiting"
        /// Some of its work is being done.
        Working "working"
        /// It has ended.
        Stopped "stopped"
    }
}

words! {
    /// What came of a session. Ordered: a session is as bad as the worst of its work.
    SessionResult {
        /// It has not ended.
        None "none"
        /// All was done.
        Success "success"
        /// Done, with something to look at.
        Warning "warning"
        /// Stopped on request.
        Cancelled "cancelled"
        /// Something was not done.
        Failed "failed"
    }
}

words! {
    /// What was asked of a running session.
    Wish {
        /// Go on.
        Run "run"
        /// Give the work back and wait.
        Pause "pause"
        /// End.
        Cancel "cancel"
    }
}

/// A session to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSession {
    /// What it does: the kind of the job, or the operation.
    pub kind: String,
    /// The job it is a run of.
    pub job: Option<String>,
    /// Who asked: a person, or `schedule`.
    pub initiator: String,
    /// Why.
    pub reason: Option<String>,
    /// The session it tries again.
    pub retry_of: Option<SessionId>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Session {
    /// Its number.
    pub id: SessionId,
    /// What it does.
    pub kind: String,
    /// The job it is a run of.
    pub job: Option<String>,
    /// How far it is.
    pub state: SessionState,
    /// What came of it.
    pub result: SessionResult,
    /// What was asked of it.
    pub wish: Wish,
    /// Who began it.
    pub initiator: String,
    /// Why it was begun, or why it ended as it did.
    pub reason: Option<String>,
    /// The session it tries again.
    pub retry_of: Option<SessionId>,
    /// The sum over its work.
    pub progress: Progress,
    /// When it was begun.
    pub begun: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
}

/// Which sessions are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionFilter {
    /// Only runs of this job.
    pub job: Option<String>,
    /// Only those that have not ended.
    pub open: bool,
    /// Only with numbers above this one.
    pub since: Option<SessionId>,
    /// At most so many: the newest.
    pub limit: Option<u32>,
}

impl Catalogue {
    /// Begins a session that has no work in the queue: something done by the caller itself.
    pub fn begin_session(&self, new: &NewSession) -> Result<SessionId> {
        self.write("begin a session", async |tx| tx.begin_session(new, SessionState::Working).await)
    }

    /// Begins a session with its work.
    pub fn begin_work(&self, new: &NewSession, works: &[NewWork]) -> Result<SessionId> {
        self.write("begin a session", async |tx| {
            let id = tx.begin_session(new, SessionState::Waiting).await?;
            for work in works {
                tx.enqueue(&NewWork { session: Some(id), ..work.clone() }).await?;
            }
            Ok(id)
        })
    }

    /// Stores how far such a session is.
    pub fn session_progress(&self, id: SessionId, progress: &Progress) -> Result<()> {
        self.write("store progress", async |tx| {
            sqlx::query("UPDATE session SET progress = $1 WHERE id = $2 AND ended_at IS NULL")
                .bind(text(progress)?)
                .bind(id.0)
                .execute(tx.on())
                .await?;
            Ok(())
        })
    }

    /// Ends a session.
    ///
    /// # Errors
    /// [`Error::State`] where it has ended already.
    pub fn end_session(&self, id: SessionId, result: SessionResult, reason: Option<&str>) -> Result<()> {
        self.write("end a session", async |tx| {
            let session = tx.session(id).await?;
            if session.state == SessionState::Stopped {
                let what = format!("session {id}");
                return Err(Error::State { what, have: session.state.to_string(), need: "waiting or working" }.into());
            }
            tx.end_session(&session, result, reason).await
        })
    }

    /// One session.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn session(&self, id: SessionId) -> Result<Session> {
        self.read("read a session", async |pool| {
            let row = sqlx::query("SELECT * FROM session WHERE id = $1").bind(id.0).fetch_optional(pool).await?;
            row.as_ref().map_or_else(|| Err(none(id)), read)
        })
    }

    /// Sessions, oldest first.
    pub fn sessions(&self, filter: &SessionFilter) -> Result<Vec<Session>> {
        self.read("list sessions", async |pool| {
            let rows = sqlx::query(
                "SELECT * FROM session WHERE id > $1 AND (CAST($2 AS TEXT) IS NULL OR job = $3) AND ($4 = 0 OR ended_at IS NULL) \
                 ORDER BY id DESC LIMIT $5",
            )
            .bind(filter.since.map_or(0, |id| id.0))
            .bind(filter.job.clone())
            .bind(filter.job.clone())
            .bind(i64::from(filter.open))
            .bind(i64::from(filter.limit.unwrap_or(u32::MAX)))
            .fetch_all(pool)
            .await?;
            rows.iter().rev().map(read).collect()
        })
    }

    /// Asks a session to pause, to go on, or to end. Work that waits is cancelled at once.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::State`] where it has ended, or is being ended.
    pub fn wish(&self, id: SessionId, wish: Wish, user: &str, reason: Option<&str>) -> Result<()> {
        self.write("ask a session", async |tx| {
            let session = tx.session(id).await?;
            if session.state == SessionState::Stopped || (session.wish == Wish::Cancel && wish != Wish::Cancel) {
                let have = if session.state == SessionState::Stopped { "stopped" } else { "being cancelled" };
                let what = format!("session {id}");
                return Err(Error::State { what, have: have.to_owned(), need: "waiting or working" }.into());
            }
            sqlx::query("UPDATE session SET wish = $1 WHERE id = $2")
                .bind(wish.word())
                .bind(id.0)
                .execute(tx.on())
                .await?;
            tx.events.push(Event {
                object: format!("session/{id}"),
                from: Some(session.wish.to_string()),
                to: Some(wish.to_string()),
                op: "ask".into(),
                session: Some(id),
                user: user.to_owned(),
                reason: reason.map(str::to_owned),
                error: None,
            });
            if wish == Wish::Cancel {
                tx.cancel_waiting(id).await?;
            }
            Ok(())
        })
    }
}

fn none(id: SessionId) -> Fault {
    Error::NotFound { what: format!("session {id}") }.into()
}

impl Tx {
    pub(super) async fn begin_session(&mut self, new: &NewSession, state: SessionState) -> Result<SessionId, Fault> {
        let id = SessionId(self.next("session").await?);
        let now = self.now;
        sqlx::query(
            "INSERT INTO session (id, kind, job, state, result, wish, initiator, reason, retry_of, progress, begun_at) \
             VALUES ($1, $2, $3, $4, 'none', 'run', $5, $6, $7, $8, $9)",
        )
        .bind(id.0)
        .bind(new.kind.clone())
        .bind(new.job.clone())
        .bind(state.word())
        .bind(new.initiator.clone())
        .bind(new.reason.clone())
        .bind(new.retry_of.map(|id| id.0))
        .bind(text(&Progress::default())?)
        .bind(now)
        .execute(self.on())
        .await?;
        self.events.push(Event {
            object: format!("session/{id}"),
            to: Some(state.to_string()),
            op: "begin".into(),
            session: Some(id),
            user: new.initiator.clone(),
            reason: new.reason.clone(),
            ..Event::default()
        });
        Ok(id)
    }

    /// The session, locked.
    pub(super) async fn session(&mut self, id: SessionId) -> Result<Session, Fault> {
        let row = sqlx::query("UPDATE session SET wish = wish WHERE id = $1 RETURNING *")
            .bind(id.0)
            .fetch_optional(self.on())
            .await?;
        row.as_ref().map_or_else(|| Err(none(id)), read)
    }

    /// A session whose first work begins is working.
    pub(super) async fn session_works(&mut self, id: SessionId) -> Result<(), Fault> {
        let session = self.session(id).await?;
        if session.state != SessionState::Waiting {
            return Ok(());
        }
        sqlx::query("UPDATE session SET state = 'working' WHERE id = $1").bind(id.0).execute(self.on()).await?;
        self.events.push(Event {
            object: format!("session/{id}"),
            from: Some(session.state.to_string()),
            to: Some(SessionState::Working.to_string()),
            op: "work".into(),
            session: Some(id),
            user: session.initiator,
            ..Event::default()
        });
        Ok(())
    }

    pub(super) async fn end_session(
        &mut self,
        session: &Session,
        result: SessionResult,
        reason: Option<&str>,
    ) -> Result<(), Fault> {
        let now = self.now;
        sqlx::query("UPDATE session SET state = 'stopped', result = $1, reason = COALESCE($2, reason), ended_at = $3 WHERE id = $4")
            .bind(result.word())
            .bind(reason.map(str::to_owned))
            .bind(now)
            .bind(session.id.0)
            .execute(self.on())
            .await?;
        if let Some(job) = &session.job {
            self.job_ended(job, session, result).await?;
        }
        self.events.push(Event {
            object: format!("session/{}", session.id),
            from: Some(session.state.to_string()),
            to: Some(result.to_string()),
            op: "end".into(),
            session: Some(session.id),
            user: session.initiator.clone(),
            reason: reason.map(str::to_owned),
            error: None,
        });
        Ok(())
    }
}

pub(super) fn read(row: &AnyRow) -> Result<Session, Fault> {
    Ok(Session {
        id: SessionId(row.try_get("id")?),
        kind: row.try_get("kind")?,
        job: row.try_get("job")?,
        state: word(row, "state")?,
        result: word(row, "result")?,
        wish: word(row, "wish")?,
        initiator: row.try_get("initiator")?,
        reason: row.try_get("reason")?,
        retry_of: row.try_get::<Option<i64>, _>("retry_of")?.map(SessionId),
        progress: record(row, "progress")?,
        begun: time(row, "begun_at")?,
        ended: maybe_time(row, "ended_at")?,
    })
}
