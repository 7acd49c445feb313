//! `status`: recoveries and mounts, and how far they are.

use crate::{context::Context, fail::Result};

/// Options of `status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this session
    #[arg(value_name = "SESSION")]
    pub session: Option<String>,
    /// Go on showing until interrupted
    #[arg(long)]
    pub watch: bool,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("status"))
}
