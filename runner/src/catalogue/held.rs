//! Work of jobs that somebody's operation holds, and what a run said before.
//!
//! Invariants
//! - Work of a job never waits for a person: what an operation holds is passed over after [`HELD_MS`], so that the other
//!   machines of its job go on at each run. Neither does it go on with what a person began otherwise: an operation that
//!   was cut short holds as well, until it is gone on with or cancelled.
//! - What stands until somebody changes it is told once, and once more when it is another thing.
//!
//! Not here: what a replica's own state holds (`job::replicate`).

use serde_json::Value;
use sqlx::{Any, Row, any::AnyArguments, query::Query};

use super::{
    Catalogue, Outcome, Result, Work,
    queue::read,
    transaction::{Fault, Tx, record},
};
use crate::fail::Code;

/// Work of a job waits so long for an operation on the same object, milliseconds: most operations take less, and those
/// that wait for a guest or for somebody's word have no end that can be told.
const HELD_MS: i64 = 10_000;

impl Catalogue {
    /// Whether the last run of the same job said this of the same object: what stands until somebody changes it is
    /// told once.
    pub fn said_before(&self, work: &Work, what: &str) -> Result<bool> {
        self.read("look what was said before", async |pool| {
            let before = before(work).fetch_optional(pool).await?;
            before.map_or(Ok(false), |row| Ok(says(&record(&row, "outcome")?, what)))
        })
    }
}

impl Tx {
    /// Ends work of jobs whose object is held by an operation that somebody has begun, or is to go on with: the other
    /// machines of its job are not to wait for that. Answers whether there was any.
    pub(super) async fn pass_over(&mut self, due: i64) -> Result<bool, Fault> {
        let rows = sqlx::query(
            "SELECT w.*, s.id AS holder, s.kind AS held_by FROM work w \
             JOIN work o ON o.object = w.object AND o.id <> w.id AND o.job IS NULL \
             AND o.state IN ('ready', 'running') AND o.run_at <= $1 AND o.queued_at <= $2 \
             JOIN session s ON s.id = o.session JOIN session r ON r.id = w.session AND r.wish = 'run' \
             WHERE w.state = 'ready' AND w.job IS NOT NULL AND w.object <> '' AND w.run_at <= $3 AND w.queued_at <= $4 \
             ORDER BY w.id, o.id",
        );
        // Both have been due for so long: a machine that waited for a slot is not left out for what takes a second.
        let (due, queued) = (due - HELD_MS, self.now - HELD_MS);
        let rows = rows.bind(due).bind(queued).bind(due).bind(queued).fetch_all(self.on()).await?;
        let mut passed = Vec::new();
        for row in &rows {
            let work = read(row)?;
            if passed.contains(&work.id) {
                continue;
            }
            passed.push(work.id);
            let (holder, held_by): (i64, String) = (row.try_get("holder")?, row.try_get("held_by")?);
            let name = work.object.rsplit('/').next().unwrap_or_default();
            let code = Code::WarnOnHold.name();
            let why = format!("{code}: {name} is on hold: {held_by}, session {holder}, has not ended");
            let before = before(&work).fetch_optional(self.on()).await?;
            let known = before.map_or(Ok(false), |row| Ok::<_, Fault>(says(&record(&row, "outcome")?, &why)))?;
            self.settle(&work, &Outcome::Skipped { why, known }, None, "queue").await?;
        }
        Ok(!passed.is_empty())
    }
}

/// The last work of the same job on the same object that came to an end.
fn before(work: &Work) -> Query<'static, Any, AnyArguments> {
    sqlx::query(
        "SELECT outcome FROM work WHERE job = $1 AND object = $2 AND id < $3 \
         AND state IN ('success', 'warning', 'failed', 'skipped') ORDER BY id DESC LIMIT 1",
    )
    .bind(work.job.clone())
    .bind(work.object.clone())
    .bind(work.id.0)
}

/// Whether an outcome says that, anywhere in it.
fn says(outcome: &Value, what: &str) -> bool {
    match outcome {
        Value::String(text) => text == what,
        Value::Array(list) => list.iter().any(|value| says(value, what)),
        Value::Object(fields) => fields.values().any(|value| says(value, what)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}
