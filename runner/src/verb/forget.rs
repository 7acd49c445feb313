//! `forget`: deletes restore points.

use crate::{
    cli::{Confirm, DryRun},
    context::Context,
    fail::Result,
};

/// Options of `forget`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The points, as MACHINE@POINT; may be several
    #[arg(value_name = "MACHINE@POINT", required = true)]
    pub points: Vec<String>,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("forget"))
}
