//! What work means: each kind of work and its body.
//!
//! Invariants
//! - A body leaves what it has stored where the next attempt finds it, and nothing half visible.
//! - Every durable effect of a body carries the fence of its task.

use crate::{
    fail::{Code, Fail, Result},
    work::{Done, Task},
};

/// Does a piece of work.
///
/// # Errors
/// [`Code::Unsupported`] for a kind that this build does not do; what the body fails with.
pub fn run(task: &Task<'_>) -> Result<Done> {
    let kind = &task.work.kind;
    Err(Fail::new(Code::Unsupported, format!("this build does not know work of the kind `{kind}`")))
}
