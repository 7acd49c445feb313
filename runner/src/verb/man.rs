//! `man`: the manual pages, generated from the command line's own tree.

use std::{fs, path::PathBuf};

use clap::Command;

use crate::{
    cli::{self, DryRun},
    context::Context,
    fail::{Code, Fail, Result},
};

/// Options of `man`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The verb; without one, the page of aquifer itself
    pub verb: Option<String>,
    /// Write all pages into this folder instead
    #[arg(long, value_name = "DIR", conflicts_with = "verb")]
    pub out: Option<PathBuf>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let mut command = cli::command();
    command.build();
    if let Some(folder) = &args.out {
        if !args.dry.dry_run {
            fs::create_dir_all(folder).map_err(|e| Fail::io(folder.display(), "create", &e))?;
        }
        for (name, page) in pages(&command)? {
            let path = folder.join(format!("{name}.1"));
            if !args.dry.dry_run {
                fs::write(&path, page).map_err(|e| Fail::io(path.display(), "write", &e))?;
            }
            context.out.line(path.display());
            let kind = if args.dry.dry_run { "plan" } else { "page" };
            context.out.record(kind, &serde_json::json!({ "path": path.display().to_string() }));
        }
        return Ok(());
    }
    let name = args.verb.as_ref().map_or("aquifer".to_owned(), |verb| format!("aquifer-{verb}"));
    let found = pages(&command)?.into_iter().find(|(page, _)| *page == name);
    let (_, page) = found.ok_or_else(|| Fail::new(Code::NotFound, format!("there is no page {name}")))?;
    context.out.text("page", &String::from_utf8_lossy(&page));
    Ok(())
}

/// Every page: the program's own and one per verb.
pub(crate) fn pages(command: &Command) -> Result<Vec<(String, Vec<u8>)>> {
    let mut pages = Vec::new();
    render(command, "aquifer".into(), &mut pages)?;
    for verb in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        render(verb, format!("aquifer-{}", verb.get_name()), &mut pages)?;
    }
    Ok(pages)
}

fn render(command: &Command, name: String, pages: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone().name(name.clone())).date("").manual("Aquifer");
    man.render(&mut page).map_err(|e| Fail::io(&name, "render", &e))?;
    pages.push((name, page));
    Ok(())
}
