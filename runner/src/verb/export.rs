//! `export`: copies a disk out to a file.

use crate::{cli::DryRun, context::Context, fail::Result};
use std::path::PathBuf;

/// Options of `export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to copy
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// The new file; .raw or .qcow2 says its format
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// Which disk
    #[arg(long, value_name = "NAME")]
    pub disk: Option<String>,
    /// Also follow backing files that lie in this folder
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("export"))
}
