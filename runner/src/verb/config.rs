//! `config`: checks or shows the site file.

use clap::Subcommand;

use crate::{context::Context, fail::Result};

/// Options of `config`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do with it
    #[command(subcommand)]
    pub action: Action,
}

/// What to do with the site file.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Read it and say everything that is wrong
    Check,
    /// Show it as understood, and where each value came from
    Show,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("config"))
}
