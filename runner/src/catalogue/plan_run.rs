//! Runs of failover plans, as records that `failover` defines.
//!
//! Invariants
//! - Every write carries a fence and the revision that was read.

use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use sqlx::{Row, any::AnyRow};

use super::{
    Catalogue, Error, Event, Fence, Result,
    transaction::{Fault, record, text, time},
};

/// A run of a plan as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanRun<R> {
    /// Its number; 0 before it is stored for the first time.
    pub id: i64,
    /// The plan.
    pub plan: String,
    /// 0 before it is stored for the first time.
    pub revision: i64,
    /// Its state, by name.
    pub state: String,
    /// All about it.
    pub record: R,
    /// When it was begun.
    pub begun: Timestamp,
}

impl Catalogue {
    /// Stores a run of a plan; gives it back with its number and new revision. A change of its state is an event.
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::Fenced`].
    pub fn put_plan_run<R: Serialize + Clone>(&self, fence: &Fence, run: &PlanRun<R>) -> Result<PlanRun<R>> {
        self.write("store a run of a plan", async |tx| {
            tx.prove(fence).await?;
            let (mut stored, mut from) = (run.clone(), None);
            if run.id == 0 {
                stored.id = tx.next("plan_run").await?;
                sqlx::query(
                    "INSERT INTO plan_run (id, plan, revision, state, record, begun_at) VALUES ($1, $2, 1, $3, $4, $5)",
                )
                .bind(stored.id)
                .bind(run.plan.clone())
                .bind(run.state.clone())
                .bind(text(&run.record)?)
                .bind(run.begun.as_millisecond())
                .execute(tx.on())
                .await?;
            } else {
                let before =
                    sqlx::query("SELECT state, revision FROM plan_run WHERE id = $1").bind(run.id).fetch_optional(tx.on()).await?;
                let before = before.ok_or_else(|| Error::NotFound { what: format!("run {} of a plan", run.id) })?;
                from = Some(before.try_get::<String, _>("state")?);
                let changed = sqlx::query(
                    "UPDATE plan_run SET revision = revision + 1, state = $1, record = $2 WHERE id = $3 AND revision = $4",
                )
                .bind(run.state.clone())
                .bind(text(&run.record)?)
                .bind(run.id)
                .bind(run.revision)
                .execute(tx.on())
                .await?;
                if changed.rows_affected() != 1 {
                    let what = format!("run {} of plan {}", run.id, run.plan);
                    return Err(Error::Stale { what, have: run.revision, now: before.try_get("revision")? }.into());
                }
            }
            stored.revision = run.revision + 1;
            if from.as_deref() != Some(run.state.as_str()) {
                tx.events.push(Event {
                    object: format!("plan/{}", run.plan),
                    from,
                    to: Some(run.state.clone()),
                    op: fence.kind.clone(),
                    session: fence.session,
                    user: fence.owner.clone(),
                    ..Event::default()
                });
            }
            Ok(stored)
        })
    }

    /// The runs of a plan, oldest first.
    pub fn plan_runs<R: DeserializeOwned>(&self, plan: &str) -> Result<Vec<PlanRun<R>>> {
        self.read("list runs of a plan", async |pool| {
            let rows = sqlx::query("SELECT * FROM plan_run WHERE plan = $1 ORDER BY id")
                .bind(plan.to_owned())
                .fetch_all(pool)
                .await?;
            rows.iter().map(read).collect()
        })
    }
}

fn read<R: DeserializeOwned>(row: &AnyRow) -> Result<PlanRun<R>, Fault> {
    Ok(PlanRun {
        id: row.try_get("id")?,
        plan: row.try_get("plan")?,
        revision: row.try_get("revision")?,
        state: row.try_get("state")?,
        record: record(row, "record")?,
        begun: time(row, "begun_at")?,
    })
}
