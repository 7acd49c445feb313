//! `permanent`: makes a takeover final; the replica becomes an ordinary machine.

use super::ops::{self, Manner, Wanted, Why};
use crate::{
    cli::{Confirm, DryRun},
    context::Context,
    fail::Result,
    operate::Act,
    replica::state::Op,
};

/// Options of `permanent`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The replicas
    #[arg(value_name = "REPLICA", required = true)]
    pub targets: Vec<String>,
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
    let manner = Manner { dry: &args.dry, confirm: Some(&args.confirm), cancel_job: false, ops: &[Op::Permanent] };
    ops::carry_out(context, &args.targets, &manner, |catalogue, record| {
        let points = catalogue.points_of::<serde_json::Value>(&record.name)?.len();
        let loss = format!(
            "{} restore points of {}; its disks become single images, and its job leaves {} out from then on",
            points, record.name, record.machine
        );
        Ok(Wanted { ask: args.why.ask(&record.name, Act::Permanent), loss: Some(loss) })
    })
}
