//! `init`: makes a repository.

use crate::{cli::DryRun, context::Context, fail::Result};

/// Options of `init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("init"))
}
