//! `completions`: what a shell needs to complete verbs and options.

use clap_complete::{Shell, generate};

use crate::{cli, context::Context, fail::Result};

/// Options of `completions`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    pub shell: Shell,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let mut text = Vec::new();
    generate(args.shell, &mut cli::command(), "aquifer", &mut text);
    context.out.text("completions", &String::from_utf8_lossy(&text));
    Ok(())
}
