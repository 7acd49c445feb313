//! `info`: what a source holds.

use crate::{context::Context, fail::Result};

/// Options of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to look at
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Only this disk
    #[arg(long, value_name = "NAME")]
    pub disk: Option<String>,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("info"))
}
