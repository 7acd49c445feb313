//! `finalize`: ends a recovery.

use crate::{
    cli::{Confirm, DryRun},
    context::Context,
    fail::Result,
};

/// Options of `finalize`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The session
    #[arg(value_name = "SESSION")]
    pub session: String,
    /// Keep the machine: its local disk becomes its only one
    #[arg(long, alias = "migrate", required_unless_present = "discard", conflicts_with = "discard")]
    pub keep: bool,
    /// Stop the machine and delete everything it wrote
    #[arg(long)]
    pub discard: bool,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("finalize"))
}
