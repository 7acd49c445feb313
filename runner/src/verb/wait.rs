//! `wait`: until a recovery has reached a state.

use crate::{context::Context, fail::Result};

/// Options of `wait`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The session
    #[arg(value_name = "SESSION")]
    pub session: String,
    /// What to wait for: running or local
    #[arg(long = "for", value_name = "STATE", default_value = "local")]
    pub state: String,
    /// How long at most, like 10m; exit code 13 when it passes
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<String>,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("wait"))
}
