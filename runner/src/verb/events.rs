//! `events`: what happened to sessions.

use crate::{context::Context, fail::Result};

/// Options of `events`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this session
    #[arg(value_name = "SESSION")]
    pub session: Option<String>,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("events"))
}
