//! `session`: changes a running recovery.

use clap::Subcommand;

use crate::{cli::DryRun, context::Context, fail::Result};

/// Options of `session`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to change
    #[command(subcommand)]
    pub change: Change,
}

/// Changes to a running recovery.
#[derive(Debug, Subcommand)]
pub enum Change {
    /// Set the rate of the background copy or when it shall be done
    Set {
        /// The session
        session: String,
        /// Limit of the background copy, like 200MiB/s; none lifts it
        #[arg(long, value_name = "RATE")]
        rate: Option<String>,
        /// When the machine shall be independent, like 02:00 or an RFC 3339 time
        #[arg(long, value_name = "TIME", conflicts_with = "rate")]
        ready_by: Option<String>,
        /// Whether only to look.
        #[command(flatten)]
        dry: DryRun,
    },
    /// Hold the background copy; the guest goes on
    Pause {
        /// The session
        session: String,
        /// Whether only to look.
        #[command(flatten)]
        dry: DryRun,
    },
    /// Go on with the background copy
    Resume {
        /// The session
        session: String,
        /// Whether only to look.
        #[command(flatten)]
        dry: DryRun,
    },
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("session"))
}
