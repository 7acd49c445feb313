//! What an operation came to, from what is recorded: the same whoever finished it.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    fail::Result,
    replica::{
        desk::Desk,
        model::{Carried, FailbackRecord},
        state::{Op, State},
    },
};

/// Something to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warned {
    /// Its code.
    pub code: String,
    /// What it is.
    pub what: String,
}

/// A replica after an operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its name.
    pub replica: String,
    /// What was done.
    pub op: Op,
    /// Its state now.
    pub state: State,
    /// What can be done now.
    pub allowed_operations: Vec<Op>,
    /// The restore point that it serves from, or the newest.
    pub point: Option<Uuid>,
    /// When its disks looked like that point.
    pub taken: Option<Timestamp>,
    /// What the first pass home moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<Carried>,
    /// What the second pass home moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<Carried>,
    /// Milliseconds between the end of the replica's machine and the start of production's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<i64>,
    /// The machine's console, where one of the two sides runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
    /// What that console said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_log: Option<PathBuf>,
    /// Where the way home leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<PathBuf>,
    /// What is to be looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Warned>,
}

impl Report {
    /// The replica as it is now. `before` is its way home, if there was one.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn of(desk: &Desk<'_>, op: Op, name: &str, before: Option<FailbackRecord>) -> Result<Self> {
        let record = desk.load(name)?.record;
        let points = desk.points(name)?;
        let point = match &record.failover {
            Some(failover) => points.iter().find(|point| point.id == failover.point),
            None => points.last(),
        };
        // What a way home moved is told as long as it stands, and once more when it is made final.
        let failback = record.failback.as_ref().or(before.as_ref().filter(|_| op == Op::Commit));
        let running = match (&record.failback, &record.failover) {
            (Some(failback), _) if failback.running.is_some() => failback.running.clone(),
            (_, Some(_)) => desk.running(&record.folder),
            _ => None,
        };
        let mut allowed = record.state.allowed();
        allowed.retain(|op| *op != Op::Start || running.is_none());
        let times = failback.and_then(|failback| failback.off_since.zip(failback.on_since));
        Ok(Self {
            replica: name.to_owned(),
            op,
            state: record.state,
            allowed_operations: allowed,
            point: point.map(|point| point.id),
            taken: point.map(|point| point.taken),
            first: failback.map(|failback| failback.first),
            second: failback.and_then(|failback| failback.second),
            downtime_ms: times.map(|(off, on)| on.as_millisecond() - off.as_millisecond()),
            console: running.as_ref().map(|running| running.console.clone()),
            console_log: running.map(|running| running.console_log),
            home: failback.map(|failback| failback.home.folder.clone()),
            warnings: Vec::new(),
        })
    }
}
