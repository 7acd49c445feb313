//! `config`: checks or shows the site file.

use clap::Subcommand;
use serde::Serialize;

use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    site::Site,
};

/// Options of `config`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do with it
    #[command(subcommand)]
    pub action: Action,
}

/// What to do with the site file.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Read it and say everything that is wrong
    Check,
    /// Show what applies, and where each value came from
    Show,
}

#[derive(Serialize)]
struct Setting {
    key: String,
    value: Option<String>,
    origin: &'static str,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    match args.action {
        Action::Check => check(context),
        Action::Show => show(context),
    }
}

fn check(context: &Context) -> Result<()> {
    let missing = || Fail::new(Code::NotFound, "there is no site file").help("aquifer -c SITE.toml config check");
    let path = context.config_path().ok_or_else(missing)?;
    let site = Site::read(&path)?;
    let repositories = site.repositories.len();
    context.out.record("site", &serde_json::json!({ "path": path, "repositories": repositories }));
    context.out.line(format_args!("{}: valid, repositories: {repositories}", path.display()));
    Ok(())
}

fn show(context: &Context) -> Result<()> {
    for (key, value, origin) in context.settings()? {
        let shown = value.as_deref().unwrap_or("-").to_owned();
        context.out.line(format_args!("{key:<22} {shown:<40} {origin}"));
        context.out.record("setting", &Setting { key, value, origin });
    }
    Ok(())
}
