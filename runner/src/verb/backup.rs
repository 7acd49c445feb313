//! `backup`: stores a restore point of a machine.

use std::path::PathBuf;

use super::NamedSource;
use crate::{cli::DryRun, context::Context, fail::Result};

/// Options of `backup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the machine
    #[arg(value_name = "MACHINE")]
    pub machine: String,
    /// A disk and where its content is read; may be given several times
    #[arg(long, value_name = "NAME=SOURCE", required = true)]
    pub disk: Vec<NamedSource>,
    /// The machine's description: TOML or libvirt domain XML
    #[arg(long = "machine", value_name = "FILE")]
    pub description: Option<PathBuf>,
    /// Store everything, standing on no earlier point
    #[arg(long)]
    pub full: bool,
    /// Read only what this bitmap of the source says has changed since the last point
    #[arg(long, value_name = "NAME", conflicts_with = "full")]
    pub bitmap: Option<String>,
    /// Also follow backing files that lie in this folder
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("backup"))
}
