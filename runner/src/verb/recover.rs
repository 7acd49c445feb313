//! `recover`: runs a machine straight from a source.

use std::path::PathBuf;

use super::NamedSource;
use crate::{cli::DryRun, context::Context, fail::Result};

/// Options of `recover`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to run
    #[arg(value_name = "SOURCE", required_unless_present = "disk")]
    pub source: Option<String>,
    /// A disk and where its content comes from; may be given several times
    #[arg(long, value_name = "NAME=SOURCE", conflicts_with = "source")]
    pub disk: Vec<NamedSource>,
    /// The machine's description: TOML or libvirt domain XML
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// Folder of the recovery; the machine's disks end here
    #[arg(long, value_name = "DIR")]
    pub into: PathBuf,
    /// Where the machine runs
    #[arg(long, value_name = "HOST", default_value = "qemu")]
    pub host: String,
    /// Leave the disks where they are; fetch only what the guest reads
    #[arg(long)]
    pub no_hydrate: bool,
    /// Limit of the background copy, like 200MiB/s
    #[arg(long, value_name = "RATE")]
    pub rate: Option<String>,
    /// When the machine shall be independent, like 02:00 or an RFC 3339 time
    #[arg(long, value_name = "TIME", conflicts_with = "rate")]
    pub ready_by: Option<String>,
    /// Also follow backing files that lie in this folder
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("recover"))
}
