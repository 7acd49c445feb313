//! `points`: machines and their restore points.

use crate::{context::Context, fail::Result};

/// Options of `points`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this machine or point
    #[arg(value_name = "SOURCE")]
    pub source: Option<String>,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("points"))
}
