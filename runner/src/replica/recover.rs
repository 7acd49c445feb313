//! What is left of operations whose worker died, brought to an end before anything else is done.
//!
//! Invariants
//! - A replica that somebody else has stamped meanwhile is not touched: the operation stays open, and says why.
//!
//! Not here: how an operation goes on (its own steps say so).

use super::{
    adopt::AdoptWork,
    desk::{Desk, Work, object},
    remove::RemoveWork,
    run::RunWork,
    state::Op,
};
use crate::{
    catalogue::OperationId,
    context::quoted,
    fail::{Code, Fail, Result},
    failback::{BackWork, CommitWork, ReturnWork, SwitchWork},
    failover::{FailoverWork, PermanentWork, StartWork, UndoWork},
};

/// Ends the open operation of a replica, if there is one that nobody carries out.
///
/// # Errors
/// [`Code::Busy`] while somebody does. That the operation was taken back is no error here.
pub fn recover(desk: &Desk<'_>, name: &str) -> Result<()> {
    recover_for(desk, name, Op::Replicate)
}

/// The same, because somebody wants `next`: what a run had copied is kept for the next run, and nobody waits for the rest.
///
/// # Errors
/// As [`recover`].
pub fn recover_for(desk: &Desk<'_>, name: &str, next: Op) -> Result<()> {
    recover_as(desk, name, next, Told::default())
}

/// What whoever goes on with an operation was told that its worker was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// An undo goes on also where a host does not answer.
    pub force: bool,
    /// A change of sides is taken back at once: production is not started for that.
    pub back: bool,
}

/// As [`recover_for`], with more to say.
///
/// # Errors
/// As [`recover`].
pub fn recover_as(desk: &Desk<'_>, name: &str, next: Op, told: Told) -> Result<()> {
    let open = desk.catalogue.open_operations()?;
    let Some(open) = open.into_iter().find(|operation| operation.object == object(name)) else { return Ok(()) };
    let open = desk.catalogue.adopt_operation(desk.fence, open.id)?;
    // Whoever has the replica now must not find it half changed by us.
    let op = Op::ALL.into_iter().find(|op| op.name() == open.op);
    desk.check_stamp_during(&desk.load(name)?.record, op)?;
    let data = if open.data.is_null() { &open.intent } else { &open.data };
    let kind = data
        .get("work")
        .and_then(|work| work.get("kind"))
        .and_then(serde_json::Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let ended = match kind.as_str() {
        RunWork::KIND if !matches!(next, Op::Replicate | Op::PlannedFailover) => {
            desk.go_back::<RunWork>(name, &open).map(drop)
        }
        UndoWork::KIND => desk.go_on_with::<UndoWork>(name, &open, |work| work.force |= told.force).map(drop),
        ReturnWork::KIND => desk.go_on_with::<ReturnWork>(name, &open, |work| work.force |= told.force).map(drop),
        SwitchWork::KIND => desk.go_on_with::<SwitchWork>(name, &open, |work| work.power_on &= !told.back).map(drop),
        RunWork::KIND => desk.go_on::<RunWork>(name, &open).map(drop),
        AdoptWork::KIND => desk.go_on::<AdoptWork>(name, &open).map(drop),
        RemoveWork::KIND => desk.go_on::<RemoveWork>(name, &open).map(drop),
        FailoverWork::KIND => desk.go_on::<FailoverWork>(name, &open).map(drop),
        StartWork::KIND => desk.go_on::<StartWork>(name, &open).map(drop),
        PermanentWork::KIND => desk.go_on::<PermanentWork>(name, &open).map(drop),
        BackWork::KIND => desk.go_on::<BackWork>(name, &open).map(drop),
        CommitWork::KIND => desk.go_on::<CommitWork>(name, &open).map(drop),
        other => Err(Fail::new(Code::Unsupported, format!("an operation of kind `{other}` is open"))),
    };
    match ended {
        Err(fail) if still_open(desk, name)? => Err(fail),
        // A first pass that got stuck is not taken back, and nothing is known of it later.
        Err(fail) if told.back && op == Some(Op::Failback) && is_stuck(desk, open.id)? => {
            let what = format!("the way home of {name} got stuck, production may be half written: {}", fail.what);
            let help = format!("aquifer failback {}    # writes all of it", quoted(name));
            Err(Fail { what, do_: None, ..fail }.help(help))
        }
        Err(fail) => {
            (desk.warn)(Code::WarnTakenBack, format!("{} of {name} had been cut short: {}", open.op, fail.what));
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn is_stuck(desk: &Desk<'_>, id: OperationId) -> Result<bool> {
    Ok(desk.catalogue.operation(id)?.state == "failed")
}

fn still_open(desk: &Desk<'_>, name: &str) -> Result<bool> {
    Ok(desk.catalogue.open_operations()?.iter().any(|operation| operation.object == object(name)))
}
