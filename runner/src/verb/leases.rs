//! `leases`: who reads or writes the repository.

use crate::{context::Context, fail::Result};

/// Options of `leases`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also show leases whose holder has gone
    #[arg(long)]
    pub all: bool,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("leases"))
}
