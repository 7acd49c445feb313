//! `door`: the processes of a recovery, started by `recover` and `session resume`. Not meant for people.

use std::path::PathBuf;

use aquifer_mount::session::Folder;

use crate::{context::Context, fail::Result, recover::door};

/// Options of `door`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the session
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Serve, instead of starting and watching the process that does
    #[arg(long)]
    pub serve: bool,
    /// Process that starts this one again
    #[arg(long, value_name = "PID", requires = "serve")]
    pub supervisor: Option<u32>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let folder = Folder::open(&args.dir)?;
    if args.serve { door::run_door(context, &folder, args.supervisor) } else { door::run_supervisor(context, &folder) }
}
