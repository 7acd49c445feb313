//! Events: each transition of anything the catalogue knows, in the order of commits.
//!
//! Invariants
//! - An event is written in the transaction that makes its transition, or not at all.
//! - Numbers have no gap and never change their order.

use jiff::Timestamp;
use serde::Serialize;
use sqlx::{Row, any::AnyRow};

use super::{
    Catalogue, Fence, Result, SessionId,
    transaction::{Fault, Tx, time},
};

/// A transition, as it is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Event {
    /// What it happened to: `session/12`, `work/31`, `replica/web01_replica`, `job/nightly`,
    /// `plan/site-dr`, `machine/web01`.
    pub object: String,
    /// The state before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The state after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// What was done.
    pub op: String,
    /// The session it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    /// Who asked: a person, or `schedule`.
    pub user: String,
    /// Why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An event as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EventRecord {
    /// Its number: one more than the one before.
    pub seq: i64,
    /// When.
    pub time: Timestamp,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// Which events are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only of this object, or of everything whose name begins with it where it ends in `/`.
    pub object: Option<String>,
    /// Only of this session.
    pub session: Option<SessionId>,
    /// At most so many.
    pub limit: Option<u32>,
}

impl Catalogue {
    /// Writes an event that belongs to no other change.
    pub fn event(&self, event: &Event) -> Result<()> {
        self.write("store an event", async |tx| {
            tx.events.push(event.clone());
            Ok(())
        })
    }

    /// The same, for whoever holds a piece of work.
    ///
    /// # Errors
    /// [`super::Error::Fenced`].
    pub fn event_of(&self, fence: &Fence, event: &Event) -> Result<()> {
        self.write("store an event", async |tx| {
            tx.prove(fence).await?;
            tx.events.push(event.clone());
            Ok(())
        })
    }

    /// Events with numbers above `since`, in order.
    pub fn events(&self, since: i64, filter: &EventFilter) -> Result<Vec<EventRecord>> {
        let (exact, prefix) = match &filter.object {
            Some(object) if object.ends_with('/') => (None, Some(object.clone())),
            object => (object.clone(), None),
        };
        self.read("list events", async |pool| {
            let rows = sqlx::query(
                "SELECT * FROM event WHERE seq > $1 AND (CAST($2 AS TEXT) IS NULL OR object = $3) \
                 AND (CAST($4 AS TEXT) IS NULL OR substr(object, 1, CAST($5 AS INTEGER)) = $6) AND ($7 = 0 OR session = $8) \
                 ORDER BY seq LIMIT $9",
            )
            .bind(since)
            .bind(exact.clone())
            .bind(exact.clone())
            .bind(prefix.clone())
            .bind(prefix.as_ref().map_or(0, |p| i64::try_from(p.chars().count()).unwrap_or(0)))
            .bind(prefix.clone())
            .bind(i64::from(filter.session.is_some()))
            .bind(filter.session.map_or(0, |id| id.0))
            .bind(i64::from(filter.limit.unwrap_or(u32::MAX)))
            .fetch_all(pool)
            .await?;
            rows.iter().map(read).collect()
        })
    }

    /// The number of the last event; 0 where there is none.
    pub fn last_event(&self) -> Result<i64> {
        self.read("look for events", async |pool| {
            let row = sqlx::query("SELECT value FROM counter WHERE name = 'event'").fetch_one(pool).await?;
            Ok(row.try_get("value")?)
        })
    }
}

impl Tx {
    /// Writes what was collected: last, because it locks the counter of events.
    pub(super) async fn write_events(&mut self) -> Result<(), Fault> {
        for event in std::mem::take(&mut self.events) {
            let seq = self.next("event").await?;
            let now = self.now;
            sqlx::query(
                "INSERT INTO event (seq, at, object, from_state, to_state, op, session, initiator, reason, error) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            )
            .bind(seq)
            .bind(now)
            .bind(event.object)
            .bind(event.from)
            .bind(event.to)
            .bind(event.op)
            .bind(event.session.map(|id| id.0))
            .bind(event.user)
            .bind(event.reason)
            .bind(event.error)
            .execute(self.on())
            .await?;
        }
        Ok(())
    }
}

fn read(row: &AnyRow) -> Result<EventRecord, Fault> {
    Ok(EventRecord {
        seq: row.try_get("seq")?,
        time: time(row, "at")?,
        event: Event {
            object: row.try_get("object")?,
            from: row.try_get("from_state")?,
            to: row.try_get("to_state")?,
            op: row.try_get("op")?,
            session: row.try_get::<Option<i64>, _>("session")?.map(SessionId),
            user: row.try_get("initiator")?,
            reason: row.try_get("reason")?,
            error: row.try_get("error")?,
        },
    })
}
