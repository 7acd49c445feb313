//! `doctor`: what this machine needs.

use crate::{context::Context, fail::Result};

/// Options of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Check only; print nothing that passes
    #[arg(long)]
    pub brief: bool,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("doctor"))
}
