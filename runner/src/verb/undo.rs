//! `undo`: takes the last step of a replica back.

use super::ops::{self, Manner, Starts, Wanted};
use crate::{
    catalogue::Catalogue,
    cli::{Confirm, DryRun},
    context::Context,
    fail::Result,
    failover::loss,
    operate::Act,
    replica::{
        model::{PointRecord, ReplicaRecord},
        state::{Op, State},
    },
    units,
};

/// Options of `undo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The replicas
    #[arg(value_name = "REPLICA", required = true)]
    pub targets: Vec<String>,
    /// Also where a machine cannot be turned off because its host does not answer
    #[arg(long)]
    pub force: bool,
    /// How machines are started.
    #[command(flatten)]
    pub starts: Starts,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let manner = Manner { dry: &args.dry, confirm: Some(&args.confirm), cancel_job: false, ops: &[Op::Undo] };
    ops::carry_out(context, &args.targets, &manner, |catalogue, record| {
        if !args.dry.dry_run && record.state == State::ReadyToSwitch {
            super::failback::unschedule(context, catalogue, &record.name)?;
        }
        let ask = args.starts.ask(&record.name, Act::Undo { force: args.force });
        Ok(Wanted { ask, loss: lost(context, catalogue, record)? })
    })
}

/// What is lost, in a sentence.
fn lost(context: &Context, catalogue: &Catalogue, record: &ReplicaRecord) -> Result<Option<String>> {
    let name = &record.name;
    Ok(match record.state {
        State::Failback => {
            let home = record.failback.as_ref().map(|failback| failback.home.machine.as_str()).unwrap_or_default();
            Some(format!("what {home} has written since the sides were changed"))
        }
        State::Failover | State::FailedFailover => {
            let points: Vec<PointRecord> =
                catalogue.points_of::<PointRecord>(name)?.into_iter().map(|row| row.record).collect();
            // A layer that cannot be read now is given up all the same.
            let lost = loss(&context.cache()?, &points, record).ok().flatten();
            let bytes = lost.map_or_else(|| "what".to_owned(), |loss| format!("{} that", units::bytes(loss.bytes)));
            let since = record.failover.as_ref().map(|failover| failover.since.to_string()).unwrap_or_default();
            Some(format!("{bytes} {name} has written since {since}"))
        }
        _ => None,
    })
}
