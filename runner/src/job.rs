//! What work means: each kind of work and its body.
//!
//! Invariants
//! - A body leaves what it has stored where the next attempt finds it, and nothing half visible.
//! - Every durable effect of a body carries the fence of its task.

pub mod backup;
pub mod copy;
pub mod give_up;
pub mod health;
mod news;
pub mod place;
pub mod replicate;
pub mod stored;

use serde::Serialize;

use crate::{
    catalogue::NewWork,
    context::Context,
    fail::{Code, Fail, Result},
    operate, plan,
    site::{Job, JobKind, Site},
    tasks::{Done, Task},
};

pub use news::{newest_points, told_of_unnamed, unnamed};

/// Something a run would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What, as words that follow "would".
    pub what: String,
    /// Bytes it is expected to read; `None` where nobody can tell before.
    pub bytes: Option<u64>,
}

/// Does a piece of work.
///
/// # Errors
/// [`Code::Unsupported`] for a kind that this build does not do; what the body fails with.
pub fn run(task: &Task<'_>) -> Result<Done> {
    match task.work.kind.as_str() {
        "backup" | "copy" | "health" => stored::run(task),
        operate::KIND => operate::run(task),
        plan::KIND => plan::run(task),
        "replication" => replicate::run(task),
        give_up::KIND => give_up::run(task),
        kind => Err(Fail::new(Code::Unsupported, format!("this build does not know work of the kind `{kind}`"))),
    }
}

/// What a piece of work would do. Changes nothing.
///
/// # Errors
/// What the work itself would be refused for.
pub fn foresee(context: &Context, site: &Site, job: &Job, work: &NewWork) -> Result<Vec<Step>> {
    let machine = work.spec.get("machine").and_then(|machine| machine.as_str());
    match &job.kind {
        JobKind::Backup(_) | JobKind::Copy(_) | JobKind::Health(_) => {
            stored::foresee(context, work.job.as_deref().unwrap_or_default(), job, machine)
        }
        JobKind::Replication(_) => replicate::foresee(context, site, job, work),
    }
}
