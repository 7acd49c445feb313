//! Operations: what is being done to a replica, journalled so that a crash can be gone on from or undone.
//!
//! Invariants
//! - The record is durable before its first side effect; a step is durable before the next one begins.
//! - One open operation for an object: the database's own unique index says so.
//! - An operation belongs to whoever holds its work: after a takeover the new holder goes on with the same record.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use sqlx::{Row, any::AnyRow};

use super::{
    Catalogue, Change, Error, Event, Fence, Result, WorkId,
    transaction::{Fault, Tx, maybe_time, record, text, time},
};

/// Number of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct OperationId(pub i64);

impl std::fmt::Display for OperationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It reached its end.
    Done,
    /// It was taken back, wholly.
    Undone(String),
    /// It ended in another legal state.
    Failed(String),
}

impl End {
    fn word(&self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Undone(_) => "undone",
            Self::Failed(_) => "failed",
        }
    }

    fn reason(&self) -> Option<String> {
        match self {
            Self::Done => None,
            Self::Undone(reason) | Self::Failed(reason) => Some(reason.clone()),
        }
    }
}

/// An operation as it is journalled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Operation {
    /// Its number.
    pub id: OperationId,
    /// What it changes: `replica/NAME`.
    pub object: String,
    /// What it does.
    pub op: String,
    /// The work it belongs to.
    pub work: WorkId,
    /// `open`, `done`, `undone` or `failed`.
    pub state: String,
    /// What it was begun with.
    pub intent: Value,
    /// The step that was reached.
    pub step: u32,
    /// What that step left behind, for going on and for undoing.
    pub data: Value,
    /// When it was begun.
    pub begun: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// Why it did not reach its end.
    pub reason: Option<String>,
}

impl Catalogue {
    /// Begins an operation on an object. Where this same operation is open already, from a worker that went away,
    /// that one goes on, from its first step.
    ///
    /// # Errors
    /// [`Error::Busy`] names the operation that is open; [`Error::Fenced`].
    pub fn begin_operation(&self, fence: &Fence, object: &str, op: &str, intent: &Value) -> Result<OperationId> {
        self.write("begin an operation", async |tx| {
            tx.prove(fence).await?;
            if let Some(open) = tx.open_operation(object).await? {
                if open.work == fence.work && open.op == op {
                    // Its journal begins anew, with what it is gone on with.
                    sqlx::query("UPDATE operation SET epoch = $1, step = 0, data = $2 WHERE id = $3")
                        .bind(fence.epoch)
                        .bind(text(intent)?)
                        .bind(open.id.0)
                        .execute(tx.on())
                        .await?;
                    return Ok(open.id);
                }
                return Err(busy(object, &open));
            }
            let id = OperationId(tx.next("operation").await?);
            let now = tx.now;
            let inserted = sqlx::query(
                "INSERT INTO operation (id, object, op, work, epoch, state, intent, step, data, begun_at) \
                 VALUES ($1, $2, $3, $4, $5, 'open', $6, 0, 'null', $7)",
            )
            .bind(id.0)
            .bind(object.to_owned())
            .bind(op.to_owned())
            .bind(fence.work.0)
            .bind(fence.epoch)
            .bind(text(intent)?)
            .bind(now)
            .execute(tx.on())
            .await
            .map_err(Fault::from);
            match inserted {
                Err(fault) if fault.is_unique_violation() => {
                    let holder = "an operation that was just begun".to_owned();
                    return Err(Error::Busy { what: object.to_owned(), holder }.into());
                }
                inserted => inserted?,
            };
            tx.operation_event(object, op, "begin", None, fence);
            Ok(id)
        })
    }

    /// Journals that a step was reached, with what is needed to go on from it or to undo it, and makes the changes that
    /// belong to it: all of that, or nothing.
    ///
    /// # Errors
    /// [`Error::Fenced`]; [`Error::State`] where the operation is not open; [`Error::Stale`].
    pub fn step(&self, fence: &Fence, id: OperationId, step: u32, data: &Value, with: &[Change]) -> Result<()> {
        self.write("journal a step", async |tx| {
            tx.prove(fence).await?;
            tx.change(fence, with).await?;
            let changed = sqlx::query(
                "UPDATE operation SET step = $1, data = $2, epoch = $3 WHERE id = $4 AND work = $5 AND state = 'open'",
            )
            .bind(i64::from(step))
            .bind(text(data)?)
            .bind(fence.epoch)
            .bind(id.0)
            .bind(fence.work.0)
            .execute(tx.on())
            .await?;
            if changed.rows_affected() == 1 { Ok(()) } else { Err(not_open(id)) }
        })
    }

    /// Ends an operation, and makes the changes that it ends with: all of that, or nothing.
    ///
    /// # Errors
    /// [`Error::Fenced`]; [`Error::State`] where the operation is not open; [`Error::Stale`].
    pub fn end_operation(&self, fence: &Fence, id: OperationId, end: &End, with: &[Change]) -> Result<()> {
        self.write("end an operation", async |tx| {
            tx.prove(fence).await?;
            tx.change(fence, with).await?;
            let now = tx.now;
            let row = sqlx::query(
                "UPDATE operation SET state = $1, reason = $2, ended_at = $3 \
                 WHERE id = $4 AND work = $5 AND state = 'open' RETURNING object, op",
            )
            .bind(end.word())
            .bind(end.reason())
            .bind(now)
            .bind(id.0)
            .bind(fence.work.0)
            .fetch_optional(tx.on())
            .await?;
            let Some(row) = row else { return Err(not_open(id)) };
            let (object, op): (String, String) = (row.try_get("object")?, row.try_get("op")?);
            tx.operation_event(&object, &op, end.word(), end.reason(), fence);
            Ok(())
        })
    }

    /// Gives an open operation to the work that will go on with it: after the work that began it has ended, or was put
    /// back because its worker went away.
    ///
    /// # Errors
    /// [`Error::Fenced`]; [`Error::Busy`] while somebody has its work in hand; [`Error::State`].
    pub fn adopt_operation(&self, fence: &Fence, id: OperationId) -> Result<Operation> {
        self.write("take an operation over", async |tx| {
            tx.prove(fence).await?;
            let row = sqlx::query(
                "UPDATE operation SET work = $1, epoch = $2 WHERE id = $3 AND state = 'open' AND (work = $4 OR NOT EXISTS \
                 (SELECT 1 FROM work w WHERE w.id = operation.work AND w.state = 'running')) RETURNING *",
            )
            .bind(fence.work.0)
            .bind(fence.epoch)
            .bind(id.0)
            .bind(fence.work.0)
            .fetch_optional(tx.on())
            .await?;
            if let Some(row) = row {
                return read(&row);
            }
            let open = sqlx::query("SELECT * FROM operation WHERE id = $1 AND state = 'open'")
                .bind(id.0)
                .fetch_optional(tx.on())
                .await?;
            let Some(open) = open else { return Err(not_open(id)) };
            let open = read(&open)?;
            Err(busy(&open.object, &open))
        })
    }

    /// Every operation that has not ended.
    pub fn open_operations(&self) -> Result<Vec<Operation>> {
        self.read("list operations", async |pool| {
            let rows = sqlx::query("SELECT * FROM operation WHERE state = 'open' ORDER BY id").fetch_all(pool).await?;
            rows.iter().map(read).collect()
        })
    }

    /// The operations of a piece of work, oldest first.
    pub fn operations_of(&self, work: WorkId) -> Result<Vec<Operation>> {
        self.read("list operations", async |pool| {
            let rows =
                sqlx::query("SELECT * FROM operation WHERE work = $1 ORDER BY id").bind(work.0).fetch_all(pool).await?;
            rows.iter().map(read).collect()
        })
    }

    /// One operation.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn operation(&self, id: OperationId) -> Result<Operation> {
        self.read("read an operation", async |pool| {
            let row = sqlx::query("SELECT * FROM operation WHERE id = $1").bind(id.0).fetch_optional(pool).await?;
            let missing = || Err(Error::NotFound { what: format!("operation {id}") }.into());
            row.as_ref().map_or_else(missing, read)
        })
    }
}

fn busy(object: &str, open: &Operation) -> Fault {
    let holder = format!("operation {} ({}), work {}, since {}", open.id, open.op, open.work, open.begun);
    Error::Busy { what: object.to_owned(), holder }.into()
}

fn not_open(id: OperationId) -> Fault {
    Error::State { what: format!("operation {id}"), have: "not open for this work".into(), need: "open" }.into()
}

impl Tx {
    async fn open_operation(&mut self, object: &str) -> Result<Option<Operation>, Fault> {
        let row = sqlx::query("SELECT * FROM operation WHERE object = $1 AND state = 'open'")
            .bind(object.to_owned())
            .fetch_optional(self.on())
            .await?;
        row.as_ref().map(read).transpose()
    }

    fn operation_event(&mut self, object: &str, op: &str, step: &str, error: Option<String>, fence: &Fence) {
        self.events.push(Event {
            object: object.to_owned(),
            op: format!("{op} {step}"),
            session: fence.session,
            user: fence.owner.clone(),
            error,
            ..Event::default()
        });
    }
}

fn read(row: &AnyRow) -> Result<Operation, Fault> {
    Ok(Operation {
        id: OperationId(row.try_get("id")?),
        object: row.try_get("object")?,
        op: row.try_get("op")?,
        work: WorkId(row.try_get("work")?),
        state: row.try_get("state")?,
        intent: record(row, "intent")?,
        step: u32::try_from(row.try_get::<i64, _>("step")?).unwrap_or(u32::MAX),
        data: record(row, "data")?,
        begun: time(row, "begun_at")?,
        ended: maybe_time(row, "ended_at")?,
        reason: row.try_get("reason")?,
    })
}
