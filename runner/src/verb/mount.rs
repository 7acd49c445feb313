//! `mount`: serves the disks of a source.

use crate::{cli::DryRun, context::Context, fail::Result};
use std::path::PathBuf;

/// Options of `mount`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to serve
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Only this disk; may be given several times
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,
    /// Serve over NBD at unix:PATH, tcp:HOST:PORT or an NBD URI [default: a private unix socket]
    #[arg(long, value_name = "ADDR")]
    pub nbd: Option<String>,
    /// Show the disks as files in this folder
    #[arg(long, value_name = "DIR")]
    pub fuse: Option<PathBuf>,
    /// Attach the disks as loop devices
    #[arg(long = "loop")]
    pub loop_device: bool,
    /// Take writes into an overlay; the source is never written
    #[arg(long)]
    pub writable: bool,
    /// Keep that overlay in this folder, and go on from what it holds
    #[arg(long, value_name = "DIR", requires = "writable")]
    pub overlay: Option<PathBuf>,
    /// Serve only while this shell command runs; it finds the address in $uri
    #[arg(long, value_name = "CMD", conflicts_with = "detach")]
    pub run: Option<String>,
    /// Return once the door answers, and go on serving in the background
    #[arg(long)]
    pub detach: bool,
    /// Certificate chain of the server (PEM), for TLS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the server (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Only clients with a certificate of this authority (PEM) may connect
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Serve on the network without TLS
    #[arg(long, conflicts_with = "tls_cert")]
    pub no_tls: bool,
    /// Also follow backing files that lie in this folder
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(_context: &Context, _args: &Args) -> Result<()> {
    Err(super::not_in_this_build("mount"))
}
