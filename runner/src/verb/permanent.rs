//! `permanent`: makes a takeover final; the replica becomes an ordinary machine.

use super::ops::{self, Manner, Options, Wanted, Why};
use crate::{
    cli::{Confirm, DryRun},
    context::Context,
    fail::Result,
    operate::{Act, RunOfJob},
    replica::state::Op,
    units,
};

/// Options of `permanent`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Replicas, or plan/NAME
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
    let options = Options::default();
    let manner =
        Manner { dry: &args.dry, confirm: Some(&args.confirm), run: RunOfJob::Ends, ops: &[Op::Permanent], options };
    ops::carry_out(context, &args.targets, &manner, |catalogue, record| {
        let points = catalogue.points_of::<serde_json::Value>(&record.name)?.len();
        let loss = format!(
            "lost: {} of {}; its disks become single images, and its job leaves {} out from then on",
            units::count(points, "restore point"),
            record.name,
            record.machine
        );
        Ok(Wanted { ask: args.why.ask(&record.name, Act::Permanent), loss: Some(loss), notes: Vec::new() })
    })
}
