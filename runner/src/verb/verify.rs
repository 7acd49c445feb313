//! `verify`: reads everything a source stands on and checks every checksum.

use crate::{context::Context, fail::Result};

/// Options of `verify`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to check; without one, the whole repository
    #[arg(value_name = "SOURCE")]
    pub source: Option<String>,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("verify"))
}
