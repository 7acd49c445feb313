//! `bench`: measures a disk behind any path or NBD URI.

use crate::{cli::DryRun, context::Context, fail::Result};

/// Options of `bench`.
#[derive(Debug, clap::Args)]
#[command(allow_missing_positional = true)]
pub struct Args {
    /// What to measure
    #[arg(value_name = "WORK")]
    pub work: Option<String>,
    /// Path or NBD URI
    #[arg(value_name = "TARGET")]
    pub target: String,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("bench"))
}
