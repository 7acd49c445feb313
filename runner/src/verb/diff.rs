//! `diff`: what differs between two points, from metadata.

use crate::{context::Context, fail::Result};

/// Options of `diff`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The older one
    #[arg(value_name = "A")]
    pub a: String,
    /// The newer one
    #[arg(value_name = "B")]
    pub b: String,
    /// Which disk
    #[arg(long, value_name = "NAME")]
    pub disk: Option<String>,
    /// Exit with 5 where they differ
    #[arg(long)]
    pub exit_code: bool,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("diff"))
}
