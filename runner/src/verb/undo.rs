//! `undo`: takes the last step of a replica back.

use super::ops::{self, Manner, Options, Starts, Wanted};
use crate::{
    catalogue::Catalogue,
    cli::{Confirm, DryRun},
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    failback::made_are_free,
    failover::loss,
    operate::{self, Act, RunOfJob},
    replica::{
        model::{PointRecord, ReplicaRecord},
        state::{Op, State},
    },
    units,
};

/// Options of `undo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Replicas, or plan/NAME
    #[arg(value_name = "REPLICA", required = true)]
    pub targets: Vec<String>,
    /// Also where a machine cannot be turned off because its host does not answer
    #[arg(long)]
    pub force: bool,
    /// Where a takeover is taken back and production is off: start it, so that it serves again
    #[arg(long)]
    pub restart: bool,
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
    let options = Options::default().flag("--force", args.force);
    let options = options.flag("--restart", args.restart).network(args.starts.network.into());
    let manner =
        Manner { dry: &args.dry, confirm: Some(&args.confirm), run: RunOfJob::Ends, ops: &[Op::Undo], options };
    ops::carry_out(context, &args.targets, &manner, |catalogue, record| {
        if !args.dry.dry_run && record.state == State::ReadyToSwitch {
            super::failback::unschedule(context, catalogue, &record.name)?;
        }
        let way_home = operate::way_home_is_left(catalogue, &record.name)?;
        let act = Act::Undo { force: args.force, restart: args.restart, way_home };
        let ask = args.starts.ask(&record.name, act);
        if way_home {
            if args.restart {
                return Err(stays_off(record));
            }
            return Ok(Wanted { ask, loss: lost_on_the_way(catalogue, record)?, notes: Vec::new() });
        }
        if let Some(failback) = record.failback.as_ref().filter(|_| !args.force) {
            made_are_free(&failback.home, ops::runs(context, &failback.home.folder)?)?;
        }
        let notes = production_then(context, args, record)?.into_iter().collect();
        Ok(Wanted { ask, loss: lost(context, catalogue, record)?, notes })
    })
}

/// What becomes of production, where a takeover is taken back while it is off.
fn production_then(context: &Context, args: &Args, record: &ReplicaRecord) -> Result<Option<String>> {
    if !matches!(record.state, State::Failover | State::FailedFailover) {
        if args.restart && matches!(record.state, State::Failback | State::ReadyToSwitch) {
            return Err(stays_off(record));
        }
        return Ok(None);
    }
    Ok(ops::production_off(context, record)?.map(|home| match args.restart {
        true => format!("{home} is started"),
        false => format!("{home} is off, and stays off: nobody serves (--restart starts it)"),
    }))
}

fn stays_off(record: &ReplicaRecord) -> Fail {
    let what = format!("{} serves again when its way home is taken back: production stays off", record.name);
    Fail::new(Code::State, what).help(format!("aquifer undo {}", quoted(&record.name)))
}

/// What is lost where a way home is taken back that was cut short: it may have changed the sides.
fn lost_on_the_way(catalogue: &Catalogue, record: &ReplicaRecord) -> Result<Option<String>> {
    let may_have_changed =
        record.state == State::Failback || operate::is_open_operation(catalogue, &record.name, &[Op::Switchover])?;
    Ok(may_have_changed.then(|| written_at_home(record)))
}

fn written_at_home(record: &ReplicaRecord) -> String {
    let home = record.failback.as_ref().map_or("production", |failback| failback.home.machine.as_str());
    format!("lost: what {home} has written since the sides were changed")
}

/// What is lost, in a sentence.
fn lost(context: &Context, catalogue: &Catalogue, record: &ReplicaRecord) -> Result<Option<String>> {
    let name = &record.name;
    Ok(match record.state {
        State::Failback => Some(written_at_home(record)),
        State::Failover | State::FailedFailover => {
            let points: Vec<PointRecord> =
                catalogue.points_of::<PointRecord>(name)?.into_iter().map(|row| row.record).collect();
            // A layer that cannot be read now is given up all the same.
            let lost = loss(&context.cache()?, &points, record).ok().flatten();
            let bytes = lost.map_or_else(|| "what".to_owned(), |loss| format!("{} that", units::bytes(loss.bytes)));
            let since = record.failover.as_ref().map(|failover| failover.since.to_string()).unwrap_or_default();
            Some(format!("lost: {bytes} {name} has written since {since}"))
        }
        _ => None,
    })
}
