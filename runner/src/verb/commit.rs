//! `commit`: makes the way home final.

use super::ops::{self, Manner, Options, Wanted, Why};
use crate::{
    cli::{Confirm, DryRun},
    context::Context,
    fail::Result,
    failback::is_tried,
    operate::{Act, RunOfJob},
    replica::{
        model::HomeKind,
        state::{Op, State},
    },
};

/// Options of `commit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Replicas, or plan/NAME
    #[arg(value_name = "REPLICA", required = true)]
    pub targets: Vec<String>,
    /// Also while production is off
    #[arg(long)]
    pub force: bool,
    /// Why.
    #[command(flatten)]
    pub why: Why,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let options = Options::default().flag("--force", args.force);
    let manner =
        Manner { dry: &args.dry, confirm: Some(&args.confirm), run: RunOfJob::Ends, ops: &[Op::Commit], options };
    ops::carry_out(context, &args.targets, &manner, |_, record| {
        if let Some(failback) = record.failback.as_ref().filter(|failback| failback.home.kind != HomeKind::Original) {
            let home = &failback.home;
            context.out.say(format_args!(
                "jobs follow {} where the site file says so: machine.{}.from = \"{}:{}\"",
                record.machine, record.machine, home.host, home.machine
            ));
        }
        if let Some(failback) = record.failback.as_ref().filter(|_| !args.force && record.state == State::Failback) {
            is_tried(&failback.home, ops::runs(context, &failback.home.folder)?)?;
        }
        let loss = format!(
            "lost: the way back to {}: from then on undo is not possible, and its writes during the takeover are one of its restore points",
            record.name
        );
        Ok(Wanted {
            ask: args.why.ask(&record.name, Act::Commit { force: args.force }),
            loss: Some(loss),
            notes: Vec::new(),
        })
    })
}
