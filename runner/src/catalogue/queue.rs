//! The queue of work: leases, fencing epochs, retries, takeover.
//!
//! Invariants
//! - A piece of work is in the hands of at most one owner and epoch; each claim is a new epoch.
//! - Two pieces of work on one object are never in hand at the same time, and never more than the slots allow.
//! - A worker that is silent for the length of its lease loses its work to whoever asks next; work that lost
//!   [`LOST_MAX`] workers fails instead of being handed out for ever.
//! - Claims are one after the other (the `dispatch` row): they take milliseconds, work takes minutes.
//!
//! Not here: the order in which work is picked (`tasks::order`), work that is passed over (`super::held`).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Row, any::AnyRow};

use super::{
    Catalogue, Error, Event, NewWork, Result, SessionId, SessionResult, Url, Wish, Work, WorkId, WorkState,
    transaction::{Fault, Tx, maybe_time, record, text, time, word},
};
use crate::tasks::{
    Busy,
    order::{self, Candidate},
};

/// Work whose workers died so often is not handed out once more: it kills them.
const LOST_MAX: i64 = 5;

/// Proof of a lease on a piece of work: every durable effect carries it; a stale one changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The work.
    pub work: WorkId,
    /// The claim.
    pub epoch: i64,
    /// Whose.
    pub owner: String,
    /// The session it belongs to, for events.
    pub session: Option<SessionId>,
    /// What kind of work, for events.
    pub kind: String,
}

/// How far a piece of work is. Sums add up over the work of a session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// What is being done.
    pub phase: String,
    /// Bytes there are to do, as far as that is known.
    pub bytes_total: u64,
    /// Bytes done with, whether or not they had to be moved.
    pub bytes_done: u64,
    /// Bytes read from sources.
    pub bytes_read: u64,
    /// Of these, bytes read from production.
    pub bytes_read_production: u64,
    /// Bytes written to targets, of those that were moved there.
    pub bytes_written: u64,
    /// Bytes of a target's own files that were written anew on it, where older restore points were merged.
    #[serde(default)]
    pub bytes_merged: u64,
    /// Blocks that were equal and moved nothing.
    pub blocks_equal: u64,
    /// Measured: bytes per second, over the last seconds.
    pub rate: u64,
    /// The limit that applies to that rate, if one does.
    pub rate_limit: Option<u64>,
    /// Where the time went.
    #[serde(default)]
    pub busy: Busy,
}

impl Progress {
    fn add(&mut self, other: &Self) {
        if self.phase.is_empty() {
            self.phase.clone_from(&other.phase);
        }
        let sums = [
            (&mut self.bytes_total, other.bytes_total),
            (&mut self.bytes_done, other.bytes_done),
            (&mut self.bytes_read, other.bytes_read),
            (&mut self.bytes_read_production, other.bytes_read_production),
            (&mut self.bytes_written, other.bytes_written),
            (&mut self.bytes_merged, other.bytes_merged),
            (&mut self.blocks_equal, other.blocks_equal),
            (&mut self.rate, other.rate),
        ];
        for (sum, part) in sums {
            *sum = sum.saturating_add(part);
        }
        self.rate_limit = self.rate_limit.max(other.rate_limit);
        self.busy.add(other.busy);
    }
}

/// What was asked of whoever works, heard with a sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Go on.
    Nothing,
    /// Stop at the next block, keep what can be gone on from, give the work back.
    Pause,
    /// Stop at the next block and end.
    Cancel,
}

/// What came of a piece of work.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Done. What it reports is kept.
    Success(Value),
    /// Done, with something to look at.
    Warning {
        /// What.
        why: String,
        /// What it reports.
        report: Value,
    },
    /// Not done.
    Failed {
        /// What happened.
        why: String,
        /// Its code, `E_...`.
        code: String,
        /// Whether the reason may pass by itself: then it is tried again.
        passing: bool,
        /// A command that helps.
        help: Option<String>,
    },
    /// Stopped because that was asked.
    Cancelled,
    /// Left out.
    Skipped {
        /// Why.
        why: String,
        /// Whether the run before was left out for the same reason, and told so.
        known: bool,
    },
    /// Given back undone: it goes on later, here or elsewhere, and no retry is used up.
    GivenBack(String),
}

impl Outcome {
    fn state(&self) -> WorkState {
        match self {
            Self::Success(_) => WorkState::Success,
            Self::Warning { .. } => WorkState::Warning,
            Self::Failed { .. } => WorkState::Failed,
            Self::Cancelled => WorkState::Cancelled,
            Self::Skipped { .. } => WorkState::Skipped,
            Self::GivenBack(_) => WorkState::Ready,
        }
    }

    fn why(&self) -> Option<&str> {
        match self {
            Self::Warning { why, .. } | Self::Failed { why, .. } => Some(why),
            Self::Skipped { why, .. } | Self::GivenBack(why) => Some(why),
            Self::Success(_) | Self::Cancelled => None,
        }
    }

    fn record(&self) -> Value {
        match self {
            Self::Success(report) => serde_json::json!({ "report": report }),
            Self::Warning { why, report } => serde_json::json!({ "why": why, "report": report }),
            Self::Failed { why, code, help, .. } => serde_json::json!({ "why": why, "code": code, "do": help }),
            Self::Cancelled => Value::Null,
            Self::Skipped { why, known: true } => serde_json::json!({ "why": why, "known": true }),
            Self::Skipped { why, .. } | Self::GivenBack(why) => serde_json::json!({ "why": why }),
        }
    }
}

/// What becomes of work that whoever had it has left.
#[derive(Clone, Debug, PartialEq)]
pub enum Left {
    /// Nobody goes on with it.
    Cancelled,
    /// Whoever goes on with it is told this.
    Told(Value),
}

impl Catalogue {
    /// Puts work into the queue.
    pub fn enqueue(&self, new: &NewWork) -> Result<WorkId> {
        self.write("put work into the queue", async |tx| tx.enqueue(new).await)
    }

    /// Takes the next piece of work of these kinds (all, where none is named) that is due, whose object is free and
    /// whose slots are free. Work of a worker whose lease ran out is taken over.
    pub fn claim(&self, owner: &str, kinds: &[&str], now: Timestamp) -> Result<Option<(Work, Fence)>> {
        self.claim_of(owner, kinds, None, now)
    }

    /// The same, of one session only: whoever runs a job from the command line works on that job.
    pub fn claim_of(
        &self,
        owner: &str,
        kinds: &[&str],
        session: Option<SessionId>,
        now: Timestamp,
    ) -> Result<Option<(Work, Fence)>> {
        // Most looks find nothing to do, and must not cost a write.
        if !self.something_due(now)? {
            return Ok(None);
        }
        self.write("take work", async |tx| {
            tx.next("dispatch").await?;
            let has_settled = tx.settle_lost().await? | tx.pass_over(now.as_millisecond()).await?;
            let (candidates, rows) = tx.candidates(now.as_millisecond(), kinds, session).await?;
            let in_use = tx.in_use().await?;
            let picked = order::pick(&candidates, &in_use, now.as_millisecond()).and_then(|index| rows.get(index));
            let Some(row) = picked else {
                // Whoever was second has nothing that lasts: the lock itself is no change.
                tx.is_idle = !has_settled;
                return Ok(None);
            };
            tx.take(row, owner).await.map(Some)
        })
    }

    /// Looks whether work is still ours, for effects that lie outside of the catalogue. Renews nothing, and writes
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Fenced`] where the work is not ours any more.
    pub fn still_ours(&self, fence: &Fence) -> Result<()> {
        self.write("look at a lease", async |tx| {
            tx.is_idle = true;
            let ours = "SELECT id FROM work WHERE id = $1 AND epoch = $2 AND owner = $3 AND state = 'running'";
            let row = sqlx::query(ours)
                .bind(fence.work.0)
                .bind(fence.epoch)
                .bind(fence.owner.clone())
                .fetch_optional(tx.on())
                .await?;
            if row.is_some() { Ok(()) } else { Err(tx.fenced(fence).await?.into()) }
        })
    }

    /// A sign of life: renews the lease, stores how far the work is, and hears what was asked.
    ///
    /// # Errors
    /// [`Error::Fenced`] where the work is not ours any more.
    pub fn beat(&self, fence: &Fence, progress: Option<&Progress>) -> Result<Asked> {
        self.write("renew a lease", async |tx| {
            tx.prove(fence).await?;
            if let Some(progress) = progress {
                sqlx::query("UPDATE work SET progress = $1 WHERE id = $2")
                    .bind(text(progress)?)
                    .bind(fence.work.0)
                    .execute(tx.on())
                    .await?;
            }
            let Some(session) = fence.session else { return Ok(Asked::Nothing) };
            let row = sqlx::query("SELECT wish FROM session WHERE id = $1").bind(session.0).fetch_one(tx.on()).await?;
            Ok(match word::<Wish>(&row, "wish")? {
                Wish::Run => Asked::Nothing,
                Wish::Pause => Asked::Pause,
                Wish::Cancel => Asked::Cancel,
            })
        })
    }

    /// Ends the work, or puts it back. The last work of a session ends the session. Saying it twice is saying it
    /// once: an answer may get lost on the way.
    ///
    /// # Errors
    /// [`Error::Fenced`] where the work is not ours any more.
    pub fn finish(&self, fence: &Fence, outcome: &Outcome, progress: Option<&Progress>) -> Result<()> {
        self.write("end work", async |tx| {
            if tx.has_ended_so(fence, outcome).await? {
                return Ok(());
            }
            tx.prove(fence).await?;
            let work = tx.work(fence.work).await?;
            tx.settle(&work, outcome, progress, &fence.owner).await
        })
    }

    /// One piece of work.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn work(&self, id: WorkId) -> Result<Work> {
        self.read("read work", async |pool| {
            let row = sqlx::query("SELECT * FROM work WHERE id = $1").bind(id.0).fetch_optional(pool).await?;
            row.as_ref().map_or_else(|| Err(Error::NotFound { what: format!("work {id}") }.into()), read)
        })
    }

    /// The work of a session, in the order it was put in.
    pub fn work_of(&self, session: SessionId) -> Result<Vec<Work>> {
        self.read("list work", async |pool| {
            let rows = sqlx::query("SELECT * FROM work WHERE session = $1 ORDER BY id")
                .bind(session.0)
                .fetch_all(pool)
                .await?;
            rows.iter().map(read).collect()
        })
    }

    /// Work that has not ended, in the order it was put in.
    pub fn open_work(&self) -> Result<Vec<Work>> {
        self.read("list work", async |pool| {
            let rows = sqlx::query("SELECT * FROM work WHERE state IN ('ready', 'running') ORDER BY id")
                .fetch_all(pool)
                .await?;
            rows.iter().map(read).collect()
        })
    }

    /// Changes work that nobody has in his hands: `is_free` says of the one that is there now whether that is so, by the
    /// clock that leases are told by.
    ///
    /// # Errors
    /// [`Error::State`] where somebody has it by now, or it has ended.
    pub fn change_left(
        &self,
        id: WorkId,
        left: &Left,
        user: &str,
        is_free: impl Fn(&Work, Timestamp) -> bool,
    ) -> Result<()> {
        self.write("change work that was left", async |tx| {
            tx.next("dispatch").await?;
            let work = tx.work(id).await?;
            let is_open = matches!(work.state, WorkState::Ready | WorkState::Running);
            let now = Timestamp::from_millisecond(tx.now).unwrap_or(Timestamp::MAX);
            if !is_open || !is_free(&work, now) {
                let (what, have) = (format!("work {id}"), work.state.to_string());
                return Err(Error::State { what, have, need: "left by whoever had it" }.into());
            }
            match left {
                Left::Cancelled => tx.settle(&work, &Outcome::Cancelled, None, user).await,
                Left::Told(spec) => {
                    sqlx::query("UPDATE work SET spec = $1 WHERE id = $2")
                        .bind(text(spec)?)
                        .bind(id.0)
                        .execute(tx.on())
                        .await?;
                    Ok(())
                }
            }
        })
    }

    /// Takes work away from owners that are known to be gone, without waiting for their leases: it is ready again under
    /// a new epoch. Answers how many pieces.
    pub fn settle_gone(&self, is_gone: impl Fn(&str) -> bool) -> Result<usize> {
        let in_hand = self.read("list owners", async |pool| {
            let rows = sqlx::query("SELECT id, owner FROM work WHERE state = 'running'").fetch_all(pool).await?;
            let of = |row: &AnyRow| Ok((row.try_get::<i64, _>("id")?, row.try_get::<Option<String>, _>("owner")?));
            rows.iter().map(of).collect::<Result<Vec<_>, Fault>>()
        })?;
        let gone: Vec<WorkId> = in_hand
            .into_iter()
            .filter(|(_, owner)| owner.as_deref().is_some_and(&is_gone))
            .map(|(id, _)| WorkId(id))
            .collect();
        if gone.is_empty() {
            return Ok(0);
        }
        self.write("take work from whoever is gone", async |tx| {
            tx.next("dispatch").await?;
            let rows = tx.in_hand().await?;
            for row in &rows {
                let work = read(row)?;
                // Somebody else may have it by now.
                if gone.contains(&work.id) && work.owner.as_deref().is_some_and(&is_gone) {
                    tx.settle_one(row, &work, "its process has ended").await?;
                }
            }
            Ok(())
        })?;
        Ok(gone.len())
    }

    fn something_due(&self, now: Timestamp) -> Result<bool> {
        // A shared database has a clock of its own for leases, which a look that costs nothing does not ask.
        let lost_before = match self.url() {
            Url::Sqlite(_) => Timestamp::now().as_millisecond(),
            Url::Postgres(_) => i64::MAX,
        };
        self.read("look for work", async |pool| {
            let row = sqlx::query(
                "SELECT count(*) AS n FROM work WHERE (state = 'ready' AND run_at <= $1) \
                 OR (state = 'running' AND lease_until < $2)",
            )
            .bind(now.as_millisecond())
            .bind(lost_before)
            .fetch_one(pool)
            .await?;
            Ok(row.try_get::<i64, _>("n")? > 0)
        })
    }
}

impl Tx {
    pub(super) async fn enqueue(&mut self, new: &NewWork) -> Result<WorkId, Fault> {
        let id = WorkId(self.next("work").await?);
        let (now, run_at) = (self.now, new.run_at.as_millisecond());
        // Waiting counts from when it could have begun.
        let waits_from = now.max(run_at);
        sqlx::query(
            "INSERT INTO work (id, kind, object, job, session, priority, place, queued_at, run_at, state, attempts, \
             retries, retry_ms, lost, epoch, needs, spec, progress) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'ready', 0, $10, $11, 0, 0, $12, $13, $14)",
        )
        .bind(id.0)
        .bind(new.kind.clone())
        .bind(new.object.clone())
        .bind(new.job.clone())
        .bind(new.session.map(|id| id.0))
        .bind(i64::from(new.priority))
        .bind(order::place(new.priority, waits_from))
        .bind(waits_from)
        .bind(run_at)
        .bind(i64::from(new.retries.count))
        .bind(new.retries.interval_ms)
        .bind(text(&new.needs)?)
        .bind(text(&new.spec)?)
        .bind(text(&Progress::default())?)
        .execute(self.on())
        .await?;
        self.events.push(Event {
            object: format!("work/{id}"),
            to: Some(WorkState::Ready.to_string()),
            op: "enqueue".into(),
            session: new.session,
            user: "queue".into(),
            reason: Some(format!("{} {}", new.kind, new.object).trim_end().to_owned()),
            ..Event::default()
        });
        Ok(id)
    }

    /// The work, locked.
    async fn work(&mut self, id: WorkId) -> Result<Work, Fault> {
        let row = sqlx::query("UPDATE work SET kind = kind WHERE id = $1 RETURNING *")
            .bind(id.0)
            .fetch_optional(self.on())
            .await?;
        row.as_ref().map_or_else(|| Err(Error::NotFound { what: format!("work {id}") }.into()), read)
    }

    async fn has_ended_so(&mut self, fence: &Fence, outcome: &Outcome) -> Result<bool, Fault> {
        let row = sqlx::query("SELECT state, outcome FROM work WHERE id = $1 AND epoch = $2 AND owner = $3")
            .bind(fence.work.0)
            .bind(fence.epoch)
            .bind(fence.owner.clone())
            .fetch_optional(self.on())
            .await?;
        let Some(row) = row else { return Ok(false) };
        let state: WorkState = word(&row, "state")?;
        let stored: Option<String> = row.try_get("outcome")?;
        Ok(state != WorkState::Running && stored == Some(text(&outcome.record())?))
    }

    /// Work whose lease ran out goes back into the queue under a new epoch: from then on whoever had it is fenced, also
    /// where other work on the same object is begun first. It ends where its session does, and where it kills its
    /// workers.
    /// Answers whether there was any.
    async fn settle_lost(&mut self) -> Result<bool, Fault> {
        let now = self.now;
        let mut has_settled = false;
        for row in &self.in_hand().await? {
            let work = read(row)?;
            if work.lease_until.is_some_and(|until| until.as_millisecond() < now) {
                self.settle_one(row, &work, "was silent for too long").await?;
                has_settled = true;
            }
        }
        Ok(has_settled)
    }

    /// Work in somebody's hands, with what was asked of its session.
    async fn in_hand(&mut self) -> Result<Vec<AnyRow>, Fault> {
        let rows = sqlx::query(
            "SELECT w.*, s.wish AS asked FROM work w LEFT JOIN session s ON s.id = w.session \
             WHERE w.state = 'running' ORDER BY w.id",
        );
        Ok(rows.fetch_all(self.on()).await?)
    }

    async fn settle_one(&mut self, row: &AnyRow, work: &Work, why: &str) -> Result<(), Fault> {
        let lost: i64 = row.try_get("lost")?;
        let asked: Option<String> = row.try_get("asked")?;
        let owner = work.owner.clone().unwrap_or_default();
        if asked.as_deref() == Some(Wish::Cancel.word()) {
            self.settle(work, &Outcome::Cancelled, None, &owner).await
        } else if lost + 1 >= LOST_MAX {
            let why = format!("{} workers in a row went away while they did it; the last was {owner}", lost + 1);
            let outcome = Outcome::Failed { why, code: "E_FAILED".into(), passing: false, help: None };
            self.settle(work, &outcome, None, &owner).await
        } else {
            self.lose(work, &owner, why).await
        }
    }

    async fn lose(&mut self, work: &Work, owner: &str, why: &str) -> Result<(), Fault> {
        sqlx::query(
            "UPDATE work SET state = 'ready', epoch = epoch + 1, lost = lost + 1, lease_until = NULL WHERE id = $1",
        )
        .bind(work.id.0)
        .execute(self.on())
        .await?;
        self.drop_slots(work.id).await?;
        self.events.push(Event {
            object: format!("work/{}", work.id),
            from: Some(work.state.to_string()),
            to: Some(WorkState::Ready.to_string()),
            op: "lose".into(),
            session: work.session,
            user: "queue".into(),
            reason: Some(format!("{owner}: {why}")),
            ..Event::default()
        });
        Ok(())
    }

    async fn candidates(
        &mut self,
        due: i64,
        kinds: &[&str],
        session: Option<SessionId>,
    ) -> Result<(Vec<Candidate>, Vec<AnyRow>), Fault> {
        let rows = sqlx::query(
            "SELECT w.* FROM work w LEFT JOIN session s ON s.id = w.session \
             WHERE (s.wish IS NULL OR s.wish = 'run') AND ($1 = 0 OR w.session = $2) \
             AND w.state = 'ready' AND w.run_at <= $3 \
             AND (w.object = '' OR NOT EXISTS (SELECT 1 FROM work o WHERE o.object = w.object AND o.id <> w.id \
                  AND (o.state = 'running' \
                       OR (w.job IS NOT NULL AND o.job IS NULL AND o.state = 'ready' AND o.run_at <= $4)))) \
             ORDER BY w.place, w.id",
        )
        .bind(i64::from(session.is_some()))
        .bind(session.map_or(0, |id| id.0))
        .bind(due)
        .bind(due)
        .fetch_all(self.on())
        .await?;
        let (mut candidates, mut kept) = (Vec::new(), Vec::new());
        for row in rows {
            let kind: String = row.try_get("kind")?;
            // Work that this worker cannot do still holds its place in the order, and its claim on slots.
            let ours = kinds.is_empty() || kinds.contains(&kind.as_str());
            let candidate = Candidate {
                place: row.try_get("place")?,
                waits_from: row.try_get("queued_at")?,
                needs: record(&row, "needs")?,
                ours,
            };
            candidates.push(candidate);
            kept.push(row);
        }
        Ok((candidates, kept))
    }

    async fn take(&mut self, row: &AnyRow, owner: &str) -> Result<(Work, Fence), Fault> {
        let before = read(row)?;
        let taken_over = row.try_get::<i64, _>("lost")? > 0;
        let lease_until = self.lease_until;
        let row = sqlx::query(
            "UPDATE work SET state = 'running', owner = $1, epoch = epoch + 1, attempts = attempts + 1, \
             lease_until = $2, outcome = NULL \
             WHERE id = $3 RETURNING *",
        )
        .bind(owner.to_owned())
        .bind(lease_until)
        .bind(before.id.0)
        .fetch_one(self.on())
        .await?;
        let work = read(&row)?;
        self.take_slots(&work).await?;
        if let Some(session) = work.session {
            self.session_works(session).await?;
        }
        let reason = taken_over.then(|| format!("{} went away", before.owner.as_deref().unwrap_or("its worker")));
        self.events.push(Event {
            object: format!("work/{}", work.id),
            from: Some(before.state.to_string()),
            to: Some(WorkState::Running.to_string()),
            op: if taken_over { "takeover" } else { "claim" }.into(),
            session: work.session,
            user: owner.to_owned(),
            reason,
            ..Event::default()
        });
        let fence = Fence {
            work: work.id,
            epoch: work.epoch,
            owner: owner.to_owned(),
            session: work.session,
            kind: work.kind.clone(),
        };
        Ok((work, fence))
    }

    /// Ends work, or puts it back, and the session with its last work.
    pub(super) async fn settle(
        &mut self,
        work: &Work,
        outcome: &Outcome,
        progress: Option<&Progress>,
        user: &str,
    ) -> Result<(), Fault> {
        let now = self.now;
        let again = matches!(outcome, Outcome::Failed { passing: true, .. }) && work.retries > 0;
        let back = again || matches!(outcome, Outcome::GivenBack(_));
        let state = if back { WorkState::Ready } else { outcome.state() };
        sqlx::query(
            "UPDATE work SET state = $1, outcome = $2, progress = COALESCE($3, progress), lost = 0, lease_until = NULL, \
             retries = retries - $4, run_at = CASE WHEN $5 = 1 THEN $6 + retry_ms ELSE run_at END, ended_at = $7 \
             WHERE id = $8",
        )
        .bind(state.word())
        .bind(text(&outcome.record())?)
        .bind(progress.map(text).transpose()?)
        .bind(i64::from(again))
        .bind(i64::from(again))
        .bind(now)
        .bind((!back).then_some(now))
        .bind(work.id.0)
        .execute(self.on())
        .await?;
        self.drop_slots(work.id).await?;
        let why = outcome.why().map(str::to_owned);
        let failed = matches!(outcome, Outcome::Failed { .. });
        self.events.push(Event {
            object: format!("work/{}", work.id),
            from: Some(work.state.to_string()),
            to: Some(state.to_string()),
            op: if again {
                "retry"
            } else if back {
                "give back"
            } else {
                "finish"
            }
            .into(),
            session: work.session,
            user: user.to_owned(),
            reason: if failed { None } else { why.clone() },
            error: if failed { why } else { None },
        });
        match work.session {
            Some(session) if !back => self.after_work(session).await,
            _ => Ok(()),
        }
    }

    /// Stores the sums of a session, and ends it where nothing is left to do.
    async fn after_work(&mut self, id: SessionId) -> Result<(), Fault> {
        let session = self.session(id).await?;
        let rows = sqlx::query("SELECT * FROM work WHERE session = $1").bind(id.0).fetch_all(self.on()).await?;
        let works = rows.iter().map(read).collect::<Result<Vec<Work>, Fault>>()?;
        let mut sum = Progress::default();
        works.iter().for_each(|work| sum.add(&work.progress));
        sum.rate = 0;
        sqlx::query("UPDATE session SET progress = $1 WHERE id = $2")
            .bind(text(&sum)?)
            .bind(id.0)
            .execute(self.on())
            .await?;
        let over = works.iter().all(|work| !matches!(work.state, WorkState::Ready | WorkState::Running));
        if !over || session.ended.is_some() {
            return Ok(());
        }
        let (result, reason) = verdict(&works);
        self.end_session(&session, result, reason.as_deref()).await
    }

    pub(super) async fn cancel_waiting(&mut self, id: SessionId) -> Result<(), Fault> {
        let rows = sqlx::query("SELECT * FROM work WHERE session = $1 AND state = 'ready' ORDER BY id")
            .bind(id.0)
            .fetch_all(self.on())
            .await?;
        for row in &rows {
            self.settle(&read(row)?, &Outcome::Cancelled, None, "queue").await?;
        }
        if rows.is_empty() { self.after_work(id).await } else { Ok(()) }
    }
}

/// The worst of the work, and why. What was left out for a reason that is known is nothing new to look at.
fn verdict(works: &[Work]) -> (SessionResult, Option<String>) {
    let is_known = |w: &&Work| w.outcome.as_ref().is_some_and(|outcome| outcome["known"] == true);
    let of = |states: &[WorkState]| works.iter().filter(|w| states.contains(&w.state) && !is_known(w)).count();
    let failed = of(&[WorkState::Failed]);
    let looked = of(&[WorkState::Warning, WorkState::Skipped]);
    let cancelled = of(&[WorkState::Cancelled]);
    let worst = |states: &[WorkState]| {
        let of_state = || works.iter().filter(|w| states.contains(&w.state));
        let first = of_state().find(|w| !is_known(w)).or_else(|| of_state().next())?;
        let why = first.outcome.as_ref()?.get("why")?.as_str()?;
        Some(if first.object.is_empty() { why.to_owned() } else { format!("{}: {why}", first.object) })
    };
    if failed > 0 {
        (SessionResult::Failed, worst(&[WorkState::Failed]))
    } else if cancelled > 0 {
        (SessionResult::Cancelled, None)
    } else if looked > 0 {
        (SessionResult::Warning, worst(&[WorkState::Warning, WorkState::Skipped]))
    } else {
        (SessionResult::Success, worst(&[WorkState::Skipped]))
    }
}

pub(super) fn read(row: &AnyRow) -> Result<Work, Fault> {
    let small =
        |column: &str| -> Result<u32, Fault> { Ok(u32::try_from(row.try_get::<i64, _>(column)?).unwrap_or_default()) };
    let outcome: Option<String> = row.try_get("outcome")?;
    Ok(Work {
        id: WorkId(row.try_get("id")?),
        kind: row.try_get("kind")?,
        object: row.try_get("object")?,
        job: row.try_get("job")?,
        session: row.try_get::<Option<i64>, _>("session")?.map(SessionId),
        priority: i32::try_from(row.try_get::<i64, _>("priority")?).unwrap_or_default(),
        queued: time(row, "queued_at")?,
        run_at: time(row, "run_at")?,
        state: word(row, "state")?,
        attempts: small("attempts")?,
        retries: small("retries")?,
        epoch: row.try_get("epoch")?,
        owner: row.try_get("owner")?,
        lease_until: maybe_time(row, "lease_until")?,
        needs: record(row, "needs")?,
        spec: record(row, "spec")?,
        progress: record(row, "progress")?,
        outcome: outcome.map(|_| record(row, "outcome")).transpose()?,
        ended: maybe_time(row, "ended_at")?,
    })
}
