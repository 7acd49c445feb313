//! A piece of work: what is put into the queue, and what is read of it.
//!
//! Not here: who gets it, and what becomes of it (`queue`).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Need, Progress, SessionId, transaction::words};

/// Number of a piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkId(pub i64);

impl std::fmt::Display for WorkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

words! {
    /// How a piece of work stands.
    WorkState {
        /// In the queue, at once or from its time on.
        Ready "ready"
        /// In somebody's hands.
        Running "running"
        /// Done.
        Success "success"
        /// Done, with something to look at.
        Warning "warning"
        /// Not done, and not tried again.
        Failed "failed"
        /// Stopped on request.
        Cancelled "cancelled"
        /// Left out: its object is on hold.
        Skipped "skipped"
    }
}

/// How often failed work is tried again, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retries {
    /// So many times more.
    pub count: u32,
    /// Milliseconds between a failure and the next attempt.
    pub interval_ms: i64,
}

/// A piece of work to put into the queue.
#[derive(Clone, Debug, PartialEq)]
pub struct NewWork {
    /// What kind: `backup`, `replication`, `failover` ...
    pub kind: String,
    /// What it changes; two works on one object run one after the other. Empty: nothing that others change.
    pub object: String,
    /// The job it belongs to.
    pub job: Option<String>,
    /// The session it belongs to.
    pub session: Option<SessionId>,
    /// Higher first: 800 restore, 300 backup and replication, 200 copy, 100 upkeep.
    pub priority: i32,
    /// Not before.
    pub run_at: Timestamp,
    /// Slots it needs, taken with the claim.
    pub needs: Vec<Need>,
    /// When it fails for a reason that may pass.
    pub retries: Retries,
    /// What to do, for whoever does it.
    pub spec: Value,
}

impl NewWork {
    /// Work that is due at once, belongs to nothing, needs no slots and is tried once.
    pub fn new(kind: &str, object: impl Into<String>, priority: i32, spec: Value) -> Self {
        Self {
            kind: kind.to_owned(),
            object: object.into(),
            job: None,
            session: None,
            priority,
            run_at: Timestamp::UNIX_EPOCH,
            needs: Vec::new(),
            retries: Retries::default(),
            spec,
        }
    }
}

/// A piece of work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Work {
    /// Its number.
    pub id: WorkId,
    /// What kind.
    pub kind: String,
    /// What it changes.
    pub object: String,
    /// The job it belongs to.
    pub job: Option<String>,
    /// The session it belongs to.
    pub session: Option<SessionId>,
    /// Higher first.
    pub priority: i32,
    /// When it was put into the queue.
    pub queued: Timestamp,
    /// Not before.
    pub run_at: Timestamp,
    /// How it stands.
    pub state: WorkState,
    /// How often it was begun.
    pub attempts: u32,
    /// How often it may still be tried again.
    pub retries: u32,
    /// Which claim this is.
    pub epoch: i64,
    /// Who has it, or had it last.
    pub owner: Option<String>,
    /// When it is given to another, without a sign of life.
    pub lease_until: Option<Timestamp>,
    /// Slots it needs.
    pub needs: Vec<Need>,
    /// What to do.
    pub spec: Value,
    /// How far it is.
    pub progress: Progress,
    /// What came of it.
    pub outcome: Option<Value>,
    /// When it ended.
    pub ended: Option<Timestamp>,
}
