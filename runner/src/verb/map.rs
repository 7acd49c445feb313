//! `map`: which ranges of a disk hold data.

use crate::{context::Context, fail::Result};

/// Options of `map`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to look at
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Which disk
    #[arg(long, value_name = "NAME")]
    pub disk: Option<String>,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("map"))
}
